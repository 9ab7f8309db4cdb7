"""Packed voxels come back by Python's gzip, in one member, whatever their number."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest

from iregzoo.space.packing import PIECE, gzip_floats


@pytest.mark.parametrize("size", [0, 1, 1000, PIECE, 2 * PIECE + 17])
@pytest.mark.parametrize("threads", [1, 3])
def test_packed_bytes_come_back(tmp_path: Path, size: int, threads: int) -> None:
    data = np.random.default_rng(0).normal(size=size // 4 + 1).astype(np.float32).tobytes()[:size]
    source, target = tmp_path / "plain", tmp_path / "packed.gz"
    source.write_bytes(data)
    gzip_floats(source, target, threads=threads)
    assert gzip.decompress(target.read_bytes()) == data
    member = zlib.decompressobj(16 + zlib.MAX_WBITS)  # one member and nothing after it, for readers that stop there
    assert member.decompress(target.read_bytes()) == data
    assert member.eof
    assert not member.unused_data


def test_an_empty_background_takes_no_room(tmp_path: Path) -> None:
    source, target = tmp_path / "plain", tmp_path / "packed.gz"
    source.write_bytes(np.zeros(1_000_000, np.float32).tobytes())
    gzip_floats(source, target, threads=2)
    assert target.stat().st_size < 0.02 * source.stat().st_size
