"""The folder from which MONAI Label's server runs: its stock ``monaibundle`` app with a Label face of each method.

A face is a MONAI bundle with one input, a patient's image, and one output, the atlas's labels on it.
"""

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

from iregzoo.cards import BRAINS, T1_BRAINS
from iregzoo.errors import InputError
from iregzoo.label.atlas import LabelledImage, write
from iregzoo.outputs import held, whole_folder
from iregzoo.registration import CANONICAL
from iregzoo.space.start import STARTS
from iregzoo.states import read_state, sha256
from iregzoo.steering import CONTROLLERS
from iregzoo.suited import choice, shown
from iregzoo.zoo import Method, Weights, bundles, find, find_weights, load

STOCK = "sample-apps/monaibundle/"  # in the package monailabel
MODELS = "model"  # the folder in which the app looks for bundles
MODEL = "models/model.pt"
# Not among what the panel offers: what finds starts, where other weights hold that, and weights for some scans alone.
FINDER, FURTHER = "finder/finder.pt", "further/model.pt"


def prepare(
    folder: Path,
    names: Sequence[str],
    weights: str | None,
    atlases: Sequence[LabelledImage],
    *,
    overwrite: bool = False,
) -> dict[str, str]:
    """Fill a folder with the app.

    Args:
        folder: new or empty.
        names: of bundles; without any, every bundle that has such weights.
        weights: a name in the bundles' metadata (default: what suits the atlases, see ``suiting``), or a file.
        atlases: from ``label.atlas``; the first is the default.
        overwrite: replace an app that is there.

    Returns:
        The names of the methods in it, each with that of its weights.

    Raises:
        InputError: for an unknown bundle, one without such weights, MONAI Label that is not installed, and a folder
            that cannot be used.
    """
    chosen = dict.fromkeys(names or having(weights), weights) if weights else suiting(names, atlases)
    methods = [(load(name, its), its) for name, its in chosen.items()]
    stock = dict(stock_files())
    check_is_app(folder)
    with whole_folder(folder, overwrite=overwrite, owned=_of_earlier_run(folder), option="folder") as staging:
        for place, source in stock.items():
            (staging / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, staging / place)
        for method, its in methods:
            further = None if weights or its is None else _further(method)
            write_face(staging / MODELS / method.bundle.name, method, its, atlases, further)
    return {method.bundle.name: method.weights.name for method, _ in methods}


def suiting(names: Sequence[str], atlases: Sequence[LabelledImage]) -> dict[str, str | None]:
    """The weights of bundles that suit atlases, None for a bundle's first: where all show brains, of any contrast.

    For a patient's scan may be of another than an atlas's; a face then also has those for T1 brains, which a request
    gets whose scans are such. Where no bundles are named, only those with such weights where there are some, and else
    all that have weights.

    Raises:
        InputError: for an unknown bundle, where none has weights, and as ``shown`` does.
    """
    found: dict[str, str | None] = {}
    for name in names or having(None):
        bundle = find(name)
        brains = all(shown(bundle, atlas.image) for atlas in atlases)
        its = choice(bundle, [BRAINS] if brains else [])
        found[name] = its[0] if its else None
    return found if names else {name: its for name, its in found.items() if its} or found


def _further(method: Method) -> str | None:
    """The weights of a bundle for T1 brains, beside those for brains of any contrast, where a face can have both."""
    named = choice(method.bundle, [T1_BRAINS])
    card = method.bundle.weights[named[0]] if named else method.card
    # A face builds its network once, with the controller of its first weights.
    replaceable = bool(card.controller) or not method.card.controller
    return named[0] if named and named[0] != method.weights.name and replaceable else None


def having(weights: str | None) -> list[str]:
    """The bundles that have weights of a name, or any.

    Raises:
        InputError: where there is none.
    """
    found = [bundle.name for bundle in bundles() if (weights in bundle.weights if weights else bundle.weights)]
    if not found:
        raise InputError(f"no bundle has weights {weights or 'at all'}; choose one with --bundles")
    return found


def stock_files() -> Iterator[tuple[str, Path]]:
    """The files of the stock app, as ``monailabel apps --download`` copies them: where they go, and where they are.

    Raises:
        InputError: where MONAI Label is not installed.
    """
    try:
        files = distribution("monailabel").files or []
    except PackageNotFoundError:
        files = []
    found = [(file.as_posix().split(STOCK)[1], Path(str(file.locate()))) for file in files if STOCK in file.as_posix()]
    if not found:
        raise InputError(
            "MONAI Label is not installed; with Python 3.10 or 3.11, install it as described in docs/clinicians.md: "
            'pip install --no-build-isolation "iregzoo[label]"'
        )
    yield from ((place, source.resolve()) for place, source in found if "__pycache__" not in place)


def check_is_app(folder: Path) -> None:
    """Refuse to overwrite what is no app: its ``main.py`` and ``README.md`` would go where others have theirs.

    Raises:
        InputError: for a folder that holds something else.
    """
    faces = (folder / MODELS).glob("*/configs/inference.json")
    if folder.is_dir() and held(folder) and not any(faces):
        raise InputError(f"{folder}: is not empty and not a Label app; choose another folder")


def _of_earlier_run(folder: Path) -> list[str]:
    """The files of faces that an earlier run made."""
    faces = [folder / MODELS / bundle.name for bundle in bundles()]
    return [file.relative_to(folder).as_posix() for face in faces for file in face.rglob("*") if file.is_file()]


def write_face(
    folder: Path,
    method: Method,
    weights: str | None,
    atlases: Sequence[LabelledImage],
    further: str | None = None,
) -> None:
    """Write a method's Label face into a new folder.

    Args:
        folder: its name is the method's in MONAI Label.
        method: with weights.
        weights: which; as for ``zoo.load``.
        atlases: the first is the default.
        further: the name of weights that a request gets whose scans they suit better.
    """
    bundle, found = method.bundle, find_weights(method.bundle, weights)
    for place in ("configs", "models", "docs"):
        (folder / place).mkdir(parents=True)
    for file in ("LICENSE", "docs/data_license.txt", "configs/logging.conf"):
        if (bundle.path / file).is_file():
            shutil.copyfile(bundle.path / file, folder / file)
    _write_weights(folder / MODEL, found)
    cards = {found.name: _card_of(folder, MODEL, found)}
    if found.card.finder:
        finder = find_weights(bundle, found.card.finder)
        state = read_state(finder.path)
        (folder / FINDER).parent.mkdir()
        torch.save({name: state[name] for name in state if name.startswith(CANONICAL)}, folder / FINDER)
        only = replace(finder, card=replace(finder.card, suits=""))  # no scans to register
        cards[finder.name] = _card_of(folder, FINDER, only)
    if further:
        other = find_weights(bundle, further)
        (folder / FURTHER).parent.mkdir()
        _write_weights(folder / FURTHER, other)
        cards[further] = _card_of(folder, FURTHER, other)
    metadata = _metadata(method, cards, atlases)
    _write_json(folder / "configs" / "metadata.json", metadata)
    _write_json(folder / "configs" / "inference.json", _inference(method, atlases))
    (folder / "docs" / "README.md").write_text(f"# {metadata['name']}\n\n{metadata['description']}\n", encoding="utf-8")
    write(folder, atlases)


def _write_weights(path: Path, weights: Weights) -> None:
    """A plain state_dict, which is all that MONAI Label loads: the weights' own file where it is one."""
    state = read_state(weights.path)
    if torch.load(weights.path, map_location="cpu", weights_only=True).keys() == state.keys():
        shutil.copyfile(weights.path, path)
    else:
        torch.save(dict(state), path)


def _card_of(folder: Path, file: str, weights: Weights) -> dict[str, Any]:
    """The entry of a face's metadata for a file that it has of some weights."""
    card = replace(weights.card, file=file, sha256=sha256(folder / file))
    return {name: value for name, value in asdict(card).items() if value}


def _metadata(method: Method, cards: Mapping[str, Any], atlases: Sequence[LabelledImage]) -> dict[str, Any]:
    """The bundle's metadata with one image in and one label map out."""
    metadata = dict(method.bundle.metadata)
    given = metadata["network_data_format"]["inputs"]["image"]
    common = {"num_channels": 1, "spatial_shape": ["*", "*", "*"], "is_patch_data": False}
    image = {**given, **common, "value_range": [], "channel_def": {"0": "image"}}
    names = {value: name for atlas in atlases for value, name in atlas.names.items()}
    labels = {
        "type": "image",
        "format": "segmentation",
        "modality": "n/a",
        **common,
        "dtype": "uint8",
        "value_range": [0, 255],
        "channel_def": {"0": "background", **{str(value): names[value] for value in sorted(names)}},
    }
    called = ", ".join(atlas.name for atlas in atlases)
    return {
        **metadata,
        "name": f"{metadata['name']}: atlas labels",
        "task": "Atlas-based segmentation by deformable registration",
        "description": f"Registers an atlas ({called}) to a patient's image and transfers the atlas's labels to it. "
        f"{metadata['description']} For research only, not a medical device.",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": labels}},
        "weights": dict(cards),
    }


def _inference(method: Method, atlases: Sequence[LabelledImage]) -> dict[str, Any]:
    """What MONAI Label reads: the network, the option panel, and what is done with a request."""
    definition = json.loads((method.bundle.path / "configs" / "inference.json").read_text("utf-8"))["network_def"]
    if method.card.controller:
        definition["network"]["controller"] = method.card.controller
    if method.card.canonical:
        definition["canonical"] = {"_target_": "iregzoo.networks.canonical.CanonicalNet"}
    iterates = method.network.controller is not None
    steering = {"controller": ["auto", *CONTROLLERS], "max_iterations": 0} if iterates else {}
    return {
        "bundle_root": ".",
        "device": "cpu",
        "displayable_configs": {
            "atlas": [atlas.name for atlas in atlases],
            "init": ["auto", *STARTS],
            **steering,
            "refine": method.card.refine,
            "mirror": False,
            "when_in_doubt": ["warn", "refuse"],
        },
        "network_def": definition,
        "preprocessing": [{"_target_": "iregzoo.label.face.ReadRequest", "bundle_root": "@bundle_root"}],
        "inferer": {"_target_": "iregzoo.label.face.AtlasInferer"},
        "postprocessing": [{"_target_": "iregzoo.label.face.Answer"}],
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def start_command(folder: Path, names: Sequence[str], studies: str) -> str:
    """The command that starts the server for this machine alone, and asks for nothing beyond it."""
    words = ["monailabel", "start_server", "--app", str(folder), "--studies", studies]
    conf = {"models": ",".join(names), "zoo_source": "ngc", "skip_trainers": "true", "sam2": "false"}
    words += [word for key, value in conf.items() for word in ("--conf", key, value)]
    return shlex.join([*words, "--host", "127.0.0.1"])
