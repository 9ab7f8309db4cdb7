"""The names of labels, in the files in which people keep them."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from iregzoo.errors import InputError

EXPECTED = 'give JSON such as {"1": "thalamus"}, or CSV with the columns label and name'


def read_names(path: Path) -> dict[int, str]:
    """The names of labels: JSON such as ``{"1": "thalamus"}``, or CSV with the columns label and name.

    Raises:
        InputError: for a file that is missing, not in UTF-8 or neither, a label that is no whole number, one that is
            named twice, and a name that is not text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start + 1}); save it as UTF-8") from None
    found: dict[int, str] = {}
    for place, (label, name) in _table(text, path) if path.suffix.lower() == ".csv" else _object(text, path):
        try:
            value = int(label)
        except ValueError:
            raise InputError(f"{path}: {place}: label {label!r} is not a whole number; {EXPECTED}") from None
        if value in found:
            raise InputError(f"{path}: {place}: names the label {value} a second time; name each label once")
        if not isinstance(name, str | int | float | None):
            raise InputError(f"{path}: {place}: the name of label {value} is not text; {EXPECTED}")
        found[value] = str(name or "").strip()
    return found


def _table(text: str, path: Path) -> list[tuple[str, tuple[str, object]]]:
    """The rows of a CSV table, each with what to call it."""
    rows = csv.DictReader(text.splitlines())
    columns = [str(column).strip() for column in rows.fieldnames or ()]
    if "label" not in columns or "name" not in columns:
        header = text.strip().splitlines()[0][:60] if text.strip() else ""
        separator = next((sign for sign in (";", "\t") if sign in header), "")
        if separator:
            raise InputError(f"{path}: its columns are separated by {separator!r}; save it with commas")
        raise InputError(f"{path}: begins with {header!r} instead of the column names; {EXPECTED}")
    rows.fieldnames = columns
    return [(f"row {rows.line_num}", (row["label"] or "", row["name"])) for row in rows]


def _object(text: str, path: Path) -> list[tuple[str, tuple[str, object]]]:
    """The entries of a JSON object, each with what to call it, also those of one key."""
    try:
        content = json.loads(text, object_pairs_hook=tuple)
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error}); {EXPECTED}") from None
    if not isinstance(content, tuple):
        raise InputError(f"{path}: does not hold a JSON object; {EXPECTED}")
    return [(f"entry {number}", pair) for number, pair in enumerate(content, 1)]


def write_names(path: Path, names: Mapping[int, str]) -> None:
    """Write the names of labels as JSON."""
    path.write_text(json.dumps({str(value): name for value, name in names.items()}, indent=2) + "\n", encoding="utf-8")
