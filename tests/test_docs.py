"""What the documents show must work, and be whole."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from iregzoo.losses import RegistrationLoss, diffusion
from iregzoo.registration import PairNetwork
from iregzoo.zoo import load

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bundles/*/docs/*.md")])
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_page_has_no_placeholder_and_no_dead_link(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text
    assert "TODO" not in text
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each piece of Python in docs/add_a_method.md defines, run as it stands there."""
    monkeypatch.chdir(ROOT)  # from where its paths lead
    page = (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = []
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        found.append({"__name__": __name__})
        exec(compile(code, "add_a_method.md", "exec"), found[-1])
    return found


def test_example_of_a_method_registers_and_learns(examples: list[dict[str, Any]]) -> None:
    network_names, loss_names, _ = examples
    torch.manual_seed(0)
    network = PairNetwork(network_names["MineNet"]())
    image = torch.rand(2, 2, 5, 6, 7)
    field = network(image)
    assert field.shape == (2, 3, 5, 6, 7)
    assert field.abs().max() < 0.01
    field.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    registration = replace(network.register(image), auxiliary={"velocity": (field,)})
    base = RegistrationLoss(window=3)
    terms = loss_names["MineLoss"](base, weight=2.0)(registration, image[:, :1], image[:, 1:])
    expected = base(registration, image[:, :1], image[:, 1:])["loss"] + 2 * diffusion(field).mean()
    assert terms["loss"].item() == pytest.approx(expected.item())


def test_example_of_a_network_elsewhere_has_its_weights(examples: list[dict[str, Any]]) -> None:
    network = load("iirp").network.network
    for name, value in examples[-1]["network"].state_dict().items():
        assert torch.equal(value, network.state_dict()[name])
