"""Archives that are not what they should be are refused, and the former bundle stays."""

import json
import os
import stat
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import pytest
import torch

from iregzoo import states
from releases import Downloads, archive, change_metadata, serve, tree, variant

Entries = dict[str, bytes]


def packed(entries: Entries, change: Callable[[ZipInfo], None] = lambda entry: None) -> bytes:
    content = BytesIO()
    with ZipFile(content, "w") as target:
        for name, data in entries.items():
            entry = ZipInfo(name)
            entry.external_attr = 0o100644 << 16
            change(entry)
            target.writestr(entry, data, entry.compress_type)
    return content.getvalue()


def entries_of(bundle: Path) -> Entries:
    return {f"iirp/{name}": (bundle / name).read_bytes() for name in tree(bundle)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../outside.json", "does not belong in a bundle"),
        ("iirp/../../outside.json", "does not belong in a bundle"),
        ("iirp/configs/../../../outside.json", "does not belong in a bundle"),
        ("/outside.json", "does not belong in a bundle"),
        ("//outside.json", "does not belong in a bundle"),
        ("C:\\outside.json", "does not belong in a bundle"),
        ("iirp/configs\\..\\outside.json", "does not belong in a bundle"),
        ("other/configs/outside.json", "does not belong in a bundle"),
        ("outside.json", "does not belong in a bundle"),
        ("iirp/setup.py", "does not belong in a bundle"),
        ("iirp/configs/__init__.py", "does not belong in a bundle"),
        ("iirp/configs/run.sh", "does not belong in a bundle"),
        ("iirp/models/model.pkl", "does not belong in a bundle"),
        ("iirp/configs/deeper/train.json", "does not belong in a bundle"),
        ("iirp/configs/.hidden.json", "does not belong in a bundle"),
        ("iirp/extra/", "does not belong in a bundle"),
        ("iirp/configs/Metadata.json", "twice"),
        ("iirp/configs/metadata.json", "twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archive_with_an_entry_out_of_place_is_refused(
    downloads: Downloads, tmp_path: Path, former: dict[str, str], name: str, words: str
) -> None:
    content = BytesIO(packed(entries_of(variant(tmp_path, "9.0.0"))))
    with ZipFile(content, "a") as target:
        target.writestr(ZipInfo(name), "{}")
    refuse_archive(downloads, content.getvalue(), words)
    assert not list(tmp_path.rglob("*outside*"))
    assert not Path("/outside.json").exists()


def refuse_archive(downloads: Downloads, content: bytes, *words: str) -> None:
    """An archive that is truly listed is refused, and nothing stays of it."""
    with serve() as server:
        server.publish("iirp", "9.0.0", content)
        downloads.refused(*words, "nothing was installed", source=server.url)
        assert len(server.archives()) == 1
    assert [path.name for path in downloads.work.iterdir()] == ["lock"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFDIR])
def test_link_is_refused(downloads: Downloads, tmp_path: Path, former: dict[str, str], kind: int) -> None:
    def change(entry: ZipInfo) -> None:
        if entry.filename.endswith("README.md"):
            entry.external_attr = (kind | 0o777) << 16

    entries = entries_of(variant(tmp_path, "9.0.0")) | {"iirp/docs/README.md": b"/etc/passwd"}
    refuse_archive(downloads, packed(entries, change), "docs/README.md", "is a link or not a regular file")


def test_bomb_is_refused(downloads: Downloads, tmp_path: Path, former: dict[str, str]) -> None:
    def change(entry: ZipInfo) -> None:
        entry.compress_type = ZIP_DEFLATED

    entries = entries_of(variant(tmp_path, "9.0.0")) | {"iirp/docs/data_license.txt": bytes(200_000_000)}
    refuse_archive(downloads, packed(entries, change), "would unpack to")


def test_bomb_that_hides_its_size_is_refused(downloads: Downloads, tmp_path: Path, former: dict[str, str]) -> None:
    def change(entry: ZipInfo) -> None:
        entry.compress_type = ZIP_DEFLATED

    size = 40_000_000
    entries = entries_of(variant(tmp_path, "9.0.0")) | {"iirp/docs/data_license.txt": bytes(size)}
    content = packed(entries, change).replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little"))
    refuse_archive(downloads, content, "not an intact ZIP file")


@pytest.mark.parametrize("damage", ["no zip", "half", "encrypted", "another method"])
def test_archive_that_cannot_be_read_is_refused(
    downloads: Downloads, tmp_path: Path, former: dict[str, str], damage: str
) -> None:
    whole = packed(entries_of(variant(tmp_path, "9.0.0")))
    directory = whole.index(b"PK\x01\x02")
    content = {
        "no zip": b"<html>Please log in</html>",
        "half": whole[: len(whole) // 2],
        "encrypted": whole[: directory + 8] + b"\x01" + whole[directory + 9 :],
        "another method": whole[: directory + 10] + b"\x63" + whole[directory + 11 :],
    }[damage]
    refuse_archive(downloads, content, "not an intact ZIP file")


class Code:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def with_weights(bundle: Path, content: object) -> None:
    """Other weights, with their true hash in the card."""
    torch.save(content, bundle / "models" / "model.pt")
    cards = json.loads((bundle / "configs" / "metadata.json").read_text("utf-8"))["weights"]
    cards["hippocampus"]["sha256"] = states.sha256(bundle / "models" / "model.pt")
    change_metadata(bundle, weights=cards)


def test_pickle_is_refused_and_not_run(downloads: Downloads, tmp_path: Path, former: dict[str, str]) -> None:
    bundle = variant(tmp_path, "9.0.0")
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    with_weights(bundle, {**state, "code": Code(tmp_path / "mark")})
    refuse_archive(downloads, archive(bundle), "is not a readable weights file")
    assert not (tmp_path / "mark").exists()
    torch.load(bundle / "models" / "model.pt", weights_only=False)  # it would have run
    assert (tmp_path / "mark").exists()


def test_weights_of_another_network_are_refused(downloads: Downloads, tmp_path: Path, former: dict[str, str]) -> None:
    bundle = variant(tmp_path, "9.0.0")
    with_weights(bundle, {"network.weight": torch.zeros(3)})
    refuse_archive(downloads, archive(bundle), "has no tensor", "weights belong to another network")


def set_network(bundle: Path, definition: object) -> None:
    path = bundle / "configs" / "inference.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "network_def": definition}))


def set_controller(bundle: Path, definition: object) -> None:
    cards = json.loads((bundle / "configs" / "metadata.json").read_text("utf-8"))["weights"]
    cards["hippocampus"]["controller"] = definition
    change_metadata(bundle, weights=cards)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda bundle: change_metadata(bundle, version="9.0.1"), "claims to be version '9.0.1'"),
        (lambda bundle: (bundle / "configs/metadata.json").unlink(), "is not readable metadata"),
        (lambda bundle: (bundle / "configs/metadata.json").write_text("[]"), "is not readable metadata"),
        (lambda bundle: (bundle / "configs/inference.json").unlink(), "defines no network"),
        (lambda bundle: (bundle / "configs/inference.json").write_text("[]"), "defines no network"),
        (lambda bundle: set_network(bundle, {"_target_": "os.getcwd"}), "'os.getcwd' is not part of this version"),
        (lambda bundle: set_network(bundle, {"_target_": "iregzoo.zoo.os.getcwd"}), "is not part of this version"),
        (
            lambda bundle: set_network(
                bundle, {"_target_": "iregzoo.registration.PairNetwork", "network": {"_target_": "os.getcwd"}}
            ),
            "'os.getcwd' is not part of this version",
        ),
        (
            lambda bundle: set_network(bundle, {"_target_": "iregzoo.networks.IIRPNet", "a": 1}),
            "cannot be used by this",
        ),
        (lambda bundle: set_network(bundle, "iregzoo.networks.IIRPNet"), "defines no network"),
        (lambda bundle: set_controller(bundle, {"_target_": "os.getcwd"}), "'os.getcwd' is not part of this version"),
        (
            lambda bundle: set_controller(bundle, {"_target_": "iregzoo.iteration.replace"}),
            "is not part of this version",
        ),
        (
            lambda bundle: set_controller(
                bundle, {"_target_": "iregzoo.iteration.TCI", "a": {"_target_": "os.getcwd"}}
            ),
            "'os.getcwd' is not part of this version",
        ),
        (lambda bundle: change_metadata(bundle, weights=[]), "not in a form that iregzoo can read"),
        (lambda bundle: change_metadata(bundle, weights={}), ".pt: has no card"),
        (lambda bundle: (bundle / "LICENSE").unlink(), "has no file 'LICENSE'"),
        (lambda bundle: (bundle / "models/model.pt").write_bytes(b"damaged"), "sha256 is"),
    ],
)
def test_bundle_that_is_not_whole_is_refused(
    downloads: Downloads,
    tmp_path: Path,
    former: dict[str, str],
    change: Callable[[Path], object],
    words: str,
) -> None:
    bundle = variant(tmp_path, "9.0.0")
    change(bundle)
    content = packed(entries_of(bundle))
    refuse_archive(downloads, content, words)
