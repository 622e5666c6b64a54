"""Live progress from the files of a run: the doctor's findings are told once, and again when they come back; silence is told."""

import io
import time

from flowray.cli import progress as module
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


def test_a_silence_is_told_but_not_at_every_beat(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.0)
    monkeypatch.setattr(module, "SILENT_S", 0.05)
    run, stream = RunDirectory(tmp_path), io.StringIO()
    progress, writer = RunProgress(run, 40, 0, stream), RowWriter(run.metrics, 0)
    for step in (1, 2):
        writer.write({"step": step, "loss/flow": 1.0, "perf/images_per_s": 1.0})
        for _ in range(10):
            progress.show()
            time.sleep(0.01)
    lines = ["silent" if "no step for" in line else "step" for line in stream.getvalue().splitlines()]
    assert lines[0] == "step"
    assert lines.count("step") == 2
    assert 1 <= lines[1:].index("step") <= 2  # told once or twice in a tenth of a second, not at every beat
    assert lines[-1] == "silent"
