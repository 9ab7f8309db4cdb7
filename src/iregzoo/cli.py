"""The command line. Every command's help is its docstring; bad input ends with one line and exit code 2."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from iregzoo.errors import InputError

# Each command imports what it needs itself: PyTorch takes seconds to import, and `iregzoo list` needs none of it.

STAGES = ("read", "weights", "start", "network", "warp", "write", "report")


def register(
    fixed: str,
    moving: str,
    output: str,
    bundle: str = "ipear",
    weights: str | None = None,
    fixed_labels: str | None = None,
    moving_labels: str | None = None,
    device: str = "auto",
    init: str = "auto",
    controller: str = "auto",
    max_iterations: int | None = None,
    refine: int = 0,
    inverse: bool = False,
    overwrite: bool = False,
) -> None:
    """Register a moving scan to a fixed one and write the results into a folder.

    Scans are NIfTI, NRRD, MetaImage or a folder with one DICOM series. The folder gets warped.nii.gz,
    displacement.nii.gz (LPS mm), transform.h5 (ITK), report.json and report.png; warped_labels.nii.gz where moving
    labels are given; with --inverse the same for the other way.

    Args:
        fixed: the scan that stays.
        moving: the scan that is brought to it.
        output: folder for the results, new or empty.
        bundle: the method; see iregzoo list.
        weights: a name from iregzoo list, or a weights file; the bundle's first if not given.
        fixed_labels: label map on the fixed scan's grid.
        moving_labels: label map on the moving scan's grid.
        device: auto, cpu, cuda or mps.
        init: affine start: auto (what the weights need), none (trust the headers), center, rigid or affine.
        controller: of the iterations: auto (the method's own), tci, iterstop or fixed.
        max_iterations: the most iterations a level of the method's pyramid.
        refine: gradient steps on the images' agreement, at the fixed scan's resolution, after the network; 0 for none.
        inverse: also write the way from fixed to moving.
        overwrite: replace the results of an earlier run in the folder.
    """
    from iregzoo.outputs import whole_folder
    from iregzoo.register import choose_controller, read_scans
    from iregzoo.register import register as register_scans
    from iregzoo.results import FILES, provenance, write
    from iregzoo.zoo import load

    for path in filter(None, (fixed, moving, fixed_labels, moving_labels)):
        if Path(path).resolve().parent == Path(output).resolve() and Path(path).name in FILES:
            raise InputError(f"{path}: lies where the results would go; choose another --output")
    stages = (*STAGES, *(["refine"] if refine else []), *(["inverse"] if inverse else []))
    with whole_folder(Path(output), overwrite=overwrite, owned=FILES) as folder, _Progress(len(stages)) as bar:
        bar("read")
        scans = read_scans(fixed, moving, fixed_labels, moving_labels)
        bar("weights")
        method = load(bundle, weights, choose_device(device))
        steering = choose_controller(controller, max_iterations, method.network.controller)
        result = register_scans(scans, method, init=init, controller=steering, refine=refine, progress=bar)
        report = write(result, folder, provenance(method), inverse=inverse, progress=bar)
    print(summary_line(report))
    for doubt in report["warnings"]:
        print(f"warning: {doubt}")
    print(f"written to {output}: look at report.png first")


def evaluate(
    pairs: str,
    bundle: str | Sequence[str],
    output: str,
    weights: str | None = None,
    peers: str | Sequence[str] | None = None,
    device: str = "auto",
    init: str = "auto",
    controller: str | Sequence[str] = "auto",
    max_iterations: int | None = None,
    refine: int = 0,
    learn2reg: str | None = None,
    plots: bool = True,
    overwrite: bool = False,
) -> None:
    """Register every pair of a table with every method and peer, and measure the results.

    The folder gets metrics.csv (a row per pair and method), summary.json (of each method mean, standard deviation and
    median of every figure and label, its worst case, and its comparison with each peer), table.md (the means), dice.png
    (box plots by structure), time.png (accuracy against seconds) and cases.png (best and worst case of each method).

    Everything is measured on the fixed scan's own grid: Dice, HD95 and ASSD (mm) of the moving labels, warped once with
    nearest neighbours; folding (%), near-singular voxels (%) and sd of log det J of the deformation without the affine;
    NCC, MSE and SSIM of intensities in [0, 1]; landmark error (mm). Seconds are from scans in memory to the warped
    scan, of a peer its registration alone.

    Peers start from the scans as they are in the files, with the same number of threads, and their fields are measured
    by the same code. ants-syn is ants.registration, SyN with its affine and default settings; greedy is its affine and
    then its deformable registration, WNCC 2x2x2, 100x50x25 iterations each. pip install "iregzoo[peers]" has both.
    Every method is compared with each peer on Dice (NCC where there are no labels) by Wilcoxon's signed-rank test, with
    Holm's correction over all comparisons of the run.

    Args:
        pairs: CSV file with columns fixed, moving and, optionally, fixed_labels, moving_labels, fixed_points,
            moving_points; relative paths are looked for beside it.
        bundle: one or more methods, separated by commas.
        output: folder for the results, new or empty.
        weights: a name from iregzoo list, or a weights file; each bundle's first if not given.
        peers: one or more of ants-syn, greedy, separated by commas, to measure beside the methods.
        device: auto, cpu, cuda or mps; peers run on the CPU.
        init: affine start: auto, none, center, rigid or affine.
        controller: one or more of auto, tci, iterstop, fixed, separated by commas.
        max_iterations: the most iterations a level.
        refine: gradient steps after the network, as for register; 0 for none.
        learn2reg: folder, new or empty, for the displacement fields as Learn2Reg's evaluator reads them,
            disp_<fixed>_<moving>.nii.gz in voxels of the moving array; in a folder for each where there are several
            methods or peers.
        plots: draw the three pictures.
        overwrite: replace the results of an earlier run in the folders.
    """
    from contextlib import ExitStack

    from iregzoo.cases import read_cases
    from iregzoo.evaluate import FILES
    from iregzoo.evaluate import evaluate as evaluate_cases
    from iregzoo.flags import flag
    from iregzoo.learn2reg import field_files
    from iregzoo.outputs import whole_folder
    from iregzoo.tables import comparison_line
    from iregzoo.zoo import load

    cases, target = read_cases(pairs), choose_device(device)
    methods = [load(name, weights, target) for name in names(bundle, "bundle")]
    controllers, others = names(controller, "controller"), names(peers, "peers") if peers else []
    registrations = len(cases) * (len(methods) * len(controllers) + len(others))
    with ExitStack() as stack:
        folder = stack.enter_context(whole_folder(Path(output), overwrite=overwrite, owned=FILES))
        fields = None
        if learn2reg:
            owned = field_files(cases, [method.bundle.name for method in methods], controllers, others)
            fields = stack.enter_context(
                whole_folder(Path(learn2reg), overwrite=overwrite, owned=owned, option="--learn2reg")
            )
        summary = evaluate_cases(
            cases,
            methods,
            folder,
            controllers=controllers,
            peers=others,
            init=init,
            max_iterations=max_iterations,
            refine=refine,
            learn2reg=fields,
            plots=flag(plots, "plots"),
            progress=stack.enter_context(_Progress(registrations)),
        )
    for result in summary["results"]:
        print(result_line(result))
    for comparison in summary["comparisons"]:
        print(comparison_line(comparison))
    if summary["failed"]:
        first = summary["failed"][0]
        raise InputError(
            f"{len(summary['failed'])} of {registrations} registrations failed, first {first['pair']} with "
            f"{first['bundle']}: {first['reason']} (the others are in {output})"
        )


def list_bundles(json: bool = False) -> None:
    """List the bundles at hand with their weights.

    Args:
        json: print a JSON list instead of a table.
    """
    import json as json_module

    from iregzoo.zoo import bundles

    found = bundles()
    if json:
        entries = [
            {
                "name": bundle.name,
                "version": bundle.metadata.get("version", ""),
                "task": bundle.metadata.get("task", ""),
                "path": str(bundle.path),
                "weights": {
                    name: {
                        "init": card.init,
                        "spacing": card.spacing,
                        "description": card.description,
                        "sha256": card.sha256,
                    }
                    for name, card in bundle.weights.items()
                },
            }
            for bundle in found
        ]
        print(json_module.dumps(entries, indent=2))
        return
    for bundle in found:
        print(f"{bundle.name:12} {bundle.metadata.get('version', ''):8} {bundle.metadata.get('name', '')}")
        for name, card in bundle.weights.items():
            print(f"{'':12} --weights {name}: {card.description}; start: {card.init}")
    if not found:
        raise InputError("no bundles found; is the package installed completely?")


def demo(
    output: str = "iregzoo-demo", bundle: str = "iirp", weights: str | None = None, overwrite: bool = False
) -> None:
    """Make a phantom pair with a known deformation, register it, and say how much of the deformation was found.

    Args:
        output: folder for the phantom (fixed, moving, labels) and the results.
        bundle: the method.
        weights: a name from iregzoo list, or a weights file.
        overwrite: replace an earlier demo in the folder.
    """
    from iregzoo.outputs import whole_folder
    from iregzoo.phantom import FILES as PHANTOM_FILES
    from iregzoo.phantom import make_phantom, recovered
    from iregzoo.register import read_scans
    from iregzoo.register import register as register_scans
    from iregzoo.results import FILES, provenance, write
    from iregzoo.zoo import load

    owned = (*FILES, *PHANTOM_FILES)
    with whole_folder(Path(output), overwrite=overwrite, owned=owned) as folder, _Progress(len(STAGES)) as bar:
        bar("read")
        phantom = make_phantom(folder)
        scans = read_scans(phantom.fixed, phantom.moving, phantom.fixed_labels, phantom.moving_labels)
        bar("weights")
        method = load(bundle, weights)
        result = register_scans(scans, method, init="none", progress=bar)
        report = write(result, folder, provenance(method), progress=bar)
        found = recovered(phantom, result)
    print(summary_line(report))
    for doubt in report["warnings"]:
        print(f"warning: {doubt}")
    print(
        f"known deformation {found['known_mm']:.2f} mm on average, of which {found['left_mm']:.2f} mm are left: "
        f"{found['recovered_percent']:.0f} % recovered"
    )
    print(f"written to {output}: look at report.png first")


def import_checkpoint(bundle: str, checkpoint: str, output: str) -> None:
    """Turn a checkpoint of a method's published code into weights for its bundle, for --weights FILE.

    Args:
        bundle: the method.
        checkpoint: the published file.
        output: the weights file to write.
    """
    from iregzoo.zoo import import_checkpoint as convert

    convert(bundle, checkpoint, output)
    print(f"written to {output}: use it with --weights {output}")


def choose_device(name: str) -> str:
    """The device that ``--device`` means.

    Raises:
        InputError: for another name, or a device that this machine lacks.
    """
    import torch

    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if present["cuda"] else "cpu"
    if name not in present:
        raise InputError(f"device {name!r} is unknown; choose auto, {', '.join(present)}")
    if not present[name]:
        raise InputError(f"device {name!r} is not on this machine; choose auto or cpu")
    return name


def names(value: str | Sequence[str], option: str) -> list[str]:
    """What stands between an option's commas, each once.

    Raises:
        InputError: where there is nothing.
    """
    parts = value.split(",") if isinstance(value, str) else value
    found = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not found:
        raise InputError(f"--{option} names nothing; give one name, or several separated by commas")
    return found


def summary_line(report: dict[str, Any]) -> str:
    """What a registration did, in a line."""
    parts = [f"NCC {report['ncc_before']:.3f} → {report['ncc_after']:.3f}"]
    if "dice_mean" in report and "dice_before_mean" in report:
        parts.append(f"Dice {report['dice_before_mean']:.3f} → {report['dice_mean']:.3f}")
    parts.append(f"folding {report['folding_percent']:.3f} %")
    if report["iterations"]:
        parts.append(f"iterations {'-'.join(map(str, report['iterations']))}")
    parts.append(f"{sum(report['seconds'].values()):.1f} s")
    return ", ".join(parts)


def result_line(result: dict[str, Any]) -> str:
    """The summary of one method, in a line."""
    from iregzoo.tables import title

    pairs = f"{result['pairs']} pair{'' if result['pairs'] == 1 else 's'}"
    parts = [f"{title(result)}, {pairs}"]
    if "dice_mean" in result:
        dice, before = result["dice_mean"], result["dice_before"]
        parts.append(f"Dice {dice['mean']:.4f} ± {dice['sd']:.4f} (before {before['mean']:.4f})")
    if "hd95_mm" in result:
        parts.append(f"HD95 {result['hd95_mm']['mean']:.2f} mm")
    parts.append(f"folding {result['folding_percent']['mean']:.3f} %")
    parts.append(f"NCC {result['ncc_before']['mean']:.3f} → {result['ncc_after']['mean']:.3f}")
    if result["iterations"]:
        parts.append(f"iterations {result['iterations']}")
    parts.append(f"{result['seconds']['mean']:.2f} s a pair")
    return ", ".join(parts)


class _Progress:
    """A progress bar on standard error that names what is being done; silent where nobody watches."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=total, leave=False, disable=None, bar_format="{desc} {bar:30} {n}/{total} [{elapsed}<{remaining}]"
        )
        self.begun = False

    def __enter__(self) -> Callable[[str], None]:
        return self.step

    def step(self, name: str) -> None:
        self.bar.update(int(self.begun))
        self.begun = True
        self.bar.set_description_str(name)

    def __exit__(self, *error: object) -> None:
        self.bar.close()


COMMANDS: dict[str, Callable[..., None]] = {
    "register": register,
    "evaluate": evaluate,
    "list": list_bundles,
    "demo": demo,
    "import-checkpoint": import_checkpoint,
}


def prepare(arguments: Sequence[str]) -> list[str]:
    """Arguments for Fire, checked and quoted.

    Fire would run a command with an option that it does not have and complain afterwards, and it reads a folder called
    1e5 as a number: unknown options are refused first, and what a command takes as text is quoted.

    Raises:
        InputError: naming an option that the command does not have, or that lacks its value.
    """
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is None:
        return list(arguments)
    parameters = signature(command).parameters
    prepared, rest = [arguments[0]], list(arguments[1:])
    while rest:
        argument = rest.pop(0)
        if argument in ("--", "--help", "-h"):  # what follows is Fire's own
            return [*prepared, argument, *rest]
        if not argument.startswith("--"):
            prepared.append(argument if argument.startswith("-") else repr(argument))
            continue
        option, _, value = argument.partition("=")
        name = option[2:].replace("-", "_")
        if name not in parameters:
            known = ", ".join(f"--{parameter.replace('_', '-')}" for parameter in parameters)
            raise InputError(f"{option} is no option of {arguments[0]}; it has {known}")
        annotation = parameters[name].annotation
        if "=" not in argument and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif "=" not in argument:
            if annotation is not bool:
                raise InputError(f"{option} has no value; give one after it")
            value = "True"
        text = annotation is str or str in get_args(annotation)
        prepared.append(f"--{name}={value!r}" if text else f"--{name}={value}")
    return prepared


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of ``iregzoo``."""
    import fire

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # a scheduler's way of Ctrl-C
        signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # an arrow must not fail where only ASCII can be shown
    try:
        fire.Fire(COMMANDS, prepare(sys.argv[1:]), name="iregzoo")
    except InputError as error:
        print(f"iregzoo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("iregzoo: interrupted; nothing was written, run the command again", file=sys.stderr, flush=True)
        # Not sys.exit: where the interrupt met code that was being exec'd (as dataclasses are, at import), Python
        # remembers it as unhandled, although it is handled here, and would end with a signal instead of 2.
        os._exit(2)
