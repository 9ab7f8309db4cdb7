"""What ``python -m monai.bundle run`` says of bad input: one line, as iregzoo's own commands do.

MONAI adds mistyped settings to the config, where nothing reads them, and wraps what is wrong in many lines.
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial, wraps
from inspect import Parameter, signature
from types import TracebackType
from typing import Any, TextIO

from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow, run, update_kwargs
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from iregzoo.errors import InputError

COMMAND = "monai.bundle.__main__"  # the module that ``python -m monai.bundle`` and ``torchrun -m monai.bundle`` run
PROGRAM = {
    name
    for function in (run, create_workflow, ConfigWorkflow)
    for name, parameter in signature(function).parameters.items()
    if parameter.kind is not Parameter.VAR_KEYWORD
}


def check_overrides() -> None:
    """End ``python -m monai.bundle run`` with one line and exit code 2 where it sets what its configs do not have.

    What every config's ``initialize`` begins with. From then on any bad input ends the command so. Where MONAI is
    called from Python it does nothing.
    """
    spec = sys.modules["__main__"].__spec__
    if spec is None or spec.name != COMMAND or sys.argv[1:2] != ["run"]:
        return
    # To the stream of now: torch.distributed collects what a hook writes, and loses it where the hook ends the process.
    sys.excepthook = partial(end_in_a_line, stream=sys.stderr)
    try:
        refuse_unknown(arguments_of_run(sys.argv[2:]))
    except InputError as error:
        print(f"iregzoo: {error}", file=sys.stderr)
        sys.exit(2)  # no exception of MONAI's own, which would come with many lines


def end_in_a_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None, stream: TextIO | None = None
) -> None:
    """The end of a process, as ``sys.excepthook``: of bad input that MONAI wrapped, its line and exit code 2."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, InputError):
        found = found.__cause__
    if found is None:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"iregzoo: {found}", file=stream or sys.stderr)
    raise SystemExit(2)


def arguments_of_run(words: Sequence[str]) -> dict[str, Any]:
    """What MONAI's ``run`` gets from a command line: read by Fire, as MONAI does, over the file of ``args_file``."""
    import fire

    given = dict[str, Any]()

    @wraps(run)
    def note(*args: Any, **kwargs: Any) -> None:
        bound = signature(run).bind(*args, **kwargs).arguments
        given.update(update_kwargs(bound.pop("args_file", None), **bound.pop("override", {}), **bound))

    fire.Fire(note, list(words))
    return given


def refuse_unknown(given: dict[str, Any]) -> None:
    """Refuse a setting that neither MONAI nor any of the config files knows.

    MONAI itself refuses one below another that does not exist, such as ``trian#loss``; below one that does, it may be
    new, such as a further argument of a component.

    Args:
        given: from ``arguments_of_run``.

    Raises:
        InputError: naming it, and the nearest that exists.
    """
    settings = set(ConfigParser.load_config_files(given.get("config_file") or {}))
    known = settings | PROGRAM | {ConfigParser.meta_key} | _tracked(given.get("tracking"))
    for name in given:
        root = ReferenceResolver.split_id(name)[0]
        if root not in known:
            near = get_close_matches(root, sorted(known), n=1)
            advice = f"did you mean --{near[0]}?" if near else "use the name of a setting in them, or leave it out"
            raise InputError(f"--{name}: the config files have no such setting; {advice}")


def _tracked(tracking: Any) -> set[str]:
    """The settings that MONAI adds where it is told to keep track of a run."""
    if tracking is None:
        return set()
    return set((DEFAULT_EXP_MGMT_SETTINGS.get(str(tracking)) or ConfigParser.load_config_files(tracking))["configs"])
