"""``python -m gconv kernels``: compile the kernels, and print a table of registers and instructions."""

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
Compile every kernel, in every tile that the layers of some suites use at batch 256, and print a table of what
the compiler made of it. Needs no GPU. Exit code 1 means that a kernel for an NVIDIA GPU spills.

  registers    registers of a thread
  spills       bytes of a thread's that did not fit into registers; if not 0, the tile is too large
  shared       bytes of shared memory of a program
  ahead        L1 if the kernel copies what it needs later to shared memory through L1, the cache in which the
               shifted loads of a row meet; L2 if it bypasses L1; empty if loads go to registers
  holds        programs that a processor holds at once, given its registers, shared memory and warps
  waves        programs of the first layer that the kernel runs, over those that 132 processors hold
  per output   warp instructions in the main loop per output, or per element of dy in the weight gradient.
               A processor of NVIDIA's issues 4 per cycle: on an H200, 0.3 per output in 16 bits take a third
               of the time that the memory takes for it.
  moved        bytes that the main loop loads and stores per output: 4 for x and y once, in 16 bits
  lines        pieces of cache lines that it touches per 1,024 outputs, each a request to L1 and L2
  operands     reads of shared memory per 1,024 outputs

  python -m gconv kernels --targets sm_90 --suite resnext50_32x4d
"""


def main(command: Sequence[str] | None = None, prog: str = "python -m gconv kernels") -> int:
    """Compile the kernels and print a table.

    Args:
        command: the command line. Defaults to None, that of this process.
        prog: name of the program, for help and errors.

    Returns:
        0, or 1 if a kernel for an NVIDIA GPU spills.
    """
    arguments = _parser(prog).parse_args(command)
    if triton.knobs.runtime.interpret:
        fail("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
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
    """Return a table with a line for each kernel; equal lines are shown once."""
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
    """Compile what the command line asks for."""
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
    add_names(parser, "--suite", SUITES, REAL, "networks whose grouped layers to compile for")
    add_names(parser, "--dtypes", TYPES, ["float16"], f"types to compile for {TF32}")
    parser.add_argument(
        "--form",
        choices=list(compiled.FORMS),
        default="plain",
        help="what the kernels compute besides the convolution: nothing (plain, the default); bias and ReLU "
        "(epilogue); a residual and SiLU (residual); batch norm and ReLU before it, the moments of the next "
        "norm after it, and the gradients of both (norm)",
    )
    parser.add_argument(
        "--tuning",
        action="store_true",
        help="compile all tiles that tune would measure, which leaves out those that spill; default: the "
        "tiles that the rules choose",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, with the layers that each kernel runs"
    )
    add_processes(parser)
    return parser
