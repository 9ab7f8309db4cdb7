"""Registration networks, one file a method."""

from iregzoo.networks.iirp import IIRPNet
from iregzoo.networks.ipear import IPEARNet

__all__ = ["IIRPNet", "IPEARNet"]
