"""``python -m gconv``: check this machine and print the result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence

from gconv.commands.options import add_batch, add_processes, new_parser
from gconv.measure.check import check

DESCRIPTION = """\
Check gconv on this machine. The report shows:

  - versions and hardware, and whether gconv.convert(model) would use gconv's kernels or PyTorch's convolution
  - whether the results are right, in every pass and type, compared with float64
  - on a GPU, the times of ResNeXt-50's grouped layers, compared with cuDNN and with the time to move the data

The last line shows what gconv.convert(model) would gain on this machine.

Exit code: 0 if all results are right, 1 if a result is wrong or a kernel failed (please report it with the
output of --json).
"""


def main(command: Sequence[str], prog: str, commands: Mapping[str, str]) -> int:
    """Check the machine and print the report.

    Args:
        command: the arguments of the command line.
        prog: name of the program, for help and errors.
        commands: the other commands and their descriptions, for help and errors.

    Returns:
        The exit code: 0, or 1 if a result is wrong or a kernel failed.
    """
    parser = _parser(prog, commands)
    arguments = parser.parse_args(command)
    if (name := arguments.command) is not None:  # it came after an option, otherwise it would have run
        parser.error(f"put the options after the command: {prog} {name} ...")
    report = check(arguments.batch, arguments.processes)
    print(json.dumps(report.as_dict(), indent=1, allow_nan=False) if arguments.json else report)
    return 1 if report.wrong else 0


def _parser(prog: str, commands: Mapping[str, str]) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:9}{purpose}" for name, purpose in commands.items())
    parser = new_parser(
        prog,
        DESCRIPTION,
        usage="%(prog)s [options]\n       %(prog)s COMMAND [options]",
        epilog=f"commands ('{prog} COMMAND --help' shows their options):\n{listed}",
    )
    parser.add_argument(
        "command", nargs="?", choices=list(commands), metavar="COMMAND", help="run another command, see below"
    )
    add_batch(parser, 256, "batch size of the timed layers")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, for a bug report")
    add_processes(parser)
    return parser
