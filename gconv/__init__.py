"""Grouped 2-d convolution for PyTorch that drops into other people's networks."""

from gconv.dispatch import backend
from gconv.functional import group_conv2d
from gconv.measure.explain import Explanation, explain
from gconv.measure.profile import Profile, profile
from gconv.module import GroupConv2d
from gconv.networks.conv_between_norms import conv_between_norms
from gconv.networks.convert import convert, revert
from gconv.networks.fuse import fuse
from gconv.networks.reports import ConversionReport, FusionReport
from gconv.ops import decompositions

__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "Explanation",
    "FusionReport",
    "GroupConv2d",
    "Profile",
    "backend",
    "conv_between_norms",
    "convert",
    "decompositions",
    "explain",
    "fuse",
    "group_conv2d",
    "profile",
    "revert",
]
