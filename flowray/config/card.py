"""The experiment card: a comment block on top of config.yaml, and card.md, whose
hand-written parts survive.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowray.config.keys import describe
from flowray.config.recipe import Recipe
from flowray.config.writing import write_whole

Diffs = Mapping[str, tuple[Any, Any]]

GOAL, SETTINGS, METRICS, CONCLUSION, NEXT = (
    "Goal",
    "Settings (difference from the base)",
    "Metrics and records",
    "Conclusion",
    "Next step",
)
# written anew every time; every other section belongs to the reader once it stands
RENDERED = (SETTINGS, METRICS)
_RULE = "# " + "=" * 70
_NO_DIFFERENCE = ("name", "storage_path", "seed", "card")
_SHOWN = 4


def header(recipe: Recipe, diffs: Diffs, *, exp_id: str, commit: str, hardware: str) -> str:
    """The comment block for the top of config.yaml, every line a `#` line; ends with a newline.

    diffs: dotted key -> (old, new) against the base recipe, as `Loaded.diffs`. What the recipe's
    `card` states wins over what is computed.
    """
    rows = _fields(recipe, diffs, exp_id, commit, hardware)
    lines = [f"# {name:<13}: {' '.join(text.split())}".rstrip() for name, text in rows]
    return "\n".join([_RULE, "# EXP CONFIG META", "# " + "-" * 70, *lines, _RULE]) + "\n"


def render_card(
    path: Path,
    recipe: Recipe,
    diffs: Diffs,
    *,
    exp_id: str,
    commit: str,
    hardware: str,
    metrics: Mapping[str, float],
    step: int,
    verdicts: Mapping[str, str],
    samples: Sequence[str] = (),
    time: str = "",
) -> None:
    """Write card.md, atomically: the header's fields, settings against the base, the metrics at
    `step`, picture paths relative to it.

    time: where the wall time went, on one line. verdicts: what the doctor says of each metric,
    by key; one without an entry stays without. Goal, conclusion, next step and any section a person
    added are taken over from the file that is there.
    """
    kept = _sections(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = [
        (name, text)
        for name, text in _fields(recipe, diffs, exp_id, commit, hardware)
        if name not in {"TITLE", "PURPOSE", "KEY_DIFFS"}
    ]
    sections = {
        GOAL: recipe.card.purpose or "-",
        SETTINGS: (
            "\n".join(
                f"- `{key}`: {_text(old)} → {_text(new)}"
                for key, (old, new) in _counted(diffs).items()
            )
            or "- none: the base as it is"
        ),
        METRICS: _metrics(metrics, step, verdicts, samples)
        + (f"\n\nTime: {time}." if time else ""),
        CONCLUSION: "- keep / reject / re-verify: not judged yet",
        NEXT: "-",
    }
    sections |= {name: body for name, body in kept.items() if name not in RENDERED}
    head = [
        f"# {recipe.card.title or recipe.name}",
        "",
        *(f"- {name}: {' '.join(text.split()) or '-'}" for name, text in rows),
    ]
    text = (
        "\n".join(head)
        + "\n"
        + "".join(f"\n## {name}\n\n{body}\n" for name, body in sections.items())
    )
    write_whole(path, text)


def git_commit() -> str:
    """'branch / abc1234' of the working directory, with '+ local changes' where there are any;
    '' outside a repository.
    """
    commit = _git("rev-parse", "--short", "HEAD")
    if not commit:
        return ""
    branch = _git("symbolic-ref", "--short", "HEAD")
    changed = " + local changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{branch} / {commit}{changed}" if branch else f"{commit}{changed}"


def key_diffs(diffs: Diffs) -> str:
    """The first few differences on one line: 'model.head.kind=pooled (was grid), ... and 3
    more'.
    """
    counted = _counted(diffs)
    shown = [
        f"{key}={_text(new)} (was {_text(old)})"
        for key, (old, new) in list(counted.items())[:_SHOWN]
    ]
    more = f" and {len(counted) - _SHOWN} more" if len(counted) > _SHOWN else ""
    return ", ".join(shown) + more or "none: the base as it is"


def _counted(diffs: Diffs) -> dict[str, tuple[Any, Any]]:
    return {key: pair for key, pair in diffs.items() if key.partition(".")[0] not in _NO_DIFFERENCE}


def _fields(
    recipe: Recipe, diffs: Diffs, exp_id: str, commit: str, hardware: str
) -> list[tuple[str, str]]:
    card, latent = recipe.card, recipe.model.latent
    core = {
        "lr": f"{recipe.optim.lr:g}",
        "batch": recipe.train.batch_size,
        "latent": f"{latent.channels}x{latent.height}x{latent.width}",
        "steps": recipe.train.steps,
        "seed": recipe.seed,
    }
    return [
        ("EXP_ID", exp_id),
        ("TITLE", card.title or recipe.name),
        ("PURPOSE", card.purpose),
        ("KEY_DIFFS", key_diffs(diffs)),
        ("DATASET", card.dataset or recipe.data.shards),
        ("HARDWARE", card.hardware or hardware),
        ("BRANCH/COMMIT", commit),
        ("CORE PARAMS", ", ".join(f"{name}={value}" for name, value in core.items())),
        ("TAGS", f"[{', '.join(card.tags)}]"),
        ("NOTES", card.notes),
    ]


def _metrics(
    metrics: Mapping[str, float], step: int, verdicts: Mapping[str, str], samples: Sequence[str]
) -> str:
    lines = [
        f"At step {step}:",
        "",
        "| metric | value | unit | better | the doctor's verdict |",
        "|---|---|---|---|---|",
    ]
    for name, value in metrics.items():
        key = describe(name)
        better = key.direction if key and key.direction != "none" else ""
        lines.append(
            f"| `{name}` | {value:.4g} | {key.unit if key else ''} | {better} |"
            f" {verdicts.get(name, '')} |"
        )
    if not metrics:
        lines = [f"At step {step}: nothing measured yet."]
    return "\n".join([*lines, *(f"\n![{sample}]({sample})" for sample in samples)])


def _sections(text: str) -> dict[str, str]:
    """Bodies of the `## ` sections that are not empty, in order; a `## ` inside a code fence
    starts none.
    """
    found: dict[str, list[str]] = {}
    current: list[str] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        if line.startswith("## ") and not fenced:
            current = found.setdefault(line[3:].strip(), [])
        else:
            current.append(line)
    return {name: body for name, lines in found.items() if (body := "\n".join(lines).strip("\n"))}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    return "none" if value is None else " ".join(str(value).split())


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
