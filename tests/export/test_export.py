"""A pipeline that `flowray.export` wrote, loaded by a Python that has no flowray."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from support import tiny_autoencoder, tiny_recipe, tiny_text
from text_support import save, t5

from flowray.cli.export import main
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe
from flowray.model.autoencoder import load_autoencoder
from flowray.sample.generate import generate, latent_batches
from flowray.sample.restore import open_run
from flowray.store.found import find_checkpoint
from flowray.store.run import RunDirectory
from flowray.train.state import fresh_state, save_state

PROMPTS = ["a red circle", "a much longer caption of two blue squares", "a red circle"]
# -I -S: no site-packages, hence no editable install; the libraries' folder is added by hand
FRESH = """
import importlib.util, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("flowray") is None
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
folder, prompts = sys.argv[2], sys.argv[3].split("|")
pipes = [DiffusionPipeline.from_pretrained(f, trust_remote_code=True) for f in sys.argv[4:]]
for i, pipe in enumerate(pipes):
    latents = pipe(prompts, seed=7, output_type="latent").images.numpy()
    pictures = np.stack([np.asarray(picture) for picture in pipe(prompts, seed=7).images])
    np.savez(f"{folder}/{i}.npz", latents=latents, pictures=pictures)
assert not [name for name in sys.modules if name.partition(".")[0] == "flowray"]
"""


def run_of(folder: Path, **overrides) -> Path:
    """A run with one checkpoint, whose weights are those of no step but far from zero."""
    if text := overrides.get("model.text"):
        save(t5, folder / "t5")
        overrides = {**overrides, "model.text": {**text, "path": str(folder / "t5")}}
    recipe = tiny_recipe(folder, **overrides)
    run = RunDirectory(folder / "runs" / "tiny")
    state = fresh_state(recipe, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for kept in (state.parameters, state.ema.average):
        for weight in kept.values():
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    run.create()
    run.config.write_text(dump_recipe(recipe))
    save_state(state, recipe, run)
    return run.path


def painted(run: Path) -> tuple[np.ndarray, np.ndarray]:
    opened = open_run(find_checkpoint(run), torch.device("cpu"))
    config = opened.recipe.model
    autoencoder = load_autoencoder(config.autoencoder, config.latent)
    sample = opened.recipe.sample
    latents = torch.cat(list(latent_batches(opened.model, PROMPTS, sample, 7)))
    return latents.numpy(), generate(opened.model, autoencoder, PROMPTS, sample, 7)


def paint_elsewhere(pipelines: list[Path], out: Path) -> None:
    """Writes 0.npz, 1.npz, ... into `out`, one a pipeline; all are loaded by one process."""
    libraries = sysconfig.get_paths()["purelib"]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("PYTHON")
    } | {"HF_MODULES_CACHE": str(out / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["HF_HUB_CACHE"] = constants.HF_HUB_CACHE
    arguments = [libraries, str(out), "|".join(PROMPTS), *map(str, pipelines)]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", FRESH, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=out,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


NOISE = {"model.source": {"kind": "noise"}, "loss.kl.weight": 0.0}
CASES = {
    "grid head, DiT": {},
    "guided, drop_null, adaLN": {
        "model.head": {"kind": "pooled", "hidden": 16},
        "model.source": {"kind": "text", "drop_null": True},
        "model.velocity.condition": {"kind": "adaln"},
        "sample.guidance_scale": 2.0,
        "loss.clip.weight": 1.0,
    },
    "noise, DiMR, cross attention, Heun": {
        **NOISE,
        "model.velocity": {
            "kind": "dimr",
            "widths": (16, 8),
            "heads": 2,
            "condition": {"kind": "cross_attention"},
        },
        "sample.solver": {"kind": "heun"},
        "sample.guidance_scale": 3.0,
    },
    "noise, DiT, cross attention, token, dopri5": {
        **NOISE,
        "model.velocity.condition": {"kind": "cross_attention"},
        "model.velocity.indicator": "token",
        "model.velocity.time": {"of": "t", "bound": "small_init"},
        "sample.solver": {"kind": "dopri5", "rtol": 1e-2, "atol": 1e-2},
    },
    "bf16 text model, kept states, connector, conv head": {
        "model.text.dtype": "bf16",
        "model.text.cache": True,
        "model.text.template": "Paint: {prompt}",
        "model.text.connector": {
            "layers": 1,
            "hidden": 16,
            "intermediate": 32,
            "heads": 2,
            "out": 24,
            "style": "qwen2",
        },
        "model.head": {"kind": "conv", "hidden": 8, "mlp": 16},
        "sample.solver": {"kind": "euler", "nodes": "left"},
        "sample.grid": "logit_normal",
    },
    "T5, padded to the most tokens": {
        "model.text": {
            "kind": "encoder",
            "path": "",
            "max_tokens": 8,
            "pad_to_max": True,
            "scale": 10.0,
        },
        "model.head": {"kind": "pooled", "hidden": 16},
    },
    "transencoder, midpoint": {
        "model.head": {"kind": "transencoder", "layers": 1, "reductions": 1, "heads": 2, "ffn": 16},
        "sample.solver": {"kind": "midpoint"},
    },
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder with a run, its pipeline, and what a Python without flowray painted with it, of each
    case.
    """
    folder = tmp_path_factory.mktemp("export")
    for name, overrides in CASES.items():
        run = run_of(folder / name, **overrides)
        assert main([str(run), "--out", str(folder / name / "pipeline")]) == 0
    paint_elsewhere([folder / name / "pipeline" for name in CASES], folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_paints_the_same_without_flowray(case, exported):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        latents, pictures = painted(exported / case / "runs" / "tiny")
    finally:
        torch.set_num_threads(threads)
    with np.load(exported / f"{list(CASES).index(case)}.npz") as found:
        assert np.array_equal(found["latents"], latents)
        assert np.array_equal(found["pictures"], pictures)
    assert latents.std() > 0.1


def test_the_folder_holds_what_is_needed_and_no_more(exported):
    """One component a folder, in safetensors; the code of the velocity network that the run has,
    and of no other; no path of this machine in it.
    """
    dit = exported / "guided, drop_null, adaLN" / "pipeline"
    assert sorted(path.name for path in dit.iterdir()) == [
        "README.md",
        "model_index.json",
        "pipeline.py",
        "recipe.yaml",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    ]
    assert not list(dit.rglob("*.bin"))
    (code,) = (dit / "transformer").glob("flow_*.py")
    other = exported / "noise, DiMR, cross attention, Heun" / "pipeline" / "transformer"
    (of_other,) = other.glob("flow_*.py")
    for text, has, lacks in (
        (code.read_text(), "class DiT(", "class DiMR("),
        (of_other.read_text(), "class DiMR(", "class DiT("),
    ):
        assert has in text
        assert lacks not in text
        assert "pydantic" not in text
        assert "import flowray" not in text
        assert "from flowray" not in text
        assert str(exported) not in text


def test_the_card_is_the_runs_own_with_its_newest_strip(exported, tmp_path):
    run = exported / "transencoder, midpoint" / "runs" / "tiny"
    (run / "card.md").write_text("# My run\n\n## Conclusion\n\nkeep\n\n![x](samples/x.png)\n")
    for step, colour in ((2, "red"), (4, "blue")):
        Image.new("RGB", (8, 8), colour).save(run / "samples" / f"step_{step:06d}.png")
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("# My run") < card.index("from_pretrained") < card.index("## Conclusion")
    assert "samples/x.png" not in card
    picture = Image.open(tmp_path / "out" / "pictures.png")
    assert picture.getpixel((0, 0)) == (0, 0, 255)


def test_tells_the_size_of_each_component(exported, tmp_path, capsys):
    case = exported / "grid head, DiT"
    out, file = tmp_path / "new" / "pipeline", tmp_path / "all.safetensors"
    assert (
        main([str(case / "runs" / "tiny"), "--out", str(out), "--single", str(file), "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == {
        name: sum(part.stat().st_size for part in (out / name).iterdir())
        for name in ("transformer", "text_encoder", "tokenizer", "vae")
    }
    assert told["file_bytes"] == file.stat().st_size


def test_refusals_write_nothing(exported, tmp_path):
    run = str(exported / "grid head, DiT" / "runs" / "tiny")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    for arguments, words in (
        ([run], "give --out DIR"),
        ([run, "--out", str(taken)], "is not empty"),
        ([run, "--out", str(tmp_path / "out"), "--refer"], "no names on the hub"),
        ([run, "--single", str(tmp_path / "x.bin")], "ends in .safetensors"),
        ([str(tmp_path), "--out", str(tmp_path / "out")], "no valid checkpoint"),
    ):
        with pytest.raises(InputError, match=words):
            main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]


def test_models_of_the_hub_can_be_named_in_place_of_copies(tmp_path, monkeypatch):
    """They are found in the hub's cache, by name and revision."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, make in (("lm", tiny_text), ("pictures", tiny_autoencoder)):
        cache = tmp_path / "hub" / f"models--org--{name}"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("a" * 40)
        (cache / "snapshots").mkdir()
        make(cache / "snapshots" / ("a" * 40))
    paths = {"model.text.path": "org/lm", "model.autoencoder.path": "org/pictures"}
    run = run_of(tmp_path / "run", **paths)
    pipeline = tmp_path / "pipeline"
    assert main([str(run), "--out", str(pipeline), "--refer"]) == 0
    assert not [name for name in ("text_encoder", "tokenizer", "vae") if (pipeline / name).exists()]
    out = tmp_path / "out"
    out.mkdir()
    paint_elsewhere([pipeline], out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        latents, pictures = painted(run)
    finally:
        torch.set_num_threads(threads)
    with np.load(out / "0.npz") as found:
        assert np.array_equal(found["latents"], latents)
        assert np.array_equal(found["pictures"], pictures)
