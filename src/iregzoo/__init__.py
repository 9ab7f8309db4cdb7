"""iregzoo: deformable 3-D medical image registration as MONAI bundles on one common library."""

import os

__version__ = "0.1.0"

# A network's volumes are given back and taken anew hundreds of times. In pages of 2 MB (on Linux; PyTorch reads this
# before its first large tensor) a CPU loses far less of its time over that, at the same peak of memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Threads meet after each of a network's many short steps. Where other programs keep a processor busy, GNU's OpenMP has
# those that arrive first spin there for milliseconds, many times as long as a step takes; so they sleep within one.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
