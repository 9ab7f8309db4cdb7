"""Registration networks, one file a method."""

from iregzoo.networks.iirp import IIRPNet

__all__ = ["IIRPNet"]
