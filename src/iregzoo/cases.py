"""A table of pairs: which scans, label maps and landmarks belong together."""

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

from iregzoo.errors import InputError

UNFIT = re.compile(r'[/\\:*?"<>|\x00-\x1f]')  # in the name of a folder, on one system or another
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # whatever follows, on Windows
MOST_BYTES = 200  # of such a name: systems take 255, and what is being written has a longer one


@dataclass(frozen=True)
class Case:
    """One line of a table of pairs; ``init`` is a file with the pair's own affine start."""

    fixed: str
    moving: str
    fixed_labels: str = ""
    moving_labels: str = ""
    fixed_points: str = ""
    moving_points: str = ""
    init: str = ""
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or f"{Path(self.moving).name} → {Path(self.fixed).name}"


COLUMNS = tuple(column.name for column in fields(Case))


def read_cases(path: str | Path, *, check: bool = True) -> list[Case]:
    """The pairs of a CSV file with columns fixed, moving and, optionally, fixed_labels, moving_labels, fixed_points,
    moving_points, init, name. Others, such as a person's age, are passed over.

    A relative path is looked for beside the CSV file, then in the working folder.

    Args:
        path: of the table.
        check: refuse a table with a file that is missing; else its path is one beside the table.

    Raises:
        InputError: for a missing table, column or file, a column that is misspelt, a line with more cells than columns
            or without a scan, or no pairs.
    """
    table = Path(path)
    if not table.is_file():
        raise InputError(f"{table}: no such file; check the path")
    try:
        lines = table.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError):
        raise InputError(f"{table}: is not UTF-8 text; save it as a UTF-8 CSV file") from None
    reader = csv.DictReader(lines)
    header = [name.strip().lower() for name in reader.fieldnames or []]
    _check_header(table, header)
    cases = []
    for row in reader:
        extra = [cell for cell in row.pop(None, []) if cell.strip()]
        if extra:
            raise InputError(
                f"{table}, line {reader.line_num}: has the extra value {extra[0]!r} beyond its {len(header)} columns; "
                "put values that contain commas in quotes"
            )
        cells = dict(zip(header, row.values(), strict=True))
        known = [name for name in header if name in COLUMNS]
        located = {name: _locate(table, reader.line_num, name, cells[name] or "", check) for name in known}
        cases.append(Case(**located))
    if not cases:
        raise InputError(f"{table}: has no pairs below its header")
    return cases


def _check_header(table: Path, header: Sequence[str]) -> None:
    """Refuse a table without the columns that are needed, and columns that are meant to be one of those known."""
    if len(header) == 1 and (separator := next((sign for sign in (";", "\t") if sign in header[0]), "")):
        raise InputError(f"{table}: its columns are separated by {separator!r}; save it with commas")
    twice = len(set(header)) < len(header)
    misspelt = [name for name in header if name not in COLUMNS and get_close_matches(name, COLUMNS)]
    if twice or misspelt or "fixed" not in header or "moving" not in header:
        raise InputError(
            f"{table}: has columns {', '.join(header) or 'none'}; expected {', '.join(COLUMNS)}, each at most "
            "once; fixed and moving are required"
        )


def _locate(table: Path, line: int, column: str, value: str, check: bool) -> str:
    value = value.strip()
    if column == "name":
        return value
    if not value:
        if column in ("fixed", "moving"):
            raise InputError(f"{table}, line {line}, column {column}: is empty; give the path of a scan")
        return ""
    for candidate in (table.parent / value, Path(value)):
        if candidate.exists():
            return str(candidate)
    if check:
        raise InputError(
            f"{table}, line {line}: {value}: no such file, neither next to the table nor in the working folder"
        )
    return str(table.parent / value)


def folder_names(cases: Sequence[Case]) -> list[str]:
    """A folder's name for each case: its own or, for want of one, ``MOVING_to_FIXED`` after its files.

    Where several would have one name, those of no name of their own get a hash of their files' paths behind it. A
    case's name does not depend on where it stands in the table.

    Raises:
        InputError: for a name of a case that cannot be a folder's, and for cases that cannot be told apart.
    """
    plain = [case.name or _after_files(case) for case in cases]
    taken = Counter(name.lower() for name in plain)
    names = [
        f"{name}-{_digest(case)}" if taken[name.lower()] > 1 and not case.name else name
        for name, case in zip(plain, cases, strict=True)
    ]
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        unfit = UNFIT.search(name) or DEVICES.fullmatch(name) or name[0] == "." or name[-1] in ". "
        if unfit or len(name.encode()) > MOST_BYTES:
            raise InputError(
                f"pair {number}: {name!r} is not a valid folder name on all systems; in the column name, use only "
                f"letters, digits, -, _ and ., at most {MOST_BYTES} bytes"
            )
        other = first.setdefault(name.lower(), number)
        if other != number:
            raise InputError(
                f"pairs {other} and {number} would both be called {name!r}; give each a unique name in the column name"
            )
    return names


def _after_files(case: Case) -> str:
    moving, fixed = (re.sub(r"(\.nii)?\.\w+$", "", Path(path).name) for path in (case.moving, case.fixed))
    return UNFIT.sub("_", f"{moving}_to_{fixed}").lstrip(".")


def _digest(case: Case) -> str:
    pair = replace(case, init="")  # it may get another start later, and stays the pair that it is
    paths = [str(Path(path).absolute()) for path in astuple(pair) if path]
    return hashlib.sha256("\n".join(paths).encode()).hexdigest()[:8]
