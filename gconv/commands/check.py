"""``python -m gconv``: check this machine and print what was found."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from gconv.measure.check import check
from gconv.measure.terminal import count

DESCRIPTION = """\
Show what gconv does on this machine:

  the environment, and whose convolution `auto` takes here
  whether results are correct: every pass and type of the kernels, compared with float64
  how fast the kernels are: ResNeXt-50's grouped layers, compared with cuDNN and the speed of the memory

Ends with a verdict: what gconv.convert(model) would gain here. Exits with 1 if a result is wrong or a kernel
fails; please report that, with the output of --json.
"""


def main(command: Sequence[str], prog: str, commands: dict[str, str]) -> int:
    """Check the machine; 1 if a result is wrong.

    Args:
        command: the arguments.
        prog: name of the program, for help.
        commands: the other commands and what they do, for help and to say where their options go.
    """
    parser = _parser(prog, commands)
    arguments = parser.parse_args(command)
    if arguments.command is not None:
        parser.error(f"options of {arguments.command} go behind it: {prog} {arguments.command} ...")
    found = check(arguments.batch, arguments.processes)
    print(json.dumps(found.as_dict(), indent=1, allow_nan=False) if arguments.json else found)
    return 1 if found.wrong else 0


def _parser(prog: str, commands: dict[str, str]) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:9}{what}" for name, what in commands.items())
    parser = argparse.ArgumentParser(
        prog,
        usage="%(prog)s [options]\n       %(prog)s COMMAND [options]",
        description=DESCRIPTION,
        epilog=f"commands (--help tells more of each):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=list(commands), metavar="COMMAND", help="see below")
    parser.add_argument(
        "--batch", type=count, default=256, metavar="N", help="batch size of the timed layers; default: 256"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for a report")
    parser.add_argument(
        "--processes", type=count, default=os.cpu_count(), metavar="N",
        help="compile kernels in N processes; default: one for each core",
    )  # fmt: skip
    return parser
