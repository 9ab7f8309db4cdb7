"""What benchmarks/speed.py is made of: that it measures what it says, and writes what it measured."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import meter
import plain
import speed
import speed_compile
import speed_floor
import speed_growth
import speed_operations
from documents import machine_line, replace_part, table
from iregzoo.iteration import Controller, FixedIterations
from iregzoo.networks import IIRPNet
from iregzoo.registration import PairNetwork, Registration
from speed_floor import floor_seconds, work
from verdicts import Target, number, ratio, slope, target_table

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {"processor": "x86-64", "threads": 2, "torch": "2.13.0", "device": "cpu", "runs": 5}
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peak memory")


@pytest.mark.parametrize("power", [1.0, 1.2, 2.0])
def test_slope_is_the_power_that_values_grow_by(power: float) -> None:
    sizes = [10.0, 30.0, 1000.0]
    assert slope(sizes, [7 * size**power for size in sizes]) == pytest.approx(power)


def test_slope_of_less_than_two_grids_is_none() -> None:
    assert slope([], []) is None
    assert slope([8.0, 8.0], [1.0, 2.0]) is None
    assert slope([8.0, 64.0], [0.0, 2.0]) is None  # no memory at all has no logarithm


def test_a_target_is_met_at_its_limit_and_missed_beyond() -> None:
    assert [Target("", 0.5, value).verdict for value in (0.2, 0.5, 0.51, None)] == [
        "met",
        "met",
        "missed",
        "not measured",
    ]
    assert target_table([Target("warp", 0.75, 0.9)]).splitlines()[-1] == "| warp | 0.750 | 0.900 | missed |"
    assert target_table([]) == ""


def test_figures_have_three_digits_whatever_their_size() -> None:
    values = (0.0, 1.7e-6, 0.0871, 0.31, 5.04, 20.73, 1234.5, None)
    assert [number(value) for value in values] == ["0.00", "1.7e-06", "0.0871", "0.310", "5.04", "20.7", "1234", "–"]
    assert ratio(1.0, 4.0) == 0.25
    assert ratio(None, 4.0) is ratio(1.0, None) is ratio(1.0, 0.0) is None


def test_a_table_in_markdown_and_the_machine_in_words() -> None:
    assert table(("a", "b"), [(1, "x"), (2, "y")]) == "| a | b |\n|---|---|\n| 1 | x |\n| 2 | y |"
    assert machine_line(MACHINE) == "2 threads of an x86-64 CPU, torch 2.13.0"
    assert machine_line({**MACHINE, "threads": 1}).startswith("1 thread of")


def test_a_part_is_replaced_between_its_markers_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    kept = "# Head\n{}<!-- other: written by benchmarks/speed.py -->\nold\n<!-- other: end -->\ntail\n"
    mine = "<!-- mine: written by benchmarks/speed.py -->\n{}\n<!-- mine: end -->\n"
    page.write_text(kept.format(mine.format("old\nlines")), encoding="utf-8")
    replace_part(page, "mine", "speed.py", "new")
    assert page.read_text("utf-8") == kept.format(mine.format("new"))
    with pytest.raises(ValueError, match="unpack"):
        replace_part(page, "none", "speed.py", "new")


def grown(power: float) -> dict[str, Any]:
    """Figures of two methods, the second of which the largest grid is too much for."""
    rows = []
    for bundle in ("iirp", "pan"):
        for side in (32, 64, 128):
            row: dict[str, Any] = {"bundle": bundle, "shape": [side] * 3}
            if (bundle, side) == ("pan", 128):
                row["failed"] = "out of memory"
            else:
                row |= {"seconds": 1e-6 * side ** (3 * power), "gigabytes": 1e-7 * side**3, "precision": "float32"}
            rows.append(row)
    return {"machine": MACHINE, "rows": rows}


def test_one_part_is_kept_and_written_beside_the_others(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text("utf-8"), encoding="utf-8")
    before = page.read_text("utf-8").split("<!-- growth: end -->")[1]
    results = speed.Results(page, "cpu")
    results.keep("register", {"rows": []})
    results.keep("growth", grown(1.1))
    results.write("growth", results.read()["growth"])
    text = page.read_text("utf-8")
    assert list(results.read()) == ["register", "growth"]
    assert text.split("<!-- growth: end -->")[1] == before
    assert speed.text("cpu", "growth", grown(1.1)) in text
    drawn = (tmp_path / "benchmarks" / "growth.svg").read_bytes()
    results.write("growth", results.read()["growth"])
    assert (tmp_path / "benchmarks" / "growth.svg").read_bytes() == drawn
    assert page.read_text("utf-8") == text


def test_growth_tells_slopes_and_what_died() -> None:
    shown = speed_growth.show(grown(1.1)).splitlines()
    assert shown[0] == "| seconds | 32×32×32 | 64×64×64 | 128×128×128 | slope |"
    assert shown[2].startswith("| iirp, float32 |")
    assert shown[2].endswith("| 1.10 |")
    assert "| out of memory | 1.10 |" in shown[3]


def test_the_page_has_a_place_for_every_part() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    for device, parts in speed.PARTS.items():
        for part in parts:
            marker = part if device == "cpu" else f"{device}-{part}"
            assert text.count(f"<!-- {marker}: written by benchmarks/speed.py -->\n") == 1
            assert text.count(f"<!-- {marker}: end -->") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parts", "operation"], "part 'operation' is unknown; cpu has operations, networks, growth, register"),
        (["--parts", "register"], "give --dataset-dir"),
        (["--parts", "operations", "--only", "wrap"], "nothing of --only wrap"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("IREGZOO_TEST_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["speed.py", *options])
    with pytest.raises(SystemExit, match="2"):
        speed.main()
    assert said in capsys.readouterr().err


def test_grids_of_the_command_line() -> None:
    assert speed.shape("64") == (64, 64, 64)
    assert speed.shape("80x96x112") == (80, 96, 112)


def test_calls_take_turns_and_very_long_ones_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    slow, quick = meter.median_seconds(
        [lambda: (seen.append("slow"), time.sleep(0.05)), lambda: seen.append("quick")], runs=3
    )
    assert seen == ["slow", "quick"] * 3
    assert 0.05 <= slow < 1
    assert quick < 0.05
    seen.clear()
    monkeypatch.setattr(meter, "PATIENCE_S", 0.04)
    meter.median_seconds([lambda: (seen.append("slow"), time.sleep(0.05)), lambda: seen.append("quick")], runs=3)
    assert seen == ["slow", "quick", "quick", "quick"]


@linux
def test_peak_memory_is_that_of_what_was_held_at_once_and_is_forgotten() -> None:
    code = """if True:
        import meter, torch
        for count in (3, 0):
            held = meter.begin_peak()
            for _ in range(count):
                torch.ones(96 << 18)
            print((meter.peak_gigabytes() - held) * 1024)
    """
    # In a process of its own, as the measurements are: this one may hold enough free memory for all of it.
    environment = {**os.environ, "PYTHONPATH": str(Path(meter.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, encoding="utf-8"
    )
    held, none = map(float, done.stdout.split())
    assert held == pytest.approx(96, abs=16)
    assert none < 16


class OneConv(torch.nn.Module):
    """A registration network of one convolution."""

    stride = 1
    controller: Controller | None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(2, 3, 3, padding=1)

    def forward(self, moving: Tensor, fixed: Tensor, controller: Controller | None = None) -> Registration:
        return Registration(self.conv(torch.cat((moving, fixed), dim=1)))


def test_work_of_a_convolution_is_counted_by_hand() -> None:
    image = torch.rand(1, 2, 5, 6, 7)
    voxels, weights = 5 * 6 * 7, 2 * 3 * 27
    found = work(PairNetwork(OneConv()), image, None)
    assert found == {"operations": 2 * voxels * weights, "bytes": 4 * (voxels * (2 + 3) + weights + 3)}
    rates = {"float32": found["operations"] / 2, "bytes": found["bytes"] / 3}
    assert floor_seconds(found, rates, "float32") == (2, 3)


def test_all_convolutions_of_a_network_are_counted() -> None:
    """Also those that are one operation with what follows, and of which oneDNN computes more than is wanted."""
    network, image = IIRPNet(controller=FixedIterations()).eval(), torch.rand(1, 2, 16, 16, 16)
    least, hooks = 0, []

    def count(layer: torch.nn.Module, given: Any, made: Tensor) -> None:
        nonlocal least
        least += 2 * made[:, 0].numel() * sum(weights.numel() for weights in layer.parameters() if weights.dim() == 5)

    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d):
            hooks.append(layer.register_forward_hook(count))
    with torch.no_grad():
        network(image[:, :1], image[:, 1:])
    for hook in hooks:
        hook.remove()
    assert least <= work(PairNetwork(network), image, None)["operations"] < 1.3 * least


def test_a_rate_is_measured_in_what_a_device_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated product of matrices would take minutes."""
    monkeypatch.setattr(speed_floor, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(speed_floor, "COPIED", 1 << 20)
    for computed in (False, True):
        monkeypatch.setattr(speed_floor, "computes_bfloat16", lambda device, computed=computed: computed)
        assert set(speed_floor.rates()) == {"float32", "bytes", *["bfloat16"] * computed}


@pytest.mark.parametrize("name", list(speed_operations.OPERATIONS))
def test_every_way_gives_the_same_result(name: str) -> None:
    operation = speed_operations.OPERATIONS[name]
    found = speed_operations.seconds(name, list(operation.ways), (18, 20, 22), runs=1, device="cpu")
    assert list(found) == list(operation.ways)
    for way, figures in found.items():
        assert figures["seconds"] > 0
        assert ("error" in figures) == (operation.reference is not None)
        if way == speed_operations.OURS:
            continue
        if operation.reference is None:
            assert figures["difference"] < 1e-4
        else:  # another scheme for the same integral: no farther from it, and from this one by the other's error
            assert found[speed_operations.OURS]["error"] < figures["error"] < 0.02
            assert figures["difference"] < 2 * figures["error"]


def test_usual_local_ncc_of_an_image_with_itself_is_one() -> None:
    image = torch.rand(1, 1, 12, 12, 12, generator=torch.manual_seed(0))
    assert float(plain.local_ncc(image, image)) == pytest.approx(1, abs=1e-4)
    assert float(plain.local_ncc(image, torch.zeros_like(image))) == 0


@linux
def test_what_runs_out_of_memory_is_told_and_other_failures_end_the_benchmark() -> None:
    huge = [8, 8, 1 << 40]
    given = {"name": "warp", "way": speed_operations.OURS, "threads": 1, "device": "cpu"}
    assert meter.child("speed_operations", "memory", shape=huge, **given) == {"failed": "out of memory"}
    with pytest.raises(SystemExit, match="KeyError"):
        meter.child("speed_operations", "memory", shape=[8, 8, 8], **{**given, "way": "none"})
    # Before it can have imported torch.
    assert meter.child("speed_operations", "memory", limit_s=0.01, shape=[8, 8, 8], **given) == {
        "failed": "more than 0.01 s"
    }


@linux
def test_one_process_measures_all_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"name": "warp", "way": speed_operations.OURS, "shape": (8, 8, 8), "device": "cpu"}
    assert meter.here("speed_operations", "memory", torch.get_num_threads(), given)["gigabytes"] >= 0
    asked = {**given, "device": "cuda"}
    monkeypatch.setattr(meter, "here", lambda *call: {"here": call})
    assert meter.child("speed_operations", "memory", 1, **asked) == {"here": ("speed_operations", "memory", 1, asked)}


def test_what_runs_out_of_a_gpu_s_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
    errors.append(RuntimeError("another"))

    def full(index: int) -> None:
        raise errors[index]

    monkeypatch.setattr(speed_operations, "memory", full)
    threads = torch.get_num_threads()
    for index in range(2):
        found = meter.here("speed_operations", "memory", threads, {"index": index})
        assert found == {"failed": "out of memory"}
    with pytest.raises(RuntimeError, match="another"):
        meter.here("speed_operations", "memory", threads, {"index": 2})


def test_compiled_networks_are_shown_beside_plain_ones() -> None:
    way = {"first": 30.0, "seconds": 3.0}
    rows = [
        {"bundle": "iirp", "shape": [8, 8, 8], "plain": {**way, "seconds": 2.0}, "compiled": way},
        {"bundle": "ipear", "shape": [8, 8, 8], "plain": way, "compiled": {"failed": "more than 240 s"}},
    ]
    shown = speed_compile.show({"rows": rows})
    assert "| iirp | 8×8×8 | 2.00 | 3.00 | 1.50 | 30.0 |" in shown
    assert "| ipear | 8×8×8 | 3.00 | more than 240 s | – | – |" in shown


@linux
def test_operations_from_the_shell_to_the_page(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text("utf-8"), encoding="utf-8")
    options = {"parts": "operations", "only": "attention", "sizes": 32, "runs": 1, "threads": 1, "page": page}
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "--write", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (row,) = json.loads((tmp_path / "benchmarks" / "cpu.json").read_text("utf-8"))["operations"]["rows"]
    ours, usual = (row["ways"][way] for way in (speed_operations.OURS, speed_operations.PLAIN))
    assert row["shape"] == [16, 16, 16]
    # A gather holds every voxel's 27 neighbours, and ours some of them at a time.
    assert usual["gigabytes"] > 27 * math.prod(row["shape"]) * 32 * 4 / (1 << 30) > ours["gigabytes"]
    assert "| attention over 3³ voxels, 32 channels, half the grid | 16×16×16 |" in page.read_text("utf-8")
