"""Methods whose weights' card says something else."""

from dataclasses import replace
from typing import Any

from iregzoo.zoo import Method


def with_card(method: Method, **changes: Any) -> Method:
    card = replace(method.card, **changes)
    return replace(method, weights=replace(method.weights, card=card))
