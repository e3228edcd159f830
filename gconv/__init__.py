"""Fast grouped convolutions for PyTorch, as drop-in replacements for its functions and layers.

Three ways to use them:

- functions, such as ``group_conv2d``, with the arguments of ``F.conv2d``
- layers, such as ``GroupConv2d``, which are subclasses of ``nn.Conv2d``
- whole networks: ``convert`` replaces the layers of a model in place, ``fuse`` copies it for inference

``explain`` and ``profile`` show which backend runs a layer or a network, and what it costs. ``backend``
selects the backend.
"""

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
