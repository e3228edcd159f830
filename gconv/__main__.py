"""``python -m gconv``: what gconv does on this machine; its other commands are named in ``COMMANDS``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import torch

from gconv import check
from gconv.problem import TYPES
from gconv.profile import profile
from gconv.terminal import count, fail, load_function

COMMANDS = {
    "tune": "measure which tiles of the kernels are fastest on the GPU that is here; auto then goes by it",
    "profile": "list the convolutions of a network of yours, what each takes, and what gconv would gain",
    "kernels": "compile the kernels and print registers, spills and instructions; needs no GPU",
}
EPILOG = "commands (--help tells more of each):\n" + "\n".join(f"  {n:9}{h}" for n, h in COMMANDS.items())
PROFILE = """\
Runs a network on random images and times each of its convolutions by itself: PyTorch's and gconv's, as the
network runs and in channels_last. Ends in what gconv.convert(model) would make of the whole.

  python -m gconv profile torchvision.models:resnext50_32x4d --batch 32 --type bfloat16 --train
"""
RAW = argparse.RawDescriptionHelpFormatter


def main(command: Sequence[str] | None = None) -> int:
    """Run the command that the command line names; the check of this machine if it names none."""
    command = sys.argv[1:] if command is None else list(command)
    if command and command[0] in COMMANDS:
        name, *rest = command
        prog = f"python -m gconv {name}"
        if name == "profile":
            return profile_model(rest, prog)
        return import_module({"tune": "gconv.tune", "kernels": "gconv.kernels.__main__"}[name]).main(
            rest, prog
        )
    parser = argparse.ArgumentParser(
        "python -m gconv", description=check.DESCRIPTION, epilog=EPILOG, formatter_class=RAW
    )
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), metavar="COMMAND", help="see below")
    check.add_options(parser)
    return check.run(parser.parse_args(command))


def profile_model(command: Sequence[str], prog: str) -> int:
    """Profile a network that the command line names."""
    parser = argparse.ArgumentParser(prog, description=PROFILE, formatter_class=RAW)
    parser.add_argument(
        "model", metavar="MODULE:FUNCTION", help="what makes the network, such as timm.models:regnety_032"
    )
    parser.add_argument("--batch", type=count, default=32, metavar="N", help="images; default: 32")
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
        help="the network as it is in channels_last; default: contiguous",
    )
    arguments = parser.parse_args(command)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = load_function(arguments.model)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    x = torch.randn(arguments.batch, *arguments.image, device=device).to(memory_format=layout)
    dtype = TYPES[arguments.type][0]
    try:
        model = make().train(arguments.train).to(device, memory_format=layout)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            print(profile(model, x))
    except Exception as error:  # whatever a stranger's model raises
        told = str(error).partition("\n")[0]
        fail(f"{arguments.model} does not run on images of {tuple(x.shape)}: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
