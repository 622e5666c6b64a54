"""Short hashes of what latents and features are made of, which name their caches."""

from __future__ import annotations

import hashlib
from pathlib import Path

from flowray.config.model import AutoencoderConfig
from flowray.config.paths import is_hub_name
from flowray.data import decode
from flowray.data.prepare import AS_THEY_ARE, Preparation
from flowray.data.reader import ShardReader
from flowray.data.shards import are_plain
from flowray.model.files import CONFIG, ModelFiles, open_autoencoder
from flowray.store.sums import Sums


def pictures_fingerprint(
    reader: ShardReader, sums: Sums, prepare: Preparation = AS_THEY_ARE
) -> str:
    """Short hash of the samples' keys, of what is left out, of their shards' content, and of how
    their pictures are decoded and prepared, where that is not plain.
    """
    digest = hashlib.sha256("\0".join(reader.keys).encode())
    if reader.without:  # keys may be the same in several shards
        digest.update(f"without {sorted(reader.without)}".encode())
    digest.update(" ".join(sums.of(reader.paths)).encode())
    # Looking into every picture takes too long; what was made or packed here is plain for sure.
    if not all(are_plain(reader.paths)):
        digest.update(f"decoded {decode.VERSION}".encode())
    if prepare.tag:
        digest.update(f"prepared {prepare.tag}".encode())
    return digest.hexdigest()[:12]


def autoencoder_fingerprint(config: AutoencoderConfig) -> str:
    """Short hash of the config and of the files that are read: their names and contents, or sizes
    and times where they are large.

    A hub name stands for itself. InputError where the path holds no autoencoder.
    """
    digest = hashlib.sha256(config.model_dump_json().encode())
    for file in () if is_hub_name(config.path) else _files(open_autoencoder(config.path)):
        content = (
            file.read_bytes()
            if file.stat().st_size < 2**25
            else f"{file.stat().st_size} {file.stat().st_mtime_ns}".encode()
        )
        digest.update(file.name.encode() + content)
    return digest.hexdigest()[:12]


def _files(found: ModelFiles | Path) -> tuple[Path, ...]:
    return (found,) if isinstance(found, Path) else (found.folder / CONFIG, *found.weights)
