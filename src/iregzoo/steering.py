"""What the options of a registration's iterations mean: controllers, their caps, and gradient steps."""

from dataclasses import replace

from iregzoo.cards import WeightsCard
from iregzoo.errors import InputError
from iregzoo.flags import check_count
from iregzoo.iteration import TCI, Controller, FixedIterations, IterStop

CONTROLLERS: dict[str, type[TCI] | type[IterStop] | type[FixedIterations]] = {
    "tci": TCI,
    "iterstop": IterStop,
    "fixed": FixedIterations,
}
MOST_ITERATIONS, MOST_STEPS = 100, 1000  # far more than ever helped; beyond them a machine is only blocked


def choose_controller(name: str, max_iterations: int | None, own: Controller | None) -> Controller | None:
    """The controller that ``--controller`` and ``--max-iterations`` mean, for a network with its ``own``.

    Raises:
        InputError: for another name, a cap that is no whole number from 1 to ``MOST_ITERATIONS``, and iterations of a
            method that takes one pass (``own`` is None).
    """
    if name != "auto" and name not in CONTROLLERS:
        raise InputError(f"controller {name!r} is unknown; choose auto, {', '.join(CONTROLLERS)}")
    if max_iterations is not None:
        check_count(max_iterations, "max-iterations", most=MOST_ITERATIONS)
    if own is None:
        _check_one_pass(name, max_iterations)
        return None
    controller = own if name == "auto" else CONTROLLERS[name]()
    if max_iterations is None:
        return controller
    if not isinstance(controller, (TCI, IterStop, FixedIterations)):
        raise InputError(
            "this bundle's own controller does not support max-iterations; choose another one with --controller"
        )
    return replace(controller, max_iterations=max_iterations)


def _check_one_pass(name: str, max_iterations: int | None) -> None:
    """Refuse iterations of a method that takes one pass."""
    asked = f"max-iterations {max_iterations!r}" if name in ("auto", "fixed") else f"controller {name!r}"
    if name not in ("auto", "fixed") or max_iterations not in (None, 1):
        raise InputError(f"{asked}: this bundle's method runs a single pass and does not iterate; leave it out")


def gradient_steps(refine: int | None, card: WeightsCard) -> int:
    """How many ``--refine`` means for weights: the card's if None.

    Raises:
        InputError: for what is no whole number from 0 to ``MOST_STEPS``.
    """
    steps = card.refine if refine is None else refine
    check_count(steps, "refine", least=0, most=MOST_STEPS)
    return steps
