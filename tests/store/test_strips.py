"""Sample strips by their steps: as text, step 1,000,000 comes before step 2."""

from flowray.cli.train import _write_card
from flowray.config.load import load_recipe
from flowray.store.run import RunDirectory


def test_strips_are_in_the_order_of_their_steps(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create()
    assert run.strips() == []
    steps = [2, 999_999, 1_000_000, 10_000_000]
    for step in reversed(steps):
        run.strip(step).write_bytes(b"")
    (run.samples / "step_x.png").write_bytes(b"")
    assert run.strips() == [run.strip(step) for step in steps]
    assert [path.name for path in run.strips()][1:3] == ["step_999999.png", "step_1000000.png"]
    run.strip(10_000_000).unlink()
    _write_card(load_recipe("quickstart", []), run)
    text = run.card.read_text()
    assert "step_1000000.png" in text
    assert "step_999999.png" not in text
