"""`report.html` and `report.md` of a sweep: what it found, how sure that is, what each trial
did, what to type next.
"""

from __future__ import annotations

import itertools
import re
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flowray.config.dotted import dotted
from flowray.findings.baselines import baseline
from flowray.report import figures
from flowray.report.analysis import (
    CALLS,
    best_diff,
    best_for_calls_words,
    front,
    heat_map,
    hours,
    incomparable_words,
    runner_up_words,
    scale_groups,
    yaml_value,
)
from flowray.report.edges import Edge, edges, wider_command
from flowray.report.figures import value_text
from flowray.report.load import load_sweep
from flowray.report.page import (
    MAX_ROWS,
    SHOWN_ROWS,
    GridRow,
    make_plot,
    number_text,
    pictures_of,
    write_markdown,
    write_page,
)
from flowray.report.results import Run, Status, Sweep, Trial
from flowray.report.stages import stages, without_flow
from flowray.sweepconfig.stop import rule_words

TABLE_METRICS = ("shoot/energy", "shoot/nmse", "flow/cos", "std/mean", "loss/flow")
EVALUATIONS = (
    "eval/named",
    "eval/coverage_excess",
    "eval/frechet",
    "eval/all_correct",
    "eval/mean_attribute_accuracy",
    CALLS,
    "perf/images_per_s",
)
STATUSES: tuple[Status, ...] = ("finished", "stopped", "waiting", "running", "failed")
MAX_TRIALS = 30  # in the table that stands open, and in the heat map
CONCLUSION, NEXT = "Conclusion", "Next step"  # the sections of report.md that belong to the reader
BLANK = {CONCLUSION: "- keep / reject / re-verify: not judged yet", NEXT: "- not written yet"}


def write_sweep_report(sweep_dir: Path) -> Path:
    """`write_pages` of a sweep directory; InputError also when sweep.yaml cannot be read."""
    return write_pages(load_sweep(sweep_dir))


def write_pages(sweep: Sweep) -> Path:
    """Write report.html, and report.md beside it, into a sweep's directory; returns the first's
    path.

    What a person wrote under Conclusion, Next step and headings of their own in report.md stays,
    and shows in both. InputError when a page cannot be written.
    """
    kept = hand_written(sweep.path / "report.md")
    context = {**_context(sweep), "kept": kept}
    write_markdown(sweep.path / "report.md", "sweep.md.j2", context)
    return write_page(sweep.path / "report.html", "sweep.html.j2", context)


def hand_written(report: Path) -> dict[str, str]:
    """The sections of a report.md from Conclusion on, by heading: they are the reader's.
    Conclusion and Next step as new where missing.
    """
    try:
        text = report.read_text("utf-8", errors="replace")
    except OSError:
        return dict(BLANK)
    start = re.search(rf"(?m)^## +({CONCLUSION}|{NEXT}) *$", text)
    parts = re.split(r"(?m)^## +(.+?) *$", text[start.start() :] if start else "")
    sections = {
        heading: body.strip() for heading, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {
        **BLANK,
        **{heading: body or BLANK.get(heading, "") for heading, body in sections.items()},
    }


def sweep_commands(
    sweep: Sweep, found: Sequence[Edge] | None = None, *, brief: bool = False
) -> dict[str, str]:
    """The commands that follow a sweep, by label, for the best trial; {} before there is one.

    found: its edges, where they are known; brief: without the command that best.yaml says, too,
    but at length.
    """
    if sweep.best is None:
        return {}
    best = sweep.best
    prompt = best.run.prompts[0] if best.run.prompts else "a small red circle on a white background"
    commands = {}
    if wider := wider_command(sweep, edges(sweep) if found is None else found):
        commands["Search on beyond the edges"] = wider
    if sweep.settings.get("task") == "sample":
        keys = {**dotted(sweep.settings.get("set")), **best.params}
        values = " ".join(
            f"--set {shlex.quote(f'{key}={yaml_value(value)}')}" for key, value in keys.items()
        )
        source = shlex.quote(str(sweep.settings.get("base")))
        return {
            "Sample with the best setting": (
                f"python -m flowray.sample {source} {shlex.quote(prompt)} {values}"
            )
        }
    if longer_known := (sweep.path / "best.yaml").is_file():
        # a budget counts all seeds
        steps = 4 * best.budget_steps // (sweep.settings.get("seeds") or 1)
        longer = (
            f"python -m flowray.train {shlex.quote(str(sweep.path / 'best.yaml'))}"
            f" train.steps={steps}"
        )
        commands["Train the best recipe longer"] = longer
    if (base := sweep.settings.get("base")) and not (brief and longer_known):
        keys = {**dotted(sweep.settings.get("set")), **best.params, "name": f"{sweep.name}-best"}
        values = " ".join(shlex.quote(f"{key}={yaml_value(value)}") for key, value in keys.items())
        commands["The same recipe from its base"] = (
            f"python -m flowray.train {shlex.quote(str(base))} {values}"
        )
    commands["Sample from the best trial"] = (
        f"python -m flowray.sample {shlex.quote(str(best.run.path))} {shlex.quote(prompt)}"
    )
    commands["Look at all trials (TensorBoard, optuna-dashboard)"] = dashboard_command(sweep)
    return commands


def dashboard_command(sweep: Sweep) -> str:
    """The command that opens what the dashboards draw of a sweep, and the report does not."""
    return f"python -m flowray.dashboard {shlex.quote(str(sweep.path))}"


def sweep_verdict(sweep: Sweep) -> str:
    """One sentence: the best trial, how many ended how, the share of full-budget steps saved."""
    ended = ", ".join(
        f"{count} {status}" for status in STATUSES if (count := len(sweep.by(status)))
    )
    spent = (
        f"{len(sweep.trials)} trials ({ended}); early stopping saved {sweep.saved:.0%} of the"
        " full-budget steps"
    )
    if not sweep.comparable:
        return f"{sweep.name}: {incomparable_words(sweep)} {spent}"
    if sweep.best is None:
        return f"{sweep.name}: no trial has a value of {sweep.metric.name}; {spent}"
    params = ", ".join(f"{key}={value_text(value)}" for key, value in sweep.best.params.items())
    score = sweep.best.value(sweep.metric.name)
    arm = next(
        (arm for arm in sweep.arms() if sweep.best in arm.trials and len(arm.values) > 1), None
    )
    mean = ""
    if arm:
        spread = f"± {statistics.stdev(arm.values):.2g} over {len(arm.values)} seeds"
        mean = f" {spread}" if len(arm.trials) == 1 else f" (mean {arm.mean:.3g} {spread})"
    best = f"best is trial {sweep.best.number}, {sweep.metric.name} {score:.3g}{mean}" + (
        f", with {params}" if params else ""
    )
    return f"{sweep.name}: {best}. {_front_words(sweep)}{spent}"


def _front_words(sweep: Sweep) -> str:
    """Of several metrics: that the best is so by the first, and which other trials are as good
    in their way; '' of one.
    """
    if len(sweep.metrics) < 2 or sweep.best is None:
        return ""
    others = [str(trial.number) for trial in front(sweep) if trial is not sweep.best]
    names = ", ".join(metric.name for metric in sweep.metrics[1:])
    beside = (
        f"trial {', '.join(others)} trade it for {names} (the front)"
        if others
        else f"no other finished trial is better in {names}"
    )
    return f"That is by the first metric; {beside}. "


def _context(sweep: Sweep) -> dict[str, Any]:
    key, best, varied = sweep.metric.name, sweep.best, sweep.varied()
    table = [
        key,
        *(metric.name for metric in sweep.metrics),
        *map(_as_probed(sweep), TABLE_METRICS),
        *_evaluations(sweep.trials),
    ]
    card = mapping(sweep.settings.get("card"))
    scored = (
        [trial for trial in sweep.trials if trial.value(key) is not None]
        if sweep.comparable
        else []
    )
    heat_keys, heat_rows = heat_map(sweep.trials[:MAX_TRIALS])
    rows, aside = _trial_pictures(sweep)
    edge = edges(sweep)
    return {
        "sweep": sweep,
        "card": card,
        "facts": _card_facts(sweep, card),
        "purpose": sweep.settings.get("description") or card.get("purpose"),
        "best": best,
        "verdict": sweep_verdict(sweep),
        "groups": scale_groups(sweep),
        "scale_of": {
            number: group.label for group in scale_groups(sweep) for number in group.numbers
        },
        "objectives": [metric.name for metric in sweep.metrics],
        "runner_up": runner_up_words(sweep),
        "for_calls": best_for_calls_words(sweep),
        "edges": edge,
        "diff": best_diff(sweep),
        "commands": sweep_commands(sweep, edge),
        "best_value": number_text(best.value(key)) if best else "",
        "baseline": baseline(key),
        "varied": varied,
        "fixed": {
            name: value
            for name, value in (sweep.trials[0].params if sweep.trials else {}).items()
            if name not in varied
        },
        "columns": list(
            dict.fromkeys(
                name for name in table if any(t.value(name) is not None for t in sweep.trials)
            )
        ),
        "shown": sweep.trials[:MAX_TRIALS],
        "folded": sweep.trials[MAX_TRIALS:],
        "counts": {status: len(sweep.by(status)) for status in STATUSES},
        "seconds": sum(trial.seconds for trial in sweep.trials),
        "hours": hours(sweep),
        "prompts": next((t.run.prompts for t in sweep.trials if t.run.prompts), ()),
        "grid_rows": rows[:SHOWN_ROWS],
        "grid_more": rows[SHOWN_ROWS:],
        "stage_rows": stages(best.run, key) if best else [],
        "grid_aside": aside,
        "heat_keys": heat_keys,
        "heat_rows": heat_rows,
        "failed": sweep.by("failed"),
        "dashboard": dashboard_command(sweep) if scored and varied else "",
        **_plots(sweep, scored),
    }


def _plots(sweep: Sweep, scored: Sequence[Trial]) -> dict[str, Any]:
    """The figures: curves and Pareto front; None or [] where there is nothing to draw."""
    key, best, best_front = sweep.metric.name, sweep.best, front(sweep)
    found: dict[str, Any] = {"curves": None, "pareto": [], "front": best_front}
    if not scored:
        return found
    found["curves"] = make_plot(
        figures.sweep_curves(
            f"{key} over steps", scored, best, key, without_flow(best.run, key) if best else ()
        ),
        f"{key} over steps of {len(scored)} trials",
        wide=True,
    )
    if best_front:
        alone = len(sweep.metrics) == 2
        for pair in itertools.combinations(sweep.metrics, 2):
            x, y = sorted(pair, key=lambda metric: metric.name != CALLS)  # a cost lies below
            svg = figures.pareto(scored, best_front, x, y, joined=alone)
            found["pareto"].append(
                make_plot(svg, f"{y.name} over {x.name}" + (", the front joined" if alone else ""))
            )
    return found


def _as_probed(sweep: Sweep) -> Any:
    """Keys as this sweep has them: measured on the EMA weights where they were."""
    have = {key for trial in sweep.trials for key in trial.metrics}
    return lambda key: f"ema/{key}" if f"ema/{key}" in have else key


def _card_facts(sweep: Sweep, card: dict[str, Any]) -> dict[str, str]:
    """The experiment card of the sweep: what is fixed, what is searched, what it runs
    on.
    """
    settings, config = (
        sweep.settings,
        next((t.run.config for t in sweep.trials if t.run.config), {}),
    )
    fixed = {**dotted(settings.get("set"))}
    space = {
        key: _range_text(spec)
        for key, spec in mapping(settings.get("parameters")).items()
        if isinstance(spec, dict)
    }
    workers, gpus = (
        config.get("resources.num_workers", 1),
        config.get("resources.gpus_per_worker", 0),
    )
    device = f"{gpus:g} GPU" if gpus else f"{config.get('resources.cpus_per_worker', 1)} core(s)"
    given = ", ".join(f"{key}={value_text(value)}" for key, value in fixed.items())
    facts = {
        "EXP_ID": sweep.name,
        "TITLE": card.get("title"),
        "PURPOSE": card.get("purpose") if settings.get("description") else "",
        "BASE": settings.get("base"),
        "KEY_DIFFS": card.get("key_diffs") or given,
        "SET": given if card.get("key_diffs") else "",
        "SEARCHED": "; ".join(f"{key} {text}" for key, text in space.items()),
        "METRIC": ", ".join(f"{metric.goal} {metric.name}" for metric in sweep.metrics),
        "METHOD": ", ".join(_method(settings)),
        "STOPS": "; ".join(_stop_texts(settings)),
        "DATASET": card.get("dataset") or config.get("card.dataset") or config.get("data.shards"),
        "HARDWARE": (
            card.get("hardware") or (f"{workers} worker(s) of {device} a trial" if config else "")
        ),
        "CORE PARAMS": card.get("core_params") or _core(config),
        "TAGS": ", ".join(map(str, card.get("tags") or [])),
        "NOTES": card.get("notes"),
    }
    known = {"title", "purpose", "key_diffs", "dataset", "hardware", "core_params", "tags", "notes"}
    facts |= {name.upper(): value_text(value) for name, value in card.items() if name not in known}
    return {name: str(text) for name, text in facts.items() if text}


def _method(settings: dict[str, Any]) -> list[str]:
    search = mapping(settings.get("search")).get("kind")
    words = [
        f"{settings.get('method', 'bayes')}{f' ({search})' if search else ''}",
        f"seed {settings.get('seed', 0)}",
    ]
    return (
        [*words, f"{settings['seeds']} seeds a setting"]
        if (settings.get("seeds") or 1) > 1
        else words
    )


def _core(config: dict[str, Any] | Any) -> str:
    named = {
        "head": "model.head.kind",
        "velocity": "model.velocity.kind",
        "batch": "train.batch_size",
        "steps": "train.steps",
    }
    return ", ".join(f"{name} {config[key]}" for name, key in named.items() if key in config)


def _stop_texts(settings: dict[str, Any]) -> list[str]:
    """Halving and the stop rules, in words."""
    texts = []
    if early := mapping(settings.get("early_terminate")):
        if early.get("type") == "asha":
            places = [
                f"at step {rung} the best 1/{eta:g} go on"
                for rung, eta in zip(early["rungs"], early["eta"], strict=True)
            ]
            texts.append(f"asha: {', '.join(places)}")
        else:
            eta = f", the best 1/{early['eta']:g} go on" if "eta" in early else ""
            texts.append(f"{early.get('type')} from step {early.get('min_iter')}{eta}")
    return [*texts, *map(rule_words, settings.get("stop") or [])]


def _range_text(spec: dict[str, Any]) -> str:
    when = "".join(
        f" when {key} is {' or '.join(map(value_text, values))}"
        for key, values in mapping(spec.get("when")).items()
    )
    if "values" in spec:
        return "{" + ", ".join(value_text(value) for value in spec["values"]) + "}" + when
    if "value" in spec:
        return value_text(spec["value"]) + when
    log = " log" if "log" in str(spec.get("distribution")) else ""
    return f"{value_text(spec.get('min'))} .. {value_text(spec.get('max'))}{log}{when}"


def _evaluations(trials: Iterable[Trial]) -> list[str]:
    """Keys of picture-level scores, where trials have them; with them the speed of drawing."""
    have = {key for trial in trials for key in trial.metrics}
    return [key for key in EVALUATIONS if key in have]


def _trial_pictures(sweep: Sweep) -> tuple[list[GridRow], list[str]]:
    """Rows trials x prompts, best first, and what is not shown and why.

    Only equal prompts and seeds are comparable.
    """
    first = next((t.run for t in sweep.trials if t.run.prompts), None)
    rows: list[GridRow] = []
    missing, other, seeds, beyond = list[str](), list[str](), list[str](), list[str]()
    for trial in sweep.trials:
        strip = trial.run.strips[-1] if trial.run.strips else None
        if strip is not None and first is not None and trial.run.prompts not in ((), first.prompts):
            other.append(str(trial.number))
        elif strip is not None and first is not None and _drawn_by(trial.run) != _drawn_by(first):
            seeds.append(str(trial.number))
        elif len(rows) == MAX_ROWS:
            beyond.append(str(trial.number))
        elif strip is not None and (pictures := pictures_of(strip)):
            value = number_text(trial.value(sweep.metric.name))
            rows.append(
                GridRow(
                    f"trial {trial.number}",
                    f"{value} at step {strip.step:,}",
                    pictures,
                    trial is sweep.best,
                )
            )
        else:
            missing.append(str(trial.number))
    said = (
        ("no pictures", missing),
        ("other prompts, so not comparable", other),
        ("another seed of the pictures, so not comparable", seeds),
        (f"beyond the best {MAX_ROWS}", beyond),
    )
    return rows, [
        f"Not shown ({why}): trial {', '.join(numbers)}." for why, numbers in said if numbers
    ]


def _drawn_by(run: Run) -> Any:
    """The seed of a run's pictures, where it is known."""
    return run.config.get("probes.seed")


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}
