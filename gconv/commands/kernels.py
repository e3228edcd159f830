"""``python -m gconv kernels``: the table of what the compiler makes of the kernels."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context

import triton

from gconv.measure import compiled
from gconv.measure.compiled import TARGETS, Kernel
from gconv.measure.problem import TYPES
from gconv.measure.suites import REAL, SUITES
from gconv.measure.terminal import add_names, count, fail, track
from gconv.text import columns

DESCRIPTION = """\
Compiles every kernel, in every tile that it is launched in for the layers of some suites at batch 256,
and prints what the compiler made of it. Needs no GPU.

  registers    of a thread
  spills       bytes of a thread's that did not fit into registers: 0, or the tile is too large
  shared       bytes of shared memory of a program
  ahead        L1 where loads are on their way before they are needed, through the cache in which the shifted
               loads of a row meet; L2 where they go past it; empty where they go to registers
  holds        programs that a processor holds at once, by its registers, shared memory and warps
  waves        programs for the first layer that the kernel runs, over those that 132 processors hold
  per output   warp instructions in the main loop for each output, or element of dy in the weight gradient.
               A processor of NVIDIA's issues 4 a cycle: on an H200, 0.3 an output in 16 bits take a third of
               the time that the memory takes for it.
  moved        bytes that the main loop loads and stores for each output: 4 for x and y once, in 16 bits
  lines        pieces of cache lines that it touches for each 1,024 outputs: requests to L1 and L2
  operands     reads of shared memory for each 1,024 outputs
"""


def main(command: Sequence[str] | None = None, prog: str = "python -m gconv kernels") -> int:
    """Parse the command line, compile, print; 1 if a kernel for an NVIDIA GPU spills."""
    arguments = _parser(prog).parse_args(command)
    if triton.knobs.runtime.interpret:
        fail("TRITON_INTERPRET is set: the interpreter compiles nothing, unset it")
    kernels = sorted(_compile_all(arguments), key=_order)
    if arguments.json:
        rows = [asdict(kernel) for kernel in kernels]
        print(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1))
    else:
        print(table(kernels))
    spilled = [k for k in kernels if k.spills and k.target.startswith("sm_")]
    if spilled and not arguments.tuning:
        print(f"error: {len(spilled)} of {len(kernels)} kernels spill:\n{table(spilled)}", file=sys.stderr)
    return 1 if spilled and not arguments.tuning else 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_names(parser, "--targets", TARGETS)
    add_names(parser, "--suite", SUITES, REAL)
    add_names(parser, "--dtypes", TYPES, ["float16"], " (tf32: float32 as F.conv2d multiplies it by default)")
    parser.add_argument(
        "--form",
        choices=list(compiled.FORMS),
        default="plain",
        help="what runs in the kernels beside the convolution: nothing (plain, the default); bias and ReLU "
        "(epilogue), a residual and SiLU (residual), batch norm and ReLU before it, the moments of the next "
        "after it, and the gradients of both (norm)",
    )
    parser.add_argument(
        "--tuning",
        action="store_true",
        help="in all tiles that tuning would compile, which drops those that spill; default: the rules'",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, with the layers that each kernel runs"
    )
    parser.add_argument("--processes", type=count, default=os.cpu_count(), help="default: one for each core")
    return parser


def _compile_all(arguments: argparse.Namespace) -> Iterator[Kernel]:
    """All that was asked for, on several cores."""
    asked = (arguments.suite, arguments.dtypes, arguments.targets, arguments.form, arguments.tuning)
    jobs = compiled.find_jobs(*asked)
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        running = [pool.submit(compiled.compile_job, job, layers) for job, layers in jobs.items()]
        for future in track(as_completed(running), "compiling", len(running)):
            yield future.result()


def _order(kernel: Kernel) -> tuple:
    return (
        TARGETS.index(kernel.target),
        list(TYPES).index(kernel.dtype),
        kernel.name,
        kernel.tile,
        kernel.layers,
    )


def table(kernels: list[Kernel]) -> str:
    """Return a line for each kernel, columns as wide as they need."""
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


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"
