"""`flowray.eval RUN --geneval FILE`: pictures for the scorers of others."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from flowray.cli.common import refuse_unwritable
from flowray.cli.progress import IMPORTING, LOOKING
from flowray.config.errors import InputError
from flowray.config.progress import Progress
from flowray.store.checkpoint import STATE
from flowray.store.found import find_checkpoint

OPTIONS = {
    "geneval": "GenEval's evaluation_metadata.jsonl",
    "dpg": "DPG-Bench's folder of prompts",
    "coco": "COCO's captions, as JSON",
}


def paint(
    run: Path,
    overrides: list[str],
    chosen: str,
    path: Path,
    *,
    seed: int,
    limit: int | None,
    out: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Paint the prompts of a set (one of OPTIONS) into `out`, or RUN/NAME; what was written, as
    JSON. Pictures that lie there already, drawn in the same way, are kept.
    """
    with progress.task(LOOKING):
        found = find_checkpoint(run, overrides)
    folder = out or found.run.path / chosen
    refuse_unwritable(folder / "x", "--out", makes_folders=True)
    with progress.task(IMPORTING):
        from flowray.sample.pipeline import open_pipeline
        from flowray.sample.promptsets import Coco, Dpg, GenEval, PromptSet, paint_set, read_set
    sets: dict[str, PromptSet] = {"geneval": GenEval(), "dpg": Dpg(), "coco": Coco()}
    prompts = sets[chosen]
    wanted = read_set(prompts, path, limit)
    with progress.task("loading the models"):
        pipe = open_pipeline(found)
    how = {
        "step": str(pipe.step),
        "checkpoint": sha256((found.checkpoint / STATE).read_bytes()).hexdigest()[:12],
        "sample": json.dumps(pipe.recipe.sample.model_dump(mode="json", exclude={"prompts"})),
    }
    try:
        kept = paint_set(prompts, wanted, pipe, folder, how, seed, progress)
    except OSError as error:
        where = error.filename or folder
        raise InputError(f"{where}: cannot be written: {error.strerror}") from error
    return {
        "pictures": str(folder),
        "step": pipe.step,
        "seed": seed,
        "prompts": len(wanted),
        "each": prompts.each,
        "kept": kept,
    }
