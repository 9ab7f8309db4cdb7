"""Parts of documents that scripts write."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iregzoo.tables import counted


def replace_part(page: Path, part: str, script: str, text: str) -> None:
    """Replace what stands between the markers of a part of a page.

    Args:
        page: Markdown with the lines ``<!-- PART: written by benchmarks/SCRIPT -->`` and ``<!-- PART: end -->``.
        part, script: of those lines.
        text: to stand between them.
    """
    first, last = f"<!-- {part}: written by benchmarks/{script} -->\n", f"<!-- {part}: end -->"
    head, rest = page.read_text(encoding="utf-8").split(first)
    page.write_text(f"{head}{first}{text}\n{last}{rest.split(last, 1)[1]}", encoding="utf-8")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (heads, *rows)]
    lines.insert(1, f"|{'---|' * len(heads)}")
    return "\n".join(lines)


def paragraphs(*parts: str) -> str:
    """Parts of a page, an empty line between them; those that are empty are left out."""
    return "\n\n".join(part.strip() for part in parts if part)


def machine_line(machine: Mapping[str, Any]) -> str:
    """What something was measured on, in words: of its ``threads``, ``processor`` and ``torch``."""
    return f"{counted(machine['threads'], 'thread')} of an {machine['processor']} CPU, torch {machine['torch']}"
