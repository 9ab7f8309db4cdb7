"""MONAI Label's own server, started as ``iregzoo label-app`` says, for the tests of this folder."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest

from iregzoo import zoo
from iregzoo.label.app import write_face
from iregzoo.label.atlas import own

from .scans import mirrored, thick, turned, write_useless

HERE = Path(__file__).parent
PATIENTS = 4  # of the test split
PATIENCE_S = 300


@dataclass(frozen=True)
class Answer:
    """What the server says: its status, and its JSON or file."""

    status: int
    content: Any


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: without a slash at its end.
        app, studies: its folders.
        process: on its own.
    """

    url: str
    app: Path
    studies: Path
    process: "subprocess.Popen[bytes]"

    def ask(self, method: str, path: str, **options: Any) -> Answer:
        import requests

        said = requests.request(method, f"{self.url}{path}", timeout=PATIENCE_S, **options)
        json_said = said.headers["content-type"].startswith("application/json")
        return Answer(said.status_code, said.json() if json_said else said.content)

    def infer(self, model: str, query: str, files: Any = None, **params: Any) -> Answer:
        """Run a method: ``query`` such as ``image=NAME&output=json``; ``params`` are those of the option panel."""
        return self.ask("POST", f"/infer/{model}?{query}", data={"params": json.dumps(params)}, files=files)

    def labels(self, model: str, query: str, folder: Path, extension: str = ".nii.gz", **params: Any) -> Path:
        """The label map that a method gives, as a file."""
        answer = self.infer(model, f"{query}&output=image", result_extension=extension, **params)
        assert answer.status == 200, answer.content
        path = folder / f"{model}{extension}"
        path.write_bytes(answer.content)
        return path


@pytest.fixture(scope="session")
def hippocampi() -> Path:
    """The folder of hippocampus scans."""
    if find_spec("monailabel") is None:
        pytest.skip('MONAI Label is not installed: pip install -e ".[label]"')
    folder = os.environ.get("IREGZOO_TEST_DATA")
    if not folder:
        pytest.skip("set IREGZOO_TEST_DATA to the folder of real scans to run this test")
    return Path(folder) / "hippocampus"


@pytest.fixture(scope="session")
def patients(hippocampi: Path) -> list[str]:
    """Names of scans that no method has seen."""
    names: list[str] = json.loads((hippocampi / "splits.json").read_text("utf-8"))["test"]
    return names[:PATIENTS]


@pytest.fixture(scope="session")
def server(hippocampi: Path, patients: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server with every method, and a face ``own`` of IIRP-Net with two atlases made of patients."""
    folder = tmp_path_factory.mktemp("label")
    app, studies = folder / "app", folder / "studies"
    command = shlex.split(prepare(app))
    assert command[0] == "monailabel"
    command[0:1] = [sys.executable, str(HERE / "launcher.py")]
    command[command.index("--studies") + 1] = str(studies)
    command[command.index("--conf") + 2] += ",own"
    write_face(app / "model" / "own", zoo.load("iirp"), None, own_atlases(hippocampi, patients, folder))
    write_studies(hippocampi, patients, studies)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MONAI_LABEL_SESSION_PATH": str(folder / "sessions")}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    running = Server(f"http://127.0.0.1:{port}", app, studies, process)
    try:
        wait_for(running, folder / "server.log")
        yield running
    finally:
        process.terminate()
        process.wait(timeout=30)


def prepare(app: Path) -> str:
    """Prepare the app with the command; gives the command that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "iregzoo", "label-app", str(app)], check=True, capture_output=True, encoding="utf-8"
    )
    return done.stdout.strip().splitlines()[-1]


def own_atlases(hippocampi: Path, patients: list[str], folder: Path) -> Any:
    """Two patients as atlases, with labels that 8 bits do not hold."""
    images, labels = [], []
    for patient in patients[-2:]:
        label_map = nib.load(hippocampi / "labels" / f"{patient}.nii.gz")
        images.append(str(hippocampi / "images" / f"{patient}.nii.gz"))
        labels.append(str(folder / f"{patient}_labels.nii.gz"))
        nib.save(nib.Nifti1Image(label_map.get_fdata().astype("int16") * 1000, label_map.affine), labels[-1])
    names = folder / "names.csv"
    names.write_text("label,name\n1000,Anterior Hippocampus\n2000,Posterior Hippocampus\n")
    return own(images, labels, str(names))


def write_studies(hippocampi: Path, patients: list[str], studies: Path) -> None:
    """The folder of scans that the server looks into."""
    studies.mkdir()
    for patient in patients:
        image = nib.load(hippocampi / "images" / f"{patient}.nii.gz")
        for name, change in (("", lambda same: same), ("_turned", turned), ("_thick", thick), ("_mirrored", mirrored)):
            nib.save(change(image), studies / f"{patient}{name}.nii.gz")
    write_useless(studies)


def wait_for(server: Server, log: Path) -> None:
    """Wait until a server answers."""
    import requests

    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and server.process.poll() is None:
        try:
            if server.ask("GET", "/info/").status == 200:
                return
        except requests.ConnectionError:
            time.sleep(0.5)
    pytest.fail(f"the server does not answer:\n{log.read_text('utf-8')[-3000:]}")
