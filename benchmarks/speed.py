"""Measure what docs/benchmarks.md shows: time and memory of operations, networks and the command line.

    python benchmarks/speed.py [--parts operations,networks,growth,register,compile] [--write]
        [--threads 2] [--runs 5] [--sizes 64,80x96x112] [--only iirp,warp] [--dataset-dir DIR] [--device cuda] [--again]

On a CPU every measurement runs in a process of its own. --write keeps the figures in docs/benchmarks/DEVICE.json and
puts the tables of the parts that were measured into the page; --again makes tables from the kept figures without
measuring. The part register needs scans in DIR (hippocampus/ and scans/), or in the folder that IREGZOO_TEST_DATA
names. A GPU has the parts operations, networks, throughput and compile.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType

import speed_compile
import speed_gpu
import speed_growth
import speed_networks
import speed_operations
import speed_register
from documents import machine_line, paragraphs, replace_part
from meter import Found, Settings, Shape, machine

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
PARTS: dict[str, dict[str, ModuleType]] = {
    "cpu": {
        "operations": speed_operations,
        "networks": speed_networks,
        "growth": speed_growth,
        "register": speed_register,
        "compile": speed_compile,
    },
    "cuda": {
        "operations": speed_operations,
        "networks": speed_networks,
        "throughput": speed_gpu,
        "compile": speed_compile,
    },
}


@dataclass(frozen=True)
class Results:
    """The page, and the figures that its tables are made of, in a folder beside it."""

    page: Path
    device: str

    @property
    def folder(self) -> Path:
        return self.page.with_suffix("")

    @property
    def file(self) -> Path:
        return self.folder / f"{self.device}.json"

    def read(self) -> Found:
        """The parts that are kept."""
        kept: Found = json.loads(self.file.read_text("utf-8")) if self.file.is_file() else {}
        return kept

    def keep(self, part: str, found: Found) -> None:
        """Keep a part beside the others."""
        self.folder.mkdir(exist_ok=True)
        text = json.dumps({**self.read(), part: found}, indent=1, allow_nan=False)
        self.file.write_text(f"{text}\n", encoding="utf-8")

    def write(self, part: str, found: Found) -> None:
        """Put a part's tables into the page, and draw its picture where it has one."""
        marker = part if self.device == "cpu" else f"{self.device}-{part}"
        replace_part(self.page, marker, Path(__file__).name, text(self.device, part, found))
        draw = getattr(PARTS[self.device][part], "draw", None)
        if draw is not None:
            draw(found, self.folder)


def text(device: str, part: str, found: Found) -> str:
    """A part's tables, and what they were measured on."""
    on = found["machine"]
    gpu = f", {on['device']}" if on["device"] != "cpu" else ""
    runs = "one run" if on["runs"] == 1 else f"medians of {on['runs']} runs"
    return paragraphs(PARTS[device][part].show(found), f"{machine_line(on)}{gpu}; {runs}.")


def shape(word: str) -> Shape:
    """A grid such as 64 or 80x96x112."""
    sizes = [int(size) for size in word.split("x")]
    first, second, third = sizes * 3 if len(sizes) == 1 else sizes
    return first, second, third


def listed(word: str) -> tuple[str, ...]:
    return tuple(filter(None, word.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", type=listed, help="default: all of the device")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", type=lambda word: tuple(map(shape, listed(word))), default=())
    parser.add_argument("--only", type=listed, default=(), help="operations, bundles, or kinds of pairs")
    parser.add_argument("--dataset-dir", type=Path, default=os.environ.get("IREGZOO_TEST_DATA"))
    parser.add_argument("--device", choices=list(PARTS), default="cpu")
    parser.add_argument("--write", action="store_true", help="keep the figures, and write the tables into the page")
    parser.add_argument("--again", action="store_true", help="make tables of the kept figures")
    parser.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # 3³ must not fail where only ASCII can be shown
    results, of = Results(given.page, given.device), PARTS[given.device]
    parts = given.parts or tuple(of if not given.again else results.read())
    if unknown := [part for part in parts if part not in of]:
        parser.error(f"part {unknown[0]!r} is unknown; {given.device} has {', '.join(of)}")
    data = Path(given.dataset_dir) if given.dataset_dir else None
    if "register" in parts and data is None and not given.again:
        parser.error("the part register needs scans: give --dataset-dir, or set IREGZOO_TEST_DATA")
    settings = Settings(given.threads, given.runs, given.sizes, given.only, data, given.device)
    for part in parts:
        found = results.read()[part] if given.again else {"machine": machine(settings), **of[part].measure(settings)}
        if not found["rows"]:
            parser.error(f"{part} has nothing of --only {','.join(given.only)}, or there are no scans")
        if given.write and not given.again:
            results.keep(part, found)
        if given.write:
            results.write(part, found)
        print(f"\n## {part}\n\n{text(given.device, part, found)}\n", flush=True)


if __name__ == "__main__":
    main()
