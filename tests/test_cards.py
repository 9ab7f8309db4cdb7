"""The card beside a file of weights: it is read as it was written, and what is wrong with it is said in a line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iregzoo import zoo
from iregzoo.cards import FILE, WeightsCard, card_of, write_card
from iregzoo.errors import InputError
from iregzoo.iteration import TCI, FixedIterations, IterStop
from iregzoo.registration import PairNetwork
from iregzoo.states import save_whole


@pytest.fixture
def network() -> PairNetwork:
    return zoo.untrained(zoo.find("iirp"))


@pytest.mark.parametrize(
    "controller", [IterStop(), TCI(window=4, order="stability", keeps_best=True), FixedIterations(3)]
)
def test_a_card_is_read_as_it_was_written(tmp_path: Path, network: PairNetwork, controller: Any) -> None:
    network.network.controller = controller
    write_card(tmp_path, network, (1.5, 1.5, 3.0), (32, 48, 32), (-1000, -200))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    save_whole(network.state_dict(), tmp_path / "mine.pt")
    found = zoo.load("iirp", str(tmp_path / "mine.pt"))
    assert (found.card.spacing, found.card.minimum, found.card.window) == ([1.5, 1.5, 3.0], [32, 48, 32], [-1000, -200])
    assert found.network.controller == controller
    assert found.card.file == str(tmp_path / "mine.pt")


def test_a_range_of_spacings_becomes_its_middle_and_other_entries_stay(tmp_path: Path, network: PairNetwork) -> None:
    (tmp_path / FILE).write_text(json.dumps({"init": "center", "refine": 7, "window": [0, 1]}), "utf-8")
    network.network.controller = None
    write_card(tmp_path, network, (1.9, 2.1), (64, 80, 64))
    found = card_of(tmp_path / "best.pt")
    assert found.spacing == pytest.approx([2.0, 2.0, 2.0])
    assert (found.init, found.refine, found.window, found.controller) == ("center", 7, None, {})


TOGETHER = """
import sys
from pathlib import Path

import torch.distributed as dist
from iregzoo import zoo
from iregzoo.cards import write_card

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
write_card(folder / str(rank), zoo.untrained(zoo.find("iirp")), (2, 2, 2), (32, 48, 32))
dist.barrier()
dist.destroy_process_group()
"""


def test_of_processes_that_train_together_the_first_writes_the_card(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    commands = [[sys.executable, "-c", TOGETHER, str(tmp_path), folder.name] for folder in folders]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert [(folder / FILE).is_file() for folder in folders] == [True, False]


def test_without_a_card_weights_have_the_defaults_and_the_bundles_own_keep_theirs(tmp_path: Path) -> None:
    assert card_of(tmp_path / "best.pt") == WeightsCard(file=str(tmp_path / "best.pt"))
    own = zoo.find_weights(zoo.find("iirp"), "hippocampus")
    copy = tmp_path / "copy.pt"
    copy.write_bytes(own.path.read_bytes())
    (tmp_path / FILE).write_text('{"spacing": [9, 9, 9]}', "utf-8")
    assert zoo.find_weights(zoo.find("iirp"), str(copy)).card == own.card


NO_CONTROLLER = "controller .* must be the definition of one of iregzoo.iteration.TCI"
BAD = {
    "no JSON": ("spacing: 2", "is not readable"),
    "no object": ("[2, 2, 2]", r"is not readable \(no JSON object\); correct it, or delete it"),
    "unknown": ('{"spacings": [2, 2, 2]}', "unknown entry 'spacings'; choose from init, spacing"),
    "hash": ('{"sha256": "0"}', "unknown entry 'sha256'"),
    "two": ('{"spacing": [2, 2]}', r"spacing \[2, 2\] must be three numbers of mm above 0; correct it"),
    "NaN": ('{"spacing": [2, 2, NaN]}', "spacing .* must be"),
    "zero": ('{"spacing": [2, 2, 0]}', "spacing .* must be"),
    "fraction": ('{"minimum": [16, 16, 16.5]}', "minimum .* must be three whole numbers"),
    "upside down": ('{"window": [300, -100]}', "window .* must be null or two numbers, the lower first"),
    "yes": ('{"canonical": 1}', "canonical 1 must be true or false"),
    "finder": ('{"finder": true}', "finder True must be the name of weights of the same bundle"),
    "negative": ('{"refine": -1}', "refine -1 must be a whole number"),
    "half": ('{"precision": "half"}', "precision 'half' must be one of auto, float32, bfloat16"),
    "start": ('{"init": 3}', "init 3 must be the name"),
    "no start": ('{"init": "auto"}', "init 'auto' must be the name of an affine start: none, center, rigid or affine"),
    "text": ('{"description": 3}', "description 3 must be text"),
    "suits": ('{"suits": "livers"}', "suits 'livers' must be 'T1 brains', 'brains' or empty"),
    "labels": ('{"labels": ["left"]}', "labels .* must be an object"),
    "other code": (
        '{"controller": {"_target_": "os.system", "command": "ls"}}',
        NO_CONTROLLER,
    ),
    "by way of": (
        '{"controller": {"_target_": "iregzoo.iteration.torch.load"}}',
        NO_CONTROLLER,
    ),
    "metric": ('{"controller": {"_target_": "iregzoo.iteration.TCI", "metric": "ssim"}}', NO_CONTROLLER),
    "threshold": ('{"controller": {"_target_": "iregzoo.iteration.IterStop", "threshold": "0.005"}}', NO_CONTROLLER),
    "half a score": ('{"controller": {"_target_": "iregzoo.iteration.TCI", "window": 3.5}}', NO_CONTROLLER),
    "setting": (
        '{"controller": {"_target_": "iregzoo.iteration.TCI", "windows": 3}}',
        NO_CONTROLLER,
    ),
    "value": (
        '{"controller": {"_target_": "iregzoo.iteration.TCI", "window": 1}}',
        NO_CONTROLLER,
    ),
}


@pytest.mark.parametrize(("content", "said"), BAD.values(), ids=BAD)
def test_a_bad_card_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / FILE).write_text(content, "utf-8")
    with pytest.raises(InputError, match=f"^{tmp_path / FILE}: .*{said}"):
        card_of(tmp_path / "best.pt")
