"""Parts of documents that scripts write."""

from pathlib import Path


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
