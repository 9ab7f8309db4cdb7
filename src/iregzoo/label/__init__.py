"""MONAI Label: an atlas's labels for a patient's scan, in 3D Slicer, OHIF, or through REST."""
