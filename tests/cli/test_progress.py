"""Live progress from the files of a run: the doctor's findings are told once, and again when they come back."""

import io

from flowray.cli.progress import RunProgress
from flowray.store.rows import RowWriter
from flowray.store.run import RunDirectory


def finding(name):
    return {"id": name, "severity": "bad", "evidence": f"{name} it is"}


def test_a_line_for_every_new_finding(tmp_path):
    run, stream = RunDirectory(tmp_path), io.StringIO()
    progress = RunProgress(run, 40, 0, stream)
    writer = RowWriter(run.findings, 0)
    lines = []
    for step, ids in ((10, ["a"]), (20, ["a", "b"]), (30, []), (40, ["a"])):
        writer.write({"step": step, "findings": [finding(name) for name in ids]})
        progress.show(now=True)
        lines.append([line.split("] ", 1)[1] for line in stream.getvalue().splitlines()])
    said = lines[-1]
    assert [len(so_far) for so_far in lines] == [1, 2, 2, 3]
    assert said == ["doctor 10/40  bad: a: a it is", "doctor 20/40  bad: b: b it is", "doctor 40/40  bad: a: a it is"]
