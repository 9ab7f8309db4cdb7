"""Time and peak memory of IIRP-Net's inference on the CPU, one process a measurement.

    python benchmarks/rp_net.py [--shape 160 192 160] [--threads 2] [--runs 3]

Prints, for one pass a level (RP-Net) and for IterStop, the median seconds of the runs and the peak memory beyond an
interpreter that has imported the library and loaded the weights. The pair is a smooth random image and a deformed copy
of it, the weights are the bundle's own.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from iregzoo.fields import warp
from iregzoo.iteration import Controller, FixedIterations, IterStop
from iregzoo.zoo import load

CONTROLLERS: dict[str, Controller] = {"RP-Net, one pass": FixedIterations(), "IIRP-Net, IterStop": IterStop()}


def smooth_pair(shape: list[int]) -> torch.Tensor:
    """A pair (1, 2, *shape), moving then fixed, that a few millimetres of smooth deformation relate."""
    generator = torch.Generator().manual_seed(0)

    def noise(channels: int, coarseness: int) -> torch.Tensor:
        small = torch.rand((1, channels, *(size // coarseness for size in shape)), generator=generator)
        return F.interpolate(small, size=shape, mode="trilinear", align_corners=True)

    moving = 0.6 * noise(1, 16) + 0.4 * noise(1, 4)
    return torch.cat((moving, warp(moving, 12 * (noise(3, 20) - 0.5))), dim=1)


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


@torch.inference_mode()
def measure(name: str, shape: list[int], threads: int, runs: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    method = load("iirp")
    image = smooth_pair(shape)
    before = peak_gigabytes()
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        registration = method.network.register(image, CONTROLLERS[name])
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": statistics.median(seconds),
        "gigabytes": peak_gigabytes() - before,
        "iterations": [int(count) for count in registration.iterations],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs=3, type=int, default=[160, 192, 160])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=list(CONTROLLERS), help="measure in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.shape, arguments.threads, arguments.runs)))
        return
    size = "×".join(map(str, arguments.shape))
    machine = f"{arguments.threads} threads of {platform.machine()}, torch {torch.__version__}"
    print(f"{size}, {machine}, median of {arguments.runs}")
    for name in CONTROLLERS:
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", name], stdout=subprocess.PIPE, check=True
        )
        found = json.loads(child.stdout)
        print(f"{name}: {found['seconds']:.1f} s, {found['gigabytes']:.2f} GB, iterations {found['iterations']}")


if __name__ == "__main__":
    main()
