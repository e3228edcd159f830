"""``python -m gconv``: run the command given on the command line, or check this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from gconv import dispatch
from gconv.measure.terminal import fail

COMMANDS = {
    "tune": "measure which tiles of the kernels are fastest on this GPU, for auto to use",
    "profile": "time each convolution of your network, and estimate what gconv would gain",
    "kernels": "compile the kernels for any GPU, and print their registers, spills and instructions",
    "hub": "write gconv as a kernel for the Hugging Face hub",
}


def main(command: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        command: the arguments. Defaults to None, the arguments of this process.

    Returns:
        The exit code.
    """
    command = sys.argv[1:] if command is None else list(command)
    try:
        return _run(command)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `python -m gconv | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(command: list[str]) -> int:
    prog, (name, *options) = "python -m gconv", command or [""]
    if name not in COMMANDS:
        return import_module(".check", __spec__.parent).main(command, prog, COMMANDS)
    if name == "kernels" and not dispatch.TRITON_INSTALLED:
        fail("kernels needs Triton, which isn't installed: pip install triton")
    return import_module(f".{name}", __spec__.parent).main(options, f"{prog} {name}")
