"""The command line. Bad input ends with one line and exit code 2."""

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from io import TextIOWrapper
from threading import Timer, main_thread
from types import FrameType
from typing import get_args

from iregzoo import __version__
from iregzoo.commands.batch import batch
from iregzoo.commands.label import label_app
from iregzoo.commands.measurement import evaluate
from iregzoo.commands.registration import align, demo, register
from iregzoo.commands.template import template
from iregzoo.commands.transforms import apply
from iregzoo.commands.zoo import download, import_checkpoint, list_bundles, pack, verify
from iregzoo.errors import InputError, check_name
from iregzoo.flags import flag

COMMANDS: dict[str, Callable[..., None]] = {
    "register": register,
    "align": align,
    "apply": apply,
    "batch": batch,
    "evaluate": evaluate,
    "template": template,
    "list": list_bundles,
    "demo": demo,
    "download": download,
    "verify": verify,
    "pack": pack,
    "label-app": label_app,
    "import-checkpoint": import_checkpoint,
}


def prepare(arguments: Sequence[str]) -> list[str]:
    """Arguments for Fire, checked and quoted.

    Fire would run a command with an option that it does not have and complain afterwards, and it reads a folder called
    1e5 as a number: unknown options are refused first, and what a command takes as text is quoted.

    Raises:
        InputError: naming an unknown command, an option that the command does not have or that lacks its value, one
            that is neither true nor false, an argument that is empty, and those that are missing.
    """
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    if arguments[0] not in COMMANDS:
        raise InputError(f"unknown command {arguments[0]}; choose from {', '.join(COMMANDS)}")
    parameters = signature(COMMANDS[arguments[0]]).parameters
    prepared, places, rest = [arguments[0]], list[str](), list(arguments[1:])
    for argument in rest:
        check_name(argument)
    while rest:
        argument = rest.pop(0)
        if argument in ("--help", "-h") or (argument == "--" and rest[:1] in (["--help"], ["-h"])):
            return [arguments[0], "--", "--help"]  # alone: Fire would run a command that is complete
        if argument == "--":  # what follows is Fire's own
            return [*prepared, *map(repr, places), argument, *rest]
        if not argument:
            raise InputError(f"an argument of {arguments[0]} is empty; give it a value or leave it out")
        if argument.startswith("-") and argument[1:2].isalpha():
            argument = _whole(argument, parameters)
        if argument.startswith("--"):
            prepared.append(_option(argument, rest, arguments[0], parameters))
            _check_once(prepared)
        else:
            places.append(argument)
    named = {option[2:].partition("=")[0] for option in prepared[1:]}
    free = [name for name in parameters if name not in named]
    if len(places) > len(free):
        raise InputError(f"unexpected argument {places[len(free)]!r}; see iregzoo {arguments[0]} --help")
    needed = [name for name in free[len(places) :] if parameters[name].default is Parameter.empty]
    if needed:  # Fire would print its usage, in many lines
        options = ", ".join(f"--{name.replace('_', '-')}" for name in needed)
        raise InputError(f"{arguments[0]} needs {options}; see iregzoo {arguments[0]} --help")
    return prepared + [_typed(name, place, parameters) for name, place in zip(free, places, strict=False)]


def _check_once(prepared: Sequence[str]) -> None:
    """Refuse the last option where it was given before: Fire would take the last and say nothing."""
    option = prepared[-1].partition("=")[0]
    if any(other.partition("=")[0] == option for other in prepared[:-1]):
        raise InputError(f"{option.replace('_', '-')} is given twice; give it once, with commas where it takes several")


def _whole(argument: str, parameters: Mapping[str, Parameter]) -> str:
    """An option that was given by its first letter, as Fire's help offers it, by its whole name."""
    letter, rest = argument[1], argument[2:]
    meant = [f"--{name.replace('_', '-')}" for name in parameters if name.startswith(letter)]
    if len(meant) != 1 or (rest and not rest.startswith("=")):
        raise InputError(
            f"{argument} is not an option; use the full name" + (f": {' or '.join(meant)}" if meant else "")
        )
    return meant[0] + rest


def _option(argument: str, rest: list[str], command: str, parameters: Mapping[str, Parameter]) -> str:
    """An option of a command for Fire, with its value, which is taken from what follows where it stands there."""
    option, _, value = argument.partition("=")
    name = option[2:].replace("-", "_")
    if name not in parameters:
        known = ", ".join(f"--{parameter.replace('_', '-')}" for parameter in parameters)
        raise InputError(f"unknown option {option}; {command} has {known}")
    annotation = parameters[name].annotation
    if "=" not in argument and rest and not rest[0].startswith("--"):
        value = rest.pop(0)
    elif "=" not in argument:
        if annotation is not bool:
            raise InputError(f"{option} needs a value; give one after it")
        value = "True"
    if not value:
        raise InputError(f"{option} is empty; give it a value or leave it out")
    return _typed(name, value, parameters)


def _typed(name: str, value: str, parameters: Mapping[str, Parameter]) -> str:
    """An option for Fire, its value quoted where it is text."""
    annotation = parameters[name].annotation
    if annotation is bool:
        value = str(flag(value, f"--{name.replace('_', '-')}"))
    text = annotation is str or str in get_args(annotation)
    return f"--{name}={value!r}" if text else f"--{name}={value}"


_again: Timer | None = None  # which brings an interrupt back


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop, after an import that is under way: libraries swallow what stops theirs, or fail later for half a module."""
    global _again
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            if _again is None or not _again.is_alive():
                _again = Timer(0.1, _interrupt_main, [number])
                _again.daemon = True
                _again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _interrupt_main(number: int) -> None:
    """Send the main thread a signal, which wakes it where it waits."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


def _end_quickly() -> None:
    """Keep Python from looking through all that PyTorch imported once more at its end, for up to a second.

    Triton, where it is loaded, would take what is then left for leaks, and say so in many lines.
    """
    if "triton" not in sys.modules:
        gc.freeze()


def main() -> None:
    """Entry point of ``iregzoo``."""
    import fire

    atexit.register(_end_quickly)
    # Beside Ctrl-C a scheduler's ways of it.
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # an arrow must not fail where only ASCII can be shown
    if sys.argv[1:] == ["--version"]:
        return print(f"iregzoo {__version__}")
    try:
        fire.Fire(COMMANDS, prepare(sys.argv[1:]), name="iregzoo")
        sys.stdout.flush()
    except InputError as error:
        print(f"iregzoo: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as of a process that the signal for it ends
    except KeyboardInterrupt as stop:
        said = str(stop) or "nothing was written"
        print(f"iregzoo: interrupted: {said}; run the command again", file=sys.stderr, flush=True)
        # Not sys.exit: a second signal would meet Python's last steps, which print what was interrupted.
        os._exit(2)
