"""What a Label face's ``inference.json`` names: reading a request, registering, and answering.

MONAI Label hands one patient's image from the transform through the inferer to the answer. The request rides on that
image, as metadata of its tensor, so that requests at the same time have nothing in common.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import Transform
from torch import Tensor

from iregzoo.devices import choose_device
from iregzoo.errors import InputError
from iregzoo.flags import flag
from iregzoo.label.atlas import place_of
from iregzoo.label.trust import trust
from iregzoo.register import Scans, read_scans, register
from iregzoo.registration import PairNetwork
from iregzoo.results import provenance
from iregzoo.space.grid import RAS_FROM_LPS
from iregzoo.space.scan import Scan
from iregzoo.space.start import STARTS
from iregzoo.steering import MOST_ITERATIONS, choose_controller
from iregzoo.suited import choices, suited
from iregzoo.template import Atlas, read_atlas
from iregzoo.zoo import Bundle, Method, Weights, find_weights, finder_of, load, read_bundle

DOUBTS = ("warn", "refuse")
BAD_REQUEST, SERVER_ERROR = 400, 500


@contextmanager
def answering(status: int) -> Iterator[None]:
    """Answer bad input with its reason and an HTTP status; the server goes on."""
    try:
        yield
    except InputError as error:
        from starlette.exceptions import HTTPException  # comes with MONAI Label

        raise HTTPException(status, str(error)) from None


@dataclass(frozen=True)
class Options:
    """What the option panel asks for."""

    controller: str = "auto"
    max_iterations: int | None = None
    init: str = "auto"
    refine: Any = None
    atlas: str = ""
    mirror: bool = False
    when_in_doubt: str = "warn"
    model_filename: str = "model.pt"

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> "Options":
        """Options from a request, where what is not asked for is missing, empty, or the list of all choices.

        They are read here and not by references in ``inference.json``, whose parser would run code in them.

        Raises:
            InputError: where a name is an option's but for its spelling, and where ``init``, ``mirror``,
                ``when_in_doubt`` or ``max_iterations``, whose 0 means the method's own, is no such choice; the others
                are checked where they are used.
        """

        def asked(name: str) -> Any:
            value = request.get(name)
            return value[0] if isinstance(value, list) and value else value

        def whole(name: str) -> Any:
            value = asked(name)
            return int(value) if str(value).strip().isdecimal() else value or 0

        _check_spelling(request)
        most = whole("max_iterations")
        if not isinstance(most, int) or not 0 <= most <= MOST_ITERATIONS:
            raise InputError(
                f"max_iterations {most!r}: give a whole number from 1 to {MOST_ITERATIONS}, or 0 for the method's "
                "default"
            )
        options = cls(
            controller=str(asked("controller") or "auto"),
            max_iterations=most or None,
            init=str(asked("init") or "auto"),
            refine=None if asked("refine") in (None, "", []) else whole("refine"),
            atlas=str(asked("atlas") or ""),
            mirror=flag(asked("mirror") or False, "mirror"),
            when_in_doubt=str(asked("when_in_doubt") or "warn"),
            model_filename=str(asked("model_filename") or "model.pt"),
        )
        if options.init not in ("auto", *STARTS):  # a file would be one of the server's
            raise InputError(f"init {options.init!r} is unknown; choose auto, {', '.join(STARTS)}")
        if options.when_in_doubt not in DOUBTS:
            raise InputError(f"when_in_doubt {options.when_in_doubt!r}: choose {' or '.join(DOUBTS)}")
        return options


def _check_spelling(request: Mapping[str, Any]) -> None:
    """Refuse ``Init`` and ``max-iterations``, which would change nothing.

    Other names that mean nothing here pass: viewers and MONAI Label send names of their own along.
    """
    for name in request:
        meant = str(name).strip().lower().replace("-", "_")
        if name != meant and meant in Options.__dataclass_fields__:
            raise InputError(f"option {name!r} is unknown; did you mean {meant!r}?")


@dataclass(frozen=True)
class Request:
    """A request with all that it needs: what rides on the patient's image."""

    options: Options
    scans: Scans
    atlas: Atlas
    bundle: Bundle
    weights: Weights


class ReadRequest(Transform):
    """The patient's image, whose path stands under ``image``, as a tensor (1, X, Y, Z) of its own grid.

    Args:
        bundle_root: of the Label face.
    """

    def __init__(self, bundle_root: str) -> None:
        self.root = Path(bundle_root)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        with answering(BAD_REQUEST):
            if not data.get("image"):
                raise InputError(
                    "the server has no image with this name; upload it, or look up the names in /datastore/"
                )
            options = Options.of(data)
            place = place_of(self.root, options.atlas)
            _check_device(data.get("device"))
        with answering(SERVER_ERROR):
            bundle = read_bundle(self.root)
        with answering(BAD_REQUEST):
            name = _card_of(bundle, options.model_filename)
        with answering(SERVER_ERROR):
            weights = find_weights(bundle, name)  # MONAI Label loads whatever is in the file: here its hash is checked
            atlas = read_atlas(place)
        with answering(BAD_REQUEST):
            scans = read_scans(data["image"], atlas.image, moving_labels=atlas.labels)
        affine = RAS_FROM_LPS @ scans.fixed.grid.affine
        if options.mirror:
            scans = replace(scans, fixed=_other_side(scans.fixed))
        meta = {
            "spatial_shape": scans.fixed.grid.shape,
            "original_affine": affine,
            "request": Request(options, scans, atlas, bundle, weights),
        }
        return {**data, "image": MetaTensor(scans.fixed.data[0], affine=torch.from_numpy(affine), meta=meta)}


def _other_side(scan: Scan) -> Scan:
    """A scan whose voxels are the same, but whose right is left."""
    return replace(scan, grid=replace(scan.grid, affine=np.diag([-1.0, 1.0, 1.0, 1.0]) @ scan.grid.affine))


def _card_of(bundle: Bundle, file: str) -> str:
    """The name of the weights in a file of a Label face."""
    named = [name for name, card in bundle.weights.items() if card.file == f"models/{file}"]
    if not named:
        raise InputError(f"model_filename {file!r}: is not among this method's weights; choose model.pt")
    return named[0]


def _check_device(name: Any) -> None:
    """Refuse a device that this machine lacks; MONAI Label has replaced a graphics card's name by ``cuda`` or so."""
    choose_device(str(name or "cpu"))


class AtlasInferer(Inferer):
    """Registers the atlas to the patient's image as ``iregzoo register`` does.

    Gives its labels (1, 1, X, Y, Z) on the patient's grid, as 8 bits, with the report on them as metadata.
    """

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> MetaTensor:
        assert isinstance(inputs, MetaTensor)
        asked: Request = inputs.meta["request"]
        options = asked.options
        pair: PairNetwork = getattr(network, "module", network)
        # Channels last is the faster layout on the CPU; torch's stubs do not know the argument.
        pair.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        with answering(SERVER_ERROR):
            finder = finder_of(asked.bundle, asked.weights, next(pair.parameters()).device, pair.precision)
            method, shown = _suiting(Method(asked.bundle, asked.weights, pair, finder=finder), asked.scans)
        with answering(BAD_REQUEST):
            result = register(
                asked.scans,
                method,
                init=options.init,
                controller=choose_controller(options.controller, options.max_iterations, method.network.controller),
                refine=options.refine,
            )
            found = trust(result, asked.atlas.names)
            if found["warnings"] and options.when_in_doubt == "refuse":
                raise InputError(f"the result is doubtful: {'; '.join(found['warnings'])}")
        used = {"atlas": asked.atlas.name, "mirror": options.mirror}
        report = {**found, **used, "seconds": result.seconds, **provenance(method, shown)}
        assert result.warped_labels is not None
        return MetaTensor(result.warped_labels.to(torch.uint8), meta={"report": report})


def _suiting(method: Method, scans: Scans) -> tuple[Method, str]:
    """A face's method, with its other weights where they suit both scans, and what these then show, else nothing."""
    bundle, network = method.bundle, method.network
    if len(choices(bundle)) < 2:
        return method, ""
    found = suited(bundle, (scans.fixed, scans.moving), method.device, network.precision)
    if found is None:
        return method, ""
    name, shown = found
    if name == method.weights.name:
        return method, shown
    return _loaded(bundle.path, name, bundle.weights[name].sha256, method.device, network.precision), shown


@lru_cache(maxsize=4)  # of what a server has in use
def _loaded(face: Path, weights: str, digest: str, device: torch.device, precision: str) -> Method:
    return load(str(face), weights, device, precision)


class Answer(Transform):
    """Puts the labels under ``pred`` and the report on them under ``result``, where MONAI Label looks for them."""

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        labels: MetaTensor = data["pred"]
        answer = {**data, "pred": labels.as_tensor(), "result": labels.meta["report"]}
        if not data.get("result_extension") and Path(data["image_path"]).is_dir():
            answer["result_extension"] = ".nii.gz"  # a DICOM series has no extension to write the labels with
        return answer
