"""``python -m gconv kernels``: compile the kernels and print a table of their registers and instructions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import triton

from gconv.commands.options import TF32, add_names, add_processes, new_parser
from gconv.measure import compiled
from gconv.measure.compiled import TARGETS, Kernel
from gconv.measure.problem import TYPES
from gconv.measure.suites import REAL, SUITES
from gconv.measure.terminal import fail
from gconv.text import columns

DESCRIPTION = """\
Compile gconv's kernels with every tile that the layers of the chosen networks use at batch size 256, and
print a table with a line for each. Needs no GPU.

  python -m gconv kernels --targets sm_90 --suite resnext50_32x4d

Columns:

  registers    registers per thread
  spills       bytes per thread that didn't fit in registers; if not 0, the tile is too large
  shared       bytes of shared memory per program
  ahead        how the main loop loads data ahead: L1 if it copies to shared memory through L1, where the
               shifted loads of a row share cache lines; L2 if the copies bypass L1; empty if it loads to
               registers
  holds        programs that fit on a multiprocessor, given their registers, shared memory and warps
  waves        programs of the first layer that runs the kernel, divided by those that 132 multiprocessors fit
  per output   warp instructions in the main loop per output, or per element of dy in the weight gradient. An
               NVIDIA multiprocessor issues 4 per cycle: at 0.3 per output in 16 bits, issuing them takes a
               third of the time that an H200's memory needs to move the data.
  moved        bytes that the main loop loads and stores per output; reading x and writing y once takes 4 in
               16 bits
  lines        pieces of cache lines touched per 1,024 outputs, each a request to L1 and L2
  operands     reads of shared memory per 1,024 outputs

Exit code: 0, or 1 if a kernel for an NVIDIA GPU spills (with --tuning: always 0).
"""


def main(command: Sequence[str] | None = None, prog: str = "python -m gconv kernels") -> int:
    """Compile the kernels and print a table.

    Args:
        command: the arguments of the command line. Defaults to None, the arguments of this process.
        prog: name of the program, for help and errors.

    Returns:
        The exit code: 0, or 1 if a kernel for an NVIDIA GPU spills.
    """
    arguments = _parser(prog).parse_args(command)
    if triton.knobs.runtime.interpret:
        fail("TRITON_INTERPRET is set, which replaces Triton's compiler with its interpreter: unset it")
    kernels = sorted(_compile(arguments), key=_order)
    if arguments.json:
        rows = [asdict(kernel) for kernel in kernels]
        print(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1))
    else:
        print(table(kernels))
    spilled = [k for k in kernels if k.spills and k.target.startswith("sm_")]
    if spilled and not arguments.tuning:
        print(f"error: {len(spilled)} of {len(kernels)} kernels spill:\n{table(spilled)}", file=sys.stderr)
    return 1 if spilled and not arguments.tuning else 0


def table(kernels: Sequence[Kernel]) -> str:
    """Return a table with a line for each kernel. Equal lines are shown once."""
    head = ("target", "type", "kernel", "tile", "ahead", "registers", "spills", "shared", "holds", "waves")
    counts = ("per output", "moved", "lines", "operands")
    rows = [
        (
            *(k.target, k.dtype, k.name, k.tile, k.ahead),
            *map(_number, (k.registers, k.spills, k.shared, k.holds)),
            *map(_number, (k.waves, k.per_output, k.moved, k.lines, k.operands), (2, 3, 1, 0, 0)),
        )
        for k in kernels
    ]
    return columns([(*head, *counts), *dict.fromkeys(rows)], left=5, rule=True)


def _compile(arguments: argparse.Namespace) -> Iterator[Kernel]:
    """Yield the kernels that the command line asks for, compiled."""
    asked = (arguments.suite, arguments.dtypes, arguments.targets, arguments.form, arguments.tuning)
    layers = compiled.find_jobs(*asked)
    for job, kernel in compiled.compile_all(list(layers), arguments.processes):
        if isinstance(kernel, BaseException):
            raise kernel
        yield replace(kernel, layers=layers[job])


def _order(kernel: Kernel) -> tuple:
    target, dtype = TARGETS.index(kernel.target), list(TYPES).index(kernel.dtype)
    return target, dtype, kernel.name, kernel.tile, kernel.layers


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = new_parser(prog, DESCRIPTION)
    add_names(parser, "--targets", TARGETS, purpose="GPUs to compile for")
    add_names(parser, "--suite", SUITES, REAL, "networks whose grouped layers to compile")
    add_names(parser, "--dtypes", TYPES, ["float16"], f"data types to compile for, {TF32}")
    parser.add_argument(
        "--form",
        choices=list(compiled.FORMS),
        default="plain",
        help="what the kernels compute in addition to the convolution: nothing (plain); bias and ReLU "
        "(epilogue); a residual and SiLU (residual); batch norm and ReLU before it, the moments of the next "
        "batch norm after it, and the gradients of both (norm) (default: plain)",
    )
    parser.add_argument(
        "--tuning",
        action="store_true",
        help="compile all tiles that 'python -m gconv tune' considers; tune itself then skips those that "
        "spill (default: the tiles that gconv's rules choose)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, including the layers that use each kernel"
    )
    add_processes(parser)
    return parser
