"""``python -m gconv``: check gconv on this machine, or run one of the other commands, ``COMMANDS``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import torch
from torch import nn

from gconv import check, dispatch
from gconv.environment import this_device
from gconv.problem import TYPES
from gconv.profile import profile
from gconv.terminal import count, fail, first_line, load_function

COMMANDS = {
    "tune": "measure which tiles of the kernels are fastest on this GPU; auto then uses the results",
    "profile": "time each convolution of your network, and estimate what gconv would gain",
    "kernels": "compile the kernels and print registers, spills and instructions; needs no GPU",
}
EPILOG = "commands (--help tells more of each):\n" + "\n".join(f"  {n:9}{h}" for n, h in COMMANDS.items())
PROFILE = """\
Runs a network on random images and times each of its convolutions by itself: PyTorch's and gconv's, as the
network runs and in channels_last. Ends with an estimate of the whole network after gconv.convert(model).

  python -m gconv profile torchvision.models:resnext50_32x4d --batch 32 --type bfloat16 --train
"""
RAW = argparse.RawDescriptionHelpFormatter


def main(command: Sequence[str] | None = None) -> int:
    """Run the command that the command line names; the check of this machine if it names none."""
    command = sys.argv[1:] if command is None else list(command)
    try:
        return _run(command)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(command: list[str]) -> int:
    if command and command[0] in COMMANDS:
        name, *rest = command
        prog = f"python -m gconv {name}"
        if name == "profile":
            return profile_model(rest, prog)
        if name == "kernels" and not dispatch.TRITON_INSTALLED:
            fail("Triton is not installed; pip install triton")
        module = import_module({"tune": "gconv.tune", "kernels": "gconv.kernels.__main__"}[name])
        return module.main(rest, prog)
    parser = argparse.ArgumentParser(
        "python -m gconv", description=check.DESCRIPTION, epilog=EPILOG, formatter_class=RAW
    )
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), metavar="COMMAND", help="see below")
    check.add_options(parser)
    arguments = parser.parse_args(command)
    if arguments.command is not None:
        parser.error(f"options of {arguments.command} go behind it: python -m gconv {arguments.command} ...")
    return check.run(arguments)


def profile_model(command: Sequence[str], prog: str) -> int:
    """Profile a network that the command line names."""
    parser = argparse.ArgumentParser(prog, description=PROFILE, formatter_class=RAW)
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


if __name__ == "__main__":
    sys.exit(main())
