"""How the benchmarks measure: a child process a measurement, median seconds, peak memory, and on which images.

On a GPU one process does all: torch tells the peak of its tensors there, and starting a process takes far longer than
what it would measure. On a CPU memory is the peak beyond what the process holds once everything is imported, loaded and
made. Linux tells it, and lets a process forget its peak; ``ru_maxrss`` would do neither, and begins with what the
parent process had.
"""

import gc
import importlib
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iregzoo.fields import warp

Shape = tuple[int, int, int]
Found = dict[str, Any]  # what was measured, as JSON keeps it
GIGABYTE = 1 << 30
PATIENCE_S = 30.0
OUT_OF_MEMORY = (
    "allocate memory",
    "bad_alloc",
    "MemoryError",
    "out of memory",
    "could not create a memory",
    "ALLOC_FAILED",
)


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Attributes:
        threads: of every measurement.
        runs: each time is the median of so many.
        shapes: grids instead of a part's own.
        only: names of operations or bundles, where not all are to be measured.
        data: folder of the scans, for the parts that want some.
        device: cpu or cuda.
    """

    threads: int = 2
    runs: int = 5
    shapes: tuple[Shape, ...] = ()
    only: tuple[str, ...] = ()
    data: Path | None = None
    device: str = "cpu"

    def wants(self, name: str) -> bool:
        return not self.only or name in self.only


def child(module: str, function: str, threads: int, *, limit_s: float | None = None, **arguments: Any) -> Found:
    """Call a benchmark's function in a process of its own, and give what it returns.

    A process that runs out of memory gives ``{"failed": "out of memory"}``, and one that takes longer than the limit
    says that; any other failure ends the benchmark. What is for a GPU, and has no limit, this process does.
    """
    if arguments.get("device") == "cuda" and limit_s is None:
        return here(module, function, threads, arguments)
    command = [sys.executable, __file__, module, function, json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            out, error = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started, such as compilers
            return {"failed": f"more than {limit_s:g} s"}
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode == 0:
        found: Found = json.loads(out.splitlines()[-1])
        return found
    if process.returncode == -signal.SIGKILL or any(sign in error for sign in OUT_OF_MEMORY):
        return {"failed": "out of memory"}
    raise SystemExit(f"{module}.{function} of {arguments} failed ({process.returncode}):\n{error}")


def here(module: str, function: str, threads: int, arguments: Found) -> Found:
    """Call a benchmark's function in this process; what runs out of a GPU's memory says so."""
    torch.set_num_threads(threads)
    try:
        found: Found = getattr(importlib.import_module(module), function)(**arguments)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        found = {"failed": "out of memory"}
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where no GPU was used
    return found


def limit_memory() -> None:
    """Let this process fail before the machine has no memory left, which may end others."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    resource.setrlimit(resource.RLIMIT_DATA, (available << 10, available << 10))


def begin_peak(device: str = "cpu") -> float:
    """Forget the peak so far; gives the gigabytes that are held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_gigabytes(device)


def peak_gigabytes(device: str = "cpu") -> float:
    """The most that was held at once since ``begin_peak``: by this process, or on the GPU by torch's tensors."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated() / GIGABYTE)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / (1 << 20)


def median_seconds(calls: Sequence[Callable[[], object]], runs: int, device: str = "cpu") -> list[float]:
    """Median seconds of each of several calls that take turns. On a GPU a turn before that does not count.

    A call that takes very long does so once.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(runs + (device == "cuda")):
        for call, found in zip(calls, seconds, strict=True):
            if found and found[0] > PATIENCE_S:
                continue
            synchronise(device)
            begin = time.perf_counter()
            call()
            synchronise(device)
            if turn >= (device == "cuda"):
                found.append(time.perf_counter() - begin)
    return [statistics.median(found) for found in seconds]


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def machine(settings: Settings) -> Found:
    """What is measured on, and how often."""
    features = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    matrix = ", AMX" if "amx_bf16" in features else ""
    return {
        "processor": f"{platform.machine().replace('_', '-')} ({torch.backends.cpu.get_cpu_capability()}{matrix})",
        "threads": settings.threads,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else "cpu",
        "runs": settings.runs,
    }


def smooth_noise(shape: Sequence[int], channels: int, coarseness: int, generator: torch.Generator) -> Tensor:
    """Random values in [0, 1] that change over so many voxels: (1, channels, *shape)."""
    small = torch.rand((1, channels, *(max(2, size // coarseness) for size in shape)), generator=generator)
    return F.interpolate(small, size=tuple(shape), mode="trilinear", align_corners=True)


def smooth_field(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A smooth displacement of up to 6 voxels along an axis: (1, 3, *shape)."""
    return 12 * (smooth_noise(shape, 3, 20, generator) - 0.5)


def smooth_pair(shape: Sequence[int]) -> Tensor:
    """A pair (1, 2, *shape), moving then fixed, that a few voxels of smooth deformation relate."""
    generator = torch.Generator().manual_seed(0)
    moving = 0.6 * smooth_noise(shape, 1, 16, generator) + 0.4 * smooth_noise(shape, 1, 4, generator)
    return torch.cat((moving, warp(moving, smooth_field(shape, generator))), dim=1)


def _serve(module: str, function: str, arguments: str) -> None:
    """What a child process does."""
    given = json.loads(arguments)
    if given.get("device", "cpu") == "cpu":
        limit_memory()
    warnings.filterwarnings("ignore")
    print(json.dumps(getattr(importlib.import_module(module), function)(**given)))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
