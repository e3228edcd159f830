"""``python -m gconv profile``: time each convolution of a network that the command line names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gconv.commands.options import add_batch, add_input, load_function, new_parser
from gconv.dispatch import this_device
from gconv.measure.problem import TYPES
from gconv.measure.profile import profile
from gconv.measure.terminal import fail, first_line

DESCRIPTION = """\
Run a network on random numbers and time each of its convolutions separately: PyTorch's and gconv's, in the
layout in which the network runs and in channels_last. The last table estimates the time of the whole network
after gconv.convert(model).

  python -m gconv profile torchvision.models:resnext50_32x4d --batch 32 --type bfloat16 --train
  python -m gconv profile torchaudio.models:wav2vec2_base --batch 8 --input 16000
"""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of dimensions


def main(command: Sequence[str] | None = None, prog: str = "python -m gconv profile") -> int:
    """Profile a network.

    Args:
        command: the command line. Defaults to None, that of this process.
        prog: name of the program, for help and errors.

    Returns:
        0; whatever goes wrong exits with 2 and an error in one line.
    """
    arguments = _parser(prog).parse_args(command)
    make, dtype = load_function(arguments.model), TYPES[arguments.type][0]
    device = this_device()
    try:
        model = make()
        if not isinstance(model, nn.Module):
            fail(f"{arguments.model} must return an nn.Module, got {type(model).__name__}")
        model, x = _prepare(model, arguments, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            print(profile(model, x))
    except Exception as error:  # a model may raise anything
        size = (arguments.batch, *arguments.input)
        fail(f"{arguments.model} does not run on an input of {size}: {first_line(error)}")
    return 0


def _prepare(
    model: nn.Module, arguments: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, Tensor]:
    """Return the network and a random input, on the device and in the layout to run in."""
    model = model.train(arguments.train).to(device)
    x = torch.randn(arguments.batch, *arguments.input, device=device)
    if arguments.channels_last:
        if x.ndim not in _CHANNELS_LAST:
            fail(f"--channels-last needs images or volumes, got --input of {len(arguments.input)} sizes")
        layout = _CHANNELS_LAST[x.ndim]
        # PyTorch's annotations of Module.to leave out memory_format.
        model, x = model.to(memory_format=layout), x.to(memory_format=layout)  # type: ignore[call-overload]
    return model, x


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = new_parser(prog, DESCRIPTION)
    parser.add_argument(
        "model",
        metavar="MODULE:FUNCTION",
        help="a function that returns the network, such as timm.models:regnety_032",
    )
    add_batch(parser, 32, "batch size")
    add_input(parser)
    parser.add_argument(
        "--type", choices=["float32", "float16", "bfloat16"], default="float32", metavar="NAME",
        help="float32, float16 or bfloat16; the latter two by autocast; default: float32",
    )  # fmt: skip
    parser.add_argument(
        "--train", action="store_true", help="profile a training step; default: a forward pass"
    )
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="first move network and input to channels_last, or channels_last_3d; default: contiguous",
    )
    return parser
