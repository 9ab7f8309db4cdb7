"""Draw the training curve of a run from its TensorBoard logs: loss terms above, validation Dice below.

python benchmarks/training_curve.py --run runs/iirp_hippocampus --output curve.png
"""

import argparse
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def smooth(values: list[float], window: int = 100) -> list[float]:
    """Mean of each value and those before it in a window."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    events = EventAccumulator(str(arguments.run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, validation = figure.subplots(2, 1)
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        steps, values = [point.step for point in points], [point.value for point in points]
        if tag.startswith("val_"):
            validation.plot(steps, values, "o-", markersize=3, label=tag)
            best = max(range(len(values)), key=values.__getitem__)
            print(f"{tag}: best {values[best]:.4f} at epoch {steps[best]}")
        else:
            losses.plot(steps, smooth(values), linewidth=1, label=tag)
    losses.set(xlabel="step", ylabel="weighted loss, mean of 100 steps")
    validation.set(xlabel="epoch (100 steps)", ylabel="validation Dice")
    for axis in (losses, validation):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(arguments.output, dpi=80)


if __name__ == "__main__":
    main()
