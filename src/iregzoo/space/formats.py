"""Formats that published data sets come in, beside those that ``iregzoo register`` reads.

- ``.pkl``: a pickled pair of arrays, image and label map, as TransMorph's authors distribute IXI. It is read without
  running code: nothing but numpy's arrays may be rebuilt.
- ``case1_T00_s.img``: raw voxels of DIR-Lab 4DCT without a header, and landmarks as 1-based voxel indices.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.space.grid import Grid
from iregzoo.space.points import map_points, read_points
from iregzoo.space.scan import Scan, image_scan, label_scan, read_labels, read_scan

# FreeSurfer's voxel axes, in which the pickled volumes were cropped, run left, inferior, anterior: here in LPS, 1 mm.
FREESURFER_AXES = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])

DIRLAB_IMAGE = re.compile(r"case(\d+)_T\d0.*\.img", re.IGNORECASE)
# Published shape, and mm along x and y, of each case; slices lie 2.5 mm apart.
DIRLAB_CASES = {
    1: ((256, 256, 94), 0.97),
    2: ((256, 256, 112), 1.16),
    3: ((256, 256, 104), 1.15),
    4: ((256, 256, 99), 1.13),
    5: ((256, 256, 106), 1.10),
    6: ((512, 512, 128), 0.97),
    7: ((512, 512, 136), 0.97),
    8: ((512, 512, 128), 0.97),
    9: ((512, 512, 128), 0.97),
    10: ((512, 512, 120), 0.97),
}
DIRLAB_SLICE_MM = 2.5
PADDING_HU = -1500  # what lies below is no CT number but filling around the scanner's circle


def read_image(path: str | Path) -> Scan:
    """An image in any of these formats, or in one that ``read_scan`` reads.

    Raises:
        InputError: as ``read_scan`` does.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        return image_scan(*_unpickle(path, 0), path)
    if _is_dirlab(path):
        return image_scan(*_read_dirlab(path), path)
    return read_scan(path)


def read_label_map(path: str | Path, scan: Scan) -> Scan:
    """The label map of an image, in any of these formats or in one that ``read_labels`` reads.

    Raises:
        InputError: as ``read_labels`` does.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        return label_scan(*_unpickle(path, 1), path, scan)
    return read_labels(path, scan)


def read_landmarks(path: str | Path, scan: Scan) -> Tensor:
    """Landmarks (K, 3) of a scan in LPS mm: voxel indices from 1 up in DIR-Lab's ``.txt``, else as ``read_points``.

    Raises:
        InputError: for a file that holds no landmarks.
    """
    path = Path(path)
    if path.suffix != ".txt":
        return read_points(path)
    try:
        index = torch.from_numpy(np.loadtxt(path, dtype=np.float64, ndmin=2)) - 1
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as landmarks ({error}); get it again") from None
    if index.shape[1:] != (3,) or len(index) == 0:
        raise InputError(f"{path}: is a table of shape {tuple(index.shape)}; expected three voxel indices per line")
    return map_points(scan.grid.affine, index)


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds numpy's arrays; every other name that a pickle asks for is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 writes numpy._core where older ones wrote numpy.core.
        wanted = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if wanted not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[wanted]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


def _reconstruct(kind: type[Any], shape: tuple[int, ...], code: bytes) -> NDArray[Any]:
    """An empty array, to which the pickle then gives shape, type and values."""
    return np.empty(0)


def _from_buffer(buffer: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


_ALLOWED = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "_codecs.encode": _latin1,  # how old pickles spell bytes
}


def _unpickle(path: Path, which: int) -> tuple[NDArray[Any], Grid]:
    """Image (0) or label map (1) of a pickled pair, and its grid."""
    try:
        with path.open("rb") as stream:
            content = _ArraysOnly(stream).load()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except Exception as error:  # a pickle that is damaged or foreign raises many kinds; each means the same here
        raise InputError(f"{path}: was rejected ({error}); a pickle may hold only numpy arrays") from None
    arrays = content if isinstance(content, (tuple, list)) else ()
    if len(arrays) != 2 or not all(isinstance(a, np.ndarray) and a.ndim == 3 and a.dtype.kind in "iuf" for a in arrays):
        raise InputError(f"{path}: does not hold a pair of 3-D arrays of numbers, image and label map")
    return arrays[which], Grid(arrays[which].shape, FREESURFER_AXES)


def _is_dirlab(path: Path) -> bool:
    return DIRLAB_IMAGE.fullmatch(path.name) is not None and not path.with_suffix(".hdr").exists()


def _read_dirlab(path: Path) -> tuple[NDArray[Any], Grid]:
    """A DIR-Lab volume in HU. Its axes are taken to run left, posterior, superior: the files say nothing of them.

    Values may be HU or HU + 1024; air, which fills a large part of every chest CT, tells which.
    """
    found = DIRLAB_IMAGE.fullmatch(path.name)
    case = int(found[1]) if found else 0
    if case not in DIRLAB_CASES:
        raise InputError(f"{path}: DIR-Lab 4DCT has the cases 1 to 10, not {case}")
    shape, spacing = DIRLAB_CASES[case]
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    size, expected = path.stat().st_size, 2 * int(np.prod(shape))
    if size != expected:
        voxels = "×".join(map(str, shape))
        raise InputError(f"{path}: holds {size} bytes, expected {expected}: {voxels} voxels of int16; get it again")
    array = np.fromfile(path, dtype="<i2").reshape(shape, order="F").astype(np.int32)
    inside = array[array > PADDING_HU]
    if inside.size and np.percentile(inside, 5) > -500:
        array = array - 1024
    affine = np.diag([spacing, spacing, DIRLAB_SLICE_MM, 1.0])
    return array, Grid(shape, affine)
