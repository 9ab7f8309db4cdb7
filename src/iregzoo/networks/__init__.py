"""Registration networks, one file a method."""

from iregzoo.networks.ad_regnet import ADRegNet
from iregzoo.networks.iirp import IIRPNet
from iregzoo.networks.ipear import IPEARNet
from iregzoo.networks.pan import PANNet
from iregzoo.networks.sm_gicnet import SMGICNet

__all__ = ["ADRegNet", "IIRPNet", "IPEARNet", "PANNet", "SMGICNet"]
