"""Draw the curves of one or more runs from their TensorBoard logs, side by side: loss terms above, validation below.

python benchmarks/training_curve.py --runs runs/iirp_hippocampus --output curve.png
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def smooth(values: list[float], window: int = 100) -> list[float]:
    """Mean of each value and those before it in a window."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def draw(run: Path, losses: Axes, validation: Axes) -> None:
    """One run: its loss terms, and what it was validated by."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        steps, values = [point.step for point in points], [point.value for point in points]
        if tag.startswith("val_"):
            validation.plot(steps, values, "o-", markersize=3, label=tag)
            measured = zip(steps, values, strict=True)
            print(f"{run.name} {tag}: {', '.join(f'{value:.4f} (epoch {step})' for step, value in measured)}")
        else:
            losses.plot(steps, smooth(values), linewidth=1, label=tag)
    losses.set(title=run.name, xlabel="step", ylabel="weighted loss, mean of 100 steps")
    validation.set(xlabel="epoch (100 steps)", ylabel="validation")
    for axis in (losses, validation):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", required=True, type=Path, nargs="+")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    count = len(arguments.runs)
    figure = Figure(figsize=(max(7.0, 4.2 * count), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, count, squeeze=False)
    for run, column in zip(arguments.runs, axes.T, strict=True):
        draw(run, *column)
    figure.savefig(arguments.output, dpi=80)


if __name__ == "__main__":
    main()
