"""iregzoo: deformable 3-D medical image registration as MONAI bundles on one common library."""

__version__ = "0.1.0"
