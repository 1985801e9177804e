"""What a check found, and what to do about it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]
_WIDTH = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A fact about one part of the machine or the installation.

    "note": flexpipe works, but slower, with less, or otherwise than one might think; "problem":
    something it needs does not work. Both come with advice.
    """

    level: Level
    about: str
    text: str
    advice: str = ""

    def __post_init__(self) -> None:
        if self.level != "ok" and not self.advice:
            raise ValueError(f"a {self.level} needs advice: {self.about}: {self.text}")


def ok(about: str, text: str) -> Finding:
    return Finding(level="ok", about=about, text=text)


def note(about: str, text: str, advice: str) -> Finding:
    return Finding(level="note", about=about, text=text, advice=advice)


def problem(about: str, text: str, advice: str) -> Finding:
    return Finding(level="problem", about=about, text=text, advice=advice)


def num_problems(findings: Sequence[Finding]) -> int:
    return sum(finding.level == "problem" for finding in findings)


def to_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """Plain values under the same names."""
    return {
        "num_problems": num_problems(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def render(findings: Sequence[Finding]) -> str:
    """A line each, the advice below it, and a count at the end."""
    wide = max(len(finding.about) for finding in findings)
    lines = [line for finding in findings for line in _lines(finding, wide)]
    count, notes = num_problems(findings), sum(finding.level == "note" for finding in findings)
    problems = "no problem" if not count else "1 problem" if count == 1 else f"{count} problems"
    return "\n".join([*lines, "", f"{problems}, {notes} {'note' if notes == 1 else 'notes'}"])


def _lines(finding: Finding, wide: int) -> list[str]:
    level = "" if finding.level == "ok" else finding.level
    head = f"{level:<9}{finding.about:<{wide}}  "
    lines = _wrapped(finding.text, head, " " * len(head))
    return lines + _wrapped(finding.advice, f"{' ' * len(head)}→ ", " " * (len(head) + 2))


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False
    )
