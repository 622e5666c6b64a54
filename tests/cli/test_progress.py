"""What commands show while they work: lines for a log, bars for a terminal, the rows of a run as
they come.
"""

import io
import time

import pytest
from support import Heard

from flowray.cli import progress as module
from flowray.cli.progress import ConsoleProgress, RunProgress
from flowray.config.progress import duration
from flowray.store.doing import WrittenProgress, doing
from flowray.store.rows import RowWriter, add_row
from flowray.store.run import RunDirectory


def finding(name):
    return {"id": name, "severity": "bad", "evidence": f"{name} it is"}


def lines(stream):
    return [line.split("] ", 1)[1] for line in stream.getvalue().splitlines()]


def test_a_line_for_every_new_finding(tmp_path):
    run, heard = RunDirectory(tmp_path), Heard()
    progress = RunProgress(run, 40, 0, heard)
    writer = RowWriter(run.findings, 0)
    counts = []
    for step, ids in ((10, ["a"]), (20, ["a", "b"]), (30, []), (40, ["a"])):
        writer.write({"step": step, "findings": [finding(name) for name in ids]})
        progress.show(lambda count=1, note="": None)
        counts.append(len(heard.said))
    assert counts == [1, 2, 2, 3]
    told = ["doctor 10/40  bad: a: a it is", "doctor 20/40  bad: b: b it is"]
    assert heard.said == [*told, "doctor 40/40  bad: a: a it is"]


def test_a_silence_is_told_but_not_at_every_look(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SILENT_S", 0.05)
    run, heard = RunDirectory(tmp_path), Heard()
    progress, writer = RunProgress(run, 40, 0, heard), RowWriter(run.metrics, 0)
    done = []
    for step in (1, 2):
        writer.write({"step": step, "loss/flow": 1.0, "perf/images_per_s": 1.0})
        for _ in range(10):
            progress.show(lambda count=1, note="": done.append(count))
            time.sleep(0.01)
    assert sum(done) == 2
    assert 2 <= len(heard.said) <= 4  # once or twice in a tenth of a second, after each step


def test_a_probe_of_a_step_that_is_not_logged_counts_too(tmp_path):
    """train.log_every above train.probe_every: the count goes on, and before the probe's own
    line.
    """
    run, said = RunDirectory(tmp_path), []
    heard = Heard()
    progress, probes, metrics = (
        RunProgress(run, 16, 0, heard),
        RowWriter(run.probes, 0),
        RowWriter(run.metrics, 0),
    )
    heard.say = lambda text: said.append((sum(done), text))
    done, notes = [], []

    def look():
        progress.show(lambda count=1, note="": (done.append(count), notes.append(note)))
        return sum(done), notes[-1]

    assert look() == (0, "starting workers")
    probes.write({"step": 4, "ema/shoot/nmse": 0.5})
    assert look() == (4, "")
    assert look() == (4, "")
    metrics.write({"step": 6, "loss/flow": 0.5, "perf/images_per_s": 7.0})
    assert look()[0] == 6
    probes.write({"step": 8, "ema/shoot/energy": 0.8, "ema/shoot/nmse": 0.4})
    assert look()[0] == 8
    assert "0.500" in notes[-1]
    assert [at for at, _ in said] == [4, 8]
    assert said[1][1].endswith("  ema/shoot/energy 0.800  ema/shoot/nmse 0.400")


def test_start_up_says_what_the_worker_is_doing(tmp_path):
    run = RunDirectory(tmp_path)
    progress, notes = RunProgress(run, 40, 0, Heard()), []

    def look():
        progress.show(lambda count=1, note="": notes.append(note))

    worker = WrittenProgress(run)
    with worker.task("encoding train pictures", 64) as advance:
        look()
        advance(32)
    look()
    RowWriter(run.metrics, 0).write({"step": 2, "loss/flow": 0.5, "perf/images_per_s": 7.0})
    look()
    assert notes[0] == "encoding train pictures 0/64"
    assert (doing(run), notes[1]) == ("", "starting workers")
    assert "0.500" in notes[2]


def test_a_log_gets_few_lines_and_none_for_what_is_quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_S", 0.05)
    monkeypatch.setattr(module, "BEAT_S", 0.2)
    stream = io.StringIO()
    progress = ConsoleProgress(stream)
    with progress.task("quick"):
        pass
    with progress.task("outer"), progress.task("encoding", 1000) as advance:
        for _ in range(100):
            advance(10)
            time.sleep(0.01)
    said = lines(stream)
    assert said[0].startswith("encoding ")
    assert said[0].endswith("/1000")
    assert all(line.startswith("encoding ") and line.endswith(" left") for line in said[1:-1])
    assert 3 <= len(said) <= 8  # at 0.05, 0.25, 0.45 ... s of about one
    counts = [int(line.removeprefix("encoding ").split("/")[0]) for line in said]
    assert counts == sorted(set(counts))


def test_a_terminal_gets_a_bar_and_is_left_clean(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = ConsoleProgress(stream)

    def work():
        with progress.task("encoding", 10) as advance:
            advance(5)
            time.sleep(0.3)
            progress.say("a remark")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    shown = stream.getvalue()
    assert "5/10" in shown
    assert "a remark\n" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is back


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.4, "4 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_a_line_when_a_worker_is_lost_and_one_when_training_is_back(tmp_path):
    run, heard = RunDirectory(tmp_path), Heard()
    spent = {"steps_s": 0.0, "saving_s": 0.0, "probes_s": 0.0}
    ready = {**spent, "what": "ready", "began": 0.0}
    add_row(run.times, {"step": 0, "start": 1, "at": 1.0, **ready, "workers": 2})
    progress = RunProgress(run, 40, 10, heard)

    def told(row: dict) -> list[str]:
        heard.said.clear()
        add_row(run.times, row)
        progress.show(lambda count=1, note="": None)
        return list(heard.said)

    # a start that was typed is said by the command
    assert told({"step": 10, "start": 2, "at": 5.0, **ready, "workers": 2}) == []
    assert told({"step": 18, "start": 2, "at": 6.0, **spent}) == []
    lost = {"step": 16, "lost": [1], "why": "its process ended", "at": 7.0}
    (line,) = told(lost)
    assert "worker 1" in line
    assert "its process ended" in line
    assert "step 16" in line
    assert "workers 0 and 1" in told({**lost, "lost": [0, 1], "at": 9.0})[0]
    # back at an earlier step, with one worker less
    (line,) = told({"step": 16, "start": 3, "at": 27.0, **ready, "workers": 1})
    assert "back at step 16 on 1 worker(s), 20 s" in line
    (line,) = told({"step": 19, "start": 3, "at": 28.0, **spent, "ended": "preempted"})
    assert "step 19" in line
    assert "back at step 19" in told({"step": 19, "start": 4, "at": 38.0, **ready, "workers": 2})[0]
    assert told({"step": 40, "start": 4, "at": 40.0, **spent, "ended": "finished"}) == []
