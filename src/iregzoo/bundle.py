"""What bundle configs name: the network behind one tensor, its inferer, and the transforms around it.

A bundle's inference goes through the same functions as ``iregzoo register``: ``LoadPair`` reads two scans and puts
them on the network's grid, ``PairInferer`` runs the network, ``SaveRegistration`` brings the field back and writes.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer
from monai.transforms import Transform
from monai.utils import convert_to_tensor
from torch import Tensor

from iregzoo.cards import WeightsCard
from iregzoo.devices import check_device
from iregzoo.errors import InputError
from iregzoo.flags import flag
from iregzoo.outputs import check_file, check_kept, check_target, whole_folder
from iregzoo.register import Scans, choose_start, conclude, frame_of, read_scans, seen, start_of, uprights
from iregzoo.registration import PairNetwork, Registration
from iregzoo.results import FILES, provenance, write
from iregzoo.space.start import Find
from iregzoo.steering import choose_controller, gradient_steps
from iregzoo.suited import choices, for_pair
from iregzoo.zoo import Bundle, Method, Weights, complete, find_weights, finder_of, read_bundle

__all__ = [
    "LoadPair",
    "Method",
    "PairInferer",
    "PairNetwork",
    "SaveRegistration",
    "check_device",
    "check_metrics",
    "check_output",
    "choose_weights",
    "complete",
    "find_weights",
    "finder_of",
    "provenance",
    "read_bundle",
]

Sample = Mapping[str, Any]


def _scans(data: Sample) -> Scans:
    optional = ("fixed_labels", "moving_labels", "fixed_mask", "moving_mask")
    return read_scans(data["fixed"], data["moving"], *(data.get(name) for name in optional))


def choose_weights(
    bundle: Bundle, weights: str | None, pair: Sample, device: torch.device | str = "cpu", precision: str = "auto"
) -> tuple[Weights, str]:
    """The weights of a name, or without one those that suit a pair's scans, and what these then show, else nothing.

    The pair's entries are those that ``LoadPair`` reads; where no scans are there, the weights are the bundle's first.

    Raises:
        InputError: as ``find_weights``, ``for_pair`` and, where there is a choice, ``read_scans`` do.
    """
    shown = ""
    chooses = weights is None and len(choices(bundle)) > 1
    if chooses and all(os.path.exists(pair[name] or "") for name in ("fixed", "moving")):
        filled = _scans(pair).filled
        weights, shown, note = for_pair(bundle, (filled.fixed, filled.moving), device, precision)
        if note:
            print(f"note: {note}")
    return find_weights(bundle, weights), shown


def check_output(output_dir: str, pairs: Sequence[Sample], init: str, overwrite: bool) -> None:
    """Refuse, before any work, a folder that cannot have the results, or whose files are what they are made from.

    Raises:
        InputError: for several pairs, whose files would have one name, and as ``check_target`` and ``check_kept`` do.
    """
    option = "--output_dir"
    if len(pairs) != 1:
        raise InputError(f"dataset#data: has {len(pairs)} pairs; give one, or run several with iregzoo batch")
    check_target(output_dir, overwrite=overwrite, owned=FILES, option=option)
    check_kept(output_dir, (*(path for pair in pairs for path in pair.values()), init), FILES, option=option)


def check_metrics(output_dir: str, overwrite: bool) -> None:
    """Refuse, before any work, a folder with the metrics of another evaluation, by MONAI or by ``iregzoo evaluate``.

    Raises:
        InputError: without ``overwrite``.
    """
    metrics = Path(output_dir) / "metrics.csv"  # as MONAI's MetricsSaver calls them
    check_file(metrics, overwrite=flag(overwrite, "overwrite"), option="--output_dir")


class LoadPair(Transform):
    """Two scans, named under ``fixed`` and ``moving``, to the network's input ``image`` (2, D, H, W).

    Label maps may stand under ``fixed_labels`` and ``moving_labels``, masks under ``fixed_mask`` and ``moving_mask``.
    Adds the affine start: ``init``, its name, and ``start``, (4, 4), LPS mm; and how the fixed scan lies: ``upright``,
    (4, 4), and ``lying``, in lines, see ``uprights``.

    Args:
        card: what the weights need.
        stride: of the network.
        init: affine start, or a file with one, see ``choose_start``; ``auto`` is the card's.
        finder: what finds starts, from ``finder_of``; None where scans are searched as they are.
    """

    def __init__(self, card: WeightsCard, stride: int, init: str = "auto", finder: Find | None = None) -> None:
        self.card, self.stride, self.init, self.finder = card, stride, choose_start(init), finder

    def __call__(self, data: Sample) -> dict[str, Any]:
        scans = _scans(data)
        name, start = start_of(scans, self.init, self.card, self.finder)
        upright, lying = uprights(scans, name, self.finder)
        image = seen(scans, frame_of(scans, start, self.card, self.stride, upright), name, self.card)[0]
        placed = {"start": torch.from_numpy(start), "upright": torch.from_numpy(upright), "lying": "\n".join(lying)}
        return {**data, "image": image, "init": name, **placed}


class PairInferer(Inferer):
    """Runs a ``PairNetwork`` under a controller: ``image`` (B, 2, D, H, W) to ``pred`` (B, 3, D, H, W).

    Args:
        controller: ``auto`` (the network's own), ``tci``, ``iterstop`` or ``fixed``.
        max_iterations: cap of the iterations a level; None is the controller's own.
    """

    def __init__(self, controller: str = "auto", max_iterations: int | None = None) -> None:
        self.controller, self.max_iterations = controller, max_iterations

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        pair: PairNetwork = getattr(network, "module", network)
        image: Tensor = convert_to_tensor(inputs, track_meta=False)
        controller = choose_controller(self.controller, self.max_iterations, pair.controller)
        return pair.register(image, controller).displacement


class SaveRegistration(Transform):
    """Bring ``pred`` back to the scans and write the files of ``iregzoo register`` into a folder.

    Args:
        load: the ``LoadPair`` that made the input.
        output_dir: the folder, empty or new.
        provenance: what made the result, from ``results.provenance``.
        inverse: also write the other way.
        jacobian: also write the Jacobian determinant, see ``results.write``.
        overwrite: allow a folder that holds something already.
        refine: gradient steps after the network; the card's if None.
    """

    def __init__(
        self,
        load: LoadPair,
        output_dir: str,
        provenance: Mapping[str, Any],
        inverse: bool = False,
        overwrite: bool = False,
        refine: int | None = None,
        jacobian: bool = False,
    ) -> None:
        self.steps = gradient_steps(refine, load.card)
        self.load, self.output_dir = load, Path(output_dir)
        self.provenance = provenance
        self.inverse, self.jacobian = flag(inverse, "inverse"), flag(jacobian, "jacobian")
        self.overwrite = flag(overwrite, "overwrite")

    def __call__(self, data: Sample) -> dict[str, Any]:
        scans = _scans(data)
        predicted: Tensor = convert_to_tensor(data["pred"], track_meta=False)
        start, upright = (
            convert_to_tensor(data[name], track_meta=False).cpu().numpy() for name in ("start", "upright")
        )
        frame = frame_of(scans, start, self.load.card, self.load.stride, upright)
        image: Tensor = convert_to_tensor(data["image"], track_meta=False)
        registration = Registration(predicted[None])
        result = conclude(scans, frame, data["init"], image[None], registration, self.steps, self.load.card)
        result = replace(result, lying=tuple(data["lying"].splitlines()))
        with whole_folder(self.output_dir, overwrite=self.overwrite, owned=FILES) as folder:
            write(result, folder, self.provenance, inverse=self.inverse, jacobian=self.jacobian)
        return dict(data)
