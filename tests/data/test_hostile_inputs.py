"""Hostile and odd inputs: nothing runs, nothing is touched that is not of the set, memory is
bounded; and what becomes of each, here and in stock webdataset, is what docs/odd-inputs.md says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import CANARY, TEXT, Case, noise, sample, tar_of
from hostile_arms import MEMORY
from hostile_folders import FOLDERS
from hostile_samples import BOMBS, BROKEN, CAPTIONS, FORMS, KNOWN
from hostile_specs import BESIDE, SPECS
from hostile_tars import ARCHIVES, MEMBERS, NAMES
from support import PICTURE, SPEC, tiny_autoencoder, tiny_pictures

from flowray.config.model import KLAutoencoder
from flowray.config.train import DataConfig
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.splits import BAD_SAMPLES

ROOT = Path(__file__).parents[2]
GROUPS = {
    "Archives": ARCHIVES,
    "Names and keys": NAMES,
    "Members": MEMBERS,
    "What data.shards names": SPECS,
    "Indexes and manifests beside a good tar": BESIDE,
    "Broken pictures": BROKEN,
    "Bombs": BOMBS,
    "Kinds of files": FORMS,
    "Colours, depths and turns": KNOWN,
    "Captions": CAPTIONS,
}
PACKED = "Folders, by `flowray.data pack`"
CASES = [case for group in GROUPS.values() for case in group]
Run = tuple[Case, Path, dict[str, Any]]


def documented() -> dict[str, dict[str, list[str]]]:
    """Heading -> input -> [flowray, stock webdataset], of docs/odd-inputs.md."""
    found: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in (ROOT / "docs" / "odd-inputs.md").read_text(encoding="utf-8").splitlines():
        heading = line.removeprefix("## ") if line.startswith("## ") else heading
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and heading and cells[0] != "input":
            found.setdefault(heading, {})[cells[0]] = cells[1:]
    return found


def run(folder: Path, arm: str, cases: list[Case] = CASES) -> list[Run]:
    """The cases, written anew and read by one of the arms."""
    places = [folder / f"{number:03d}" for number in range(len(cases) + 1)]
    for place in places:
        place.mkdir(parents=True)
    (places[0] / "good.tar").write_bytes(tar_of(sample()))
    (places[0] / "in").mkdir()
    for name, data in sample():
        (places[0] / "in" / str(name)).write_bytes(data)
    asked = [(str(places[0]), str(places[0]))]
    for case, place in zip(cases, places[1:], strict=True):
        asked.append((str(place), case.write(place).replace("{}", str(place))))
    (folder / "cases.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hostile_arms.py")), arm, "cases.json"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(zip(cases, places[1:], json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return run(tmp_path_factory.mktemp("ours"), "flowray")


def cause(one: dict[str, Any]) -> str:
    """That of a bad sample, by its fault or the line that names it."""
    if "cause" in one:
        return str(one["cause"])
    told = one["bad"]
    causes = {" no picture (": "no picture", " does not decode": "does not decode"}
    return next((name for words, name in causes.items() if words in told), "no caption")


def by_flowray(case: Case, found: dict[str, Any]) -> str:
    """What became of it, as the table has it."""
    if line := found["refused"]:
        why = re.sub(r"^shards '.*?': |^shard \S+: ", "", line)
        short = re.split("; |: |, first |,? at or just after", why)[0]
        # which of these it is differs by version of tarfile
        return f"refused: {short}".replace("not a plain tar", "corrupt")
    bad = [cause(one) for one in found["samples"] if "bad" in one]
    parts = [f"{len(found['samples']) - len(bad)} read"]
    parts += [f"{count} left out: {why}" for why, count in Counter(bad).items()]
    parts += ["the .npy refused"] * any(
        "npy" in one and "cause" not in one for one in found["samples"]
    )
    return ", ".join(parts)


def by_pack(found: dict[str, Any]) -> str:
    return "nothing packed, one line" if found["refused"] else f"{found['packed']} packed"


def by_stock(case: Case, place: Path, found: dict[str, Any]) -> str:
    if "raised" in found:
        return found["raised"]
    programs = re.findall(r"subprocess.Popen \('(?:.*/)?(\w+)'", " ".join(found["ran"]))
    if place.with_name(f"{place.name}.{CANARY}").exists():
        ran = ["runs its code"]
    else:
        ran = [f"starts {programs[0]}"] if programs else []
    error = "out of memory" if found.get("memory") else found["error"]
    error = "an error" if programs and error else error  # which one is a race of two processes
    count = len(found["samples"])
    parts = [*ran, *([f"{count} read"] if count or not error else []), *([error] if error else [])]
    b = next((one for one in found["samples"] if one["key"] == "b"), {})
    if case.right is not None and "pixels" in b and not fits(case, b["pixels"]):
        parts.append("other pixels")
    if (
        case.captions
        and len(case.captions) == 1
        and b.get("text", TEXT) not in (*case.captions, TEXT)
    ):
        parts.append("another text")
    return ", ".join(parts)


def fits(case: Case, pixels: Any) -> bool:
    got, right = np.asarray(pixels, float), np.asarray(case.right, float)  # of one colour: (3,)
    same_shape = right.shape in (got.shape, (3,), ())
    return same_shape and bool(abs(got - right).max() <= case.off)


def test_each_case_has_its_row_and_each_row_its_case() -> None:
    groups = {**GROUPS, PACKED: FOLDERS}
    names = {heading: [case.name for case in group] for heading, group in groups.items()}
    assert {heading: list(rows) for heading, rows in documented().items()} == names
    assert len({case.name for case in CASES}) == len(CASES) >= 80


def test_flowray_does_what_is_documented(ours: list[Run]) -> None:
    rows = {name: row for group in documented().values() for name, row in group.items()}
    assert [case.name for case, _, found in ours if "raised" in found] == []
    got = {case.name: by_flowray(case, found) for case, _, found in ours}
    assert got == {name: rows[name][0] for name in got}
    for case, _, found in ours:
        for one in found["samples"]:
            if "bad" in one:
                continue
            mine = one["key"] == "b"
            captions = case.captions if mine and case.captions else (TEXT,)
            assert tuple(one["captions"]) == captions, case.name
            if mine and case.right is not None:
                assert fits(case, one["pixels"]), case.name
            elif one["size"] == [PICTURE, PICTURE]:
                assert one["pixels"] in (noise(1).tolist(), noise(2).tolist()), case.name


def test_nothing_runs_and_nothing_else_is_touched(ours: list[Run]) -> None:
    refuse_harm(ours)


def refuse_harm(runs: list[Run]) -> None:
    for case, place, found in runs:
        assert (found["ran"], found["escaped"]) == ([], []), case.name
        assert found["peak"] < MEMORY, case.name
        assert not place.with_name(f"{place.name}.{CANARY}").exists(), case.name
    folder = runs[0][1].parent
    assert {path.suffix for path in folder.iterdir()} == {"", ".json"}


def test_pack_does_what_is_documented(tmp_path: Path) -> None:
    runs = run(tmp_path, "pack", FOLDERS)
    assert [case.name for case, _, found in runs if "raised" in found] == []
    got = {case.name: [by_pack(found)] for case, _, found in runs}
    assert got == documented()[PACKED]
    for case, place, found in runs:
        assert "\n" not in found["refused"], case.name
        there = {path.name for path in place.iterdir()}
        assert there == ({"in"} if found["refused"] else {"in", "out"}), case.name
    refuse_harm(runs)


def test_check_says_so(ours: list[Run]) -> None:
    """What training would refuse or leave out is bad, and is one line each."""
    for case, _, found in ours:
        told = found["checked"]
        assert all("\n" not in line for line in [*told, found["refused"]]), case.name
        wrong = bool(found["refused"]) or any("bad" in one for one in found["samples"])
        if wrong:
            assert any(line.startswith(("bad", "refused")) for line in told), case.name
        if case.told:
            assert any(re.search(case.told, line) for line in told), (case.name, told)


def test_the_encode_leaves_out_the_same(tmp_path: Path, ours: list[Run]) -> None:
    (tmp_path / "train").mkdir()
    read, bad = list[tuple[str, str]](), list[tuple[str, str, str]]()
    empty = list[tuple[str, str, str]]()
    for case, place, found in ours:
        if found["refused"] or case in BOMBS or case in BESIDE:  # which all have the same tar
            continue
        samples, tars = iter(found["samples"]), sorted(place.glob("*.tar"))
        for tar in [tar for tar in tars if not tar.stat().st_size]:
            tars.remove(tar)
            empty.append((f"{place.name}-empty.tar", "", "0 bytes"))
            shutil.copy(tar, tmp_path / "train" / empty[-1][0])
        for tar in tars:
            name = f"{place.name}-{len(read) + len(bad):04d}.tar"
            shutil.copy(tar, tmp_path / "train" / name)
            for _ in range(len(found["samples"]) // len(tars)):
                one = next(samples)
                if "bad" in one:
                    bad.append((name, one["key"], cause(one)))
                elif one["size"] != [PICTURE, PICTURE]:
                    bad.append((name, one["key"], "another size"))
                else:
                    read.append((name, one["key"]))
    data = DataConfig(
        shards=str(tmp_path / "train"),
        val_shards=str(tiny_pictures(tmp_path / "val", 8)),
        cache=str(tmp_path / "cache"),
        max_bad=1,
    )
    config = KLAutoencoder(path=str(tiny_autoencoder(tmp_path / "autoencoder")))
    folder = ensure_latents(data, config, SPEC)["train"]
    rows = [json.loads(line) for line in (folder / BAD_SAMPLES).read_text().splitlines()]
    assert [(Path(row["shard"]).name, row["key"], row["cause"]) for row in rows] == empty + bad
    latents = load_latents(folder)
    assert latents.reader.keys == latents.picture_reader().keys == [key for _, key in read]
    assert latents.moments(np.arange(len(latents))).mean.isfinite().all()
    texts = [latents.captions(i) for i in range(len(latents))]
    pictures = latents.picture_reader()
    assert texts == [pictures.captions(i) for i in range(len(latents))]


@pytest.mark.slow
@pytest.mark.skipif(version("webdataset") != "1.0.2", reason="the documented version is another")
def test_stock_webdataset_does_what_is_documented(tmp_path: Path) -> None:
    rows = {name: row for group in documented().values() for name, row in group.items()}
    got = {case.name: by_stock(case, place, found) for case, place, found in run(tmp_path, "stock")}
    assert got == {name: rows[name][1] for name in got}
