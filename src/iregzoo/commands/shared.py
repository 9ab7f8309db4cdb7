"""What several commands share: options that mean the same everywhere, progress, and lines of results."""

from collections.abc import Callable, Sequence
from typing import Any

from iregzoo.errors import InputError

STAGES = ("read", "weights", "start", "network", "warp", "write", "report")


def names(value: str, option: str) -> list[str]:
    """What stands between an option's commas, each once.

    Raises:
        InputError: where there is nothing.
    """
    return list(dict.fromkeys(listed(value, option)))


def listed(value: str, option: str) -> list[str]:
    """What stands between an option's commas.

    Raises:
        InputError: where there is nothing.
    """
    found = [part.strip() for part in value.split(",") if part.strip()]
    if not found:
        raise InputError(f"--{option} is empty; give one name, or several separated by commas")
    return found


def summary_line(report: dict[str, Any]) -> str:
    """What a registration did, in a line."""
    parts = [f"NCC {report['ncc_before']:.3f} → {report['ncc_after']:.3f}"]
    if "dice_mean" in report:
        parts.append(f"Dice {report['dice_before_mean']:.3f} → {report['dice_mean']:.3f}")
    parts.append(f"folding {report['folding_percent']:.3f} %")
    if report["iterations"] and "network_left_out" not in report:
        parts.append(f"iterations {'-'.join(map(str, report['iterations']))}")
    parts.append(f"{sum(report['seconds'].values()):.1f} s")
    return ", ".join(parts)


class Progress:
    """A progress bar on standard error that names what is being done; silent where nobody watches."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=total, leave=False, disable=None, bar_format="{desc} {bar:30} {n}/{total} [{elapsed}<{remaining}]"
        )
        self.begun = False

    def __enter__(self) -> Callable[[str], None]:
        return self.step

    def step(self, name: str) -> None:
        self.bar.update(int(self.begun))
        self.begun = True
        self.bar.total = max(self.bar.total, self.bar.n + 1)  # weights may ask for one more
        self.bar.set_description_str(name)

    def __exit__(self, *error: object) -> None:
        self.bar.close()


class Bytes:
    """A progress bar of a transfer on standard error; silent where nobody watches."""

    def __init__(self, name: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(desc=name, leave=False, disable=None, unit="B", unit_scale=True, delay=0.5)

    def __enter__(self) -> Callable[[int, int], None]:
        return self.step

    def step(self, done: int, size: int) -> None:
        self.bar.total = size
        self.bar.update(done - self.bar.n)

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def say_ignored(table: str, columns: Sequence[str]) -> None:
    """Tell which columns of a table nothing looks at: one may have been meant to be another."""
    from iregzoo.cases import ignored_columns

    if ignored := ignored_columns(table, columns):
        print(f"note: {table}: ignored {', '.join(ignored)}; the columns known here are {', '.join(columns)}")
