"""Scans in, transforms and warped scans out."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iregzoo.cards import WeightsCard
from iregzoo.continuation import continue_field
from iregzoo.errors import InputError
from iregzoo.iteration import Controller
from iregzoo.necessity import Needless, try_without
from iregzoo.refinement import SMOOTHNESS, likeness, refine_displacement
from iregzoo.registration import Registration
from iregzoo.scans import Scans as Scans  # with the next, what a registration begins with
from iregzoo.scans import read_scans as read_scans
from iregzoo.space.frame import Frame, affine_displacement, make_frame, network_input, warp_scan
from iregzoo.space.grid import Grid, Matrix, canonical_axes
from iregzoo.space.masks import Masks
from iregzoo.space.precise import precise_start
from iregzoo.space.scan import Window
from iregzoo.space.start import GIVEN, SEARCHED, STARTS, Find, affine_start, others
from iregzoo.space.transforms import TRANSFORM_FILES, read_linear
from iregzoo.space.upright import lying
from iregzoo.steering import gradient_steps
from iregzoo.zoo import Method

Progress = Callable[[str], None]
TRUSTED = ("none", GIVEN)  # starts that are used as they are
SHARP_MM = 1.5  # in smaller voxels, some tenths of a mm by which a search is off hide what two scans have in common
# Of gradient steps that are the whole deformation, and no correction of a network's: of four known changes of 1.3 mm on
# average in each of two real brains, 0.28 and 0.48 mm are left with it, 0.32 and 0.52 with that of a correction.
SMOOTHNESS_ALONE = 4 * SMOOTHNESS


@dataclass(frozen=True)
class Refinement:
    """What finishing by gradient steps did.

    Attributes:
        steps: how many.
        network: the grid on which the network saw the pair; that of the frame is the refinement's.
        local_ncc_before, local_ncc_after: the pair's ``refinement.likeness`` on the refinement's grid, in [0, 1].
    """

    steps: int
    network: Grid
    local_ncc_before: float
    local_ncc_after: float


@dataclass(frozen=True)
class Result:
    """A registered pair, on the fixed image's own grid. Tensors are of float32, but for labels, and on the CPU, but
    for what ``registration`` has beside its displacement, which is where the network ran.

    Attributes:
        scans: what was registered.
        frame: its geometry, with the affine start that was used.
        init: the name of that start.
        registration: what the network gave, on the frame's grid; its displacement continued around what masks count,
            and after a refinement the refined one.
        deformation: (1, 3, *fixed.shape), LPS mm, without the affine.
        displacement: (1, 3, *fixed.shape), LPS mm, affine included.
        warped: the moving scan on the fixed grid, (1, 1, *fixed.shape), in its own intensities.
        warped_labels: the moving labels on the fixed grid, (1, 1, *fixed.shape) of integers, where there were any.
        seconds: time by stage.
        refinement: what gradient steps did after the network, where there were any.
        card: of the weights; None for a peer, which has none.
        needless: what showed that the network's displacement was to be left out, where it was.
        lying: in words, each scan that was seen to lie otherwise than its header says.
        shared: of an alignment, what the scans tell of each other by it, a part of what the fixed one tells of itself.
    """

    scans: Scans
    frame: Frame
    init: str
    registration: Registration
    deformation: Tensor
    displacement: Tensor
    warped: Tensor
    warped_labels: Tensor | None
    seconds: dict[str, float]
    refinement: Refinement | None = None
    card: WeightsCard | None = None
    needless: Needless | None = None
    lying: tuple[str, ...] = ()
    shared: float | None = None


def choose_start(init: str | Path) -> str | Matrix:
    """The start that ``--init`` means: the name that it is, or the affine of a file with a linear transform.

    Raises:
        InputError: for what is neither, and as ``read_linear`` does.
    """
    init = str(init)
    if init in ("auto", *STARTS):
        return init
    if not init.lower().endswith(TRANSFORM_FILES):
        files = ", ".join(TRANSFORM_FILES)
        raise InputError(f"init {init!r} is unknown; choose auto, {', '.join(STARTS)} or a transform file ({files})")
    return read_linear(init)


def start_of(
    scans: Scans, init: str | Path | Matrix, card: WeightsCard, finder: Find | None = None
) -> tuple[str, Matrix]:
    """What a report calls a pair's affine start, and the affine (4, 4), LPS mm: ``auto`` is the card's.

    What finds brains, where weights have it, finds a start in place of the search.

    Raises:
        InputError: as ``choose_start`` and ``affine_start`` do.
    """
    if isinstance(init, (str, Path)):
        init = choose_start(init)
    start = card.init if isinstance(init, str) and init == "auto" else init
    name = start if isinstance(start, str) else GIVEN
    return name, affine_start(scans.filled.fixed, scans.filled.moving, start, finder)


def uprights(scans: Scans, init: str, finder: Find | None) -> tuple[Matrix, tuple[str, ...]]:
    """A rotation (4, 4) of the world after which the fixed scan lies as its axes say, and which headers are wrong.

    The moving scan is not looked at where a start of this name was given.
    """
    if finder is None:
        return np.eye(4), ()
    looked = (scans.filled.fixed, scans.filled.moving)[: 1 if init == GIVEN else 2]
    said = (lying(scan, finder.upright(scan), init) for scan in looked)
    return finder.upright(scans.filled.fixed), tuple(filter(None, said))


def frame_of(scans: Scans, start: Matrix, card: WeightsCard, stride: int, upright: Matrix | None = None) -> Frame:
    """The geometry of a pair with an affine start (4, 4), LPS mm, as weights and a network's stride need it.

    ``upright`` is that of ``uprights``; the fixed scan lies as its header says if None.
    """
    return make_frame(
        scans.filled.fixed,
        scans.filled.moving,
        start,
        spacing=card.spacing,
        stride=stride,
        minimum=card.minimum,
        window=card.window,
        upright=upright,
    )


def seen(scans: Scans, frame: Frame, init: str, card: WeightsCard) -> Tensor:
    """What the network sees of a pair: (1, 2, *frame.network.shape), see ``network_input``.

    Args:
        scans: the pair.
        frame: its geometry.
        init: the name of its affine start.
        card: of the weights.

    Raises:
        InputError: where the moving scan shows nothing there, and where the masks leave nothing to compare.
    """
    image = network_input(frame, scans.filled.fixed, scans.filled.moving, card.window)
    if not image[:, 0].any():
        raise InputError(
            f"{scans.moving.path}: does not overlap {scans.fixed.path.name} (init {init}); align them with --init "
            f"{others(init)} or a transform file, or correct the affines in their headers"
        )
    if scans.masks:
        scans.counted(
            frame.fixed, affine_displacement(frame.start, frame.fixed), f"after the affine start (init {init})"
        )
    return image


@contextmanager
def timed(stage: str, seconds: dict[str, float], progress: Progress) -> Iterator[None]:
    """Announce a stage and note how long it took."""
    progress(stage)
    begin = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - begin, 3)


@torch.no_grad()  # not inference_mode: its tensors could take part in no gradient of the caller's
def register(
    scans: Scans,
    method: Method,
    *,
    init: str | Path | Matrix = "auto",
    controller: Controller | None = None,
    refine: int | None = None,
    progress: Progress = lambda stage: None,
    placed: Callable[[Frame], None] = lambda frame: None,
) -> Result:
    """Register a pair: affine start, network, and its field brought back to the fixed image's grid.

    Where the pair has masks, the search for the start and the network, which know none, see scans whose lesions are
    filled, see ``fill_holes``. Around what counts, such as outside a brain, the network's field is replaced, see
    ``continue_field``, and the gradient steps look only at what counts.

    Args:
        scans: the pair, from ``read_scans``; of arrays, ``Scans`` of what ``image_scan`` makes.
        method: from ``zoo.load``.
        init: affine start: a name, see ``affine_start``, of which ``auto`` is what the weights' card says; a file with
            a linear transform; or the affine, (4, 4), LPS mm, from a place in the fixed scan to one in the moving.
        controller: of the iterations, such as ``iteration.TCI()``; the network's own if None.
        refine: gradient steps that finish the pair after the network, see ``refinement``; the card's if None.
        progress: told the name of each stage as it begins.
        placed: told the pair's geometry before the network runs.

    Raises:
        InputError: for scans that do not meet, weights that give what is not finite, and as ``start_of`` and
            ``gradient_steps`` do.
        TypeError, ValueError: for a controller that is none, or that a method of one pass cannot use.
    """
    steps = gradient_steps(refine, method.card)
    seconds: dict[str, float] = {}
    with timed("start", seconds, progress):
        name, start = start_of(scans, init, method.card, method.finder)
        upright, lying_otherwise = uprights(scans, name, method.finder)
        frame = frame_of(scans, start, method.card, method.network.stride, upright)
        image = seen(scans, frame, name, method.card)
    placed(frame)
    with timed("network", seconds, progress):
        registration = method.network.register(image.to(method.device), controller)
        if method.device.type == "cuda":  # which goes on after the call, whose time would be in no stage
            torch.cuda.synchronize(method.device)
    result = conclude(scans, frame, name, image, registration, steps, method.card, seconds=seconds, progress=progress)
    return replace(result, lying=lying_otherwise)


@torch.no_grad()
def conclude(
    scans: Scans,
    frame: Frame,
    init: str,
    image: Tensor,
    registration: Registration,
    steps: int,
    card: WeightsCard,
    *,
    seconds: dict[str, float] | None = None,
    progress: Progress = lambda stage: None,
) -> Result:
    """What follows the network: masks and gradient steps, where there are any, and the way back to the fixed grid.

    Where the scans tell much less of each other with the network's displacement than without, it is left out, see
    ``Trial.needless``, and the start is made precise unless it is trusted, see ``precise_start``.

    Args:
        scans: the pair.
        frame: its geometry.
        init: the name of its affine start.
        image: what the network saw, see ``seen``.
        registration: what the network gave, on its device.
        steps: gradient steps, 0 for none.
        card: of the weights.
        seconds: where the time of each stage is noted.
        progress: told the name of each stage as it begins.

    Raises:
        InputError: for a displacement that is not finite.
    """
    seconds = {} if seconds is None else seconds
    predicted, refinement = registration.displacement, None
    if not torch.isfinite(predicted).all():
        raise InputError(
            "the network returned a displacement that is not finite; check that the weights are not damaged"
        )
    with timed("check", seconds, progress):
        needless, frame = _checked(scans, frame, init, image.to(predicted.device), predicted, card.window)
        if needless:
            registration = _altered(registration, torch.zeros_like(predicted))
    if scans.masks and not needless:
        with timed("mask", seconds, progress):
            registration = _continued(scans.masks, frame, registration)
    registration = replace(registration, displacement=registration.displacement.cpu())
    if steps:
        smoothness = SMOOTHNESS_ALONE if needless else SMOOTHNESS
        with timed("refine", seconds, progress):
            frame, registration, refinement = _refine(
                scans, frame, registration, steps, card.window, predicted.device, smoothness
            )
    with timed("warp", seconds, progress):
        result = finish(scans, frame, init, registration, seconds)
        return replace(result, refinement=refinement, card=card, needless=needless)


def _checked(
    scans: Scans, frame: Frame, init: str, image: Tensor, predicted: Tensor, window: Window | None
) -> tuple[Needless | None, Frame]:
    """What shows that a network's displacement is needless, if it is, and the frame to go on with.

    The displacement is compared with a start that has been made fairly precise, except for one that is trusted, and
    where the search came near enough to tell: where the displacement gains nothing over it, it may not have.
    """
    counted = _compared(scans.masks, frame, predicted)
    near = init in SEARCHED and frame.network.spacing.min() >= SHARP_MM
    still, found = frame, None
    if init in TRUSTED or near:
        found = try_without(predicted, image, image[:, :1], counted)
    if found is None or (near and not found.gains and not found.needless):
        still = _made_precise(scans, frame, init, roughly=True)
        unmoved = network_input(still, scans.filled.fixed, scans.filled.moving, window)[:, :1].to(image.device)
        found = try_without(predicted, image, unmoved, counted)
    if not found.needless:
        return None, frame
    return found.needless, frame if init in TRUSTED else _made_precise(scans, still, init)


def _made_precise(scans: Scans, frame: Frame, init: str, *, roughly: bool = False) -> Frame:
    """A frame with a precise start: a rigid motion away from its own, or an affine one if that was searched for."""
    start = precise_start(
        scans.filled.fixed,
        scans.filled.moving,
        frame.start,
        rigid=init != "affine",
        masks=scans.masks,
        roughly=roughly,
    ).start
    return replace(frame, start=start)


def _compared(masks: Masks, frame: Frame, displacement: Tensor) -> Tensor | None:
    """Which voxels of a network's grid count both with its displacement and without; None if all."""
    if not masks:
        return None
    counted = masks.counted_in(frame, displacement) & masks.counted_in(frame, torch.zeros_like(displacement))
    return counted.to(displacement.device)


def _continued(masks: Masks, frame: Frame, registration: Registration) -> Registration:
    """What a network gave, its displacement continued around what counts; in a filled hole it is as it was given."""
    around = masks.closed()
    if all(mask.data.all() for mask in around):
        return registration
    predicted = registration.displacement
    counted = around.counted_in(frame, predicted).to(predicted.device)
    return registration if counted.all() else _altered(registration, continue_field(predicted, counted))


def _altered(registration: Registration, displacement: Tensor) -> Registration:
    """A registration with another displacement; what else the network gave belongs to its own alone."""
    return replace(registration, displacement=displacement, inverse=None, opposite=None, pyramid=())


def _refine(
    scans: Scans,
    frame: Frame,
    registration: Registration,
    steps: int,
    window: Window | None,
    device: torch.device,
    smoothness: float,
) -> tuple[Frame, Registration, Refinement]:
    """Finish a network's displacement by gradient steps, on a grid of the fixed scan's own voxels."""
    axes, _ = canonical_axes(scans.fixed.grid)
    spacing = scans.fixed.grid.spacing[axes].tolist()
    seen = scans.filled
    own = make_frame(seen.fixed, seen.moving, frame.start, spacing=spacing, stride=1, minimum=(1, 1, 1), window=window)
    image = network_input(own, seen.fixed, seen.moving, window).to(device)
    moving, fixed = image[:, :1], image[:, 1:]
    begun = frame.carry(registration.displacement, own.network).to(device)
    counted = scans.masks.counted_in(own, begun).to(device) if scans.masks else None
    refined = refine_displacement(begun, moving, fixed, steps=steps, counted=counted, smoothness=smoothness)
    before, after = (float(likeness(u, moving, fixed, counted=counted)) for u in (begun, refined))
    return own, _altered(registration, refined.cpu()), Refinement(steps, frame.network, before, after)


def finish(
    scans: Scans, frame: Frame, init: str, registration: Registration, seconds: dict[str, float] | None = None
) -> Result:
    """Bring a network's displacement (on the CPU) back to the fixed image's own grid and warp the moving scan once."""
    deformation = frame.deform(registration.displacement)
    displacement = frame.total(deformation)
    labels = scans.moving_labels
    return Result(
        scans=scans,
        frame=frame,
        init=init,
        registration=registration,
        deformation=deformation,
        displacement=displacement,
        warped=warp_scan(scans.moving, displacement, frame.fixed),
        warped_labels=warp_scan(labels, displacement, frame.fixed, mode="nearest") if labels else None,
        seconds={} if seconds is None else seconds,
    )
