"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # a full disk, or a spent quota


def write_whole(
    path: Path, content: str | bytes, *, durable: bool = False, shared: bool = False
) -> None:
    """Replace a file in one step: a reader, or a start after a crash, sees the old one or the new
    one, never half of it. OSError leaves the old one, and nothing beside it.

    durable: on disk before the old one goes, so that a machine that loses power has one of the two.
    shared: several processes may write it at once; what a killed one leaves beside it then stays.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12] if shared else 'partial'}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
