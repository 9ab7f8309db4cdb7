"""Who takes part in an evaluation: methods with their weights and controllers, and peers."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from iregzoo.cases import Case
from iregzoo.errors import InputError
from iregzoo.iteration import Controller
from iregzoo.peers import Peer, register_with
from iregzoo.register import Result, Scans, register
from iregzoo.space.masks import fill_holes
from iregzoo.space.scan import read_mask, read_scan
from iregzoo.space.transforms import read_linear
from iregzoo.steering import choose_controller
from iregzoo.suited import choice, shown
from iregzoo.zoo import Method, find, is_bundle, load

Timed = tuple[Result, float]


@dataclass(frozen=True)
class Entrant:
    """Something that registers pairs and is measured.

    Attributes:
        bundle: the method's name, ``NAME`` or ``NAME@WEIGHTS``, or the peer's.
        controller: as ``--controller`` has it; empty for a peer.
        parameters: trained ones of the network; 0 for a peer.
        run: a pair, and the file with its own affine start or nothing, to its result and the seconds that it took.
            Peers make their own start.
    """

    bundle: str
    controller: str
    parameters: int
    run: Callable[[Scans, str], Timed]


def load_methods(
    entries: Sequence[str],
    weights: str | None = None,
    device: str | torch.device = "cpu",
    precision: str = "auto",
    *,
    chosen: Mapping[str, str] = MappingProxyType({}),
) -> list[Method]:
    """The methods of entries ``NAME`` or ``NAME@WEIGHTS``, each of which is called as its entry is written.

    NAME is a bundle's, or its folder, of which the last part becomes the name; a folder may have an @ in its path.

    Args:
        entries: one or more.
        weights: of entries that have none, as in ``zoo.load``.
        device, precision: as in ``zoo.load``.
        chosen: the names of weights by the entry, in place of its bundle's first.

    Raises:
        InputError: for an entry that lacks its name or its weights, ``weights`` that no entry takes, and what
            ``zoo.load`` refuses.
    """
    parts = [_parts(entry) for entry in entries]
    if weights is not None and all(own for _, own in parts):
        raise InputError(
            f"--weights {weights}: every entry of --bundle has its own weights after the @; leave --weights out"
        )
    methods = []
    for entry, (name, own) in zip(entries, parts, strict=True):
        method = load(name, own or weights or chosen.get(entry), device, precision)
        methods.append(replace(method, alias=f"{method.bundle.name}@{own}") if own else method)
    return methods


def suited_weights(
    entries: Sequence[str],
    cases: Sequence[Case],
    device: str | torch.device = "cpu",
    precision: str = "auto",
    progress: Callable[[str], None] = lambda path: None,
) -> dict[str, tuple[str, str]]:
    """The weights that suit all cases, and what these show, see ``suited``, by each entry that names none and has such.

    Args:
        entries: as for ``load_methods``.
        cases: all of them; a scan that cannot be read is left for its case to fail on.
        device, precision: as in ``zoo.load``.
        progress: told the path of each scan that is looked at.

    Raises:
        InputError: as ``load_methods`` does.
    """
    bundles = {entry: find(name) for entry in entries for name, own in [_parts(entry)] if not own}
    seen: dict[str, list[str]] = {entry: [] for entry in bundles}
    scans = dict.fromkeys(each for case in cases for each in case.masked)  # each once
    for path, mask in scans:
        left = [entry for entry in bundles if all(seen[entry])]
        if not left:
            break
        progress(path)
        try:
            scan = read_scan(path)
            scan = fill_holes(scan, read_mask(mask, scan) if mask else None)
        except InputError:
            continue
        for entry in left:
            seen[entry].append(shown(bundles[entry], scan, device, precision))
    found = {entry: choice(bundle, seen[entry]) for entry, bundle in bundles.items()}
    return {entry: each for entry, each in found.items() if each}


def _parts(entry: str) -> tuple[str, str]:
    """Name and weights of an entry, whose weights may be empty."""
    if "@" not in entry or is_bundle(entry):
        return entry, ""
    parts = entry.split("@")
    splits = [("@".join(parts[:count]), "@".join(parts[count:])) for count in range(1, len(parts))]
    name, weights = next((split for split in splits if is_bundle(split[0])), splits[0])  # a folder may have an @, too
    name, weights = name.strip(), weights.strip()
    if not name or not weights:
        raise InputError(
            f"--bundle {entry}: give NAME@WEIGHTS, WEIGHTS being a name from iregzoo list or a weights file, or NAME"
        )
    return name, weights


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
        InputError: for a controller that one of the methods does not take, and for two of one name.
    """
    called = Counter([*(method.name for method in methods), *(peer.name for peer in peers)])
    for name, count in called.items():
        if count > 1:
            raise InputError(
                f"{count} methods would be called {name}; give each weights of its own, NAME@WEIGHTS, or rename the "
                "folder of one"
            )
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
    return Entrant(method.name, name, parameters, run)


def _peer(peer: Peer) -> Entrant:
    return Entrant(peer.name, "", 0, lambda scans, file: register_with(peer, scans))
