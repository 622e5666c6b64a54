"""Paths of recipes and sweeps: which keys hold one, where it starts, what is said of a missing one.

What is read (data, models, a base) starts from the file that names it; what is written
(storage_path) lies in FLOWRAY_STORAGE or the working directory, whoever names it. A key that holds
a path says so in its annotation (`PathField`). Loading makes every such value absolute, once: Ray's
workers run in folders of their own, where a relative one means another place.
"""

from __future__ import annotations

import difflib
import errno
import glob
import os
import re
import shlex
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Annotated, Any, TypeVar

from pydantic.fields import FieldInfo

from flowray.config.errors import InputError

# the folder that all nodes share; where set, relative storage paths lie in it
STORAGE = "FLOWRAY_STORAGE"

# huggingface_hub's rule for a repository id: `name` or `org/name`
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_STARTS = ("/", "~", "$", "./", "../")
_FILES = (".bin", ".ckpt", ".gguf", ".json", ".pt", ".pth", ".safetensors", ".tar", ".yaml", ".yml")

# the addresses that shards may have
PROTOCOLS = ("s3", "gs", "hf", "https", "http")
WRITABLE = ("s3", "gs")  # of them

Value = TypeVar("Value")


@dataclass(frozen=True)
class PathField:
    """Annotation of a config field whose text (or texts) are paths.

    names: what is a name and no path, such as `embedded`.
    hub: `org/name` may be a model of the Hugging Face hub.
    pattern: may hold the wildcards of `glob`.
    remote: may be an address (`s3://...`).
    bucket: is the address of a bucket's folder, and no path.
    root: of what is written: the environment variable of the folder of relative paths, which is the
    working directory where that is not set.
    run: a run or sweep that is there already; one not found from that folder is looked for from the
    file's and from the working directory.
    """

    names: tuple[str, ...] = ()
    hub: bool = False
    pattern: bool = False
    remote: bool = False
    bucket: bool = False
    root: str = ""
    run: bool = False


OptionalPath = Annotated[str | None, PathField()]
SETS = ("shapes", "shapes_closed", "digits", "emoji_64", "emoji_128", "emoji_256")
ShardsPath = Annotated[str, PathField(names=SETS, pattern=True, remote=True)]
OptionalShards = Annotated[str | None, PathField(pattern=True, remote=True)]
OptionalBucket = Annotated[str | None, PathField(bucket=True)]
StoragePath = Annotated[str, PathField(root=STORAGE)]
RunPaths = Annotated[tuple[str, ...], PathField(root=STORAGE, run=True)]
OptionalRun = Annotated[str | None, PathField(root=STORAGE, run=True)]
SHIPPED = ("embedded", "embedded_emoji")  # the models in the package
# and those that `flowray.models fetch` puts into the cache
MODELS = (*SHIPPED, "smollm2", "minilm")
ModelPath = Annotated[str, PathField(names=MODELS, hub=True)]
OptionalModel = Annotated[str | None, PathField(hub=True)]


def path_field(field: FieldInfo) -> PathField | None:
    """How a config field holds paths, None where it holds none."""
    return next((extra for extra in field.metadata if isinstance(extra, PathField)), None)


def looks_like_path(text: str) -> bool:
    """Whether a text can only be a path: its beginning, a slash in it, or a file's ending."""
    return text.startswith(_STARTS) or "/" in text or text.lower().endswith(_FILES)


def is_address(text: str) -> bool:
    """Whether a text is an address, of whatever protocol, and no path."""
    return "://" in text


def address(text: str) -> str:
    """The address of shards, without a last slash; InputError, which never repeats a secret, where
    the protocol is another one or credentials stand in it: it is written into the files of a run.
    """
    protocol, _, rest = text.partition("://")
    if protocol not in PROTOCOLS:
        got = f"{protocol}://" if re.fullmatch(r"[a-z0-9+.-]{1,20}", protocol) else "an address"
        raise InputError(f"got {got}, want a folder, or {'://, '.join(PROTOCOLS)}://")
    host = rest.partition("/")[0]
    if "@" in host or (protocol.startswith("http") and re.search("[?#]", rest)):
        end = host.rpartition("@")[2].partition("?")[0].partition("#")[0]
        raise InputError(
            f"got {protocol}://{end}... with a name, a password or a query in it, which would be"
            " written into the files of a run; credentials belong in the environment"
        )
    if not host:
        raise InputError(f"got {text!r}, want {protocol}:// and a place")
    return text.rstrip("/")


def is_hub_name(text: str, *folders: Path) -> bool:
    """Whether `text` names a model of the hub, `org/name` or `name`; what looks like a path, and
    what names a model of flowray's own, never does.

    A path starts with `/`, `./`, `../`, `~` or `$`, ends with `/`, has more than one slash, a drive
    or the ending of a file of weights, begins with something that exists in the first of `folders`,
    or is whole in another one. Loading gives the folders; what it has left a name is one anywhere.
    """
    if text in MODELS or not _HUB_NAME.fullmatch(text):
        return False
    if text.startswith(_STARTS) or text.lower().endswith(_FILES):
        return False
    begins = any(exists(folder / text.partition("/")[0]) for folder in folders[:1])
    return not begins and not any(exists(folder / text) for folder in folders[1:])


def exists(path: Path) -> bool:
    """Whether something is there; InputError where that cannot be seen, as in a closed folder."""
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    """`exists` for a file."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """`exists` for a folder."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    """Its st_mode, 0 where nothing is there."""
    try:
        return path.stat().st_mode
    except ValueError:  # a null byte
        return 0
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return 0
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def expand(text: str, *folders: Path) -> str:
    """`~`, `$NAME` and `${NAME}` replaced, `$$` being a plain `$`.

    What is there under that very name keeps its `$`, and so does a new file in such a folder.
    folders: what a relative one starts from, the working directory unless given.
    InputError where a variable or a home is not there.
    """
    very = Path(os.path.expanduser(text))
    starts = folders or (Path(),)
    if "$" in text and any(exists(folder / very) for folder in starts):
        return str(very)
    try:
        text = Template(text).substitute(os.environ)
    except (KeyError, ValueError) as error:
        if "$" in str(very.parent) and any(exists(folder / very.parent) for folder in starts):
            return str(very)
        why = "; a `$` that begins no variable is written `$$`"
        if isinstance(error, KeyError):
            why = f", but the environment variable {error.args[0]} is not set"
        raise InputError(f"got {text!r}{why}") from None
    whole = os.path.expanduser(text)
    if whole.startswith("~"):
        raise InputError(
            f"got {text!r}, but no such user is known; `./~...` is a file of that name"
        )
    return whole


def absolute(text: str, field: PathField, *folders: Path) -> str:
    """A path made absolute; names and hub names as they are.

    folders: what a path that is read starts from: the first where it is there, else the first.
    InputError, without the place: a variable is not set, an address (`s3://...`).
    """
    if text in field.names:
        return text
    if field.bucket and text.partition("://")[0] not in WRITABLE:
        got = f"{text.partition('://')[0]}://" if is_address(text) else repr(text)
        raise InputError(f"got {got}, want {':// or '.join(WRITABLE)}://, a bucket and a folder")
    if is_address(text):
        if field.remote or field.bucket:
            return address(expand(address(text)))
        mounted = "a folder; mount it on every node and type its path"
        instead = "the hub's name (org/name) or a folder" if field.hub else mounted
        raise InputError(f"got {text!r}, want {instead}")
    if field.hub and is_hub_name(text, *folders):
        return text
    if not text:
        raise InputError("got '', want a path")
    shared = [Path(os.environ[field.root])] if os.environ.get(field.root) else []
    if field.run:
        folders = (*shared, *folders, Path.cwd())
    elif field.root:
        folders = (*shared, Path.cwd())[:1]
    path = expand(text, *folders)
    if os.path.isabs(path):
        return _tidy(path)
    places = [_joined(folder.absolute(), path, field) for folder in folders]
    first, *others = places
    if others and not _is_there(first, field):
        first = next((place for place in others if _is_there(place, field)), first)
    return _tidy(first)


def _is_there(place: str, field: PathField) -> bool:
    return exists(Path(place)) or (field.pattern and bool(glob.glob(place)))


def _joined(folder: Path, path: str, field: PathField) -> str:
    literal = not field.pattern or not glob.has_magic(path) or exists(folder / path)
    return str(folder / path) if literal else os.path.join(glob.escape(str(folder)), path)


def _tidy(path: str) -> str:
    """Without `.`, `..` and a last slash, where that is the same place: `link/..` need not be."""
    plain = os.path.normpath(path)
    return plain if os.path.realpath(plain) == os.path.realpath(path) else path


def source_path(text: str, folder: Path | None = None) -> Path:
    """Of a recipe's or sweep's file, as a command or a `base:` in a file of `folder` has it.

    What is there under that very name needs no `$$`: the files of a run in a folder with a `$`.
    """
    very = (folder or Path()) / text
    return very if exists(very) else (folder or Path()) / expand(text, folder or Path())


def storage_folder(text: str = "runs") -> str:
    """The folder that a storage path names, absolute."""
    return absolute(text, PathField(root=STORAGE))


def storage_place(storage: Path) -> Path:
    """The folder to try: `storage`, or the one that it would be made in.

    InputError where neither is there: what is so far from being there is a slip of the pen, or a
    folder that is not mounted.
    """
    if storage.is_dir():
        return storage
    if storage.exists():
        raise InputError(f"--storage {storage}: a file, want a folder")
    if storage.parent.is_dir():
        return storage.parent
    there = next(folder for folder in storage.parents if folder.is_dir())
    raise InputError(
        f"--storage {storage}: no such folder, {there} is the nearest that is there; "
        f"mount it, type `mkdir -p {shlex.quote(str(storage))}`, or --storage FOLDER"
    )


def moved(file: Path, storage_path: str, name: str) -> dict[str, str]:
    """The storage_path and name of the run or sweep in whose folder `file` is.

    Nothing where they are those given: another way to the same folder does not rename the run.
    """
    here = file.absolute().parent
    if os.path.realpath(here) == os.path.realpath(os.path.join(storage_path, name)):
        return {}
    return {"storage_path": str(here.parent), "name": here.name}


def map_paths(value: Value, change: Callable[[str], str]) -> Value:
    """`value` with its texts changed: a path field holds one path, a list of them or null."""
    made: Any = value
    if isinstance(value, str):
        made = change(value)
    elif isinstance(value, list | tuple):
        made = type(value)(change(item) if isinstance(item, str) else item for item in value)
    return made


def make_absolute(
    value: Value, field: PathField | None, folders: Sequence[Path], place: str
) -> Value:
    """A config value with its paths absolute.

    folders: as `absolute` takes them.
    place: where it stands, 'r.yaml:3: data.cache', for the line of an InputError.
    """
    if field is None:
        return value
    try:
        return map_paths(value, lambda text: absolute(text, field, *folders))
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def written(text: str) -> str:
    """A resolved path as a file has it, so that reading gives it back."""
    return text.replace("$", "$$")


def argument(text: str) -> Path:
    """A path from the command line.

    The shell leaves `~` and variables inside quotes, and in `--option=~/x`, as they are.
    """
    return Path(expand(text))


def place_argument(text: str) -> Path | str:
    """A folder or an address from the command line."""
    whole = expand(text)
    return address(whole) if is_address(whole) else Path(whole)


def model_argument(text: str) -> str:
    """A model from the command line: `embedded`, a name of the hub, or a path, made absolute."""
    return absolute(text, PathField(names=MODELS, hub=True), Path.cwd())


def no_such(path: str | Path) -> str:
    """'no such folder, did you mean NEAREST?' (or file), whichever part of the path is misspelt.

    Of what is there and is of another kind than was wanted it says what it is.
    """
    path = Path(path)
    if kind := _kind(path):
        return f"there is {kind} of that name"
    what = "file" if path.name.lower().endswith(_FILES) else "folder"
    there = path.absolute()
    found = Path(there.anchor)
    for part in there.parts[1:]:
        inside = found / part
        try:
            is_there = exists(inside)
        except InputError:
            return f"no such {what} can be seen; {found} is closed to you"
        if not is_there:
            near = difflib.get_close_matches(part, _names(found), n=1)
            if not near:
                where = "" if found == there.parent else f"; {found} has no {part}"
                return f"no such {what}{where}"
            inside = found / near[0]
        found = inside
    return f"no such {what}, did you mean {found}?"


def _kind(path: Path) -> str:
    """What lies at a path, '' where nothing does or it cannot be seen."""
    try:
        mode = _mode(path)
    except InputError:
        return ""
    if not mode:
        return ""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
