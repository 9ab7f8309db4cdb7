"""A table of pairs: which scans, label maps, masks and landmarks belong together."""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from difflib import get_close_matches
from io import StringIO
from pathlib import Path

from iregzoo.errors import InputError

UNFIT = re.compile(r'[/\\:*?"<>|\x00-\x1f]')  # in the name of a folder, on one system or another
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # whatever follows, on Windows
ENDINGS = (".nii.gz", ".nii", ".hdr", ".img", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".dcm")  # of scans
ALIKE = 0.88  # and more is a slip of the pen, of difflib's ratio: moving_id has 0.8, moving_lables 0.92
MOST_BYTES = 200  # of such a name: systems take 255, and what is being written has a longer one


@dataclass(frozen=True)
class Case:
    """One line of a table of pairs; ``init`` is a file with the pair's own affine start."""

    fixed: str
    moving: str
    fixed_labels: str = ""
    moving_labels: str = ""
    fixed_mask: str = ""
    moving_mask: str = ""
    fixed_points: str = ""
    moving_points: str = ""
    init: str = ""
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or f"{Path(self.moving).name} → {Path(self.fixed).name}"

    @property
    def scans(self) -> tuple[str, ...]:
        """What ``read_scans`` reads."""
        return self.fixed, self.moving, self.fixed_labels, self.moving_labels, self.fixed_mask, self.moving_mask

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file of it."""
        return tuple(path for name, path in vars(self).items() if path and name != "name")

    @property
    def masked(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Each scan with its mask."""
        return (self.fixed, self.fixed_mask), (self.moving, self.moving_mask)


COLUMNS = tuple(column.name for column in fields(Case))


def read_cases(path: str | Path, *, check: bool = True) -> list[Case]:
    """The pairs of a CSV file with columns fixed, moving and, optionally, fixed_labels, moving_labels, fixed_mask,
    moving_mask, fixed_points, moving_points, init, name; see ``read_rows``."""
    return [Case(**row) for row in read_rows(path, COLUMNS, ("fixed", "moving"), of="pairs", check=check)]


def read_rows(
    path: str | Path, columns: Sequence[str], needed: Sequence[str], *, of: str, check: bool = True
) -> list[dict[str, str]]:
    """The rows of a CSV file whose columns hold the paths of files; a column ``name`` holds no path.

    A relative path is looked for beside the CSV file, then in the working folder. Columns that are not known, such as a
    person's age, are passed over.

    Args:
        path: of the table.
        columns: those that are known.
        needed: those of them that every row has to fill.
        of: what the rows are, in the plural, for the messages.
        check: refuse a table with a file that is missing; else its path is one beside the table.

    Raises:
        InputError: for a missing table, column or file, a column that is misspelt, a line with more cells than columns
            or without what is needed, or no rows; for what is no CSV file of UTF-8 text.
    """
    table = Path(path)
    reader = csv.DictReader(StringIO(_text(table), newline=""))  # line ends within quotes belong to a cell
    try:
        rows = list(_rows(table, reader, columns, needed, check))
    except csv.Error as error:
        raise InputError(f"{table}, after line {reader.line_num}: is not CSV ({error}); close its quotes") from None
    if not rows:
        raise InputError(f"{table}: has no {of} below its header")
    return rows


def ignored_columns(path: str | Path, columns: Sequence[str]) -> list[str]:
    """The columns of a table that ``read_rows`` has read which it passes over."""
    header = next(csv.reader(StringIO(_text(Path(path)), newline="")), [])
    named = (name.strip().lower() for name in header)
    return [name for name in named if name and name not in columns]


def _text(table: Path) -> str:
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            text = stream.read()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{table}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{table}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{table}: is not UTF-8 text; save it as a UTF-8 CSV file")
    return text


def _rows(
    table: Path, reader: "csv.DictReader[str]", columns: Sequence[str], needed: Sequence[str], check: bool
) -> Iterator[dict[str, str]]:
    header = [name.strip().lower() for name in reader.fieldnames or []]
    while header and not header[-1]:  # a spreadsheet's empty columns
        header.pop()
    _check_header(table, header, columns, needed)
    reader.fieldnames = header
    for row in reader:
        extra = [cell for cell in row.pop(None, []) if cell.strip()]
        if not extra and not any((cell or "").strip() for cell in row.values()):
            continue  # a spreadsheet's empty row
        if extra:
            raise InputError(
                f"{table}, line {reader.line_num}: has the extra value {extra[0]!r} beyond its {len(header)} columns; "
                "put values that contain commas in quotes"
            )
        cells = {name: (cell or "").strip() for name, cell in row.items() if name in columns}
        place = f"{table}, line {reader.line_num}"
        if empty := [name for name in needed if not cells[name]]:
            raise InputError(f"{place}, column {empty[0]}: is empty; give the path of a scan")
        files = {name: _locate(table, place, cell, check) for name, cell in cells.items() if name != "name"}
        yield {**cells, **files}


def _check_header(table: Path, header: Sequence[str], columns: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse a table without the columns that are needed, and columns that are meant to be one of those known."""
    if len(header) == 1 and (separator := next((sign for sign in (";", "\t") if sign in header[0]), "")):
        raise InputError(f"{table}: its columns are separated by {separator!r}; save it with commas")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        said = f"the column {twice} more than once; keep one" if twice else "columns without a heading; give them names"
        raise InputError(f"{table}: has {said}")
    for name in header:
        meant = [] if name in columns else get_close_matches(name, columns, n=1, cutoff=ALIKE)
        if meant:
            raise InputError(f"{table}: has a column {name}; rename it to {meant[0]}, or otherwise if it is none")
    if not set(needed) <= set(header):
        required = f"{' and '.join(needed)} {'are' if needed[1:] else 'is'} required"
        raise InputError(
            f"{table}: has columns {', '.join(header) or 'none'}; expected {', '.join(columns)}; {required}"
        )


def _locate(table: Path, place: str, value: str, check: bool) -> str:
    if not value:
        return ""
    reason = "no such file"
    for candidate in (table.parent / value, Path(value)):
        try:
            candidate.stat()
            return str(candidate)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:  # no right to look into its folder, a name that is too long, a circular link
            reason = error.strerror or str(error)
    if check:
        shown = value if len(value) <= MOST_BYTES else f"{value[:MOST_BYTES]}…"
        raise InputError(f"{place}: {shown}: {reason}, next to the table and in the working folder; check the path")
    return str(table.parent / value)


def folder_names(cases: Sequence[Case]) -> list[str]:
    """A folder's name for each case: its own or, for want of one, ``MOVING_to_FIXED``; see ``distinct_names``."""
    bare = [replace(case, init="", name="") for case in cases]  # it may get another start later, and stays that pair
    paths = [[path for path in astuple(case) if path] for case in bare]
    made = [f"{stem(case.moving)}_to_{stem(case.fixed)}" for case in cases]
    return distinct_names([case.name for case in cases], made, paths, of="pair")


def distinct_names(own: Sequence[str], made: Sequence[str], paths: Sequence[Sequence[str]], *, of: str) -> list[str]:
    """A name that a file or folder can have for each row of a table.

    Where several would have one name, those of no name of their own get a hash of their files' paths behind it. A
    row's name does not depend on where it stands in the table.

    Args:
        own: the names that the table has, or nothing.
        made: names for those that have none.
        paths: of each row's files.
        of: what a row is, for the messages.

    Raises:
        InputError: for a name of a row that cannot be a folder's, and for rows that cannot be told apart.
    """
    plain = [name or UNFIT.sub("_", other).lstrip(".") for name, other in zip(own, made, strict=True)]
    taken = Counter(name.lower() for name in plain)
    names = [
        f"{name}-{_digest(files)}" if taken[name.lower()] > 1 and not given else name
        for name, given, files in zip(plain, own, paths, strict=True)
    ]
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        unfit = not name or UNFIT.search(name) or DEVICES.fullmatch(name) or name[0] == "." or name[-1] in ". "
        if unfit or len(name.encode()) > MOST_BYTES:
            raise InputError(
                f"{of} {number}: {name!r} is not a valid folder name on all systems; in the column name, use only "
                f"letters, digits, -, _ and ., at most {MOST_BYTES} bytes"
            )
        other = first.setdefault(name.lower(), number)
        if other != number:
            raise InputError(
                f"{of}s {other} and {number} would both be called {name!r}; give each a unique name in the column name"
            )
    return names


def stem(path: str) -> str:
    """A scan's name without its folder and its ending; a DICOM series' folder has none, also where it has dots."""
    name = Path(path).name
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def is_made_of(name: str, other: str) -> bool:
    """Whether another name is what ``distinct_names`` makes of a name that several rows would have."""
    return re.fullmatch(re.escape(name) + "-[0-9a-f]{8}", other) is not None


def whole_path(path: str | Path) -> str:
    """The path from the root, the same wherever it is asked for; links of its folders are followed, before a ``..``."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name) if name not in ("", ".", "..") else os.path.realpath(path)


def _digest(paths: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(whole_path(path) for path in paths).encode()).hexdigest()[:8]
