"""Image similarities: mean squared and absolute error, global and local correlation, local information, SSIM.

Each takes two images (B, C, *shape) with 2 or 3 spatial axes and returns one number per pair, (B,), so that a batch
gives each pair what it would get alone. Sums run in float32 or better, also under autocast. What is no tensor raises
TypeError; images of two shapes, or of another number of axes, ValueError.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from iregzoo.fields import check_tensor

# Below this many roundings (the type's eps) of its sum of squares, a window's variance counts as none. It is the
# difference of two sums, and about 4 roundings off at most: a quarter of the least that counts.
FLAT = 16


def _prepare(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    for image in (first, second):
        check_tensor(image, "image")
    if first.shape != second.shape:
        raise ValueError(f"images differ in shape: {tuple(first.shape)} and {tuple(second.shape)}")
    if first.dim() not in (4, 5):
        raise ValueError(f"images have shape {tuple(first.shape)}; expected (B, C, H, W) or (B, C, D, H, W)")
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype)


def mse(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared error per pair: (B,)."""
    a, b = _prepare(first, second)
    return (a - b).square().flatten(1).mean(1)


def mae(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute error per pair: (B,)."""
    a, b = _prepare(first, second)
    return (a - b).abs().flatten(1).mean(1)


def _centred(values: Tensor) -> Tensor:
    """Rows (B, M) less their means, twice: the first mean of a constant row is rounded and would leave a constant."""
    values = values - values.mean(1, keepdim=True)
    return values - values.mean(1, keepdim=True)


def ncc(first: Tensor, second: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Global normalised cross-correlation (Pearson's r of the intensities) per pair: (B,), in [-1, 1].

    A constant image correlates with nothing: its score is 0, not NaN. ``eps`` is the smallest norm that counts.
    """
    a, b = (_centred(image.flatten(1)) for image in _prepare(first, second))
    # Normalising each image first keeps the products in range for images of any intensity scale.
    return (F.normalize(a, dim=1, eps=eps) * F.normalize(b, dim=1, eps=eps)).sum(1)


def box_sum(volume: Tensor, window: int, *, transposed: bool = False) -> Tensor:
    """Sum over a window³ (or window²) box around every voxel, zeros outside: (B, C, *shape).

    Each axis takes about log2(window) shifted additions instead of window: sums of 2, 4, 8 … voxels are built by
    doubling and the binary digits of the window pick those that add up to it. Only additions, so nothing cancels.
    Of an even window, one more voxel lies before than behind, or behind than before in the ``transposed`` sum, which
    is the gradient's.
    """
    before = (window - 1) // 2 if transposed else window // 2
    for axis in range(2, volume.dim()):
        volume = _box_sum_axis(volume, axis, window, before)
    return volume


def _box_sum_axis(volume: Tensor, axis: int, window: int, before: int) -> Tensor:
    size = volume.shape[axis]
    after = window - 1 - before
    if max(before, after) == 1 and size:  # each neighbour by itself, in half the time of doubling with a border
        own = volume.clone()
        if before:
            own.narrow(axis, 1, size - 1).add_(volume.narrow(axis, 0, size - 1))
        if after:
            own.narrow(axis, 0, size - 1).add_(volume.narrow(axis, 1, size - 1))
        return own
    partial = F.pad(volume, [0, 0] * (volume.dim() - 1 - axis) + [before, after])
    total: Tensor | None = None
    offset, width = 0, 1
    while width <= window:
        if window & width:
            piece = partial.narrow(axis, offset, size)
            total = piece if total is None else total + piece
            offset += width
        if 2 * width <= window:
            kept = partial.shape[axis] - width
            partial = partial.narrow(axis, 0, kept) + partial.narrow(axis, width, kept)
        width *= 2
    assert total is not None
    return total


class _SquaredLocalNCC(torch.autograd.Function):
    """Squared local correlation map of eps-regularised windows, with its gradient written out.

    With a, b the images and, over each window of n voxels, S(·) the box sum,
        c = S(ab) − S(a)S(b)/n,  v_a = S(a²) − S(a)²/n,  v_b alike,  map = c² / (v_a v_b + eps),
    where v_a and v_b of flat windows are large instead of rounding (``_variance``), and so map and gradient are 0.
    Only the images are kept for the backward pass; the window sums are cheaper to repeat than to hold.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, window: int, eps: float) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.window, ctx.eps = window, eps
        cross, var_a, var_b, _, _ = _window_statistics(a, b, window)
        return _squared(cross, var_a, var_b, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a, b = ctx.saved_tensors
        statistics = _window_statistics(a, b, ctx.window)
        gradients = _gradients(a, b, ctx.window, ctx.eps, statistics, grads[0], ctx.needs_input_grad)
        return *gradients, None, None


class _MeanSquaredLocalNCC(torch.autograd.Function):
    """The map's mean, with its gradient, which is made with the value: both need the same window sums."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, window: int, eps: float) -> Tensor:
        statistics = _window_statistics(a, b, window)
        cross, var_a, var_b, _, _ = statistics
        mean = _squared(cross, var_a, var_b, eps).flatten(1).mean(1)
        each = a.new_full((), 1 / max(1, a.shape[1:].numel()))
        ctx.axes = a.dim() - 2
        ctx.save_for_backward(*_gradients(a, b, window, eps, statistics, each, ctx.needs_input_grad))
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return *_scaled(ctx, grads[0]), None, None


class _MeanLocalInformation(torch.autograd.Function):
    """−½ log(1 − map / (1 + floor)) on the mean, with its gradient, as above; 0 where a window does not count."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, window: int, eps: float, floor: float, counted: Tensor | None
    ) -> Tensor:
        statistics = _window_statistics(a, b, window)
        cross, var_a, var_b, _, _ = statistics
        left = _squared(cross, var_a, var_b, eps).div_(-1 - floor).add_(1)  # not explained
        if counted is not None:
            left.masked_fill_(~counted, 1)
        mean = left.log().flatten(1).mean(1) / -2
        each = left.reciprocal_().div_(2 * (1 + floor) * max(1, a.shape[1:].numel()))
        if counted is not None:
            each.masked_fill_(~counted, 0)
        ctx.axes = a.dim() - 2
        ctx.save_for_backward(*_gradients(a, b, window, eps, statistics, each, ctx.needs_input_grad))
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        return *_scaled(ctx, grads[0]), None, None, None, None


Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Both saved gradients of a mean per pair, for any gradient of it, (B,)."""
    each = grad.view(-1, *[1] * (ctx.axes + 1))
    grad_a, grad_b = (None if gradient is None else gradient * each for gradient in ctx.saved_tensors)
    return grad_a, grad_b


def _window_statistics(a: Tensor, b: Tensor, window: int) -> Statistics:
    """Window sums: cross c, variances v_a and v_b (each times n, see ``_variance``), and the plain sums S(a), S(b)."""
    n = window ** (a.dim() - 2)
    sum_a, sum_b = box_sum(a, window), box_sum(b, window)
    cross = box_sum(a * b, window).addcmul_(sum_a, sum_b, value=-1 / n)
    return cross, _variance(a, sum_a, window), _variance(b, sum_b, window), sum_a, sum_b


def _variance(image: Tensor, total: Tensor, window: int) -> Tensor:
    """S(a²) − S(a)²/n, but S(a²) where that is less than ``FLAT`` roundings of it, and a divisor not to be trusted.

    The map c² / (v_a v_b) of such a window becomes 2e-6 or less in float32, and its gradient as small a part.
    """
    limits = torch.finfo(image.dtype)
    squares = box_sum(image * image, window)
    variance = squares.addcmul(total, total, value=-1 / window ** (image.dim() - 2))
    part = variance.div_(squares.clamp(min=limits.tiny))
    return F.threshold(part, FLAT * limits.eps, 1.0, inplace=True).mul_(squares)  # torch.where takes twice as long


def _squared(cross: Tensor, var_a: Tensor, var_b: Tensor, eps: float) -> Tensor:
    """The map c² / (v_a v_b + eps), at most 1: of a window that is hardly more than flat, rounding may make more."""
    return cross.square().div_((var_a * var_b).add_(eps)).clamp_(max=1)


def _gradients(
    a: Tensor, b: Tensor, window: int, eps: float, statistics: Statistics, g: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of both images, where they are wanted, for any gradient g of the map.

    ∂/∂b = S'(p)·a + S'(q)·b − S'((p S(a) + q S(b))/n) with p = 2 g c / (v_a v_b + eps), q = −2 g map v_a / (v_a v_b +
    eps) and S' the transposed sum, and ∂/∂a alike.
    """
    if not any(wanted):
        return None, None
    n = window ** (a.dim() - 2)
    cross, var_a, var_b, sum_a, sum_b = statistics
    denominator = (var_a * var_b).add_(eps)
    p = 2 * g * cross / denominator
    pc = p * cross / denominator
    box_p = box_sum(p, window, transposed=True)
    grad_a = grad_b = None
    if wanted[0]:
        q = -pc * var_b
        rest = box_sum((p * sum_b + q * sum_a) / n, window, transposed=True)
        grad_a = box_p * b + box_sum(q, window, transposed=True) * a - rest
    if wanted[1]:
        q = -pc * var_a
        rest = box_sum((p * sum_a + q * sum_b) / n, window, transposed=True)
        grad_b = box_p * a + box_sum(q, window, transposed=True) * b - rest
    return grad_a, grad_b


def _check_window(window: int) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window}; expected an odd number of voxels")


def local_ncc_map(first: Tensor, second: Tensor, *, window: int = 9, eps: float = 1e-5) -> Tensor:
    """Squared local correlation at every voxel: (B, C, *shape), in [0, 1].

    The sums of a window that hardly varies beside its brightness, as in drawn and synthetic images, cancel. Where the
    standard deviation is below 0.0014 of the root mean square (6e-8 in float64), what is left may be rounding, and the
    window counts as flat: the map and its gradient are 0 but for a few millionths.

    The squared form is that of VoxelMorph, MONAI and the published code of the methods here; IIRP-Net's equation (3)
    prints the signed correlation. Windows reach over the border with zeros, as there.

    Raises:
        ValueError: for an even or non-positive window.
    """
    _check_window(window)
    a, b = _prepare(first, second)
    result: Tensor = _SquaredLocalNCC.apply(a, b, window, eps)  # type: ignore[no-untyped-call]  # so in torch's stubs
    return result


def local_ncc(first: Tensor, second: Tensor, *, window: int = 9, eps: float = 1e-5) -> Tensor:
    """Mean squared local normalised cross-correlation per pair: (B,), in [0, 1]; see ``local_ncc_map``."""
    _check_window(window)
    a, b = _prepare(first, second)
    if not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return local_ncc_map(a, b, window=window, eps=eps).flatten(1).mean(1)
    mean: Tensor = _MeanSquaredLocalNCC.apply(a, b, window, eps)  # type: ignore[no-untyped-call]  # so in torch's stubs
    return mean


def whole_windows(counted: Tensor, window: int) -> Tensor:
    """Which windows hold no voxel that does not count: boolean (B, C, *shape), as is ``counted``.

    The window of a voxel is that of ``local_ncc_map`` and ``local_information``; what is beyond the border counts.

    Raises:
        ValueError: for ``counted`` that is not boolean.
    """
    _check_counted(counted, counted.shape)
    return box_sum((~counted).float(), window) == 0


def _check_counted(counted: Tensor, shape: torch.Size) -> None:
    if counted.dtype != torch.bool or counted.shape != shape:
        given = f"shape {tuple(counted.shape)} and type {counted.dtype}"
        raise ValueError(f"counted has {given}; expected torch.bool of {tuple(shape)}")


def local_information(
    first: Tensor,
    second: Tensor,
    *,
    window: int = 2,
    eps: float = 1e-6,
    floor: float = 0.05,
    counted: Tensor | None = None,
) -> Tensor:
    """Mean of −½ log(1 − ρ² / (1 + floor)) per pair, ρ² the squared local correlation: (B,), 0 or more.

    Without the floor it is the mutual information, in nats, of two normal variables with that correlation (Cover and
    Thomas, Elements of Information Theory, 2006, section 8.5): a window in which one image tells nearly all of the
    other counts for more than by ρ² alone, as ``local_ncc`` has it.

    Args:
        first, second: images (B, C, *shape).
        window: voxels an axis; zeros are beyond the border, and an even window reaches one voxel farther back.
        eps: added to the product of the windows' sums of squares; what makes less counts as flat, as do windows that
            hardly vary beside their brightness (``local_ncc_map``).
        floor: what is left unexplained at least, which bounds a window's share.
        counted: boolean, of the images' shape: the windows that count; another adds 0 to the mean. All if None.

    Raises:
        ValueError: for a window below 2, a floor that is not positive, and ``counted`` of another type or shape.
    """
    if window < 2 or floor <= 0:
        raise ValueError(f"window={window}, floor={floor}; expected at least 2 voxels and a floor above 0")
    a, b = _prepare(first, second)
    if counted is not None:
        _check_counted(counted, a.shape)
    if not torch.is_grad_enabled():
        a, b = a.detach(), b.detach()
    mean: Tensor = _MeanLocalInformation.apply(a, b, window, eps, floor, counted)  # type: ignore[no-untyped-call]  # so in torch's stubs
    return mean


def ssim(first: Tensor, second: Tensor, *, window: int = 7) -> Tensor:
    """Mean structural similarity per pair of images in [0, 1]: (B,), in [-1, 1] (Wang et al., IEEE TIP 2004).

    Means, variances and the covariance are those of the boxes of ``window`` voxels an axis that lie wholly inside;
    C₁ = 0.01² and C₂ = 0.03². MONAI's SSIM with its uniform kernel is the same, at twenty times the time: its windows
    are dense convolutions.

    Raises:
        ValueError: for an even or non-positive window, and an axis smaller than the window.
    """
    _check_window(window)
    a, b = _prepare(first, second)
    if min(a.shape[2:]) < window:
        raise ValueError(f"images have shape {tuple(a.shape)}; a window of {window} voxels does not fit inside")
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = (_means_inside(x, window) for x in (a, b, a * a, b * b, a * b))
    product, squares = mean_a * mean_b, mean_a.square() + mean_b.square()
    luminance = (2 * product + 0.01**2) / (squares + 0.01**2)
    structure = (2 * (mean_ab - product) + 0.03**2) / (mean_aa + mean_bb - squares + 0.03**2)
    return (luminance * structure).flatten(1).mean(1)


def _means_inside(volume: Tensor, window: int) -> Tensor:
    """Means over the boxes that lie wholly inside: (B, C, *(shape − window + 1))."""
    means: Tensor = box_sum(volume, window) / window ** (volume.dim() - 2)
    for axis in range(2, volume.dim()):
        means = means.narrow(axis, window // 2, volume.shape[axis] - window + 1)
    return means
