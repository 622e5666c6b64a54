"""What a stranger meets first: links of the docs, make targets, hosted CI, the issue form."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("cluster/*.md")])
CI = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def dry(*arguments: str) -> str:
    """What make would run."""
    command = ["make", "-n", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    files = [link for link in links if not re.match(r"\w+:", link)]
    assert [link for link in files if not (page.parent / link).exists()] == []


def test_readme_leads_to_the_pages_of_a_stranger() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        assert f"]({name})" in text


def test_every_make_target_that_contributing_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    typed = re.findall(r"(?:^    |`)make ([\w -]+?)(?:`| *#| \w+=|$)", text, re.MULTILINE)
    named = {target for words in typed for target in words.split()}
    assert {"setup", "test", "lint", "types", "tests", "test-slow", "test-kernels"} <= named
    dry(*sorted(named))


def test_ci_runs_what_a_contributor_types_and_shows_the_slowest_tests() -> None:
    steps = CI["jobs"]["test"]["steps"]
    typed = [step["run"] for step in steps if "run" in step]
    assert [command.split()[:2] for command in typed] == [["make", "test"]]
    run = dry(*typed[0].split()[1:])
    assert re.search(r"-m pytest .*--durations=20", run)
    assert "ruff check" in run
    assert "mypy" in run


def test_commits_are_checked_by_what_make_lint_types_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    run = dry("lint", "types")
    for hook in hooks["repos"][0]["hooks"]:
        assert hook["entry"].removesuffix(" --force-exclude") in run


def test_the_issue_form_asks_for_the_doctors_json() -> None:
    form = ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml"
    body = yaml.safe_load(form.read_text(encoding="utf-8"))["body"]
    asked = [item["attributes"]["description"] for item in body]
    assert any("python -m flowray.doctor RUN --json" in text for text in asked)
