"""Paths of recipes and sweeps: absolute from the moment they are loaded, relative to the file
that names them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from pydantic.fields import FieldInfo

from flowray.config.errors import InputError
from flowray.config.load import dump_recipe, load_recipe
from flowray.config.model import EncoderText
from flowray.config.paths import PathField, absolute, argument, is_hub_name, no_such, path_field
from flowray.config.recipe import Recipe
from flowray.config.schema import known_keys
from flowray.sweepconfig.check import base_recipe
from flowray.sweepconfig.file import dump_sweep, load_sweep, text_sweep
from flowray.sweepconfig.sweep import Sweep

SWEEP = """\
name: s
base: {base}
metric: {{name: ema/shoot/nmse}}
parameters:
  optim.lr: {{min: 1e-4, max: 1e-2}}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `my files` with recipes below it, while the working directory is `elsewhere`;
    $DATA is set.
    """
    for name in ("my files/deep", "elsewhere", "data/train"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLOWRAY_STORAGE", raising=False)
    return tmp_path / "my files"


def value(recipe: Recipe, key: str) -> object:
    node: object = recipe
    for name in key.split("."):
        node = getattr(node, name)
    return node


def one_line(source: Path | str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(str(source), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_text_that_is_a_path_says_so() -> None:
    def is_text(field: FieldInfo) -> bool:
        return field.annotation in (str, str | None, tuple[str, ...])

    fields = {key: slot.field for key, slots in known_keys().items() for slot in slots}
    fields |= {f"sweep.{key}": field for key, field in Sweep.model_fields.items()}
    words = ("path", "shards", "cache", "vgg", "linear", "folder", "file", "dir", "warm_start")
    unmarked = [
        key
        for key, field in fields.items()
        if is_text(field)
        and any(word in key.rpartition(".")[2] for word in words)
        and path_field(field) is None
    ]
    assert unmarked == []
    marked = {key for key, field in fields.items() if path_field(field)}
    assert {
        "data.shards",
        "data.val_shards",
        "data.cache",
        "storage_path",
        "loss.lpips.vgg",
    } <= marked
    assert {"model.text.path", "model.autoencoder.path", "loss.dino.teacher.path"} <= marked
    assert {"sweep.storage_path", "sweep.warm_start", "model.semantic.net.path"} <= marked


@pytest.mark.parametrize(
    ("key", "text", "want"),
    [
        ("data.shards", "shards/", "my files/shards"),
        ("data.shards", "./shapes", "my files/shapes"),
        ("data.shards", "shapes", None),
        ("data.shards", "../data/*.tar", "data/*.tar"),
        ("data.shards", "$DATA/train", "data/train"),
        ("data.val_shards", "${DATA}/val", "data/val"),
        ("data.cache", "~/cache", "cache"),
        ("data.cache", "$$cache", "my files/$cache"),
        ("storage_path", "runs", "elsewhere/runs"),
        ("model.text.path", "~/models/qwen", "models/qwen"),
        ("model.text.path", "Qwen/Qwen3-0.6B", None),
        ("model.text.path", "embedded", None),
        ("model.autoencoder.path", "deep/vae", "my files/deep/vae"),
        ("model.autoencoder.path", "vae.safetensors", "my files/vae.safetensors"),
        ("loss.repa.teacher.path", "../data", "data"),
        ("loss.lpips.vgg", "vgg16.pth", "my files/vgg16.pth"),
    ],
)
def test_a_path_starts_from_the_file_that_names_it(
    home: Path, key: str, text: str, want: str | None
) -> None:
    nested: object = text
    for name in reversed(key.split(".")):
        nested = {name: nested}
    (home / "r.yaml").write_text(yaml.safe_dump(nested))
    expected = text if want is None else str(home.parent / want)
    assert value(load_recipe(str(home / "r.yaml")).recipe, key) == expected
    (home / "deep" / "child.yaml").write_text("base: ../r.yaml\n")
    child = load_recipe("../my files/deep/child.yaml").recipe
    assert value(child, key) == expected
    (home / "again.yaml").write_text(dump_recipe(child))
    assert load_recipe(str(home / "again.yaml")).recipe == child


def test_a_typed_path_starts_from_the_working_directory(home: Path) -> None:
    here = home.parent / "elsewhere"
    recipe = load_recipe(
        "quickstart", ["data.shards=here/", "model.text={kind: encoder, path: ./t5}"]
    ).recipe
    assert recipe.data.shards == str(here / "here")
    assert isinstance(recipe.model.text, EncoderText)
    assert recipe.model.text.path == str(here / "t5")
    assert recipe.storage_path == str(here / "runs")


def test_a_glob_in_a_folder_with_brackets(home: Path) -> None:
    from flowray.data.shards import find_shards

    (odd := home / "set [1]").mkdir()
    (odd / "a.tar").write_bytes(b"a" * 512)
    (odd / "r.yaml").write_text("data: {shards: '*.tar', val_shards: a.tar}\n")
    data = load_recipe(str(odd / "r.yaml")).recipe.data
    assert find_shards(data.shards) == find_shards(str(data.val_shards)) == (odd / "a.tar",)


def test_relative_storage_lies_in_flowray_storage(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWRAY_STORAGE", "/mnt/shared")
    (home / "r.yaml").write_text("storage_path: mine\ndata: {cache: cache}\n")
    recipe = load_recipe(str(home / "r.yaml")).recipe
    assert (recipe.storage_path, recipe.data.cache) == ("/mnt/shared/mine", str(home / "cache"))
    assert load_recipe("quickstart").recipe.storage_path == "/mnt/shared/runs"
    assert load_recipe("quickstart", ["storage_path=/x"]).recipe.storage_path == "/x"


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        (
            "data.shards",
            "$NOWHERE/x",
            (
                "r.yaml:2: data.shards: got '$NOWHERE/x', but the environment variable NOWHERE is"
                " not set"
            ),
        ),
        ("data.cache", "s3://b/x", "r.yaml:2: data.cache: got 's3://b/x', want a folder"),
        ("data.shards", "ftp://b/x", "r.yaml:2: data.shards: got ftp://, want a folder, or s3://"),
        ("data.shards", "https://h/x.tar?sig=5", "data.shards: got https://h... with a name"),
        ("data.shards", "s3://me:secret@b/x", "data.shards: got s3://b... with a name"),
        ("data.cache", "~nobody-here/x", "no such user"),
        ("data.cache", "''", "want a path"),
    ],
)
def test_a_path_that_is_none_is_one_line(home: Path, key: str, text: str, says: str) -> None:
    section, name = key.split(".")
    (home / "r.yaml").write_text(f"{section}:\n  {name}: {text}\n")
    assert says in one_line(home / "r.yaml")
    if "'" not in text:
        assert one_line("quickstart", f"{key}={text}").startswith(f"command line: {key}: got")


def test_names_of_the_hub_and_paths(home: Path) -> None:
    (home / "org").mkdir()
    for name in (
        "gpt2",
        "Qwen/Qwen3-0.6B",
        "google/t5-v1_1-xxl",
        "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
    ):
        assert is_hub_name(name, home)
    for path in (
        "/a/b",
        "./a",
        "../a",
        "~/a",
        "$A/b",
        "a/",
        "a/b/c",
        "C:\\a",
        "a.safetensors",
        "a/b.pth",
        "org/x",
        "org",
        "..",
        "~",
    ):
        assert not is_hub_name(path, home), path
        assert path.startswith("$") or Path(absolute(path, PathField(hub=True), home)).is_absolute()


def test_the_nearest_name_that_is_there(home: Path) -> None:
    (home / "models" / "clip").mkdir(parents=True)
    assert no_such(home / "models" / "clap") == f"no such folder, did you mean {home}/models/clip?"
    assert no_such(home / "modles" / "clip") == f"no such folder, did you mean {home}/models/clip?"
    assert no_such(home / "models" / "w.safetensors") == "no such file"
    assert no_such(home / "zzz" / "clip") == f"no such folder; {home} has no zzz"


def test_what_is_there_is_never_the_nearest_name(home: Path) -> None:
    os.mkfifo(home / "pipe")
    (home / "file").touch()
    for path, kind in (
        ("pipe", "a pipe"),
        ("file", "a file"),
        (".", "a folder"),
        ("/dev/null", "a device"),
    ):
        assert kind in no_such(home / path)
        assert "did you mean" not in no_such(home / path)


def test_an_argument_has_what_the_shell_left(home: Path) -> None:
    assert argument("~/runs/a") == home.parent / "runs/a"
    assert argument("$DATA/a") == home.parent / "data/a"
    assert argument("runs/a/") == Path("runs/a")


def test_the_paths_of_a_sweep(home: Path) -> None:
    (home / "small.yaml").write_text("base: sweep_proxy\ndata: {shards: shards/}\n")
    more = (
        "  data.shards: {values: [a/, shapes, $DATA/b], prior: {value: a/}}\n  model.text.path:"
        " {value: ./llm}\n"
    )
    more += "  data.limit: {values: [8], when: {data.shards: [a/]}}\n"
    more += (
        "set: {data.cache: ~/cache}\npoints: [{data.shards: a}]\nstorage_path: out\nmethod:"
        " random\nwarm_start: [old]\n"
    )
    (home / "s.yaml").write_text(SWEEP.format(base="small.yaml") + more)
    sweep = load_sweep(str(home / "s.yaml"))
    shards = sweep.parameters["data.shards"]
    assert shards.values == (str(home / "a"), "shapes", str(home.parent / "data/b"))  # type: ignore[union-attr]
    assert sweep.parameters["data.limit"].when == {"data.shards": (str(home / "a"),)}
    assert sweep.parameters["model.text.path"].value == str(home / "llm")  # type: ignore[union-attr]
    assert sweep.set == {"data.cache": str(home.parent / "cache")}
    assert sweep.points == ({"data.shards": str(home / "a")},)
    assert (sweep.base, sweep.storage_path) == (
        str(home / "small.yaml"),
        str(home.parent / "elsewhere/out"),
    )
    assert sweep.warm_start == (str(home / "old"),)
    assert base_recipe(sweep).data.shards == str(home / "shards")
    assert text_sweep(dump_sweep(sweep), "again") == sweep


def test_the_typed_paths_of_a_sweep(home: Path) -> None:
    here = home.parent / "elsewhere"
    (home / "s.yaml").write_text(SWEEP.format(base="sweep_proxy") + "set: {data.cache: cache}\n")
    typed = [
        "set.data.cache=cache",
        "parameters.data.shards={values: [a, shapes]}",
        "storage_path=$DATA/out",
        "method=random",
    ]
    sweep = load_sweep(str(home / "s.yaml"), [*typed, "warm_start=[old]"])
    assert sweep.set["data.cache"] == str(here / "cache")
    assert sweep.parameters["data.shards"].values == (str(here / "a"), "shapes")  # type: ignore[union-attr]
    assert (sweep.base, sweep.storage_path, sweep.warm_start) == (
        "sweep_proxy",
        str(home.parent / "data/out"),
        (str(here / "old"),),
    )
    assert load_sweep(str(home / "s.yaml")).storage_path == str(here / "runs")
    (here / "own.yaml").write_text("seed: 3\n")
    assert load_sweep(str(home / "s.yaml"), ["base=own.yaml"]).base == str(here / "own.yaml")


def test_earlier_runs_are_also_found_from_the_working_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = home.parent / "elsewhere"
    (home / "s.yaml").write_text(SWEEP.format(base="sweep_proxy") + "warm_start: [runs/old]\n")
    (here / "runs" / "old").mkdir(parents=True)
    assert load_sweep(str(home / "s.yaml")).warm_start == (str(here / "runs/old"),)
    (home.parent / "shared/runs/old").mkdir(parents=True)
    monkeypatch.setenv("FLOWRAY_STORAGE", str(home.parent / "shared"))
    assert load_sweep(str(home / "s.yaml")).warm_start == (str(home.parent / "shared/runs/old"),)


@pytest.mark.parametrize("folder", ["my$1 files", "a$b", "${c}", "100$"])
def test_a_path_that_is_there_keeps_its_dollar(
    home: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """And so does a new file in it. Where nothing is there, a `$` begins a variable."""
    here = home.parent / "elsewhere"
    (here / folder / "sets").mkdir(parents=True)
    assert argument(folder) == Path(folder)
    assert argument(f"{folder}/new.png") == Path(folder, "new.png")
    recipe = load_recipe(
        "quickstart",
        [f"data.shards={folder}/*", f"storage_path={folder}", f"data.cache={folder}/sets/"],
    ).recipe
    assert (recipe.data.shards, recipe.storage_path) == (
        str(here / folder / "*"),
        str(here / folder),
    )
    assert recipe.data.cache == str(here / folder / "sets")
    (here / folder / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(f"{folder}/r.yaml").recipe == recipe
    monkeypatch.chdir("/")
    assert argument(str(here / folder)) == here / folder
    for text in (folder, f"{folder}/new.png"):
        with pytest.raises(InputError):
            argument(text)


def test_a_variable_goes_before_a_folder_of_its_name(home: Path) -> None:
    (home.parent / "elsewhere" / "$DATA").mkdir()
    assert argument("$DATA/new") == home.parent / "data" / "new"
    assert argument("$DATA") == Path("$DATA")
