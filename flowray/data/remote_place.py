"""An object store or web server by its addresses: asked again where it fails, written to whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError
from flowray.data.remote import Found, filesystem, plain, retried


class RemotePlace:
    """One protocol's file system, that of `url`. A name is an address as fsspec has it, without
    `s3://`.

    Every method tries again, ever more slowly; InputError, one line, where the server never answers
    or forbids it.
    """

    def __init__(self, url: str):
        self.protocol = url.partition("://")[0]
        self.fs = filesystem(url)
        self.lists = not self.protocol.startswith("http")

    def name(self, url: str) -> str:
        return str(self.fs._strip_protocol(url))

    def url(self, name: str) -> str:
        return name if name.startswith(f"{self.protocol}://") else f"{self.protocol}://{name}"

    def ask(self, name: str, call: Callable[[], Any]) -> Any:
        """What the call finds; None where nothing is there."""
        with suppress(FileNotFoundError):
            return self._try(name, "read", call)
        return None

    def ls(self, name: str) -> list[dict[str, Any]]:
        """fsspec's rows of what is in a folder."""
        return self.ask(name, lambda: self.fs.ls(name, detail=True)) or []

    def read(self, name: str) -> bytes | None:
        """A small file's content."""
        found = self.ask(name, lambda: self.fs.cat_file(name))
        return None if found is None else bytes(found)

    def get(self, name: str, file: Path) -> bool:
        """Fetch a file, of the size that the server says; False where there is none."""

        def get() -> bool:
            self.fs.get_file(name, str(file))
            if (here := file.stat().st_size) != (size := self.fs.info(name)["size"]):
                raise ConnectionError(f"got {here} of {size} bytes")
            return True

        return bool(self.ask(name, get))

    def put(self, file: Path, name: str) -> None:
        """Send a file that stays as it is; FileNotFoundError where it does not."""
        size = file.stat().st_size

        def put() -> None:
            self.fs.put_file(str(file), name)
            if (there := self.fs.info(name)["size"]) != size:
                raise ConnectionError(f"{there} of {size} bytes came there")

        self._try(name, "written", put)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file; FileNotFoundError where there is no such bucket."""
        self._try(name, "written", lambda: self.fs.pipe_file(name, content))

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file where there is none; False, and nothing written, where there is one.

        S3 and Google's storage decide it themselves, others are asked before.
        """

        def create() -> bool:
            try:
                self.fs.pipe_file(name, content, mode="create")
            except Exception:  # each library has its own kind
                if self.fs.exists(name):
                    return False
                raise
            return True

        return self._try(name, "written", create)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, in this order; those that are not there are as they should be."""
        for name in names:
            with suppress(FileNotFoundError):
                self._try(name, "written", partial(self.fs.rm_file, name))

    def _try(self, name: str, done: str, call: Callable[[], Found]) -> Found:
        url = self.url(name)
        try:
            return retried(url, call)
        except PermissionError as error:
            raise InputError(f"{url}: cannot be {done}: {plain(error)}") from None
