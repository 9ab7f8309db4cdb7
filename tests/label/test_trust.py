"""What is said of an atlas's labels on a patient's scan. No server is needed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iregzoo.label.atlas import own
from iregzoo.label.trust import trust
from iregzoo.register import Scans, register
from iregzoo.zoo import load

from .scans import write_atlas


@pytest.mark.parametrize(("init", "mend"), [("none", "try init rigid"), ("rigid", "use your own atlas")])
def test_what_is_advised_has_not_been_tried(tmp_path: Path, init: str, mend: str) -> None:
    options = write_atlas(tmp_path)
    (atlas,) = own([options[1]], [options[3]], options[5])
    other = torch.rand(atlas.image.data.shape, generator=torch.manual_seed(1))  # as unlike as noise is
    scans = Scans(replace(atlas.image, data=other), atlas.image, moving_labels=atlas.labels)
    found = trust(register(scans, load("pan"), init=init), atlas.names)
    alike = [words for words in found["warnings"] if "resemble" in words]
    assert len(alike) == 1
    assert alike[0].startswith("the scan does not resemble the atlas")
    assert alike[0].endswith(mend)
