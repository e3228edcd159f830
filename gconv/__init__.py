"""Grouped 2-d convolution for PyTorch that drops into other people's networks."""

from gconv.between import conv_between_norms
from gconv.convert import ConversionReport, convert, revert
from gconv.dispatch import backend
from gconv.explain import Explanation, explain
from gconv.functional import group_conv2d
from gconv.fuse import fuse
from gconv.graph import FusionReport
from gconv.module import GroupConv2d
from gconv.ops import decompositions
from gconv.profile import Profile, profile

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
