"""What importing iregzoo tells PyTorch before it is there, and what a user has said already."""

import os
import subprocess
import sys

import pytest

SAYS = {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "20000"}


@pytest.mark.parametrize(("name", "value"), SAYS.items())
@pytest.mark.parametrize("own", [None, "0"])
def test_settings_of_the_process(name: str, value: str, own: str | None) -> None:
    environment = {key: each for key, each in os.environ.items() if key not in SAYS} | ({name: own} if own else {})
    code = f"import os, sys, iregzoo; print(os.environ[{name!r}], 'torch' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8", check=True
    )
    assert said.stdout.split() == [own or value, "False"]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("iregzoo", ("torch", "numpy", "monai")),
        ("iregzoo.networks", ("ptwt", "pywt", "monai", "scipy", "SimpleITK", "nibabel")),
        ("iregzoo.zoo", ("ptwt", "monai", "scipy")),
        ("iregzoo.register", ("ptwt", "monai", "matplotlib", "ignite")),
    ],
)
def test_an_import_brings_no_more_than_it_needs(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert said.stdout.strip() == "[]"
