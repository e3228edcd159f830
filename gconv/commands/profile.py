"""``python -m gconv profile``: time each convolution of a network, as a table or a plot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gconv.commands.options import add_batch, add_input, load_function, new_parser
from gconv.dispatch import this_device
from gconv.measure.figures import check_path
from gconv.measure.problem import TYPES
from gconv.measure.profile import Profile, profile
from gconv.measure.terminal import fail, first_line

DESCRIPTION = """\
Run a network on random numbers and time each of its convolutions separately, on PyTorch and on gconv, in the
network's layout and in channels_last. The last table estimates the time of the complete network after
gconv.convert(model).

  python -m gconv profile torchvision.models:resnext50_32x4d --batch 32 --type bfloat16 --train
  python -m gconv profile torchvision.models:resnext50_32x4d --plot layers.svg --roofline roofline.svg
  python -m gconv profile torchaudio.models:wav2vec2_base --batch 8 --input 16000
"""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of dimensions


def main(command: Sequence[str] | None = None, prog: str = "python -m gconv profile") -> int:
    """Profile a network.

    Args:
        command: the command line. Defaults to None, the command line of this process.
        prog: the program's name in help and errors.

    Returns:
        0. Problems exit with code 2 and an error in one line.
    """
    arguments = _parser(prog).parse_args(command)
    make, dtype = load_function(arguments.model), TYPES[arguments.type][0]
    device = this_device()
    try:
        for path in filter(None, (arguments.plot, arguments.roofline)):
            check_path(path)  # before minutes of profiling
    except (ImportError, OSError, ValueError) as error:
        fail(error)
    try:
        model = make()
        if not isinstance(model, nn.Module):
            fail(f"{arguments.model} must return an nn.Module, got {type(model).__name__}")
        model, x = _prepare(model, arguments, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            result = profile(model, x)
    except Exception as error:  # a model may raise anything
        size = (arguments.batch, *arguments.input)
        fail(f"can't run {arguments.model} on an input of size {size}: {first_line(error)}")
    print(result)
    _plot(result, arguments.plot, "time", arguments.model)
    _plot(result, arguments.roofline, "roofline", arguments.model)
    return 0


def _plot(result: Profile, path: Path | None, kind: Literal["time", "roofline"], title: str) -> None:
    """Draw a plot and print its path, if the command line names one."""
    if path is None:
        return
    try:
        print(f"plot: {result.plot(path, kind, title=title)}")
    except (OSError, ValueError) as error:
        fail(error)


def _prepare(
    model: nn.Module, arguments: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, Tensor]:
    """Return the network and a random input, on the device and in the requested layout."""
    model = model.train(arguments.train).to(device)
    x = torch.randn(arguments.batch, *arguments.input, device=device)
    if arguments.channels_last:
        if x.ndim not in _CHANNELS_LAST:
            fail(f"--channels-last needs --input C H W or C D H W, got {' '.join(map(str, arguments.input))}")
        layout = _CHANNELS_LAST[x.ndim]
        # PyTorch's annotations of Module.to leave out memory_format.
        model, x = model.to(memory_format=layout), x.to(memory_format=layout)  # type: ignore[call-overload]
    return model, x


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = new_parser(prog, DESCRIPTION)
    parser.add_argument(
        "model",
        metavar="MODULE:FUNCTION",
        help="function that returns the network, such as timm.models:regnety_032",
    )
    add_batch(parser, 32, "batch size")
    add_input(parser)
    parser.add_argument(
        "--type", choices=["float32", "float16", "bfloat16"], default="float32", metavar="NAME",
        help="data type: float32, float16 or bfloat16; the 16-bit types use autocast (default: float32)",
    )  # fmt: skip
    parser.add_argument(
        "--train", action="store_true", help="profile a training step (default: a forward pass)"
    )
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="run in channels_last, or channels_last_3d for volumes (default: contiguous)",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE",
        help="plot to write (.png, .svg or .pdf): the time of each convolution and its memory floor",
    )  # fmt: skip
    parser.add_argument(
        "--roofline", type=Path, metavar="FILE",
        help="roofline to write: the speed of each convolution and whether memory or arithmetic limits it",
    )  # fmt: skip
    return parser
