"""The token that Ray's driver shows is the one that its processes ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray._raylet import AuthenticationTokenLoader

from flowray.cluster.access import MODE, TOKEN, TOKEN_PATH, require_token, take_token
from flowray.config.errors import InputError


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch):
    """No variable of the token's, and Ray reads the next test's anew."""
    for name in (MODE, TOKEN, TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    yield
    AuthenticationTokenLoader.instance().reset_cache()


def shown() -> str:
    """What this process would show to a Ray."""
    header = AuthenticationTokenLoader.instance().get_token_for_http_header()
    return " ".join(header.values()).removeprefix("Bearer ")


def test_a_token_that_is_not_there_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    missing = tmp_path / "my. files" / "token"
    monkeypatch.setenv(TOKEN_PATH, str(missing))
    with pytest.raises(InputError) as told:
        take_token()
    assert str(missing) in str(told.value)


def test_a_token_that_has_changed_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for home in (tmp_path / "one", tmp_path / "two"):
        monkeypatch.setenv("HOME", str(home))
        path = require_token()
        assert path == home / ".ray" / "auth_token"
        take_token()
        assert shown() == path.read_text()
    monkeypatch.setenv(TOKEN, "a" * 64)
    take_token()
    assert shown() == "a" * 64
