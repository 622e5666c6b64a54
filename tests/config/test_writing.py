"""Files written whole: what a write leaves, and one that failed or was killed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import files_of_at_most

from flowray.config.writing import write_whole


@pytest.mark.parametrize("how", [{}, {"durable": True}, {"shared": True}])
@pytest.mark.parametrize("content", ["größer", b"\x89PNG\r\n"])
def test_the_new_file_is_whole_and_alone(
    tmp_path: Path, content: str | bytes, how: dict[str, bool]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("old")
    write_whole(file, content, **how)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("old")
    with files_of_at_most(4096), pytest.raises(OSError, match="large"):
        write_whole(file, "x" * 10_000)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_many_writers_at_once(tmp_path: Path) -> None:
    file, texts = tmp_path / "index.json", [str(n) * 200_000 for n in range(8)]
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(lambda text: write_whole(file, text, shared=True), texts * 4))
    assert file.read_text() in texts
    assert list(tmp_path.iterdir()) == [file]
