"""Ctrl-C and other signals: one line and the exit code of the signal, or 75 with a checkpoint;
nothing is left half written.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from ray_nodes import offspring
from support import own_pictures, remarks, tiny_recipe

from flowray.cli.train import _StopSignals
from flowray.config.load import dump_recipe
from flowray.data.make import ShapesSet, write_set
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.run import RunDirectory
from flowray.tune.ledger import Ledger

SWEEP = """
storage_path: runs
base: tiny.yaml
method: random
metric: {name: ema/shoot/nmse}
parameters: {optim.lr: {distribution: uniform, min: 1.0e-4, max: 1.0e-3}}
run_cap: 2
"""


def to_all(process: subprocess.Popen) -> None:
    """SIGTERM to it and to all that it has started in its group, twice, as `timeout` does;
    schedulers and terminals are alike.
    """
    process.terminate()
    os.killpg(process.pid, signal.SIGTERM)


def to_it(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def heard():
    """Signals as a terminal leaves them: under nohup, or behind `&`, commands would inherit that
    some are ignored.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml, a recipe that would train for minutes, and sweep.yaml."""
    folder = tmp_path_factory.mktemp("cc")
    recipe = tiny_recipe(folder, **{"train.steps": 20_000, "train.log_every": 1})
    (folder / "tiny.yaml").write_text(dump_recipe(recipe))
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


def interrupt(
    place: Path,
    said: str,
    *argv: str,
    times: int = 1,
    send: Callable[[subprocess.Popen], None] = to_it,
) -> tuple[int, list[str]]:
    """(exit code, remarks) of a command that gets Ctrl-C, or what `send` sends, where a line has
    `said`; nothing that it started is left.
    """
    environment = {**os.environ, "FLOWRAY_CACHE": str(place / "cache"), "FLOWRAY_TEST": str(place)}
    command = [sys.executable, "-m", "flowray", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        command, cwd=place, env=environment, start_new_session=True, **pipes
    ) as process:
        try:
            wanted = (said, *["stopping"] * (times - 1))
            for words in wanted:
                while words not in (line := process.stderr.readline()):
                    assert line, f"ended before it said {words}"
                send(process)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (out == "") == (process.returncode in (129, 130, 143))
    deadline = time.monotonic() + 20
    while left := offspring(f"FLOWRAY_TEST={place}"):
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/comm").read_text() for pid in left]
        time.sleep(0.1)
    return process.returncode, remarks(err)


@pytest.mark.parametrize(
    ("send", "ended"), [(to_it, (130, ["interrupted"])), (to_all, (143, ["terminated"]))]
)
def test_while_importing(place: Path, send, ended) -> None:
    argv = ("doctor", "overfit", "tiny.yaml", "--steps", "20000")
    assert interrupt(place, "importing", *argv, send=send) == ended


def test_while_a_health_check_trains(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    argv = ("doctor", "overfit", "tiny.yaml", "--steps", "20000")
    assert interrupt(place, "training ", *argv) == (130, ["interrupted"])
    assert list(tmp_path.glob("flowray-health-*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("make", "shapes", "--samples", "100000", "--out", "out"), "making train"),
        (("pack", "own", "out/shards", "--size", "4096", "--min-size", "1"), "packing all"),
    ],
)
def test_while_data_are_written(
    tmp_path: Path, argv: tuple[str, ...], said: str, number: int
) -> None:
    own_pictures(tmp_path / "own")
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    send = partial(subprocess.Popen.send_signal, sig=number)
    assert interrupt(tmp_path, said, "data", *argv, send=send) == (128 + number, [word])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_in_a_destructor_where_python_drops_what_is_raised(number: int) -> None:
    script = (
        "import sys, time\n"
        "from flowray.cli.common import entry\n"
        "class Slow:\n"
        "    def __del__(self):\n"
        "        print('here', file=sys.stderr, flush=True)\n"
        "        time.sleep(0.5)\n"
        "def main(argv):\n"
        "    Slow()\n"
        "    time.sleep(30)\n"
        "    return 0\n"
        "entry(main, [])\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "here\n"
        process.send_signal(number)
        said = process.stderr.read()
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert (process.returncode, said) == (128 + number, f"{word}\n")


@pytest.mark.parametrize("send", [to_it, to_all])
def test_while_latents_are_encoded(tmp_path: Path, send) -> None:
    """Pictures are there already; of their latents whole shards stay, and nothing hidden."""
    shards = tmp_path / "shards"
    write_set(ShapesSet(train=3000, val=20, unseen=20), shards)
    own = ("quickstart", f"data.shards={shards / 'train'}", f"data.val_shards={shards / 'val'}")
    code, said = interrupt(tmp_path, "encoding train", "data", "encode", *own, send=send)
    assert (code, said) in ((130, ["interrupted"]), (143, ["terminated"]))
    shards = [file for file in (tmp_path / "cache").glob("latents-*/**/*") if file.is_file()]
    assert {file.with_suffix(".tar") for file in shards} == set((tmp_path / "cache").rglob("*.tar"))
    assert not [file for file in shards if file.name.startswith(".")]


def test_nohup_holds(tmp_path: Path) -> None:
    """A hang-up that was ignored before the command began stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        argv = ("data", "make", "shapes", "--samples", "200", "--out", "out")
        hang_up = partial(subprocess.Popen.send_signal, sig=signal.SIGHUP)
        code, _ = interrupt(tmp_path, "making train", *argv, send=hang_up)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 0


def test_a_start_that_is_ended_leaves_no_run(place: Path) -> None:
    argv = ("train", "tiny.yaml", "name=none", "--json")
    code, said = interrupt(place, "starting Ray", *argv, send=to_all)
    # Python tells of a signal that comes while it forks, in a callback of a library
    assert (code, said[-1]) == (143, "terminated")
    assert not (place / "runs" / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "ended"), [(to_it, (130, ["interrupted"])), (to_all, (143, ["terminated"]))]
)
def test_so_does_one_whose_workers_are_starting(place: Path, send, ended) -> None:
    assert (
        interrupt(place, "training 0", "train", "tiny.yaml", "name=none", "--json", send=send)
        == ended
    )
    assert not (place / "runs" / "none").exists()


@pytest.mark.slow
def test_a_sweep_that_is_ended_goes_on_with_the_next_start(place: Path) -> None:
    argv = ("tune", "sweep.yaml", "name=ended", "--json")
    assert interrupt(place, "starting Ray", *argv, send=to_all) == (143, ["terminated"])
    assert interrupt(place, "trial 0", *argv, send=to_all)[0] == 75
    kept = Ledger(place / "runs" / "ended" / "trials.jsonl").trials
    assert {trial.status for trial in kept.values()} <= {"running", "waiting"}


@pytest.mark.slow
@pytest.mark.parametrize("send", [to_it, to_all])
def test_a_run_leaves_a_checkpoint(place: Path, send) -> None:
    """A second start that is ended while it starts leaves the first one's."""
    name = send.__name__
    argv = ("train", "tiny.yaml", f"name={name}", "--json")
    assert interrupt(place, "probe 4", *argv, send=send) == (75, [])
    left = newest_checkpoint(place / "runs" / name / "checkpoints")
    assert left is not None
    assert interrupt(place, "starting Ray", *argv, "--resume", send=send)[0] in (130, 143)
    assert newest_checkpoint(place / "runs" / name / "checkpoints") == left


@pytest.mark.slow
def test_twice_ends_without_waiting(place: Path) -> None:
    argv = ("train", "tiny.yaml", "name=twice", "train.log_every=10000", "train.grad_every=0")
    assert interrupt(place, "probe 4", *argv, times=2) == (130, ["interrupted"])


def test_a_second_one_while_the_first_is_being_answered(tmp_path: Path) -> None:
    """Whoever presses Ctrl-C twice at once means the second one too."""
    run, said = RunDirectory(tmp_path), []
    run.create()

    class Impatient:
        def say(self, text: str) -> None:
            said.append(text)
            if len(said) == 1:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), _StopSignals(run, Impatient()):
        signal.raise_signal(signal.SIGINT)
    assert len(said) == 1
    assert run.stop_request.exists()
