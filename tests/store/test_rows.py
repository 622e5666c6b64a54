"""Row files: torn lines, what a resume keeps, numbers that JSON does not have."""

import json

from flowray.config.rows import parse_rows
from flowray.store.rows import RowWriter, read_rows


def test_rows_survive_a_torn_last_line_and_a_resume_drops_what_comes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = RowWriter(path, last_step=0)
    for step in range(1, 8):
        writer.write({"step": step, "loss/flow": step / 3})
    assert [row["step"] for row in read_rows(path)] == list(range(1, 8))  # flushed without a close
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 8, "loss/fl')  # the writer was killed here
    assert [row["step"] for row in read_rows(path)] == list(range(1, 8))

    writer = RowWriter(path, last_step=5)
    writer.write({"step": 6, "loss/flow": 0.5})
    writer.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[4]["loss/flow"] == 5 / 3
    assert rows[5]["loss/flow"] == 0.5
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_row_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    writer = RowWriter(path, last_step=2)
    writer.write({"step": 3})
    writer.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_non_finite_numbers_become_null(tmp_path):
    path = tmp_path / "probes.jsonl"
    writer = RowWriter(path, last_step=0)
    writer.write({"step": 1, "a": float("nan"), "b": float("-inf"), "c": 0.0})
    writer.close()
    assert path.read_text() == '{"step": 1, "a": null, "b": null, "c": 0.0}\n'


def test_no_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "none.jsonl") == []


def test_lines_that_hold_no_row_are_numbered_but_for_a_torn_last_one():
    assert parse_rows('{"a": 1}\n[2]\nx\n\n{"b": 2}\n{"c') == ([{"a": 1}, {"b": 2}], [2, 3])
