"""Displacement algebra: sample, warp, compose, integrate, invert, resize, Jacobian.

A displacement is a float tensor (B, N, *shape) with N = 2 or 3 spatial axes, in voxels of its own grid; channel i
moves along array axis i. It pulls: ``warp(image, u)(x) = image(x + u(x))``. All sampling uses voxel centres as
corners (``align_corners=True``), so the first and last voxel of an axis are the ends of its sampling range.

Everything runs on the device of its inputs. Coordinates are kept in float32 or better even under autocast, because a
half-precision coordinate of 150 voxels is only good to a tenth of a voxel.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]

from iregzoo import kernels
from iregzoo.gather import gather, takes
from iregzoo.precision import exact_dtype

# Places from which a volume is worth sharing among threads, and of a slab for each thread.
_SHARED = 2**15
_SLAB = 2**17


def check_tensor(value: object, name: str) -> None:
    """Raise TypeError for what is no tensor, such as a NumPy array."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a tensor: torch.from_numpy makes one of an array"
        )


def check_displacement(displacement: Tensor, name: str = "displacement") -> int:
    """Return the number of spatial axes N of a field (B, N, *shape).

    Raises:
        TypeError: for what is no tensor.
        ValueError: where the channels do not match the spatial axes, or N is neither 2 nor 3.
    """
    check_tensor(displacement, name)
    axes = displacement.dim() - 2
    if axes not in (2, 3) or displacement.shape[1] != axes:
        raise ValueError(
            f"{name} has shape {tuple(displacement.shape)}; expected (B, 2, H, W) or (B, 3, D, H, W) "
            "with one channel per spatial axis"
        )
    return axes


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def identity(shape: Sequence[int], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Voxel coordinates of a grid: (1, N, *shape), channel i holding the position along axis i."""
    axes = [torch.arange(size, device=device, dtype=dtype) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _normalised(places: Tensor, sizes: Sequence[int], relative: bool, first: int = 0) -> Tensor:
    """Places (B, N, *shape) in voxels of an image as grid_sample counts: −1 to 1 along each axis, the last axis first.

    Relative places are displacements from the voxels of their own grid, which begins at ``first`` of its first axis.
    The components stay the planes they are, for writing them side by side, as grid_sample expects them, would take
    longer than all the rest.
    """
    axes = len(sizes)
    tracked = torch.is_grad_enabled() and places.requires_grad
    grid = None if tracked else places.new_empty(places.shape)
    planes = []
    for plane, axis in enumerate(reversed(range(axes))):
        scale = 2.0 / max(sizes[axis] - 1, 1)
        start = places.new_full((), -1.0)
        if relative:
            positions = torch.arange(places.shape[2 + axis], device=places.device, dtype=places.dtype)
            if axis == 0:
                positions += first
            start = (positions * scale - 1.0).view(-1, *[1] * (axes - 1 - axis))
        out = None if grid is None else grid[:, plane]
        planes.append(torch.add(start, places[:, axis], alpha=scale, out=out))
    return torch.stack(planes, dim=1) if grid is None else grid


def _sample_places(
    image: Tensor, places: Tensor, relative: bool, mode: str, padding: str, out: Tensor | None = None
) -> Tensor:
    if mode not in ("linear", "nearest") or padding not in ("zeros", "border"):
        raise ValueError(f"mode={mode!r}, padding={padding!r}; expected linear or nearest, zeros or border")
    if mode == "linear" and takes(image, places):
        return gather(image, places, relative=relative, padding=padding, out=out)
    if mode == "linear" and kernels.samples(image, places, out):
        return kernels.sample(image, places, relative=relative, padding=padding, out=out)
    if padding == "zeros" and 1 in image.shape[2:]:
        # Along an axis of one voxel grid_sample reads that voxel wherever a place is. With a zero beside it, it falls
        # to zero outside, as along every other axis.
        image = F.pad(image, [end for size in reversed(image.shape[2:]) for end in (0, int(size == 1))])
    # An image is read in its own precision, and integers in one that holds any label, where the device has it.
    dtype = torch.promote_types(image.dtype, torch.float32) if image.is_floating_point() else places.dtype
    if not image.is_floating_point() and image.dtype.itemsize > 2:
        dtype = exact_dtype(image.device)

    def read(volumes: Tensor, grid: Tensor) -> Tensor:
        how = "bilinear" if mode == "linear" else mode
        sampled = F.grid_sample(volumes, grid.to(dtype), mode=how, padding_mode=padding, align_corners=True)
        if not image.is_floating_point():
            sampled = sampled.round()  # the cast alone would make 2 of 2.9999
        if _may_be_nan(grid):  # where grid_sample reads some voxel or none
            sampled.detach().masked_fill_(grid.isnan().any(-1)[:, None], math.nan if image.is_floating_point() else 0)
        return sampled

    if _in_slabs(image, places):
        return _sample_slabs(image, places, relative, dtype, read, out)
    volumes, grid = image.to(dtype), _normalised(places, image.shape[2:], relative).movedim(1, -1)
    groups = _channel_groups(image, places)
    if groups > 1:
        volumes = volumes.reshape(len(volumes) * groups, -1, *volumes.shape[2:])
        grid = grid[:, None].expand(-1, groups, *grid.shape[1:]).flatten(0, 1)
    sampled = read(volumes, grid).to(image.dtype)
    if groups > 1:
        sampled = sampled.view(len(image), -1, *sampled.shape[2:])
    return sampled if out is None else out.copy_(sampled)


def _may_be_nan(grid: Tensor) -> bool:
    """Whether places have to be looked at for NaN one by one: not where their sum, at hand at once, is a number.

    Only a CPU is asked for the sum: a GPU would have to be waited for, and a traced sum has no value yet.
    """
    if not (type(grid) is Tensor and grid.device.type == "cpu"):
        return True
    if is_tracing() or torch.compiler.is_compiling():  # type: ignore[no-untyped-call]
        return True
    return math.isnan(float(grid.detach().sum()))


def _channel_groups(image: Tensor, places: Tensor) -> int:
    """In how many parts an image whose gradient is wanted is read.

    On a CPU, PyTorch gives each volume of a batch one thread. So an image's channels become a batch, all read at the
    same places; of four channels or more each, for every part has a gradient of the places, of three.
    """
    if not (type(image) is type(places) is Tensor and image.device.type == "cpu" and len(image) == len(places)):
        return 1
    if not (torch.is_grad_enabled() and image.requires_grad) or math.prod(places.shape) < _SHARED:
        return 1
    most = min(torch.get_num_threads() // len(image), image.shape[1] // 4)
    return next((groups for groups in range(most, 1, -1) if image.shape[1] % groups == 0), 1)


def _in_slabs(image: Tensor, places: Tensor) -> bool:
    """Whether a volume is read slab by slab.

    On a CPU, PyTorch gives each volume of a batch one thread. So a volume's slabs become a batch, all reading the one
    image; its gradient would be a sum of copies, so where that is wanted its channels are shared out instead.
    """
    return (
        type(image) is type(places) is Tensor
        and places.device.type == "cpu"
        and places.dim() == 5
        and len(image) == len(places) <= torch.get_num_threads()
        and math.prod(places.shape[2:]) >= _SHARED
        and not (torch.is_grad_enabled() and image.requires_grad)
    )


def _sample_slabs(
    image: Tensor,
    places: Tensor,
    relative: bool,
    dtype: torch.dtype,
    read: Callable[[Tensor, Tensor], Tensor],
    out: Tensor | None,
) -> Tensor:
    """Read (B, C, *image_shape) at places (B, 3, D, H, W) by ``read``, a few slabs of D at once, one for each thread.

    What is made on the way is as large as those slabs are: nothing of the size of a volume is taken and given back.
    """
    if out is None:
        out = image.new_empty(*image.shape[:2], *places.shape[2:])
    depth = places.shape[2]
    threads = min(torch.get_num_threads(), depth)
    thickness = depth // threads
    if not (torch.is_grad_enabled() and places.requires_grad):  # a gradient would pass over the volume for each step
        thickness = max(1, min(thickness, _SLAB // math.prod(places.shape[3:])))
    for index, volume in enumerate(image.to(dtype)):
        first = 0
        while first < depth:  # slabs of one thickness while the depth lasts for all threads, then thinner ones
            thick = min(thickness, max(1, (depth - first) // threads))
            count = min(threads, (depth - first) // thick)
            after = first + count * thick
            grid = _normalised(places[index : index + 1, :, first:after], image.shape[2:], relative, first)[0]
            slabs = grid.view(3, count, thick, *grid.shape[2:]).permute(1, 2, 3, 4, 0)
            sampled = read(volume.expand(count, *volume.shape), slabs)
            out[index, :, first:after].view(-1, count, thick, *grid.shape[2:]).copy_(sampled.movedim(0, 1))
            first = after
    return out


def _check_image(image: Tensor, places: Tensor, axes: int) -> None:
    """Raise TypeError or ValueError unless an image (B, C, *image_shape) can be read at places (B, N, *shape)."""
    check_tensor(image, "image")
    if image.dim() != axes + 2 or image.shape[0] != places.shape[0]:
        raise ValueError(
            f"image has shape {tuple(image.shape)}; expected {axes + 2} axes, (B, C, *shape) with B = "
            f"{places.shape[0]}, for coordinates or a displacement of shape {tuple(places.shape)}"
        )
    if image.device != places.device:
        raise ValueError(f"image is on {image.device}, but where to read it on {places.device}; move one of them")


def sample(image: Tensor, coordinates: Tensor, *, mode: str = "linear", padding: str = "zeros") -> Tensor:
    """Read an image at voxel coordinates.

    Args:
        image: (B, C, *image_shape), any dtype.
        coordinates: (B, N, *shape), absolute positions in voxels of the image.
        mode: ``linear`` or ``nearest``.
        padding: ``zeros`` or ``border`` outside the image.

    Returns:
        (B, C, *shape) in the image's dtype. A place that is NaN reads NaN, or 0 where the image holds integers.

    Raises:
        TypeError: for what is no tensor.
        ValueError: where the axes, the batches or the devices of image and coordinates differ.
    """
    axes = check_displacement(coordinates, "coordinates")
    _check_image(image, coordinates, axes)
    return _sample_places(image, at_least_float32(coordinates), False, mode, padding)


def warp(
    image: Tensor, displacement: Tensor, *, mode: str = "linear", padding: str = "zeros", out: Tensor | None = None
) -> Tensor:
    """Warp an image: ``warped(x) = image(x + u(x))``.

    Args:
        image: (B, C, *shape), any dtype.
        displacement: (B, N, *shape) in voxels, on the same grid.
        mode: ``linear`` or ``nearest`` (label maps).
        padding: ``zeros`` or ``border`` outside the image.
        out: (B, C, *shape), written to and returned where it is given; not in the image's memory.

    Returns:
        (B, C, *shape) in the image's dtype. A displacement that is NaN gives NaN, or 0 where the image holds integers.

    Raises:
        TypeError: for what is no tensor.
        ValueError: where the grids, the batches or the devices differ, or ``out`` has another shape.
    """
    _check_image(image, displacement, check_displacement(displacement))
    if image.shape[2:] != displacement.shape[2:]:
        raise ValueError(
            f"image grid {tuple(image.shape[2:])} differs from displacement grid {tuple(displacement.shape[2:])}; "
            "resize the displacement first"
        )
    expected = (len(displacement), *image.shape[1:])
    if out is not None and out.shape != expected:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {expected}")
    return _sample_places(image, at_least_float32(displacement), True, mode, padding, out)


def compose(outer: Tensor, inner: Tensor, *, padding: str = "border") -> Tensor:
    """The displacement that moves by ``inner`` first: ``inner(x) + outer(x + inner(x))``.

    Warping with the result equals warping with ``outer`` and then the warped image with ``inner``.

    Args:
        outer, inner: (B, N, *shape) in voxels of one grid.
        padding: how ``outer`` continues outside its grid, ``border`` or ``zeros``.
    """
    moved = warp(outer, inner, padding=padding)
    return moved.add_(inner) if moved.dtype == inner.dtype else moved + inner


def integrate(velocity: Tensor, steps: int = 7) -> Tensor:
    """Exponential of a stationary velocity field by scaling and squaring (Arsigny et al., MICCAI 2006).

    There the field is divided by 2**steps and composed with itself ``steps`` times; the first step of time h leaves an
    error of h²/2 there. Here that step is one of the midpoint rule, h v(x + h/2 v(x)), whose error is of the order of
    h³, so half the squarings come nearer to the exponential than all of them would, with 4 instead of 7 warps at 7
    steps, and fewer interpolations. It does so where the field changes by less than about 3 voxels from voxel to voxel
    (7 steps); beyond, fields fold with either.

    Args:
        velocity: (B, N, *shape) in voxels per unit time.
        steps: accuracy, in squarings of plain scaling and squaring; steps // 2 are done. 0 gives the velocity itself, 1
            one step of the midpoint rule.

    Raises:
        ValueError: for negative steps.
    """
    if steps < 0:
        raise ValueError(f"steps={steps}; expected 0 or more squarings")
    velocity = at_least_float32(velocity)
    if steps == 0:
        return velocity.clone()
    squarings = steps // 2
    time = 0.5**squarings
    displacement = time * warp(velocity, time / 2 * velocity, padding="border")
    for _ in range(squarings):
        displacement = compose(displacement, displacement)
    return displacement


def invert(displacement: Tensor, *, iterations: int = 100, tolerance: float = 1e-3) -> Tensor:
    """Inverse displacement by fixed-point iteration (Chen et al., Medical Physics 2008).

    Moves v(x) half the way to −u(x + v(x)) for each pair until the way is no longer than ``tolerance`` voxel. The whole
    way converges only where the field's Lipschitz constant is below one, and oscillates where a field compresses
    strongly; half the way still converges there. ``inverse_error`` says how well it went.

    Args:
        displacement: (B, N, *shape) in voxels.
        iterations: the most iterations.
        tolerance: largest residual v(x) + u(x + v(x)) at which to stop, in voxels.
    """
    u = at_least_float32(displacement)
    inverse: Tensor = torch.zeros_like(u)
    active = torch.ones(u.shape[0], dtype=torch.bool, device=u.device)
    for _ in range(iterations):
        residual = inverse + warp(u, inverse, padding="border")
        active = active & (residual.abs().flatten(1).amax(1) > tolerance)
        inverse = torch.where(active.view(-1, *[1] * (u.dim() - 1)), inverse - residual / 2, inverse)
        if not active.any():
            break
    return inverse


def inverse_error(displacement: Tensor, inverse: Tensor) -> Tensor:
    """Length in voxels of ``u ∘ u⁻¹ − id`` at every voxel: (B, *shape)."""
    return length(compose(displacement, inverse))


def length(vectors: Tensor, dim: int = 1) -> Tensor:
    """Euclidean length of vectors along an axis, by default a field's: (B, N, *shape) to (B, *shape).

    ``torch.linalg.vector_norm`` takes twenty times as long on a CPU, over any axis but the last. Like that one's, its
    gradient is zero where the length is. It is computed and given in float32 or better.
    """
    first, *others = at_least_float32(vectors).unbind(dim)
    squares = first.square()
    for other in others:
        squares.addcmul_(other, other)
    if not squares.requires_grad:
        return squares.sqrt_()
    some = squares != 0
    return squares.where(some, 1).sqrt() * some


def resize(displacement: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample a displacement to another grid; its values are scaled by the ratio of the shapes.

    Args:
        displacement: (B, N, *old_shape) in voxels of the old grid.
        shape: the new grid's sizes.

    Returns:
        (B, N, *shape) in voxels of the new grid (×2 for one pyramid level).
    """
    axes = check_displacement(displacement)
    old = displacement.shape[2:]
    if tuple(old) == tuple(shape):
        return displacement
    mode = "trilinear" if axes == 3 else "bilinear"
    resized = F.interpolate(at_least_float32(displacement), size=tuple(shape), mode=mode, align_corners=True)
    ratios = [new / before for new, before in zip(shape, old, strict=True)]
    if len(set(ratios)) == 1:
        return resized * ratios[0]
    return resized * resized.new_tensor(ratios).view(1, axes, *[1] * axes)
