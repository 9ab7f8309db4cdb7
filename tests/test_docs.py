"""What the documents show must work, and be whole."""

import re
from pathlib import Path

import pytest
import torch

from iregzoo.registration import PairNetwork

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bundles/*/docs/*.md")])
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_page_has_no_placeholder_and_no_dead_link(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text
    assert "TODO" not in text
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_example_of_a_method_registers_and_learns() -> None:
    """The network in docs/add_a_method.md, as it stands there."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, type[torch.nn.Module]] = {}
    exec(compile(code, "add_a_method.md", "exec"), names)  # the page's own code
    torch.manual_seed(0)
    network = PairNetwork(names["MineNet"]())
    image = torch.rand(2, 2, 5, 6, 7)
    field = network(image)
    assert field.shape == (2, 3, 5, 6, 7)
    assert field.abs().max() < 0.01
    field.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
