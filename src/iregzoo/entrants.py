"""Who takes part in an evaluation: methods with their controllers, and peers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from iregzoo.errors import InputError
from iregzoo.iteration import Controller
from iregzoo.peers import Peer, register_with
from iregzoo.register import Result, Scans, choose_controller, register
from iregzoo.space.transforms import read_linear
from iregzoo.zoo import Method

Timed = tuple[Result, float]


@dataclass(frozen=True)
class Entrant:
    """Something that registers pairs and is measured.

    Attributes:
        bundle: the bundle's or the peer's name.
        controller: as ``--controller`` has it; empty for a peer.
        parameters: trained ones of the network; 0 for a peer.
        run: a pair, and the file with its own affine start or nothing, to its result and the seconds that it took.
            Peers make their own start.
    """

    bundle: str
    controller: str
    parameters: int
    run: Callable[[Scans, str], Timed]


def line_up(
    methods: Sequence[Method],
    controllers: Sequence[str],
    peers: Sequence[Peer],
    *,
    init: str,
    max_iterations: int | None,
    refine: int | None,
) -> list[Entrant]:
    """Every method with every controller, then the peers.

    Raises:
        InputError: for a controller that one of the methods does not take.
    """
    found = []
    for method in methods:
        for name in controllers:
            try:
                controller = choose_controller(name, max_iterations, method.network.controller)
            except InputError as error:
                raise InputError(f"bundle {method.bundle.name}, {error}") from None
            found.append(_method(method, name, controller, init, refine))
    return [*found, *(_peer(peer) for peer in peers)]


def _method(method: Method, name: str, controller: Controller | None, init: str, refine: int | None) -> Entrant:
    def run(scans: Scans, file: str) -> Timed:
        start = read_linear(file) if file else init
        begin = time.perf_counter()
        result = register(scans, method, init=start, controller=controller, refine=refine)
        return result, time.perf_counter() - begin

    # All of them: loading a method for inference has frozen what is trainable in training.
    parameters = sum(parameter.numel() for parameter in method.network.parameters())
    return Entrant(method.bundle.name, name, parameters, run)


def _peer(peer: Peer) -> Entrant:
    return Entrant(peer.name, "", 0, lambda scans, file: register_with(peer, scans))
