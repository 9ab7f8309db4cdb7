"""Inverses place by place: what a transform takes to given places, found by Newton's method for each by itself.

A gridded inverse is as good as interpolation between its voxels; here every place is solved to a tolerance. Steps are
halved until they help, and a place where none helps, as happens next to folds, begins anew from the nodes that the
transform takes nearest to it. A transform that is continuous and moves nothing far reaches every place, also where it
folds: there it comes from several places, of which one is given.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Move = Callable[[Tensor], Tensor]  # places (K, N) to where they go, each by itself

PIECE = 1 << 18  # places solved at a time
ITERATIONS, HALVINGS = 30, 6
MUCH = 10.0  # times as far may a place be off as its image is, before it is in doubt
BEGINNINGS = 16  # nodes to begin anew from


def invert_at(
    move: Move,
    targets: Tensor,
    *,
    start: Tensor,
    nodes: Callable[[], Tensor] | None = None,
    step: float,
    tolerance: float,
) -> Tensor:
    """Places (K, N) that ``move`` takes to ``targets``, at most ``tolerance`` away where it can be done.

    Args:
        move: the transform.
        targets: (K, N) in float64, as everything here.
        start: (K, N), where to begin; the targets themselves will do.
        nodes: gives (M, N), where to begin anew: all over what the transform deforms, and as close together as it
            varies. It is asked only where a place needs it.
        step: of the finite differences, in the units of the places; well below what the transform varies over.
        tolerance: how far from its target a place may end up.
    """
    solved = [
        _newton(move, *part, step, tolerance)
        for part in zip(torch.split(targets, PIECE), torch.split(start, PIECE), strict=True)
    ]
    places, misses = torch.cat([part[0] for part in solved]), torch.cat([part[1] for part in solved])
    stuck = torch.where(misses > tolerance)[0]
    if nodes is None or not len(stuck):
        return places
    beginnings = nodes()
    images = torch.cat([move(part) for part in torch.split(beginnings, PIECE)])
    from scipy.spatial import cKDTree  # with much of scipy, which a registration alone does not need

    tree = cKDTree(images.numpy(), compact_nodes=False, balanced_tree=False)
    _, nearest = tree.query(targets[stuck].numpy(), k=list(range(1, min(BEGINNINGS, len(beginnings)) + 1)))
    for beginning in torch.as_tensor(nearest).T:
        left = misses[stuck] > tolerance
        if not left.any():
            break
        again, miss = _newton(move, targets[stuck[left]], beginnings[beginning[left]], step, tolerance)
        better = miss < misses[stuck[left]]
        chosen = stuck[left][better]
        places[chosen], misses[chosen] = again[better], miss[better]
    return places


def doubtful(move: Move, places: Tensor, step: float) -> Tensor:
    """Which places (K, N) a transform turns inside out, or squeezes to about a tenth or less in a direction: (K,).

    Much that lies around such a place goes almost to where it goes, so what its image misses says little about it.
    """
    found = []
    for at in torch.split(places, PIECE):
        jacobian = _jacobian(move, at, move(at), step)
        farther = torch.linalg.inv_ex(jacobian).inverse.flatten(1).norm(dim=1)
        found.append(~((torch.linalg.det(jacobian) > 0) & (farther < MUCH)))  # which NaN is not, either
    return torch.cat(found)


def _newton(move: Move, targets: Tensor, start: Tensor, step: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """Places (K, N) by damped Newton steps, and how far from their targets they end up: (K,)."""
    places = start.clone()
    off = move(places) - targets
    active = torch.where(off.norm(dim=1) > tolerance)[0]
    for _ in range(ITERATIONS):
        if not len(active):
            break
        at, miss, aim = places[active], off[active], targets[active]
        at, miss, better = _descend(move, aim, at, miss, _direction(move, at, miss + aim, miss, step))
        places[active], off[active] = at, miss
        active = active[better & (miss.norm(dim=1) > tolerance)]
    return places, off.norm(dim=1)


def _direction(move: Move, at: Tensor, there: Tensor, miss: Tensor, step: float) -> Tensor:
    """What Newton's method takes off: J⁻¹ times the miss; the miss itself where J is singular."""
    solution = torch.linalg.solve_ex(_jacobian(move, at, there, step), miss[:, :, None]).result[:, :, 0]
    return torch.where(solution.isfinite().all(1, keepdim=True), solution, miss)


def _jacobian(move: Move, at: Tensor, there: Tensor, step: float) -> Tensor:
    """Of places (K, N) that go to ``there``, by differences: (K, N, N)."""
    columns = [(move(at + step * unit) - there) / step for unit in torch.eye(at.shape[1], dtype=at.dtype)]
    return torch.stack(columns, dim=2)


def _descend(move: Move, aim: Tensor, at: Tensor, miss: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The longest share of a step, halved again and again, that brings each place nearer; and which ones it did."""
    at, miss = at.clone(), miss.clone()
    left = torch.arange(len(at))
    for halving in range(HALVINGS):
        trial = at[left] - direction[left] / 2**halving
        missed = move(trial) - aim[left]
        better = missed.norm(dim=1) < miss[left].norm(dim=1)
        at[left[better]], miss[left[better]] = trial[better], missed[better]
        left = left[~better]
        if not len(left):
            break
    moved = torch.ones(len(at), dtype=torch.bool)
    moved[left] = False
    return at, miss, moved
