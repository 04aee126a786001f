"""The measured part of a page that is otherwise written by hand: what stands between two comments in the Markdown."""
from __future__ import annotations

from pathlib import Path

from mvam_fast.files import write_text

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def _parts(path: Path) -> tuple[str, str, str]:
    """What stands before, between and after the comments."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    between, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"{path}: {BEGIN} and {END} must stand in it once each, in this order")
    return before, between, after


def between(path: Path) -> str:
    """The text between the comments, without the line ends around it."""
    return _parts(path)[1].strip("\n")


def replace(path: Path, text: str) -> None:
    """Writes `text` between the comments; `between` then gives it back, less line ends around it."""
    before, _, after = _parts(path)
    write_text(path, before + BEGIN + "\n" + text.strip("\n") + "\n" + END + after)
