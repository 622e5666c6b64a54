"""Recipes load in layers, and any bad input is one line that points at the place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flowray.config.errors import InputError
from flowray.config.load import Loaded, dump_recipe, load_recipe, override_recipe, recipe_names
from flowray.config.model import ConvHead, GridHead, PooledHead
from flowray.config.recipe import Recipe
from flowray.config.train import DataConfig

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(text: str, name: str = "r.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return _write


def refusal(source: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def one_line(write: Write, text: str, *overrides: str) -> str:
    """The message for a recipe file of this text, its folder cut off."""
    source = write(text)
    return refusal(source, *overrides).replace(f"{Path(source).parent}/", "")


# layers


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.source == f"flowray/recipes/{name}.yaml"


def test_the_packaged_recipes_are_there() -> None:
    assert {"base", "quickstart", "digits"} <= set(recipe_names())
    assert load_recipe("digits").recipe.data.shards == "digits"
    assert load_recipe("quickstart").recipe.name == "quickstart"


def test_a_child_merges_deeply_and_its_differences_are_against_its_base(write: Write) -> None:
    write("name: parent\noptim:\n  lr: 2e-3\n  weight_decay: 0.1\n", "parent.yaml")
    loaded = load_recipe(write("base: parent.yaml\noptim:\n  lr: 1e-4\n"), ["train.steps=7"])
    assert loaded.recipe.optim.lr == 1e-4
    assert loaded.recipe.optim.weight_decay == 0.1
    assert loaded.diffs == {"optim.lr": (2e-3, 1e-4), "train.steps": (1000, 7)}


def test_a_relative_base_is_found_beside_the_file_that_names_it(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    write("base: ../top.yaml\ntrain:\n  steps: 5\n", "sub/child.yaml")
    write("base: digits\ntrain:\n  batch_size: 8\n", "top.yaml")
    monkeypatch.chdir("/")
    recipe = load_recipe(str(tmp_path / "sub" / "child.yaml")).recipe
    assert (recipe.train.steps, recipe.train.batch_size, recipe.data.shards) == (5, 8, "digits")


def test_a_path_wins_over_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").write_text("seed: 41\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").recipe.seed == 41


def test_another_kind_resets_its_mapping_and_the_same_kind_does_not(write: Write) -> None:
    write("model:\n  head:\n    kind: grid\n    hidden: 64\n    layers: 5\n", "grid.yaml")
    same = load_recipe(
        write("base: grid.yaml\nmodel:\n  head: {kind: grid, convs: 3}\n")
    ).recipe.model.head
    other = load_recipe(
        write("base: grid.yaml\nmodel:\n  head: {kind: conv, mlp: 9}\n")
    ).recipe.model.head
    assert same == GridHead(hidden=64, layers=5, convs=3)
    assert other == ConvHead(mlp=9)


def test_differences_across_kinds_are_against_the_new_kind(write: Write) -> None:
    loaded = load_recipe(write("model:\n  head:\n    kind: pooled\n    hidden: 64\n"))
    assert loaded.diffs == {"model.head.kind": ("grid", "pooled"), "model.head.hidden": (512, 64)}


def test_a_section_without_keys_changes_nothing(write: Write) -> None:
    assert load_recipe(write("optim:\n  # lr: 1\nseed: 0\n")).recipe == Recipe(
        storage_path=str(Path("runs").absolute())
    )


def test_yaml_anchors_and_merge_keys_work(write: Write) -> None:
    text = (
        "loss:\n  flow: &w\n    weight: 2\n  kl:\n    <<: *w\n    form: gaussian\n  clip:\n    <<:"
        " *w\n    weight: 3\n"
    )
    loss = load_recipe(write(text)).recipe.loss
    assert (loss.flow.weight, loss.kl.weight, loss.kl.form, loss.clip.weight) == (
        2,
        2,
        "gaussian",
        3,
    )
    shared = "loss:\n  flow: &w\n    weight: 2\n  kl: &k\n    <<: *w\n    weight: 3\n  clip: *k\n"
    assert load_recipe(write(shared)).recipe.loss.clip.weight == 3


# key=value


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("train.steps=12", "train.steps", 12),
        ("optim.betas=[0.8, 0.9]", "optim.betas", (0.8, 0.9)),
        (
            "sample.prompts=[a red circle, a blue square]",
            "sample.prompts",
            ("a red circle", "a blue square"),
        ),
        ("name=20250903", "name", "20250903"),
        ("card.notes=warm-up: 50", "card.notes", "warm-up: 50"),
        ("model.text.template={prompt}!", "model.text.template", "{prompt}!"),
        ("data.val_shards=null", "data.val_shards", None),
        ("probes.raw=false", "probes.raw", False),
        ("data.shards=/a/b=c/*.tar", "data.shards", "/a/b=c/*.tar"),
    ],
)
def test_an_override_takes_the_type_of_its_field(override: str, key: str, value: object) -> None:
    node: object = load_recipe("base", [override]).recipe
    for name in key.split("."):
        node = getattr(node, name)
    assert node == value
    assert type(node) is type(value)


def test_overrides_compose_in_order_and_kinds_come_first() -> None:
    def head(*overrides: str) -> object:
        return load_recipe("base", overrides).recipe.model.head

    assert head("model.head.kind=pooled") == PooledHead()
    assert head(
        "model.head.kind=pooled", "model.head.layers=4", "model.head.hidden=8"
    ) == PooledHead(layers=4, hidden=8)
    assert head("model.head.layers=4", "model.head.kind=pooled") == PooledHead(layers=4)
    assert head("model.head={kind: pooled, layers: 4}", "model.head.hidden=8") == PooledHead(
        layers=4, hidden=8
    )
    assert head("model.head.layers=4", "model.head.layers=5") == GridHead(layers=5)


def test_override_recipe_sets_python_values_in_any_order() -> None:
    recipe = override_recipe(
        Recipe(), {"model.head.hidden": 48, "model.head.kind": "conv", "optim.lr": "1e-4"}
    )
    assert recipe.model.head == ConvHead(hidden=48)
    assert recipe.optim.lr == 1e-4
    assert override_recipe(recipe, {}) == recipe
    assert Recipe().model.head == GridHead()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim.lr": "abc"}, "optim.lr: got 'abc', want a number > 0"),
        ({"optim.learning_rate": 1}, "unknown key optim.learning_rate, did you mean optim.lr?"),
        ({"model.head.hidden": 63}, "model.head: hidden 63 must be a multiple of heads 4 and of 4"),
    ],
)
def test_override_recipe_names_the_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message.replace('?', '[?]')}$"):
        override_recipe(Recipe(), values)


# round trip


def test_a_dump_reads_back_equal(write: Write) -> None:
    overrides = [
        "model.head={kind: pooled, hidden: 7}",
        "flow.time={kind: log_snr, low: -1, high: 5}",
        "loss.kl.schedule={kind: until, steps: 3}",
        "optim.lr=1e-20",
        "name='007'",
        'card.title=颜色: "纹理" # 1\n二',
        "sample.prompts=[null text, 'yes']",
        "model.text={kind: encoder, path: ~/t5}",
    ]
    recipe = load_recipe("quickstart", overrides).recipe
    again = load_recipe(write(dump_recipe(recipe)))
    assert again.recipe == recipe
    assert again.recipe.name == "007"


# errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 0\noptim:\n  learning_rate: 1\n",
            "r.yaml:3: unknown key optim.learning_rate, did you mean optim.lr?",
        ),
        (
            "train:\n  bach_size: 8\n",
            "r.yaml:2: unknown key train.bach_size, did you mean train.batch_size?",
        ),
        ("batch: 8\n", "r.yaml:1: unknown key batch, did you mean train.batch_size?"),
        ("lr: 8\n", "r.yaml:1: unknown key lr, did you mean optim.lr?"),
        ("optimizer:\n  lr: 1\n", "r.yaml:1: unknown key optimizer, did you mean optim?"),
        (
            "train:\n  epochs: 8\n",
            "r.yaml:2: unknown key train.epochs; length is counted in steps: use train.steps",
        ),
        (
            "cfg_scale: 3\n",
            (
                "r.yaml:1: unknown key cfg_scale; use sample.guidance_scale, where 1 is off (a w"
                " that is off at 0 is w + 1)"
            ),
        ),
        (
            "data:\n  zzz: 8\n",
            (
                "r.yaml:2: unknown key data.zzz; allowed under data:"
                f" {', '.join(DataConfig.model_fields)}"
            ),
        ),
        ("optim:\n  lr: abc\n", "r.yaml:2: optim.lr: got 'abc', want a number > 0"),
        ("optim:\n  lr: yes\n", "r.yaml:2: optim.lr: got true, want a number > 0"),
        ("optim:\n  lr: .nan\n", "r.yaml:2: optim.lr: got nan, want a number > 0"),
        ("optim:\n  betas: [0.9]\n", "r.yaml:2: optim.betas: got [0.9], want a list of 2 numbers"),
        (
            "loss:\n  kl:\n\n    weight: -1\n",
            "r.yaml:4: loss.kl.weight: got -1, want a number >= 0",
        ),
        (
            "loss:\n  kl:\n    form: bx\n",
            "r.yaml:3: loss.kl.form: got 'bx', want one of box, gaussian",
        ),
        ("loss:\n  kl: 3\n", "r.yaml:2: loss.kl: got 3, want a mapping"),
        (
            "loss:\n  kl: {weight: -1, form: bx}\n",
            "r.yaml:2: loss.kl.weight: got -1, want a number >= 0 (and 1 more error)",
        ),
        ("train:\n  ema: 1\n", "r.yaml:2: train.ema: got 1, want a number >= 0 and < 1"),
        ("data:\n  limit: 0\n", "r.yaml:2: data.limit: got 0, want null or a whole number > 0"),
        ("name: 2024\n", "r.yaml:1: name: got 2024, want text in quotes"),
        (
            "name: a b\n",
            (
                "r.yaml:1: name: got 'a b', a name becomes a folder: letters, digits, '.', '_' and"
                " '-' only"
            ),
        ),
        (
            "model:\n  head: pooled\n",
            "r.yaml:2: model.head: got 'pooled', want a mapping; type model.head.kind=pooled",
        ),
        (
            "model:\n  head:\n    kind: poled\n",
            (
                "r.yaml:3: model.head.kind: got 'poled', want one of pooled, grid, conv,"
                " transencoder, did you mean pooled?"
            ),
        ),
        (
            "model:\n  head:\n    kind: pooled\n    heads: 8\n",
            (
                "r.yaml:4: model.head.heads belongs to kind grid or transencoder, but"
                " model.head.kind is pooled (which takes shape, linear_map, hidden, layers); set"
                " model.head.kind too, or drop the key"
            ),
        ),
        (
            "model:\n  text:\n    kind: encoder\n",
            "r.yaml:3: model.text.path: is missing (kind encoder needs it), want text",
        ),
        (
            "model:\n  head:\n    hidden: 63\n",
            "r.yaml:3: model.head: hidden 63 must be a multiple of heads 4 and of 4",
        ),
        (
            "model:\n  latent:\n    height: 9\n  velocity:\n    patch: 2\n  head:\n    layers: 1\n",
            "r.yaml:5: model: velocity.patch 2 must divide the latent's 9 x 8",
        ),
        (
            "loss:\n  kl:\n    schedule:\n      steps: 5\n",
            (
                "r.yaml:4: loss.kl.schedule: a linear schedule takes either steps or fraction"
                " (steps is 5, fraction is 0.1; null unsets one)"
            ),
        ),
        (
            "resources:\n  num_workers: 3\nseed: 1\n",
            "r.yaml:2: train.batch_size 32 must be a multiple of resources.num_workers 3",
        ),
        (
            "resources:\n  shard: hybrid\nprobes:\n  doctor_every: 1\n",
            (
                "r.yaml:4: resources.shard hybrid leaves no worker all weights, as"
                " probes.doctor_every would have it; set one of them to none or 0"
            ),
        ),
        (
            "model:\n  text:\n    cache: true\nresources: {shard: full, shard_text: true}\n",
            (
                "r.yaml:4: resources.shard_text wants resources.shard full or hybrid and"
                " model.text.cache false"
            ),
        ),
        ("seed: 0\nseed: 1\n", "r.yaml:2: key seed is given twice, first on line 1"),
        ("optim:\n  lr: 1\n  lr: 2\n", "r.yaml:3: key optim.lr is given twice, first on line 2"),
        ("", "r.yaml: is empty, want a mapping of keys, such as `name: my_run`"),
        ("# nothing\n", "r.yaml: is empty, want a mapping of keys, such as `name: my_run`"),
        ("\n- a\n", "r.yaml:2: got a list, want a mapping of keys, such as `name: my_run`"),
        (
            "seed: 1\na: [1\n",
            "r.yaml:3: not valid YAML: expected ',' or ']', but got '<stream end>'",
        ),
        (
            "seed: 1\n\tb: 2\n",
            "r.yaml:2: not valid YAML: found character '\\t' that cannot start any token",
        ),
        ("seed: 1\nname: \x07\n", "r.yaml:2: not valid YAML: control character '\\x07'"),
        (
            "seed: !!python/name:os.system\n",
            "r.yaml:1: not valid YAML: could not determine a constructor for the tag",
        ),
        ("1: 2\n", "r.yaml:1: key 1 must be plain text; put it in quotes"),
        ("card: &x\n  notes: *x\n", "r.yaml:1: the anchor contains itself"),
        ("base: [a]\n", "r.yaml:1: base: got ['a'], want the name or path of a recipe"),
        (
            "seed: 0\nbase: quikstart\n",
            "r.yaml:2: base: unknown recipe 'quikstart', did you mean quickstart?",
        ),
        ("base: s.yaml\n", "r.yaml:1: base: s.yaml: no such file, did you mean r.yaml?"),
        ("base: r.yaml\n", "r.yaml:1: base: r.yaml leads back to itself: r.yaml -> r.yaml"),
    ],
)
def test_a_bad_file_gets_one_line_with_its_place(write: Write, text: str, message: str) -> None:
    got = one_line(write, text)
    assert got.startswith(message)
    tail = got.removeprefix(message)
    assert not tail or tail.startswith((" (packaged:", " 'tag:yaml.org"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=abc", "optim.lr: got 'abc', want a number > 0"),
        ("optim.lr=0", "optim.lr: got 0, want a number > 0"),
        ("optimizer.lr=1", "unknown key optimizer.lr, did you mean optim.lr?"),
        ("wandb.project=x", "unknown key wandb.project; metrics go to metrics.jsonl"),
        ("optim.zzz=1", "unknown key optim.zzz; allowed under optim: lr, betas"),
        (
            "model.head.kind=poled",
            (
                "model.head.kind: got 'poled', want one of pooled, grid, conv, transencoder, did"
                " you mean pooled?"
            ),
        ),
        ("model.velocity.kind=di", "model.velocity.kind: got 'di'"),
        ("foo", "got 'foo', want key=value, such as optim.lr=3e-4"),
        ("=3", "got '=3', want key=value"),
    ],
)
def test_a_bad_override_gets_one_line(override: str, message: str) -> None:
    assert refusal("base", override).startswith(f"command line: {message}")


def test_an_error_points_at_the_layer_that_set_the_value(write: Write) -> None:
    write("optim:\n  lr: 1\n\n  weight_decay: -1\n", "parent.yaml")
    assert "parent.yaml:4: optim.weight_decay" in one_line(write, "base: parent.yaml\nseed: 1\n")
    write("resources:\n  num_workers: 2\n", "parent.yaml")
    assert one_line(write, "base: parent.yaml\ntrain:\n  batch_size: 33\n").startswith(
        "r.yaml:3: train.batch_size 33"
    )
    write("train:\n  batch_size: 32\nresources:\n  num_workers: 2\n", "parent.yaml")
    assert one_line(write, "base: parent.yaml\ntrain:\n  batch_size: 33\n").startswith(
        "r.yaml:3: train.batch_size 33"
    )
    assert one_line(write, "train:\n  batch_size: 33\n", "resources.num_workers=2").startswith(
        "command line: train.batch_size 33"
    )


def test_a_source_that_is_no_recipe(tmp_path: Path, write: Write) -> None:
    write("seed: 1\n")
    (tmp_path / "run").mkdir()
    write("seed: 1\n", "run/config.yaml")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "folder.yaml").mkdir()
    assert refusal("quickstat").startswith(
        "unknown recipe 'quickstat', did you mean quickstart? (packaged: base, crossflow_256, "
    )
    assert (
        refusal(str(tmp_path / "rr.yaml"))
        == f"{tmp_path}/rr.yaml: no such file, did you mean {tmp_path}/r.yaml?"
    )
    for typed in ("./quickstrt", "recipes/quickstrt.yaml", "./quickstart.yaml"):
        assert refusal(typed) == f"{typed}: no such file; type quickstart for the packaged recipe"
    write("seed: 1\n", "quickstart-long.yaml")
    near = f"{tmp_path}/quickstart-lng.yaml"
    assert refusal(near) == f"{near}: no such file, did you mean {tmp_path}/quickstart-long.yaml?"
    assert refusal("/nowhere/x.yaml") == "/nowhere/x.yaml: no such file; / has no nowhere"
    assert f"{tmp_path}/run/config.yaml --resume" in refusal(str(tmp_path / "run"))
    assert "is a folder" in refusal(str(tmp_path / "empty"))
    assert "is a folder" in refusal(str(tmp_path / "folder.yaml"))
    assert "is not UTF-8 text" in refusal(str(tmp_path / "bytes.yaml"))


def test_loading_pulls_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from flowray.config import load, card, keys; load.load_recipe('quickstart'); "
        "sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loaded_is_frozen() -> None:
    loaded = load_recipe("base")
    assert isinstance(loaded, Loaded)
    with pytest.raises(AttributeError):
        loaded.source = "x"  # type: ignore[misc]
