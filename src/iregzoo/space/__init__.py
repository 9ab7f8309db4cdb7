"""Scanner space: reading scans, affine start, network grid to fixed image and back, ITK transforms."""
