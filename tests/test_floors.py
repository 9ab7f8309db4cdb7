"""The house: a module imports from its own floor or lower, and the lower two lift out into another project."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import iregzoo

ROOT = Path(iregzoo.__file__).parent
FLOORS = {
    0: (
        "__init__",
        "errors",
        "flags",
        "devices",
        "fields",
        "gather",
        "kernels",
        "_triton",
        "similarity",
        "slices",
        "iteration",
        "adam",
        "attention",
        "continuation",
        "inversion",
        "jacobian",
        "precision",
        "registration",
        "process",
        "silence",
        "states",
    ),
    1: (
        "losses",
        "metrics",
        "networks",
        "overlap",
        "significance",
        "symmetric",
        "synthesis",
        "refinement",
        "necessity",
    ),
    2: (
        "anatomy",
        "canonical",
        "cards",
        "cases",
        "label_names",
        "space",
        "datasets",
        "finder",
        "overrides",
        "pairs",
        "scans",
        "training",
        "handlers",
    ),
    3: (
        "bundle",
        "zoo",
        "manifest",
        "checks",
        "release",
        "transfer",
        "unpack",
        "download",
        "register",
        "align",
        "steering",
        "suited",
        "quality",
        "outputs",
        "planes",
        "report",
        "views",
        "page",
        "results",
        "measure",
        "peers",
        "apply",
        "learn2reg",
        "entrants",
        "tables",
        "plots",
        "evaluate",
        "engines",
        "jobs",
        "batch",
        "phantom",
        "group",
        "groupwise",
        "template",
    ),
    4: ("label", "commands", "cli", "__main__"),
}
FLOOR_OF = {part: floor for floor, parts in FLOORS.items() for part in parts}
FREE = {*sys.stdlib_module_names, "torch", "numpy", "monai", "scipy", "iregzoo"}
# An accelerated operator that attention uses where it is installed, and the wavelets of SM-GICNet.
OPTIONAL = {"_triton": {"triton"}, "attention": {"natten"}, "networks": {"ptwt"}}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
EACH_MODULE = pytest.mark.parametrize("name", MODULES)


def part_of(name: str) -> str:
    """The part of the house that a module belongs to: iregzoo.space.grid is in space."""
    return name.split(".")[1] if "." in name else "__init__"


def floor_of(name: str) -> int:
    part = part_of(name)
    assert part in FLOOR_OF, f"iregzoo.{part} is on no floor; give it one in FLOORS of tests/{Path(__file__).name}"
    return FLOOR_OF[part]


def targets(node: ast.AST, name: str) -> Iterator[str]:
    """Modules that one statement imports; of `from package import module`, the module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
        base = resolve_name("." * node.level + (node.module or ""), package)
        within = {f"{base}.{alias.name}" for alias in node.names}
        yield from within & MODULES.keys()
        if within - MODULES.keys():
            yield base


def is_for_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(node: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """All below a node, also within functions; with or without what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if typing or not is_for_typing_only(child):
            yield child
            yield from statements(child, typing)


def imports(name: str, *, typing: bool = True) -> set[str]:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    return {target for node in statements(tree, typing) for target in targets(node, name)}


def own_imports(name: str, *, typing: bool = True) -> set[str]:
    return {target for target in imports(name, typing=typing) if target.split(".")[0] == "iregzoo"}


def test_the_package_is_read() -> None:
    assert {"iregzoo", "iregzoo.fields", "iregzoo.networks", "iregzoo.networks.iirp"} <= MODULES.keys()
    assert "iregzoo.similarity" in imports("iregzoo.iteration")
    assert "iregzoo.networks.iirp" in imports("iregzoo.networks")


@EACH_MODULE
def test_module_has_a_floor(name: str) -> None:
    floor_of(name)


@EACH_MODULE
def test_module_imports_from_its_floor_or_lower(name: str) -> None:
    above = [target for target in sorted(own_imports(name)) if floor_of(target) > floor_of(name)]
    assert above == [], f"{name} is on floor {floor_of(name)} and imports from above: {', '.join(above)}"


@EACH_MODULE
def test_own_imports_exist(name: str) -> None:
    assert own_imports(name) <= MODULES.keys()


@EACH_MODULE
def test_lower_floors_need_torch_and_numerics_alone(name: str) -> None:
    if floor_of(name) > 1:
        return
    packages = {target.split(".")[0] for target in imports(name)}
    foreign = packages - FREE - OPTIONAL.get(part_of(name), set())
    assert foreign == set(), f"{name} is on floor {floor_of(name)} and needs {', '.join(sorted(foreign))}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({name: own_imports(name, typing=False) - {name} for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' → '.join(reversed(error.args[1]))}")
