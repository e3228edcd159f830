"""``python -m gconv``: check this machine and print the result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence

from gconv.commands.options import add_batch, add_processes, new_parser
from gconv.measure.check import check

DESCRIPTION = """\
Check gconv on this machine, and show:

  the environment, and whether gconv.convert(model) would use gconv's kernels or PyTorch's own convolution
  whether results are right: every pass and type of the kernels, compared with float64
  how fast the kernels are: ResNeXt-50's grouped layers, compared with cuDNN and with the speed of the memory

The last line says what gconv.convert(model) would gain here. Exit code 1 means that a result is wrong or that
a kernel failed: please report it with the output of --json.
"""


def main(command: Sequence[str], prog: str, commands: Mapping[str, str]) -> int:
    """Check the machine.

    Args:
        command: the command line.
        prog: name of the program, for help and errors.
        commands: the other commands and what they do, for help and errors.

    Returns:
        0, or 1 if a result is wrong or a kernel failed.
    """
    parser = _parser(prog, commands)
    arguments = parser.parse_args(command)
    if (name := arguments.command) is not None:  # after an option, or it would have been run
        parser.error(f"options of {name} go behind it: {prog} {name} ...")
    report = check(arguments.batch, arguments.processes)
    print(json.dumps(report.as_dict(), indent=1, allow_nan=False) if arguments.json else report)
    return 1 if report.wrong else 0


def _parser(prog: str, commands: Mapping[str, str]) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:9}{purpose}" for name, purpose in commands.items())
    parser = new_parser(
        prog,
        DESCRIPTION,
        usage="%(prog)s [options]\n       %(prog)s COMMAND [options]",
        epilog=f"commands; run '{prog} COMMAND --help' for the options of one:\n{listed}",
    )
    parser.add_argument("command", nargs="?", choices=list(commands), metavar="COMMAND", help="see below")
    add_batch(parser, 256, "batch size of the timed layers")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for a report")
    add_processes(parser)
    return parser
