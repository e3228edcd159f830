"""``python -m gconv profile``: time each convolution of a network that the command line names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from gconv.dispatch import this_device
from gconv.measure.problem import TYPES
from gconv.measure.profile import profile
from gconv.measure.terminal import count, fail, first_line, load_function

DESCRIPTION = """\
Runs a network on random images and times each of its convolutions by itself: PyTorch's and gconv's, as the
network runs and in channels_last. Ends with an estimate of the whole network after gconv.convert(model).

  python -m gconv profile torchvision.models:resnext50_32x4d --batch 32 --type bfloat16 --train
"""


def main(command: Sequence[str] | None = None, prog: str = "python -m gconv profile") -> int:
    """Profile a network that the command line names."""
    parser = argparse.ArgumentParser(
        prog, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", metavar="MODULE:FUNCTION", help="returns the network, such as timm.models:regnety_032"
    )
    parser.add_argument("--batch", type=count, default=32, metavar="N", help="batch size; default: 32")
    parser.add_argument(
        "--image", type=count, nargs=3, default=(3, 224, 224), metavar=("C", "H", "W"),
        help="size of an image; default: 3 224 224",
    )  # fmt: skip
    parser.add_argument(
        "--type", choices=["float32", "float16", "bfloat16"], default="float32", metavar="NAME",
        help="float32 (default), or float16 or bfloat16 by autocast",
    )  # fmt: skip
    parser.add_argument("--train", action="store_true", help="a training step; default: a forward pass")
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="put network and images into channels_last first; default: contiguous",
    )
    arguments = parser.parse_args(command)
    make, dtype = load_function(arguments.model), TYPES[arguments.type][0]
    device, last = this_device(), torch.channels_last
    try:
        model = make()
        if not isinstance(model, nn.Module):
            fail(f"{arguments.model} must return an nn.Module, got {type(model).__name__}")
        model = model.train(arguments.train).to(device)
        x = torch.randn(arguments.batch, *arguments.image, device=device)
        if arguments.channels_last:
            model, x = model.to(memory_format=last), x.to(memory_format=last)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            print(profile(model, x))
    except Exception as error:  # whatever a stranger's model raises
        size = (arguments.batch, *arguments.image)
        fail(f"{arguments.model} does not run on images of {size}: {first_line(error)}")
    return 0
