"""A table of pairs: which scans, label maps and landmarks belong together."""

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from iregzoo.errors import InputError


@dataclass(frozen=True)
class Case:
    """One line of a table of pairs."""

    fixed: str
    moving: str
    fixed_labels: str = ""
    moving_labels: str = ""
    fixed_points: str = ""
    moving_points: str = ""

    @property
    def name(self) -> str:
        return f"{Path(self.moving).name} → {Path(self.fixed).name}"


COLUMNS = tuple(column.name for column in fields(Case))


def read_cases(path: str | Path) -> list[Case]:
    """The pairs of a CSV file with columns fixed, moving and, optionally, fixed_labels, moving_labels, fixed_points,
    moving_points. A relative path is looked for beside the CSV file, then in the working folder.

    Raises:
        InputError: for a missing table, column or file, an unknown column, or no pairs.
    """
    table = Path(path)
    if not table.is_file():
        raise InputError(f"{table}: no such file; check the path")
    try:
        lines = table.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError):
        raise InputError(f"{table}: is no text in UTF-8; save it as a CSV file in UTF-8") from None
    reader = csv.DictReader(lines)
    header = [name.strip() for name in reader.fieldnames or []]
    unknown = [name for name in header if name not in COLUMNS]
    if unknown or len(set(header)) < len(header) or "fixed" not in header or "moving" not in header:
        raise InputError(
            f"{table}: has columns {', '.join(header) or 'none'}; expected {', '.join(COLUMNS)}, each once at most, "
            "of which fixed and moving are needed"
        )
    rows = [{name: (value or "").strip() for name, value in zip(header, row.values(), strict=False)} for row in reader]
    if not rows:
        raise InputError(f"{table}: has no pairs below its header")
    return [
        Case(**{name: _locate(table, number, name, value) for name, value in row.items()})
        for number, row in enumerate(rows, 2)
    ]


def _locate(table: Path, line: int, column: str, value: str) -> str:
    if not value:
        if column in ("fixed", "moving"):
            raise InputError(f"{table}, line {line}: names no {column} scan")
        return ""
    for candidate in (table.parent / value, Path(value)):
        if candidate.exists():
            return str(candidate)
    raise InputError(f"{table}, line {line}: {value}: no such file, neither beside the table nor in the working folder")
