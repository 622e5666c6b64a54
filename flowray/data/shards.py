"""Writing and finding shards: ordinary webdataset tars (`KEY.png`, `KEY.txt`, `KEY.json`) beside
a `manifest.json`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError, did_you_mean
from flowray.config.jsons import parse_json
from flowray.config.paths import exists, is_address, is_file, is_folder, no_such
from flowray.data.folders import is_clutter, put_in_place
from flowray.data.remote import RemoteCache, opened, stat_of

MANIFEST = "manifest.json"
EMBEDDED = ("shapes", "shapes_closed", "digits")  # the names that stand for sets made on first use
# those that stand for sets which only `flowray.data make` makes, as they are fetched
FETCHED = ("emoji_64", "emoji_128", "emoji_256")
NAMED = (*EMBEDDED, *FETCHED)
# folders of these names are parts of a set that must not be read as one
SPLITS = ("train", "val", "valid", "validation", "dev", "eval", "test", "unseen", "held_out")
MOST_SHARDS = 1_000_000  # that a pattern may name


def write_shards(
    folder: Path, samples: Iterable[dict[str, Any]], *, per_shard: int = 1000, meta: dict[str, Any]
) -> Path:
    """Write `samples` as `folder/shard-000000.tar` ... and `folder/manifest.json`; returns
    `folder`.

    samples: dicts of `__key__` (str, no dot after its last slash) and `extension: bytes`, the bytes
    already encoded.
    meta: what made the samples; kept in the manifest, never read here. The same samples give the
    same bytes. Everything goes to a hidden sibling folder that is renamed at the end, so the folder
    is there whole or not at all. InputError where it exists already with something in it, cannot be
    written, or no sample came.
    """
    with whole_folder(folder) as partial:
        if not fill_folder(partial, samples, per_shard=per_shard, meta=meta):
            raise InputError(f"{folder}: no samples to write")
    return folder


def fill_folder(
    folder: Path,
    samples: Iterable[dict[str, Any]],
    *,
    per_shard: int,
    meta: dict[str, Any],
    take: Callable[[Path], None] | None = None,
) -> int:
    """`write_shards` into a folder that is there, for use within `whole_folder`; how many
    samples came. take: gets every shard when it is whole, and may remove it.
    """
    if per_shard < 1:
        raise InputError(f"per_shard {per_shard}: a shard holds at least 1 sample")
    rest, seen, shards = iter(samples), set[str](), list[dict[str, Any]]()
    while (first := next(rest, None)) is not None:
        name = f"shard-{len(shards):06d}.tar"
        count = _write_tar(folder / name, chain([first], islice(rest, per_shard - 1)), seen)
        size = (folder / name).stat().st_size
        shards.append(
            {"name": name, "samples": count, "bytes": size, "sha256": sha256(folder / name)}
        )
        if take:
            take(folder / name)
    manifest = {"meta": meta, "samples": len(seen), "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return len(seen)


def refuse_occupied(folder: Path) -> None:
    """InputError where something is there already, but for an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder}: exists already and is not an empty folder; remove it or choose another"
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A hidden sibling to write in, renamed to `folder` on success and removed on any exception."""
    refuse_occupied(folder)
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}"
    try:
        partial.mkdir(parents=True)
        yield partial
        put_in_place(partial, folder, last=MANIFEST)
    except OSError as error:
        refuse_occupied(folder)  # another writer was first
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_set(out: Path | str) -> Iterator[tuple[Path, Callable[[Path], None] | None]]:
    """`whole_folder`, of an address too: a folder to fill, and the `take` of `fill_folder`."""
    if isinstance(out, str):
        from flowray.data.remote_sets import packing_to  # it is built on what is here

        with packing_to(out) as (partial, take):
            yield partial, take
    else:
        with whole_folder(out) as partial:
            yield partial, None


def left_partials(folder: Path) -> list[Path]:
    """What writers of `folder` that were killed left: the hidden siblings of `whole_folder`."""
    return sorted(folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 12}"))


def _write_tar(path: Path, samples: Iterable[dict[str, Any]], seen: set[str]) -> int:
    """One tar; `seen` holds the keys of the shards before it and gets its own."""
    from webdataset.writer import TarWriter  # slow to import, and reading needs none of it

    count = 0
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            key = sample["__key__"]
            if not key or "." in key.rpartition("/")[2]:
                raise InputError(
                    f"sample key {key!r}: webdataset ends a key at its first dot; use letters,"
                    " digits, '_' and '-'"
                )
            if key in seen:
                raise InputError(
                    f"sample key {key!r} comes twice; keys must differ over all shards"
                )
            seen.add(key)
            tar.write(sample)
            count += 1
    return count


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_shards(spec: str, cache: RemoteCache | None = None) -> tuple[Path, ...]:
    """The tars of a folder, of a glob (`**` any folders), of a pattern with braces
    (`{00000..00127}.tar`), or the one tar `spec` names, sorted by path. Hidden files are none.
    Those of an address have their places in `cache`, the usual one unless given.

    A folder without tars of its own stands for those under it, unless a folder among them is a
    split such as `val`. InputError where nothing is found, a tar that braces name is not there, the
    tars hold no sample at all, or one has a path that is no UTF-8.
    """
    if is_address(spec):
        from flowray.data.remote_sets import find_remote  # it is built on what is here

        return find_remote(spec, cache or RemoteCache.of())
    path = Path(spec)
    if not (is_folder(path) or is_file(path)) and "{" in spec and not glob.glob(spec):
        found, what = _of_braces(spec), ""
    else:
        found, what = _of_one(spec)
    if not found:
        # who takes names has looked for them before: this one does not, or it is misspelt
        named = "" if spec in NAMED else f"{', '.join(NAMED)}, "
        raise InputError(
            f"shards {spec!r}: {what}; give {named}a folder of .tar files, a glob or one .tar"
        )
    if odd := next((tar for tar in found if not _is_text(tar)), None):
        raise InputError(f"shards {spec!r}: {str(odd)!r} is no UTF-8; rename it")
    if not any(_starts_with_a_member(tar) for tar in found):
        raise InputError(
            f"shards {spec!r}: {len(found)} .tar file(s) but not one sample in them, first"
            f" {found[0]}"
        )
    return tuple(found)


def _of_one(spec: str) -> tuple[list[Path], str]:
    """The tars of a spec without braces, and, where there are none, why."""
    path = Path(spec)
    if is_folder(path):
        found, what = tars(path), "the folder holds no .tar file"
        if not found and (below := splits(path)):
            if not any(folder.name.lower() in SPLITS for folder in below):
                return sorted(tar for folder in below for tar in tars(folder)), ""
            names = ", ".join(folder.name for folder in below[:5])
            what += f", but these under it do: {names}; did you mean {below[0]}?"
        return found, what
    if is_file(path):
        if not _is_tar(path):
            raise InputError(
                f"shards {spec!r}: not a .tar file; give a folder of .tar files, a glob or one"
                " uncompressed .tar"
            )
        return [path], ""
    if glob.has_magic(spec):
        matching = (Path(p) for p in glob.glob(str(path), recursive=True))
        return sorted(p for p in matching if _is_tar(p)), "no .tar file matches"
    near = "" if exists(path) or path.name in NAMED else did_you_mean(path.name, NAMED)
    return [], f"no such folder{near}" if near else no_such(path)


def _of_braces(spec: str) -> list[Path]:
    """The tars of every alternative; InputError where one of them has none."""
    each = expand_braces(spec)
    if each == [spec]:
        return _of_one(spec)[0]
    found, lacking = set[Path](), list[str]()
    for one in each:
        of_one, _ = _of_one(one)
        found.update(of_one)
        lacking += [] if of_one else [one]
    if lacking:
        raise InputError(
            f"shards {spec!r}: {len(lacking)} of {len(each)} are not there, first {lacking[0]};"
            " a glob takes those that are"
        )
    return sorted(found)


def expand_braces(spec: str) -> list[str]:
    """Every alternative of a pattern with braces; the spec itself where it has none."""
    from braceexpand import braceexpand  # webdataset brings it and reads patterns so

    # braceexpand makes all numbers of a range before it gives the first name
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", spec)
    many = any(abs(int(last) - int(first)) >= MOST_SHARDS for first, last in ranges)
    try:
        each = [] if many else list(islice(braceexpand(spec), MOST_SHARDS + 1))
    except ValueError as error:  # unbalanced ones
        raise InputError(f"shards {spec!r}: {error}") from error
    if many or len(each) > MOST_SHARDS:
        raise InputError(f"shards {spec!r}: more than {MOST_SHARDS} names; use a glob")
    return each


def lacking(spec: str, found: Iterable[Path]) -> list[Path]:
    """The shards that the manifests beside those found for a spec name, and that are not there.

    Only of a folder or a named set: who names some tars of one has not asked for the others.
    """
    there = set(found)
    remote = is_address(spec)
    some = spec.lower().endswith(".tar") or any(sign in spec for sign in "*?[{")
    if some if remote else not (spec in NAMED or is_folder(Path(spec))):
        return []
    named = (folder / name for folder in {path.parent for path in there} for name in _named(folder))
    return sorted(path for path in named if path not in there and (remote or not path.exists()))


def _named(folder: Path) -> list[str]:
    """The shards right in a folder that its manifest names; none where another program, or
    nobody, wrote it.
    """
    try:
        rows = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))["shards"]
        return [name for row in rows if (name := str(row["name"])) == Path(name).name]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def are_plain(paths: Iterable[Path]) -> list[bool]:
    """Of each tar whether `flowray.data` made or packed it, by the manifest beside it: its pictures
    are PNGs of 8-bit RGB then, with nothing to turn, blend or convert. It reads no sample.
    """
    by_folder: dict[Path, dict[str, int]] = {}
    plain = []
    for path in paths:
        if path.parent not in by_folder:
            by_folder[path.parent] = _written_here(path.parent)
        plain.append(by_folder[path.parent].get(path.name) == stat_of(path)[0])
    return plain


def _written_here(folder: Path) -> dict[str, int]:
    """The tars of a folder that was made or packed, and their sizes; none where another program,
    or nobody, wrote a manifest.
    """
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        told = manifest["meta"].keys()
        if "set" not in told and not {"source", "size"} <= told:
            return {}
        return {row["name"]: row["bytes"] for row in manifest["shards"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def tars(folder: Path) -> list[Path]:
    """The .tar files right in a folder, sorted; hidden ones apart, as macOS's `._NAME.tar`."""
    return sorted(path for path in folder.glob("*") if _is_tar(path) and path.name[0] != ".")


def splits(folder: Path) -> list[Path]:
    """The folders in a folder that have .tar files, sorted; hidden ones and systems' own apart."""
    below = (path for path in folder.glob("*") if path.is_dir() and not is_clutter(Path(path.name)))
    return sorted(path for path in below if tars(path))


def _is_text(path: Path) -> bool:
    """Whether manifests and pages, which are UTF-8, can name it."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def _starts_with_a_member(tar: Path) -> bool:
    stat_of(tar)
    try:
        with tar.open("rb") as file:
            return any(file.read(512))
    except OSError as error:
        raise InputError(f"shard {tar}: cannot be read: {error.strerror}") from error
