"""The experiment card in the comments on top of a sweep file."""

from __future__ import annotations

import re
from typing import Any

_FIELD = re.compile(
    r"# +(TITLE|PURPOSE|KEY_DIFFS|DATASET|HARDWARE|CORE PARAMS|TAGS|NOTES) *: *(.*)"
)


_EXPECTS = re.compile(r"# +Expect(?:ed reading)? *: *(.*)")


def head_card(text: str) -> dict[str, Any]:
    """The experiment card in the comment block on top of a file: `# PURPOSE : ...`, `# Expected
    reading: ...`, up to a gap.
    """
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if field := _FIELD.match(line):
            current = found.setdefault(field[1].lower().replace(" ", "_"), [field[2]])
        elif expects := _EXPECTS.match(line):
            current = found.setdefault("expects", [expects[1]])
        elif words := line.lstrip("# "):
            current.append(words)
        else:
            current = []
    card: dict[str, Any] = {name: " ".join(lines) for name, lines in found.items()}
    if "tags" in card:
        card["tags"] = [tag.strip() for tag in card["tags"].strip("[] ").split(",") if tag.strip()]
    return card
