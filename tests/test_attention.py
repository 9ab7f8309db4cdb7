"""Neighbourhood attention against a loop over voxels, its gradients, and the memory that it takes."""

import importlib.util
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iregzoo import attention
from iregzoo.attention import neighbourhood_attention, offset_attention

SHAPE = (4, 7, 5)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed), dtype=dtype)


def operands(shape: tuple[int, ...] = SHAPE, channels: int = 6, batch: int = 1) -> list[Tensor]:
    return [random(batch, channels, *shape, seed=seed) for seed in range(3)]


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SLAB_CPU", 1)


# --- the same, voxel by voxel


def voxels(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def plain_shifted(query: Tensor, key: Tensor, value: Tensor, window: tuple[int, ...], heads: int) -> Tensor:
    """Each voxel's window of keys, moved inside the volume where it would reach out."""
    shape = query.shape[2:]
    q, k, v = (x.unflatten(1, (heads, -1)) for x in (query, key, value))
    out = torch.zeros_like(v)
    for voxel in voxels(shape):
        starts = [min(max(x - w // 2, 0), s - w) for x, w, s in zip(voxel, window, shape, strict=True)]
        box = (..., *[slice(first, first + w) for first, w in zip(starts, window, strict=True)])
        keys, values = k[box].flatten(3), v[box].flatten(3)
        weights = torch.einsum("bhd,bhdn->bhn", q[(..., *voxel)], keys) / q.shape[2] ** 0.5
        out[(..., *voxel)] = torch.einsum("bhn,bhdn->bhd", weights.softmax(-1), values)
    return out.flatten(1, 2)


def plain_offsets(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Each neighbour in turn, with a logit of its bias alone where it is outside."""
    heads, *window = bias.shape
    shape = query.shape[2:]
    q, k = (x.unflatten(1, (heads, -1)) for x in (query, key))
    out = query.new_zeros(query.shape[0], heads, 3, *shape)
    for voxel in voxels(shape):
        logits, offsets = [], []
        for place in voxels(tuple(window)):
            offset = [p - w // 2 for p, w in zip(place, window, strict=True)]
            other = [x + o for x, o in zip(voxel, offset, strict=True)]
            inside = all(0 <= x < s for x, s in zip(other, shape, strict=True))
            product = (q[(..., *voxel)] * k[(..., *other)]).sum(-1) if inside else 0.0
            logits.append(scale * product + bias[(slice(None), *place)].expand(query.shape[0], -1))
            offsets.append(offset)
        weights = torch.stack(logits, dim=-1).softmax(-1)
        out[(..., *voxel)] = weights @ torch.tensor(offsets, dtype=query.dtype)
    return out.flatten(1, 2)


# --- values


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("window", "shape"),
    [
        ((3, 3, 3), SHAPE),
        ((3, 3, 3), (3, 3, 3)),
        ((5, 5, 5), (5, 6, 8)),
        ((5, 1, 3), (9, 2, 4)),
        ((2, 3, 1), (2, 5, 1)),
        ((4, 4, 4), (4, 4, 4)),
    ],
)
def test_each_query_attends_to_its_window_shifted_inside(
    window: tuple[int, ...], shape: tuple[int, ...], heads: int
) -> None:
    query, key, value = operands(shape)
    found = neighbourhood_attention(query, key, value, window=window, heads=heads)
    torch.testing.assert_close(found, plain_shifted(query, key, value, window, heads), rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("window", [(3, 3, 3), (5, 5, 5), (1, 3, 5)])
@pytest.mark.parametrize("shape", [SHAPE, (1, 2, 3)])
def test_offsets_are_weighted_with_zero_keys_outside(
    window: tuple[int, ...], shape: tuple[int, ...], heads: int
) -> None:
    query, key, _ = operands(shape)
    bias = random(heads, *window, seed=5)
    found = offset_attention(query, key, bias, scale=0.7)
    assert found.shape == (1, 3 * heads, *shape)
    torch.testing.assert_close(found, plain_offsets(query, key, bias, 0.7), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("small_slabs")
def test_slabs_leave_no_seam() -> None:
    query, key, value = operands()
    found = neighbourhood_attention(query, key, value, heads=2)
    torch.testing.assert_close(found, plain_shifted(query, key, value, (3, 3, 3), 2), rtol=0, atol=1e-12)
    bias = random(2, 3, 5, 3)
    found = offset_attention(query, key, bias)
    torch.testing.assert_close(found, plain_offsets(query, key, bias, 1.0), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("numbers", [1, 600, 2**19])
@pytest.mark.parametrize("window", [(3, 3, 3), (3, 5, 1), SHAPE])
def test_planes_leave_no_seam(monkeypatch: pytest.MonkeyPatch, window: tuple[int, ...], numbers: int) -> None:
    monkeypatch.setattr(attention, "_PLANES_CPU", numbers)
    query, key, value = (x.contiguous(memory_format=torch.channels_last_3d) for x in operands(batch=2))
    found = neighbourhood_attention(query, key, value, heads=2, window=window)
    torch.testing.assert_close(found, plain_shifted(query, key, value, window, 2), rtol=0, atol=1e-12)


def test_value_may_have_channels_of_its_own() -> None:
    query, key, _ = operands()
    value = random(1, 4, *SHAPE, seed=3)
    found = neighbourhood_attention(query, key, value, heads=2)
    torch.testing.assert_close(found, plain_shifted(query, key, value, (3, 3, 3), 2), rtol=0, atol=1e-12)


def test_scale_is_that_of_the_products() -> None:
    query, key, value = operands()
    found = neighbourhood_attention(query, key, value, scale=0.0)
    inner = torch.nn.functional.avg_pool3d(value, 3, stride=1)
    torch.testing.assert_close(found[..., 1:-1, 1:-1, 1:-1], inner)
    doubled = neighbourhood_attention(2 * query, key, value, scale=0.3)
    torch.testing.assert_close(doubled, neighbourhood_attention(query, key, value, scale=0.6))


@pytest.mark.parametrize("axis", range(3))
def test_a_match_one_voxel_along_an_axis_is_a_displacement_of_one(axis: int) -> None:
    # Channels that tell the voxels of an axis apart: the moving side is the fixed one, a voxel further.
    shape = [5, 5, 5]
    marks = 40 * torch.eye(5, dtype=torch.float64).view(5, *[5 if i == axis else 1 for i in range(3)])
    fixed = marks.expand(5, *shape)[None]
    bias = torch.full((1, 3, 3, 3), -100.0, dtype=torch.float64)
    bias[(0, *[slice(None) if i == axis else 1 for i in range(3)])] = 0
    found = offset_attention(fixed, fixed.roll(1, dims=2 + axis), bias).narrow(2 + axis, 0, 4)
    expected = torch.zeros_like(found)
    expected[:, axis] = 1
    torch.testing.assert_close(found, expected)


def test_large_logits_do_not_overflow() -> None:
    query, key, value = (1e3 * operand.float() for operand in operands())
    assert neighbourhood_attention(query, key, value).isfinite().all()
    assert offset_attention(query, key, torch.zeros(1, 3, 3, 3)).isfinite().all()


def test_batch_equals_its_singles() -> None:
    inputs = operands(batch=3)
    bias = random(2, 3, 3, 3)
    both = neighbourhood_attention(*inputs, heads=2), offset_attention(*inputs[:2], bias)
    for pair in range(3):
        single = [operand[pair : pair + 1] for operand in inputs]
        torch.testing.assert_close(both[0][pair : pair + 1], neighbourhood_attention(*single, heads=2))
        torch.testing.assert_close(both[1][pair : pair + 1], offset_attention(*single[:2], bias))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of sizes, which a trace keeps
@pytest.mark.parametrize("wanted", [True, False])
def test_both_forms_can_be_traced(wanted: bool) -> None:
    def shifted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return neighbourhood_attention(query, key, value, window=[min(3, size) for size in query.shape[2:]])

    def offset(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return offset_attention(query, key, value[:1, :2, :3, :3, :3].flatten(0, 1))

    given, other = operands((4, 5, 2)), [operand.flip(2) for operand in operands((4, 5, 2))]
    with torch.set_grad_enabled(wanted):
        traced = torch.jit.trace(shifted, given, check_trace=False)
        torch.testing.assert_close(traced(*other), shifted(*other))
        given, other = operands(), [operand.flip(2) for operand in operands()]
        traced = torch.jit.trace(offset, given, check_trace=False)
        torch.testing.assert_close(traced(*other), offset(*other))


def test_layout_in_memory_does_not_matter() -> None:
    inputs = operands()
    strided = [operand.to(memory_format=torch.channels_last_3d) for operand in inputs]
    torch.testing.assert_close(neighbourhood_attention(*strided, heads=3), neighbourhood_attention(*inputs, heads=3))
    chunks = torch.cat(inputs, dim=1).movedim(1, -1).contiguous().movedim(-1, 1).chunk(3, dim=1)
    torch.testing.assert_close(neighbourhood_attention(*chunks), neighbourhood_attention(*inputs))


# --- gradients


@pytest.mark.parametrize(("window", "shape"), [(3, (3, 4, 3)), ((5, 1, 2), (5, 1, 2))])
@pytest.mark.usefixtures("small_slabs")
def test_gradient_of_the_shifted_form(window: int | tuple[int, ...], shape: tuple[int, ...]) -> None:
    inputs = [operand.requires_grad_() for operand in operands(shape, channels=2)]
    assert torch.autograd.gradcheck(
        lambda *x: neighbourhood_attention(*x, window=window, heads=2), inputs, fast_mode=True
    )


@pytest.mark.usefixtures("small_slabs")
def test_gradient_of_the_offset_form() -> None:
    inputs = [operand.requires_grad_() for operand in (*operands((3, 2, 2), channels=2)[:2], random(2, 3, 3, 1))]
    assert torch.autograd.gradcheck(lambda *x: offset_attention(*x, scale=0.7), inputs, fast_mode=True)


# --- memory


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Of distinct storages kept for the backward pass."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storages.values())


class Footprint(TorchDispatchMode):
    """The most memory held at once by storages that were taken while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[int] = Counter()
        self.held = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.watch(tensor, tensor.untyped_storage().data_ptr() in given)
        return out

    def watch(self, tensor: Tensor, known: bool) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if known and not self.users[place]:
            return  # a view of what was there before
        if not self.users[place]:
            self.held += size
            self.peak = max(self.peak, self.held)
        self.users[place] += 1
        weakref.finalize(tensor, self.drop, place, size)

    def drop(self, place: int, size: int) -> None:
        self.users[place] -= 1
        if not self.users[place]:
            self.held -= size


def peak_bytes(run: Callable[[], object]) -> int:
    with Footprint() as footprint:
        run()
    return footprint.peak


@pytest.mark.parametrize("form", ["shifted", "offset"])
def test_memory_is_far_below_an_unfold(form: str) -> None:
    query, key, value = (random(1, 16, 40, 24, 24, seed=i, dtype=torch.float32).requires_grad_() for i in range(3))
    bias = torch.zeros(1, 3, 3, 3)

    def attend() -> Tensor:
        return neighbourhood_attention(query, key, value) if form == "shifted" else offset_attention(query, key, bias)

    unfold = 27 * key.untyped_storage().nbytes()
    assert unfold / 27 < saved_bytes(attend) < unfold / 6  # the query, and key and value with their padding
    with torch.no_grad():
        assert key.untyped_storage().nbytes() < peak_bytes(attend) < unfold / 4
    assert peak_bytes(lambda: attend().sum().backward()) < unfold / 2


# --- precision


def test_bfloat16_stays_close() -> None:
    query, key, value = (operand.float() for operand in operands())
    expected = neighbourhood_attention(query, key, value)
    found = neighbourhood_attention(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.02 * expected.norm()
    bias = torch.zeros(2, 3, 3, 3)
    expected = offset_attention(query, key, bias)
    found = offset_attention(query.bfloat16(), key.bfloat16(), bias)
    assert found.dtype == torch.float32  # a displacement
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_autocast_does_not_touch_the_sums() -> None:
    query, key, value = (operand.float() for operand in operands())
    expected = neighbourhood_attention(query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = neighbourhood_attention(query, key, value)
    assert torch.equal(found, expected)


# --- what is refused


@pytest.mark.parametrize("axis", range(3))
def test_grid_smaller_than_the_window_is_refused(axis: int) -> None:
    shape = [6, 6, 6]
    shape[axis] = 4
    volume = torch.zeros(1, 2, *shape)
    with pytest.raises(ValueError, match=r"axis of 4 voxels; the window of 5 needs 5"):
        neighbourhood_attention(volume, volume, volume, window=5)


@pytest.mark.parametrize("window", [0, (3, 3), (3, 3, -1)])
def test_window_without_a_size_is_refused(window: int | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"window=.*one positive size, or three"):
        neighbourhood_attention(*operands(), window=window)


def test_even_window_is_refused_but_for_a_whole_axis() -> None:
    with pytest.raises(ValueError, match=r"window=\(4, 4, 3\) on grid \(4, 7, 5\)"):
        neighbourhood_attention(*operands(), window=(4, 4, 3))
    with pytest.raises(ValueError, match=r"bias has shape \(1, 3, 2, 3\)"):
        offset_attention(*operands()[:2], torch.zeros(1, 3, 2, 3))


def test_operands_that_do_not_fit_are_refused() -> None:
    query, key, value = operands()
    with pytest.raises(ValueError, match=r"query \(1, 6, 4, 7, 5\) and key \(1, 6, 4, 7, 4\)"):
        neighbourhood_attention(query, key[..., 1:], value)
    with pytest.raises(ValueError, match=r"value has shape \(1, 6, 4, 7, 4\)"):
        neighbourhood_attention(query, key, value[..., 1:])
    with pytest.raises(ValueError, match=r"value has shape \(1, 5, .*3 heads"):
        neighbourhood_attention(query, key, value[:, 1:], heads=3)
    for heads in (0, 4):
        with pytest.raises(ValueError, match=rf"6 channels.*the {heads} heads"):
            neighbourhood_attention(query, key, value, heads=heads)
    with pytest.raises(ValueError, match=r"6 channels.*the 4 heads"):
        offset_attention(query, key, torch.zeros(4, 3, 3, 3))


# --- NATTEN


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("natten") is None, reason="needs a GPU and natten"
)
@pytest.mark.parametrize(("heads", "dtype", "tolerance"), [(1, torch.float32, 1e-2), (2, torch.bfloat16, 5e-2)])
def test_natten_agrees(heads: int, dtype: torch.dtype, tolerance: float) -> None:
    if attention._natten() is None:
        pytest.skip("natten was installed without its kernels")
    inputs = [operand.to("cuda", dtype).requires_grad_() for operand in operands((9, 8, 7), channels=32)]
    ours = [operand.detach().double().cpu().requires_grad_() for operand in inputs]
    found = neighbourhood_attention(*inputs, heads=heads)
    expected = neighbourhood_attention(*ours, heads=heads)
    found.square().sum().backward()
    expected.square().sum().backward()
    for theirs, own in [(found, expected), *[(a.grad, b.grad) for a, b in zip(inputs, ours, strict=True)]]:
        assert (theirs.double().cpu() - own).norm() < tolerance * own.norm()


def test_natten_without_its_kernels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib, "import_module", lambda name: object())
    assert attention._natten.__wrapped__() is None
