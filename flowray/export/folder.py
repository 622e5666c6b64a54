"""Writing a run as a pipeline folder of diffusers, or as one file of weights."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from flowray.config.card import SETTINGS, render_card
from flowray.config.errors import InputError
from flowray.config.load import dump_recipe
from flowray.config.paths import exists
from flowray.config.recipe import Recipe
from flowray.data.folders import put_in_place
from flowray.export.parts import NETWORK, Parts
from flowray.export.pipeline import FlowrayPipeline
from flowray.export.source import bundled
from flowray.sample.restore import OpenedRun
from flowray.store.run import RunDirectory

INDEX, PIPELINE = "model_index.json", "pipeline"
_PICTURES, _RECIPE, _CARD = "pictures.png", "recipe.yaml", "README.md"
_TITLE = "The pipeline of this folder. Made by `flowray export`.\n"


def refuse_taken(folder: Path) -> None:
    """InputError where a folder cannot become an export: it is a file or has files."""
    if exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise InputError(f"--out {folder}: {what}; give a folder that is not there yet")


def save_folder(
    opened: OpenedRun, parts: Parts, refers: Mapping[str, list[str]], folder: Path
) -> dict[str, int]:
    """Write the pipeline, whole or not at all; returns component -> bytes of those in it.

    refers: components that are named and not copied, as `references` has them. OSError: the disk.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        sizes = _write(opened, parts, refers, partial)
        _write_card(opened, sizes, refers, partial)
        put_in_place(partial, folder, last=INDEX)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sizes


def _write(
    opened: OpenedRun, parts: Parts, refers: Mapping[str, list[str]], folder: Path
) -> dict[str, int]:
    frozen = {
        "text_encoder": ("transformers", parts.text_encoder),
        "tokenizer": ("transformers", parts.tokenizer),
        "vae": ("diffusers", parts.vae),
    }
    index: dict[str, Any] = {
        "_class_name": [PIPELINE, FlowrayPipeline.__name__],
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "references": dict(refers) or None,
        "text_dtype": parts.text_dtype,
        "transformer": [parts.module, NETWORK],
    }
    parts.network.save_pretrained(folder / "transformer")
    (folder / "transformer" / f"{parts.module}.py").write_text(parts.code, encoding="utf-8")
    for name, (library, component) in frozen.items():
        if name in refers:
            index[name] = [None, None]
            continue
        component.save_pretrained(folder / name)
        index[name] = [library, type(component).__name__]
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    code = bundled(FlowrayPipeline, title=_TITLE).text
    (folder / f"{PIPELINE}.py").write_text(code, encoding="utf-8")
    (folder / _RECIPE).write_text(dump_recipe(_portable(opened.recipe)), encoding="utf-8")
    written = ["transformer", *(name for name in frozen if name not in refers)]
    return {name: _bytes((folder / name).iterdir()) for name in written}


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _portable(recipe: Recipe) -> Recipe:
    """The recipe without the folders of this machine that a run writes to."""
    data = recipe.data.model_copy(update={"cache": None})
    return recipe.model_copy(update={"data": data, "storage_path": "runs"})


def _write_card(
    opened: OpenedRun, sizes: Mapping[str, int], refers: Mapping[str, list[str]], folder: Path
) -> None:
    """README.md: how to load it, pictures of the run, and the run's experiment card."""
    run, card = RunDirectory(opened.path), folder / _CARD
    if run.card.is_file():
        shutil.copyfile(run.card, card)
    else:
        about = {"exp_id": run.path.name, "commit": "", "hardware": "", "step": opened.step}
        render_card(card, opened.recipe, {}, metrics={}, verdicts={}, **about)  # type: ignore[arg-type]
    # pictures lie beside a run's card, not beside this one
    lines = [line for line in card.read_text("utf-8").splitlines() if line[:2] != "!["]
    if not run.card.is_file():  # without the run's own nothing is known of settings and metrics
        lines = lines[: lines.index(f"## {SETTINGS}")]
    head = ["---", "library_name: diffusers", "pipeline_tag: text-to-image", "---", "", lines[0]]
    head += ["", *_usage(opened)]
    if strips := sorted(run.samples.glob("step_*.png")):
        shutil.copyfile(strips[-1], folder / _PICTURES)
        head += ["", f"![Pictures of the run's own prompts]({_PICTURES})"]
    head += ["", "| component | size | |", "|---|---:|---|"]
    head += [f"| {name} | {size / 1e6:.1f} MB | {origin(name)} |" for name, size in sizes.items()]
    head += [f"| {name} | | {place[2]}, at {place[4]} |" for name, place in refers.items()]
    card.write_text("\n".join([*head, *lines[1:]]) + "\n", encoding="utf-8")


def origin(component: str) -> str:
    """What became of a component that the folder holds, in words."""
    return "trained" if component == "transformer" else "frozen, copied"


def _usage(opened: OpenedRun) -> list[str]:
    prompts = opened.recipe.sample.prompts
    prompt = prompts[0] if prompts else "a large red circle on a white background"
    sample = opened.recipe.sample
    return [
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        'pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)',
        f"pipe({prompt!r}, seed=0).images[0].save('picture.png')",
        "```",
        "",
        f"Of itself it takes {sample.steps} steps with guidance scale {sample.guidance_scale:g}.",
    ]


def save_single(opened: OpenedRun, parts: Parts, file: Path) -> int:
    """All weights in one file, `transformer.`, `text_encoder.` and `vae.` before their names, with
    recipe and configs as metadata; returns its bytes. OSError: the disk.
    """
    tensors = {
        f"{name}.{key}": tensor.detach().clone().contiguous()
        for name, component in (
            ("transformer", parts.network.flow),
            ("text_encoder", parts.text_encoder),
            ("vae", parts.vae),
        )
        for key, tensor in component.state_dict().items()
    }
    metadata = {
        "format": "pt",
        "recipe": dump_recipe(_portable(opened.recipe)),
        "step": str(opened.step),
        "text_encoder": parts.text_encoder.config.to_json_string(),
        "vae": parts.vae.to_json_string(),
    }
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return file.stat().st_size
