"""Bad input: one line that says where and what to type, exit code 2, nothing started, nothing
spoilt.
"""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import assert_refused, remarks, tiny_recipe

from flowray.cli import doctor, eval, report, sample, train
from flowray.cli.common import entry
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe
from flowray.doctor.subject import open_subject
from flowray.sample.restore import open_run
from flowray.store.found import find_checkpoint
from flowray.store.run import RunDirectory, RunLock
from flowray.train.group import Group
from flowray.train.loop import train as train_loop

EARLY = """
import json
import sys
from flowray.cli.main import main
for argv in json.loads(sys.argv[1]):
    sys.argv = ["flowray", *argv]
    try:
        main()
    except SystemExit as stop:
        print(stop.code, sorted({"torch", "ray", "transformers"} & set(sys.modules)), argv)
"""

HOLD = """
import sys, time
from pathlib import Path
from flowray.store.run import RunDirectory, RunLock
with RunLock(RunDirectory(Path(sys.argv[1]))):
    print("held")
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with tiny.yaml and a finished run of it, `runs/tiny`."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = tiny_recipe(folder, **{"train.steps": 2})
    (folder / "tiny.yaml").write_text(dump_recipe(recipe))
    train_loop(
        recipe, RunDirectory(folder / "runs" / "tiny"), Group.current("cpu"), lambda row: None
    )
    (folder / "empty").mkdir()
    (folder / "file").write_text("not a folder")
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    (folder / "blank.txt").write_text("\n  \n")
    (folder / "latin.txt").write_bytes("a red circle\nein gr\xfcner Kreis\n".encode("latin-1"))
    (folder / "nul.txt").write_bytes(b"a red\0circle\n")
    return folder


def line_of(main, argv: list[str]) -> str:
    """The one line that a command says on stderr before it exits with 2."""
    stderr = io.StringIO()
    with redirect_stderr(stderr), pytest.raises(SystemExit) as stop:
        entry(main, argv)
    lines = remarks(stderr.getvalue())
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["quikstart"], "did you mean quickstart?"),
        (["nosuch.yaml"], "nosuch.yaml"),
        (["/dev/null"], "a device"),
        (["tiny.yaml", "name=new", "model.text.path=/dev/null"], "a device"),
        (["tiny.yaml", "loss.kl.wieght=1"], "did you mean loss.kl.weight?"),
        (["tiny.yaml", "learning_rate=1"], "optim.lr"),
        (["tiny.yaml", "optim.lr=fast"], "optim.lr"),
        (["tiny.yaml", "name=new", "data.shards=nowhere"], "no such folder"),
        (["quickstart", "data.shards=shapes_close"], "did you mean shapes_closed"),
        (["tiny.yaml", "name=new", "data.shards=empty"], "the folder holds no .tar file"),
        (["tiny.yaml", "name=new", "data.val_shards=empty"], "the folder holds no .tar file"),
        (["tiny.yaml", "name=new", "storage_path=file"], "storage_path: "),
        (["tiny.yaml", "name=new", "data.cache=file/cache"], "data.cache"),
        (["tiny.yaml", "--resmue"], "unrecognized arguments: --resmue"),
        (["tiny.yaml"], "type --resume to continue it, or name=OTHER"),
        (["./quickstart"], "./quickstart: no such file; type quickstart"),
        (["recipes/quickstart.yaml"], "recipes/quickstart.yaml: no such file; type quickstart"),
    ],
)
def test_train(place, monkeypatch, argv, says):
    monkeypatch.chdir(place)
    assert says in line_of(train.main, argv)
    config = place / "runs" / "tiny" / "config.yaml"
    assert "name: tiny" in config.read_text()


def test_a_run_in_use_is_not_touched(place, monkeypatch):
    monkeypatch.chdir(place)
    run = RunDirectory(place / "runs" / "busy")
    run.create()
    owner = subprocess.Popen([sys.executable, "-uc", HOLD, str(run.path)], stdout=subprocess.PIPE)
    try:
        owner.stdout.readline()
        assert "in use by process" in line_of(train.main, ["tiny.yaml", "name=busy"])
        assert not run.config.exists()
    finally:
        owner.kill()
        owner.wait()
    RunLock(run).refuse_if_held()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["runs/tiny", "--prompts", "picture.png"], "picture.png:1: not UTF-8 text"),
        (["runs/tiny", "--prompts", "latin.txt"], "latin.txt:2: not UTF-8 text"),
        (["runs/tiny", "--prompts", "nul.txt"], "nul.txt: a binary file"),
        (["runs/tiny", "--prompts", "blank.txt"], "blank.txt: no captions in it"),
        (["runs/tiny", "--prompts", "none.txt"], "none.txt: cannot be read"),
        (["runs/tiny", "--prompts", "empty"], "empty: cannot be read"),
        (["runs/tiny"], "no prompt; type one in quotes"),
        (["runs/tiny", " "], "prompt 1 of 1: is empty"),
        (["runs/tiny", "a red circle", ""], "prompt 2 of 2: is empty"),
        (["runs/tiny", "a", " ", "--prompts", "latin.txt"], "latin.txt:2"),
        (["runs/tiny", "a red circle", "--out", "empty"], "--out empty: is a folder"),
        (
            ["runs/tiny", "a red circle", "--out", "file/a.png"],
            "--out file/a.png: cannot be written",
        ),
        (
            ["runs/tiny", "a red circle", "--out", "file/new/a.png"],
            "--out file/new/a.png: cannot be written",
        ),
        (
            ["runs/tiny", "a red circle", "--out", "/proc/new/a.png"],
            "--out /proc/new/a.png: cannot be written",
        ),
        (["runs/none", "a red circle"], "runs/none: no such folder"),
        (["empty", "a red circle"], "empty: no valid checkpoint in it yet"),
        (["runs/tiny", "a red circle", "--set", "sample.stpes=3"], "did you mean sample.steps?"),
        *(
            (["runs/tiny", "a red circle", option, text], f"{option}: got {text}")
            for option in ("--count", "--scale", "--seed")
            for text in ("-1", "0", "nan", "inf", "1e9", "1000000000")
            if option != "--seed" or text not in ("0", "1000000000")
        ),
        *(
            (["runs/tiny", "a", "b", "--between", text], f"--between: got {text}, want a whole")
            for text in ("-1", "0", "1", "1025", "x")
        ),
        (["runs/tiny", "a red circle", "--between", "7"], "--between 7: got 1 caption"),
        (
            ["runs/tiny", *"ab", "--between", "1024", "--count", "17"],
            "--count 17: 17 rows of 1,024 make a sheet of 17,408 pictures, want at most 16,384",
        ),
        (["runs/tiny", *"abcdefghijklmnopq", "--count", "1024"], "17 rows of 1,024 make a sheet"),
        (["runs/tiny", *"abc", "--between", "1024"], "--between 1024: 3 captions make a row of"),
        *(
            (["runs/tiny", "a red circle", "--set", f"sample.{key}={text}"], f"sample.{key}: got")
            for key in ("steps", "guidance_scale")
            for text in ("-1", "nan", "inf")
        ),
    ],
)
def test_sample(place, monkeypatch, argv, says):
    monkeypatch.chdir(place)
    assert says in line_of(sample.main, argv)


def test_eval(place, monkeypatch):
    monkeypatch.chdir(place)
    assert "runs/none: no such folder" in line_of(eval.main, ["runs/none"])
    absent = ["runs/tiny", "--set", "model.text.path=org/absent"]
    assert "model.text.path" in line_of(eval.main, absent)
    wanted = "--captions: want at most"  # before it loads a model
    assert wanted in line_of(eval.main, [*absent, "--captions", "999"])


def test_what_needs_no_model_is_refused_before_torch_is_imported(place, tmp_path):
    """Folders, places to write, keys, trials. One process for all."""
    (tmp_path / "s.yaml").write_text(
        "name: s\nbase: sweep_proxy\nmetric: {name: ema/shoot/nmse}\nparameters:\n  optim.lr:"
        " {values: [1e-3]}\n"
    )
    refused = [
        *(
            [command, where, *more]
            for command, more in (("sample", ["a"]), ("eval", []), ("doctor", []))
            for where in ("runs/none", "empty")
        ),
        *(
            [command, "runs/tiny", *more, "--out", "nowhere/a/x"]
            for command, more in (("eval", []), ("doctor", []))
        ),
        *(
            [command, "runs/tiny", *more, "--out", "empty"]
            for command, more in (("sample", ["a"]), ("eval", []), ("doctor", []))
        ),
        ["sample", "runs/tiny", "a", "--out", "/proc/new/a.png"],
        ["doctor", "runs/tiny", "--out", "/proc/a.html"],
        ["sample", "runs/tiny", "a", "--set", "sample.stpes=3"],
        ["sample", "runs/tiny", "a", "--between", "7"],
        ["eval", "runs/tiny", "--captions", "1"],
        ["doctor", "runs/tiny", "--batch", "7"],
        ["doctor", "overfit", "tiny.yaml", "--samples", "0"],
        ["doctor", "ablations", "tiny.yaml", "--dir", "file"],
        ["train", "tiny.yaml"],
        ["train_autoencoder", "empty", "--out", "new"],
        ["train_autoencoder", "empty", "--out", "runs"],
        ["tune", str(tmp_path / "s.yaml"), "--finish", "99", f"storage_path={tmp_path}"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", EARLY, json.dumps(refused)],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == [f"2 [] {argv}" for argv in refused], done.stderr
    assert len(remarks(done.stderr)) == len(refused)


def test_a_prompt_that_is_cut_is_told_in_one_line(place):
    argv = ["sample", "runs/tiny", "a small red circle " * 60, "--out", "cut.png"]
    done = subprocess.run(
        [sys.executable, "-m", "flowray", *argv],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    (line,) = remarks(done.stderr)
    assert line.startswith("warning: model.text.max_tokens: ")
    assert str(place) not in line


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda text: text[: text.index("\n  velocity:")], "config.yaml: has no flow"),
        (lambda text: text[: text.index("\nsample:")], "config.yaml: has no sample"),
        (lambda text: text.replace("model:", "model: ["), "config.yaml:"),
        (lambda text: text.replace("\nseed:", "\nsede:"), "did you mean seed?"),
        (lambda text: "", "config.yaml: is empty"),
    ],
    ids=["cut in the model", "cut later", "no YAML", "unknown key", "empty"],
)
def test_a_broken_config_of_a_run_is_blamed_itself(place, tmp_path, spoil, says):
    run = tmp_path / "tiny"
    shutil.copytree(place / "runs" / "tiny", run)
    config = run / "config.yaml"
    config.write_text(spoil(config.read_text()))
    for main, more in (
        (sample.main, ["a red circle"]),
        (eval.main, []),
        (doctor.main, []),
        (report.main, []),
    ):
        line = line_of(main, [str(run), *more])
        assert line.startswith(f"error: {config}"), line
        assert says in line
    assert not (run / "report.html").exists()


def test_weights_that_do_not_fit_are_blamed_on_what_was_typed_or_on_the_config(place, tmp_path):
    """The checkpoint is whole: what differs is what it is read with."""
    cpu, run = torch.device("cpu"), tmp_path / "tiny"
    shutil.copytree(place / "runs" / "tiny", run)
    for key in ("model.velocity.depth=3", "model.velocity.width=32", "model.head.kind=pooled"):
        found = find_checkpoint(run, [key, "sample.steps=3"])
        assert_refused(
            lambda found=found: open_run(found, cpu),
            InputError,
            f"^command line: {key}: .*/tiny was trained with",
        )
    found = find_checkpoint(run, ["loss.clip.weight=1"])
    assert open_run(found, cpu).step == 2  # pictures need none of its weights
    assert_refused(lambda: open_subject(found), InputError, "^command line: loss.clip.weight=1")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("depth: 2", "depth: 3"))
    assert_refused(lambda: open_run(find_checkpoint(run), cpu), InputError, f"^{config}: ")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "tiny.yaml", "train.stpes=3"], "did you mean train.steps?"),
        (["sample", "runs/tiny", "--prompts", "picture.png"], "picture.png:1: not UTF-8 text"),
        (
            ["sample", "runs/tiny", "a", "--set", "model.head.kind=pooled"],
            "command line: model.head.kind=pooled",
        ),
        (["eval", "runs/tiny", "--attribute", "style"], "no field 'style' in its JSON"),
    ],
)
def test_the_commands_as_users_start_them(place, argv, says):
    done = subprocess.run(
        [sys.executable, "-m", f"flowray.{argv[0]}", *argv[1:]],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(remarks(done.stderr)) == 1, done.stderr
    assert remarks(done.stderr)[0].startswith("error: ")
    assert says in done.stderr
