"""Releases: the same bundle gives the same bytes, the manifest is true, and MONAI downloads what is packed."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from zipfile import ZIP_STORED, ZipFile

import pytest
import torch

from iregzoo import manifest, zoo
from iregzoo.errors import InputError
from iregzoo.release import INDEX, MODEL_INFO, pack, read_index
from releases import BUNDLES, VERSION, archive, change_metadata, serve, tree, variant
from shell import run

NAMES = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/metadata.json"))


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("IREGZOO_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("IREGZOO_SOURCE", raising=False)
    return tmp_path / "home"


# --- the manifest


@pytest.mark.parametrize("name", NAMES)
def test_manifest_is_true_of_the_bundles(name: str) -> None:
    said = manifest.manifest()
    true = manifest.signed([zoo.read_bundle(BUNDLES / name)], said)
    assert said == true, (
        f"bundles/manifest.json is not true of {name}. Raise its version if it was released; then run: {manifest.SIGN}"
    )


def test_manifest_lies_beside_the_bundles_and_is_packaged_with_them() -> None:
    assert manifest.manifest_path() == BUNDLES / "manifest.json"
    assert "    manifest.json\n" in (BUNDLES.parent / "setup.cfg").read_text("utf-8")


def test_command_that_rewrites_the_manifest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run as the message of the test above says, on a copy of the checkout."""
    shutil.copytree(BUNDLES.parent / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(BUNDLES, tmp_path / "bundles")
    (tmp_path / "bundles/iirp/docs/README.md").write_text("changed")
    before = json.loads((tmp_path / "bundles/manifest.json").read_text("utf-8"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "src"))
    done = subprocess.run(
        [sys.executable, *manifest.SIGN.split()[1:]], check=False, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "bundles/manifest.json").read_text("utf-8"))
    changed = after["iirp"][VERSION]
    assert changed["files"]["docs/README.md"] == hashlib.sha256(b"changed").hexdigest()
    assert changed["sha256"] == hashlib.sha256(archive(tmp_path / "bundles/iirp")).hexdigest()
    del before["iirp"][VERSION], after["iirp"][VERSION]
    assert after == before


def test_weights_that_are_not_those_of_their_card_are_not_signed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(BUNDLES, tmp_path / "bundles")
    monkeypatch.setattr(manifest, "manifest_path", lambda: tmp_path / "bundles" / "manifest.json")
    before = manifest.manifest_path().read_bytes()
    assert manifest.sign() == manifest.manifest_path()
    card = tmp_path / "bundles/pan/configs/metadata.json"
    digest = zoo.find("pan").weights["hippocampus"].sha256
    card.write_text(card.read_text("utf-8").replace(digest, "0" * 64), "utf-8")
    with pytest.raises(
        InputError, match=f"model.pt: sha256 is {digest}, expected 000.*enter the hash of a file of your own"
    ):
        manifest.sign()
    assert manifest.manifest_path().read_bytes() == before


def test_manifest_keeps_other_versions_and_orders_them_as_numbers(tmp_path: Path) -> None:
    before = {"iirp": {"0.9.0": {"sha256": "a"}, "0.2.0": {"sha256": "b"}}, "gone": {"0.1.0": {"sha256": "c"}}}
    said = manifest.signed([zoo.read_bundle(variant(tmp_path, "0.10.0"))], before)
    assert list(said["iirp"]) == ["0.2.0", "0.9.0", "0.10.0"]
    assert said["iirp"]["0.9.0"] == {"sha256": "a"}
    assert said["gone"] == before["gone"]


# --- packing


def test_same_bundle_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whenever, wherever and in whatever order its files were written, and with whatever rights."""
    first = variant(tmp_path / "a", "9.0.0")
    second = tmp_path / "b" / "iirp"
    for name in sorted(tree(first), reverse=True):
        (second / name).parent.mkdir(parents=True, exist_ok=True)
        (second / name).write_bytes((first / name).read_bytes())
        (second / name).chmod(stat.S_IRWXU)
        os.utime(second / name, (1e9, 1e9))
    (second / ".DS_Store").write_text("of the machine")
    assert archive(first) == archive(second)
    (second / "LICENSE").write_text("another")
    assert archive(first) != archive(second)


def test_archive_has_one_folder_and_nothing_that_a_machine_decides(tmp_path: Path) -> None:
    packed = pack(zoo.find("iirp"), tmp_path)
    with ZipFile(tmp_path / packed.file) as content:
        entries = content.infolist()
        assert content.testzip() is None
        assert [entry.filename for entry in entries] == [f"iirp/{name}" for name in sorted(tree(BUNDLES / "iirp"))]
        assert {entry.compress_type for entry in entries} == {ZIP_STORED}
        assert {(entry.date_time, entry.create_system) for entry in entries} == {((1980, 1, 1, 0, 0, 0), 3)}
        assert {oct(entry.external_attr >> 16) for entry in entries} == {"0o100644"}


def test_archive_is_the_one_in_the_manifest(tmp_path: Path) -> None:
    packed = pack(zoo.find("iirp"), tmp_path)
    signed = manifest.manifest()["iirp"][VERSION]
    assert (packed.sha256, packed.size) == (signed["sha256"], signed["size"])
    content = (tmp_path / packed.file).read_bytes()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (packed.sha256, packed.size)


def test_several_packs_extend_the_index(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, home: Path
) -> None:
    monkeypatch.setenv("IREGZOO_SOURCE", "https://example.org/releases")
    folder = tmp_path / "new" / "release"
    for version in ("10.0.0", "9.0.0"):
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(variant(tmp_path, version), home / "bundles" / "iirp")
        assert run(monkeypatch, "pack", "iirp", "--output", str(folder)) == 0
    assert run(monkeypatch, "pack", "ipear", "--output", str(folder)) == 0
    assert capsys.readouterr().out.count("sha256") == 3
    listed = read_index(json.loads((folder / INDEX).read_text("utf-8")), INDEX)
    ipear = zoo.find("ipear").version
    assert [(one.name, one.version) for one in listed] == [("iirp", "9.0.0"), ("iirp", "10.0.0"), ("ipear", ipear)]
    model_info = json.loads((folder / MODEL_INFO).read_text("utf-8"))
    assert set(model_info) == {"iirp_v9.0.0", "iirp_v10.0.0", f"ipear_v{ipear}"}
    for one in listed:
        content = (folder / one.file).read_bytes()
        assert (one.sha256, one.size) == (hashlib.sha256(content).hexdigest(), len(content))
        assert model_info[one.file.removesuffix(".zip")] == {
            "checksum": hashlib.sha1(content).hexdigest(),
            "source": f"https://example.org/releases/{one.file}",
        }
    assert {path.name for path in folder.iterdir()} == {INDEX, MODEL_INFO, *(one.file for one in listed)}


def test_packing_again_changes_nothing(tmp_path: Path) -> None:
    pack(zoo.find("iirp"), tmp_path)
    before = tree(tmp_path)
    pack(zoo.find("iirp"), tmp_path)
    assert tree(tmp_path) == before


def test_version_is_not_released_twice_with_another_content(tmp_path: Path) -> None:
    bundle, folder = variant(tmp_path, "9.0.0"), tmp_path / "release"
    pack(zoo.read_bundle(bundle), folder)
    before = tree(folder)
    (bundle / "docs/README.md").write_text("changed")
    with pytest.raises(InputError, match=r"iirp_v9\.0\.0\.zip: is a different iirp 9\.0\.0; raise the version"):
        pack(zoo.read_bundle(bundle), folder)
    assert tree(folder) == before


def test_change_without_another_version_is_not_packed(tmp_path: Path) -> None:
    bundle = variant(tmp_path, VERSION)
    with pytest.raises(
        InputError, match=rf"metadata\.json: differs from what was signed off for iirp {VERSION}.*{manifest.SIGN}"
    ):
        pack(zoo.read_bundle(bundle), tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_bundle_that_is_not_whole_is_not_packed(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            pack(zoo.read_bundle(bundle), tmp_path / "release")
        assert not (tmp_path / "release").exists()

    bundle = variant(tmp_path, "9.0.0")
    model = bundle / "models" / "model.pt"
    for stray in ("configs/setup.py", "notes.txt", "configs/deeper/train.json", "models/model.pkl"):
        (bundle / stray).parent.mkdir(exist_ok=True)
        (bundle / stray).write_text("{}")
        refused(rf"{stray}: does not belong in a bundle")
        (bundle / stray).unlink()
    shutil.copy(model, bundle / "models" / "old.pt")
    refused(r"old\.pt: has no card in metadata\.json")
    (bundle / "models" / "old.pt").unlink()
    (bundle / "docs" / "link.md").symlink_to(BUNDLES.parent / "README.md")
    refused(r"link\.md: does not belong in a bundle")
    (bundle / "docs" / "link.md").unlink()
    model.write_bytes(model.read_bytes()[:-1])
    refused(r"model\.pt: sha256 is .*, expected")
    model.unlink()
    refused(r"has no file 'models/model\.pt'")


@pytest.mark.parametrize("version", ["", "1.x", "1.0-beta", "../1", "1..0", "٣.0.0"])
def test_version_that_is_none_is_not_packed(tmp_path: Path, version: str) -> None:
    bundle = variant(tmp_path, "9.0.0")
    change_metadata(bundle, version=version)
    with pytest.raises(InputError, match=r"version .* of iirp: give numbers separated by dots"):
        pack(zoo.read_bundle(bundle), tmp_path / "release")


@pytest.mark.parametrize("name", ["my_variant", "my-bundle", "1st"])
def test_name_that_monai_could_not_read_is_not_packed(tmp_path: Path, name: str) -> None:
    bundle = variant(tmp_path, "9.0.0").rename(tmp_path / name)
    with pytest.raises(InputError, match=rf"bundle '{name}': use only letters"):
        pack(zoo.read_bundle(bundle), tmp_path / "release")


def test_folder_that_cannot_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    assert run(monkeypatch, "pack", "iirp", "--output", str(tmp_path / "file" / "release")) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "Not a directory" in error


def test_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    pack(zoo.find("ipear"), tmp_path)
    before = tree(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"iirp_v.*\.zip: writing failed \(File too large\); free up"):
            pack(zoo.find("iirp"), tmp_path)
        with pytest.raises(InputError, match="writing failed"):
            pack(zoo.find("iirp"), tmp_path / "a" / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(tmp_path) == before
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("file", [INDEX, MODEL_INFO])
def test_index_that_is_none_is_kept_and_named(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text('{"bundles": [')
    with pytest.raises(InputError, match=rf"{file}: is not readable JSON"):
        pack(zoo.find("iirp"), tmp_path)
    assert {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()} == {file: '{"bundles": ['}


# --- verify


def lines(printed: str) -> list[tuple[str, str]]:
    return [tuple(line.split(":")[0].split(maxsplit=1)) for line in printed.strip().splitlines()]  # type: ignore[misc]


@pytest.mark.parametrize("name", NAMES)
def test_verify_finds_the_bundles_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(monkeypatch, "verify", name) == 0
    checks = [f"weights {weights}" for weights in zoo.find(name).weights for _ in range(2)]
    assert lines(capsys.readouterr().out) == [("ok", what) for what in ("contents", *checks, "manifest")]


def test_verify_names_each_thing_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, home: Path
) -> None:
    bundle = home / "bundles" / "iirp"
    shutil.copytree(BUNDLES / "iirp", bundle)
    (bundle / "docs" / "README.md").write_text("changed")
    state = torch.load(bundle / "models/model.pt", weights_only=True)
    state["network.foreign"] = torch.zeros(1)
    torch.save(state, bundle / "models/model.pt")
    assert run(monkeypatch, "verify", "iirp") == 2
    shown = capsys.readouterr()
    assert lines(shown.out) == [
        ("ok", "contents"),
        ("WRONG", "weights hippocampus"),
        ("WRONG", "weights hippocampus"),
        *[("ok", f"weights {name}") for name in ("brain", "brain", "brain_any", "brain_any")],
        ("WRONG", "manifest"),
    ]
    assert "sha256 is" in shown.out
    assert "unexpected tensor 'network.foreign'" in shown.out
    assert "docs/README.md: differs from what was signed off" in shown.out
    (error,) = shown.err.strip().splitlines()
    assert error.startswith("iregzoo: 3 of 8 checks of iirp")


def test_verify_says_what_the_manifest_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, home: Path
) -> None:
    shutil.copytree(variant(tmp_path, "9.0.0"), home / "bundles" / "iirp")
    assert run(monkeypatch, "verify", "iirp") == 0
    printed = capsys.readouterr().out
    assert ("--", "manifest") in lines(printed)
    assert "has no entry for iirp 9.0.0" in printed


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"sha256": ""}, "has no sha256 in its card"),
        ({"file": "../../../etc/passwd"}, "has no file '../../../etc/passwd'"),
        ({"file": ["models/model.pt"]}, "cannot be used by this version of iregzoo"),
        ({"sha256": 7}, "cannot be used by this version of iregzoo"),
    ],
)
def test_verify_finds_a_card_wrong(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    home: Path,
    card: dict[str, Any],
    words: str,
) -> None:
    bundle = variant(tmp_path, "9.0.0")
    cards = json.loads((bundle / "configs/metadata.json").read_text("utf-8"))["weights"]
    cards["hippocampus"] |= card
    change_metadata(bundle, weights=cards)
    shutil.copytree(bundle, home / "bundles" / "iirp")
    assert run(monkeypatch, "verify", "iirp") == 2
    assert words in capsys.readouterr().out


def test_cards_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    bundle = variant(tmp_path, "9.0.0")
    for weights in ({"new": {"file": "models/model.pt", "of_a_later_iregzoo": 1}}, ["models/model.pt"], {"new": 3}):
        change_metadata(bundle, weights=weights)
        with pytest.raises(InputError, match=r"the weights' cards in metadata\.json are not in a form that iregzoo"):
            _ = zoo.read_bundle(bundle).weights


# --- MONAI's own download


def test_monai_downloads_what_is_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command of MONAI's documentation."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    packed = pack(zoo.find("iirp"), tmp_path / "release")
    with serve({packed.file: (tmp_path / "release" / packed.file).read_bytes()}) as release:
        options = {"name": "iirp", "version": VERSION, "url": f"{release.url}/{packed.file}"}
        command = [sys.executable, "-m", "monai.bundle", "download", "--bundle_dir", str(tmp_path / "monai")]
        command += [part for name, value in options.items() for part in (f"--{name}", value)]
        done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0, done.stderr
        assert release.archives() == [None]
    assert tree(tmp_path / "monai" / "iirp") == tree(BUNDLES / "iirp")


def test_monai_finds_versions_and_archives_as_on_github(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MONAI's addresses, which name GitHub, lead to a server here; everything else is MONAI's own."""
    import requests
    from monai.bundle import download, get_bundle_info, get_bundle_versions, scripts

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "release"
    packed = pack(zoo.find("iirp"), folder)
    pack(zoo.read_bundle(variant(tmp_path, "9.0.0")), folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assets = [{"name": name, "browser_download_url": f"https://github.com/x/{name}"} for name in files]
    files["releases"] = json.dumps([{"tag_name": "hosting_storage_v1", "assets": assets}]).encode()
    with serve(files) as release:
        get, address = requests.get, scripts._get_git_release_url

        def here(url: str) -> str:
            return f"{release.url}/{Path(urlsplit(url).path).name}"

        monkeypatch.setattr(requests, "get", lambda url, **rest: get(here(url), **rest))
        monkeypatch.setattr(scripts, "_get_git_release_url", lambda *parts, **named: here(address(*parts, **named)))
        for tag in ("hosting_storage_v1", "dev"):  # from a release's files, and from models/model_info.json of a branch
            found = get_bundle_versions("iirp", repo="owner/iregzoo", tag=tag)
            assert found == {"latest_version": "9.0.0", "all_versions": [VERSION, "9.0.0"]}
        info = get_bundle_info("iirp", VERSION, repo="owner/iregzoo", tag="dev")
        assert info["browser_download_url"].endswith(f"/releases/download/hosting_storage_v1/{packed.file}")
        repo = "owner/iregzoo/hosting_storage_v1"
        download("iirp", bundle_dir=tmp_path / "latest", source="github", repo=repo, progress=False)
        download("iirp", VERSION, bundle_dir=tmp_path / "named", source="github", repo=repo, progress=False)
    assert tree(tmp_path / "latest" / "iirp") == tree(tmp_path / "9.0.0" / "iirp")
    assert tree(tmp_path / "named" / "iirp") == tree(BUNDLES / "iirp")
