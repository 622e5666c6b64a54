"""`flowray.dashboard`: what it would start, that servers end with it, and what it says where one
is missing or does not start.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from flowray.cli.dashboard import (
    HOST,
    RAY_LINK,
    Server,
    answers,
    free_port,
    main,
    ray_link,
    servers,
    serving,
)
from flowray.config.errors import InputError


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "head"
    folder.mkdir()
    (folder / "sweep.yaml").write_text("name: head\nmetric: {name: shoot/nmse}\n")
    (folder / "study.journal").write_text("")
    return folder


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An optuna-dashboard on the path."""
    path = tmp_path / "bin" / "optuna-dashboard"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return Path(shutil.which("optuna-dashboard") or "")


def test_both_servers_are_on_loopback_with_the_study_and_its_pictures(
    sweep: Path, program: Path
) -> None:
    board, study = servers(sweep, 7300)
    assert board.command[1:] == (
        *("-m", "tensorboard.main", "--logdir", str(sweep)),
        *("--host", "127.0.0.1", "--port", str(board.port), "--reload_interval", "15"),
    )
    wanted = (
        str(sweep / "study.journal"),
        "--host",
        "127.0.0.1",
        "--port",
        str(study.port),
        "--artifact-dir",
        str(sweep / "artifacts"),
    )
    assert study.command[1:] == wanted
    assert Path(study.command[0]).name == "optuna-dashboard"
    assert 7300 <= board.port < study.port
    assert [server.link for server in (board, study)] == [
        f"http://127.0.0.1:{server.port}/" for server in (board, study)
    ]


def test_plan_prints_the_links_and_starts_nothing(
    sweep: Path, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sweep), "--plan", "--json", "--port", "7310"]) == 0
    out = capsys.readouterr()
    links = json.loads(out.out)
    assert list(links) == ["TensorBoard", "optuna-dashboard"]
    assert "tensorboard.main" in out.err
    assert not any(
        answers(HOST, int(link.rpartition(":")[2].strip("/"))) for link in links.values()
    )


def test_a_missing_optuna_dashboard_is_one_line_with_what_to_install(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if (
        shutil.which("optuna-dashboard")
        or (Path(sys.executable).parent / "optuna-dashboard").exists()
    ):
        pytest.skip("it is installed here")
    assert main([str(sweep), "--plan"]) == 0
    told = capsys.readouterr()
    remarks = [line for line in told.err.splitlines() if "pip install" in line]
    assert len(remarks) == 1
    assert remarks[0].endswith("pip install 'flowray[dashboard]'")
    assert "pip install" not in told.out  # which has the links and the commands alone
    assert any(line.startswith("TensorBoard ") for line in told.out.splitlines())


def test_a_run_has_tensorboard_alone(
    tmp_path: Path, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    assert main([str(tmp_path), "--plan", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["TensorBoard"]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a sweep"):
        main([str(tmp_path)])


@pytest.mark.parametrize("port", ["-3", "0", "65536", "http"])
def test_what_is_no_port_is_one_line(port: str) -> None:
    with pytest.raises(InputError, match=f"--port: got {port}"):
        main(["runs", "--port", port])


def test_a_taken_port_is_passed_over() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        taken = other.getsockname()[1]
        assert free_port(taken) > taken


def test_rays_own_link_is_shown_while_it_answers(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_link(sweep) is None
    (sweep / RAY_LINK).parent.mkdir()
    with socket.socket() as dashboard:
        dashboard.bind((HOST, 0))
        dashboard.listen()
        link = f"http://{HOST}:{dashboard.getsockname()[1]}"
        (sweep / RAY_LINK).write_text(f"{link}\n")
        assert ray_link(sweep) == link
    assert ray_link(sweep) is None  # the sweep has ended
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert ray_link(sweep) == "http://127.0.0.1:8265"


def test_a_server_lives_as_long_as_its_block(tmp_path: Path) -> None:
    port = free_port(7400)
    plain = (
        sys.executable,
        "-m",
        "http.server",
        str(port),
        "--bind",
        HOST,
        "--directory",
        str(tmp_path),
    )
    with serving(Server("files", plain, port)) as started:
        started.wait_until_it_answers()
        assert answers(HOST, port)
    assert started.process.poll() is not None
    assert not answers(HOST, port)


def test_a_server_that_dies_says_its_last_words() -> None:
    port = free_port(7420)
    command = (sys.executable, "-c", "import sys; print('starting'); sys.exit('no such storage')")
    with (
        serving(Server("broken", command, port)) as started,
        pytest.raises(InputError, match="broken did not start: no such storage; type"),
    ):
        started.wait_until_it_answers()


@pytest.mark.slow
def test_tensorboard_answers_until_the_command_is_told_to_end(sweep: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "flowray.dashboard",
        str(sweep),
        "--json",
        "--port",
        str(free_port(7440)),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        link = json.loads(process.stdout.readline())["TensorBoard"]
        assert b"TensorBoard" in urllib.request.urlopen(link, timeout=30).read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not answers(HOST, int(link.rpartition(":")[2].strip("/")))
