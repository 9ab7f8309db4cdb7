"""Average the weights of trainings that went on from one another, and store them in half precision.

    python benchmarks/average_weights.py BEST.pt OTHER.pt --output model.pt

Weights along one training often lie around a better place than any of them reached (Wortsman et al., "Model soups",
ICML 2022). One file alone is only stored in half precision.
"""

from hashlib import sha256
from pathlib import Path

import fire
import torch


def main(*files: str, output: str) -> None:
    """Write the mean of the tensors of files that hold the same ones, and say its sha256."""
    states = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
    if not states or any(state.keys() != states[0].keys() for state in states):
        raise SystemExit("give one or more files of one network's weights")
    torch.save({name: sum(state[name] for state in states).div(len(states)).half() for name in states[0]}, output)
    print(f"written to {output}: sha256 {sha256(Path(output).read_bytes()).hexdigest()}")


if __name__ == "__main__":
    fire.Fire(main)
