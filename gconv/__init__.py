"""Grouped convolutions for PyTorch that drop into other people's networks."""

from gconv.dispatch import backend
from gconv.functional import (
    group_conv1d,
    group_conv2d,
    group_conv3d,
    group_conv_transpose1d,
    group_conv_transpose2d,
)
from gconv.measure.explain import Explanation, explain
from gconv.measure.profile import Profile, profile
from gconv.module import GroupConv1d, GroupConv2d, GroupConv3d, GroupConvTranspose1d, GroupConvTranspose2d
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
    "GroupConv1d",
    "GroupConv2d",
    "GroupConv3d",
    "GroupConvTranspose1d",
    "GroupConvTranspose2d",
    "Profile",
    "backend",
    "conv_between_norms",
    "convert",
    "decompositions",
    "explain",
    "fuse",
    "group_conv1d",
    "group_conv2d",
    "group_conv3d",
    "group_conv_transpose1d",
    "group_conv_transpose2d",
    "profile",
    "revert",
]
