"""Synthesised images: what is drawn follows the tissues, the seed and the settings, and nothing else."""

from dataclasses import replace

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from iregzoo.synthesis import Synthesis, Tissue, blurred

SHAPE = (24, 20, 16)
TISSUES = {
    0: Tissue(0, 5, 1, 2, 1),
    2: Tissue(1, 160, 5, 4, 1),
    41: Tissue(1, 160, 5, 4, 1),
    3: Tissue(2, 90, 5, 4, 1),
    24: Tissue(3, 40, 5, 4, 1),
    502: Tissue(4, 200, 5, 4, 1),
}
CLEAN = {"noise": 0.0, "blur": 0.0, "bias": 0.0, "gamma": 0.0, "thick": 0.0}
PLAIN = Synthesis(TISSUES, head=[502], cover=[24], t1=1.0, stripped=0.0, **CLEAN)


def label_map() -> Tensor:
    """A slab of each label along the first axis."""
    labels = torch.zeros(1, *SHAPE, dtype=torch.int16)
    for number, label in enumerate((0, 502, 24, 3, 2, 41)):
        labels[:, 4 * number : 4 * number + 4] = label
    return labels


def draw(synthesis: Synthesis, seed: int = 0, labels: Tensor | None = None) -> Tensor:
    return synthesis(label_map() if labels is None else labels, torch.Generator().manual_seed(seed))


def brightness(image: Tensor, label: int) -> float:
    """Mean in the middle of a label's slab, which a little blur does not reach."""
    places = torch.where((label_map()[0] == label).any(-1).any(-1))[0]
    return float(image[0, places[1] : places[2] + 1].mean())


@pytest.mark.parametrize("seed", range(5))
def test_every_image_is_finite_and_fills_its_range(seed: int) -> None:
    image = draw(Synthesis(TISSUES, head=[502], cover=[24]), seed)
    assert image.shape == (1, *SHAPE)
    assert image.dtype == torch.float32
    assert image.min() == 0
    assert image.max() == 1


def test_the_seed_alone_decides() -> None:
    synthesis = Synthesis(TISSUES, head=[502], cover=[24])
    torch.manual_seed(1)
    first = draw(synthesis, 3)
    torch.manual_seed(2)
    assert torch.equal(draw(synthesis, 3), first)
    assert not torch.equal(draw(synthesis, 4), first)


@pytest.mark.parametrize("seed", range(5))
def test_t1_has_the_order_of_its_statistics(seed: int) -> None:
    image = draw(PLAIN, seed)
    values = [brightness(image, label) for label in (0, 24, 3, 2, 502)]
    assert values == sorted(values)
    assert values[-1] - values[0] > 0.8


def test_random_contrast_has_any_order_and_sides_look_alike() -> None:
    images = [draw(replace(PLAIN, t1=0.0), seed) for seed in range(12)]
    darker = [brightness(image, 2) < brightness(image, 3) for image in images]
    assert 0 < sum(darker) < len(darker)
    tissues = {label: replace(tissue, std=0.0, std_sd=0.0) for label, tissue in TISSUES.items()}
    image = draw(replace(PLAIN, tissues=tissues))
    assert abs(brightness(image, 2) - brightness(image, 41)) < 1e-4


def test_a_stripped_image_shows_no_head() -> None:
    tissues = {label: replace(tissue, std=0.0, std_sd=0.0) for label, tissue in TISSUES.items()}
    covered = set()
    for seed in range(8):
        image = draw(replace(PLAIN, tissues=tissues, stripped=1.0), seed)
        assert abs(brightness(image, 502) - brightness(image, 0)) < 1e-4
        assert brightness(image, 3) > 0.2
        covered.add(brightness(image, 24) > 0.05)
    assert covered == {True, False}


def test_unknown_labels_look_like_background() -> None:
    labels = label_map()
    labels[labels == 3] = 999
    labels[labels == 502] = 7
    labels[labels == 24] = -4
    tissues = {label: replace(tissue, std=0.0, std_sd=0.0) for label, tissue in TISSUES.items()}
    image = draw(replace(PLAIN, tissues=tissues), labels=labels)
    for label in (3, 502, 24):
        assert abs(brightness(image, label) - brightness(image, 0)) < 1e-4


@pytest.mark.parametrize(("setting", "value"), [("noise", 1.0), ("bias", 0.5), ("gamma", 0.5), ("thick", 1.0)])
def test_every_disturbance_disturbs(setting: str, value: float) -> None:
    assert (draw(replace(PLAIN, **{setting: value})) - draw(PLAIN)).abs().mean() > 1e-3


@pytest.mark.parametrize("sigma", [0.4, 1.0, 1.7])
def test_blur_is_a_gaussian(sigma: float) -> None:
    image = torch.rand(1, *SHAPE, generator=torch.manual_seed(0))
    reach = max(1, round(3 * sigma))
    expected = gaussian_filter(image[0].double().numpy(), sigma, mode="nearest", radius=reach)
    torch.testing.assert_close(blurred(image, sigma)[0].double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_tissues_without_a_background_are_refused() -> None:
    with pytest.raises(ValueError, match="label 0, the background"):
        Synthesis({2: TISSUES[2]})
