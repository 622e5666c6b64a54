"""Help on one screen for every verb; the plan as one JSON object."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest
from support import remarks, tiny_recipe

from benchmarks import __main__ as benchmarks
from flowray.cli import main, train
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, load_recipe
from flowray.data.check import check_shards
from flowray.model.assemble import build_model
from flowray.model.autoencoder import load_autoencoder

SUBCOMMANDS = (
    *("doctor overfit", "doctor ablations"),
    "models fetch",
    *(f"data {name}" for name in ("make", "pack", "check", "show", "encode")),
    *(f"cluster {name}" for name in ("check", "head", "join", "stop")),
)
BENCHMARKS = [
    f"benchmarks {name}"
    for name in (
        *("sweep", "record", "answers", "pair", "tune-overhead", "trial-startup"),
        *("data", "train", "step", "sample", "scaling"),
    )
]

LOADED = """
import sys
from flowray.cli.main import main
for verb in sys.argv[1:]:
    sys.argv = ["flowray", *verb.split(), *([] if verb.startswith("--") else ["--help"])]
    try:
        main()
    except SystemExit:
        loaded = sorted({"torch", "ray"} & set(sys.modules))
    if loaded:
        break
print(verb, loaded)
"""


def command_of(verb):
    return benchmarks.main if verb == "benchmarks" else import_module(f"flowray.cli.{verb}").main


def command(*argv):
    env = {**os.environ, "COLUMNS": "100"}
    done = [sys.executable, *argv]
    return subprocess.run(done, capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("command", [*main._VERBS, *SUBCOMMANDS, "benchmarks", *BENCHMARKS])
def test_help_fits_a_screen(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    verb, *more = command.split()
    with pytest.raises(SystemExit) as stop:
        command_of(verb)([*more, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert 5 <= len(lines) <= 40
    assert max(map(len, lines)) <= columns, max(lines, key=len)
    assert lines[0].startswith("usage: ")


@pytest.mark.parametrize("verb", ["models", "data", "cluster", "benchmarks"])
def test_every_subcommand_has_its_help_looked_at(verb):
    with pytest.raises(InputError) as refused:
        command_of(verb)(["nosuch"])
    known = re.findall(r"'([\w-]+)'", str(refused.value).partition("choose from")[2])
    assert known == [
        command.split()[1]
        for command in (*SUBCOMMANDS, *BENCHMARKS)
        if command.startswith(f"{verb} ")
    ]


@pytest.mark.parametrize(
    "command", ["train", "doctor", "sample", "doctor overfit", "data encode", "benchmarks record"]
)
def test_what_may_be_left_out_is_not_said_to_be_missing(command):
    verb, *more = command.split()
    with pytest.raises(InputError, match="required") as refused:
        command_of(verb)(more)
    assert not re.search(r"key=value|prompt", str(refused.value))


def test_flowray_lists_every_verb():
    done = command("-m", "flowray")
    assert done.returncode == 0
    assert all(f"\n  {verb} " in done.stdout for verb in main._VERBS)


def test_no_help_and_no_version_loads_torch_or_ray():
    """One process for all: what one of them loads stays loaded."""
    asked = ["--version", *main._VERBS, *SUBCOMMANDS]
    done = command("-c", LOADED, *asked)
    assert done.stdout.endswith(" []\n"), done.stdout + done.stderr


def test_python_m_flowray_answers():
    done = command("-m", "flowray", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"flowray {metadata.version('flowray')} (Python ")
    same = (
        command("-m", "flowray", "train", "quikstart"),
        command("-m", "flowray.train", "quikstart"),
    )
    assert same[0].returncode == same[1].returncode == 2
    assert same[0].stderr == same[1].stderr
    assert "did you mean quickstart?" in same[0].stderr


@pytest.mark.parametrize("verb", main._VERBS)
def test_every_listed_verb_has_its_own_command(verb, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["flowray", verb, "--help"])
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().out.startswith(f"usage: flowray.{verb} ")


def test_every_listed_verb_is_a_module_too():
    """`python -m flowray.VERB`: a file, or a folder with the shim."""
    root = Path(main.__file__).parent.parent
    found = {
        v
        for v in main._VERBS
        if (root / f"{v}.py").is_file() or (root / v / "__main__.py").is_file()
    }
    assert found == main._VERBS.keys()


def unread() -> int:
    """The end to write to of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("unbuffered", "argv"),
    [
        *(("1", (verb, "--help")) for verb in main._VERBS),
        ("", ("train", "--help")),
        ("", ("train", "quickstart", "--plan")),
    ],
)
def test_what_cannot_be_printed_is_a_line_and_a_reader_who_has_gone_is_none(unbuffered, argv):
    """With Python's own buffer and without it, which argparse and rich see to in ways of their
    own.
    """
    full, gone = os.open("/dev/full", os.O_WRONLY), unread()
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "flowray", *argv]
    started = [
        subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=env)
        for out in (full, gone)
    ]
    said = [remarks(one.communicate(timeout=120)[1]) for one in started]
    os.close(full)
    os.close(gone)
    assert said == [["error: the output cannot be written: No space left on device"], []]
    assert [one.returncode for one in started] == [1, 141]


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-", "2> >(true)", "<&- 2>&-"])
def test_a_stderr_that_takes_nothing_changes_nothing(tmp_path, stderr):
    """Bad input, and work that tells its progress: exit code, stdout and files are the same."""
    out = tmp_path / "shards"
    make = f"data make shapes --samples 40 --out {shlex.quote(str(out))}"
    for argv, code in (("train quikstart", 2), (make, 0)):
        line = f"{shlex.quote(sys.executable)} -m flowray {argv} {stderr}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, "")
        assert ("error" in done.stdout, bool(done.stdout)) == (False, code == 0)
    assert done.stdout.count(" samples ") == 3
    assert check_shards(str(out / "train")).good


def test_a_stderr_that_is_full_for_now_gets_what_comes_later():
    """A pipe that does not block and that its reader empties in time."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fill = "[sys.stderr.write('x' * 4096) or sys.stderr.flush() for _ in range(40)]"
    said = f"from flowray.cli.common import _hold_streams; import sys; _hold_streams(); {fill}"
    late = "input(); print('the last line', file=sys.stderr, flush=True)"
    code = f"{said}; print('full', flush=True); {late}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], stderr=writer, **pipes) as child:
        os.close(writer)
        assert child.stdout.readline() == "full\n"
        assert len(os.read(reader, 1 << 20)) >= 4096
        child.communicate("\n")
    assert b"the last line" in os.read(reader, 1 << 20)
    os.close(reader)


def test_an_unknown_verb(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flowray", "trian"])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_plan_counts_disjoint_parts_and_starts_nothing(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path, **{"loss.clip.weight": 1.0, "resources.num_workers": 2})
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_recipe(recipe))
    assert train.main([str(file), "--plan", "--json", "train.steps=7"]) == 0
    plan = json.loads(capsys.readouterr().out)
    model = build_model(recipe.model, recipe.loss, 0)
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    assert plan["parameters"].pop("autoencoder") == sum(p.numel() for p in autoencoder.parameters())
    assert sum(plan["parameters"].values()) == sum(p.numel() for p in model.parameters())
    assert plan["parameters"]["text.queries"] == model.text.queries.numel()
    assert sum(n for part, n in plan["parameters"].items() if part.startswith("velocity.")) == sum(
        p.numel() for p in model.velocity.parameters()
    )
    assert (plan["steps"], plan["images"], plan["workers"]) == (7, 56, 2)
    assert not (tmp_path / "runs").exists()
    assert train.main(["quickstart", "--plan"]) == 0
    table = capsys.readouterr().out
    assert f"{load_recipe('quickstart').recipe.train.steps} steps" in table
