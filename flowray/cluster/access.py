"""Who may use a Ray that flowray starts: only who has the token. Ray's own services listen on every
interface, whatever address it is given (measured with 2.60: the GCS of a head on 127.0.0.1 is on
[::]), so that an address alone protects nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flowray.config.errors import InputError, last_line

# Ray's own variables
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # where Ray's clients look for a cluster
LOOPBACK = "127.0.0.1"


def require_token(*, make: bool = True, private: bool = False) -> Path | None:
    """The path of the token that Ray looks for, ~/.ray/auth_token; None where a variable holds it.

    make: one is made where there is none. Ray would make it readable for everybody on the machine;
    here it is the owner's alone (0600). private: of a Ray that ends with this process and that
    nobody joins; without a home that can be written the token is in this process's environment
    alone. InputError where there is none that can be read, or where token authentication is
    switched off: no Ray is started without it.
    """
    mode = os.environ.get(MODE, "token")
    if mode.lower() != "token":
        raise InputError(
            f"{MODE}={mode}: a Ray without a token runs the code of anybody who reaches this"
            f" machine; type `unset {MODE}`"
        )
    if os.environ.get(TOKEN):
        return None
    given = os.environ.get(TOKEN_PATH)
    path = Path(given or os.path.expanduser("~/.ray/auth_token"))
    if make and not given and (error := _make_token(path)):
        if private:
            os.environ[TOKEN] = secrets.token_hex(32)
            return None
        raise InputError(
            f"{path}: the token cannot be written: {error.strerror}; set {TOKEN_PATH}=FILE with a"
            " token in it"
        ) from error
    try:
        problem = "" if path.read_text().strip() else "it is empty"
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or "it is not text"
    if problem:
        raise InputError(
            f"{path}: no token: {problem}; copy the head's file of that name, mode 0600, or remove "
            f"it{f' and {TOKEN_PATH}' if given else ''} for a new one where a head is started"
        )
    return path


def _make_token(path: Path) -> OSError | None:
    """Make the file unless it is there; what was in the way."""
    if not path.is_absolute():
        return OSError(errno.ENOENT, "this user has no home")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        return None
    except OSError as error:
        return error
    return None


def take_token() -> None:
    """Take part in token authentication where a token is at hand: Ray's clients stay out of it
    unless RAY_AUTH_MODE is set. Ray's remark that it is on goes unsaid. InputError where what
    should hold a token holds none.

    Ray keeps the first token that a process reads; its processes read it anew, and refuse a driver
    whose token has changed since (another HOME or RAY_AUTH_TOKEN).
    """
    from ray.exceptions import AuthenticationError

    from flowray.cluster.ray_private import TokenLoader, token_setup

    TokenLoader.instance().reset_cache()
    with _quiet(token_setup.logger):
        try:
            token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        except AuthenticationError as error:
            raise InputError(last_line(error.message)) from None


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def start_command(options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A `ray start` command with these options, and its environment: token on, no other cluster's
    address. InputError where authentication is switched off.
    """
    require_token()
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ray = shutil.which("ray", path=beside) or "ray"
    kept = {name: value for name, value in os.environ.items() if name not in ADDRESSES}
    tracking = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}  # training runs show in the dashboard
    return [ray, "start", "--disable-usage-stats", *options], {**tracking, **kept, MODE: "token"}
