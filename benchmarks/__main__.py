"""``python -m benchmarks``: measure layers and networks, and report the results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks import counters, first, layers, networks
from benchmarks.peers import RUNNERS, Contender, applies, contenders
from benchmarks.store import RESULTS_FOLDER, Store, TableRow, is_wrong
from benchmarks.summary import spread, summary_table
from gconv.commands.options import TF32, add_batch, add_names, count, minutes, new_parser
from gconv.dispatch import this_device, why_not_triton
from gconv.geometry import PASSES
from gconv.kernels.choice import slug
from gconv.measure.environment import environment
from gconv.measure.problem import TYPES, Problem
from gconv.measure.suites import REAL, SUITES
from gconv.measure.terminal import STOPPED, fail, run_resumable, track
from gconv.measure.timing import copy_speed
from gconv.text import columns

DESCRIPTION = """\
Measure gconv and compare it with PyTorch's convolution (cuDNN), torch.compile and the memory floor, the time
that a copy takes to move the same bytes.

  python -m benchmarks run --suite resnext50_32x4d --dtypes bfloat16 --batch 256
  python -m benchmarks networks --batch 64 256
  python -m benchmarks report benchmarks/results/nvidia-h200

Each measurement is saved as soon as it is made, so you can stop a command at any time, and run it again to
continue where it stopped. Wrong results get no time.

Exit code: 0 if everything was measured, 1 if a result was wrong, 3 if --minutes ran out first.
"""
RUN = """\
Time single passes of the grouped layers of well-known networks, on the device and on the host, and measure
the memory floor, the peak memory and the error against float64.

  python -m benchmarks run --suite resnext50_32x4d --dtypes bfloat16 --batch 256
"""
NETWORKS = """\
Time inference and training steps of networks in bfloat16 autocast: with gconv, with gconv's fused batch
norms, and with F.conv2d in both layouts.

  python -m benchmarks networks --network resnext50_32x4d --tasks training --modes graphed --batch 256
"""
ACCURACY = """\
Train the network of the resnext demo with and without fusing batch norms into the convolutions, with several
seeds each, and compare the accuracies: fusion should make no difference.

  python -m benchmarks accuracy --seeds 3 --epochs 6
"""
PIECES = """\
Measure how fast a GPU copies and reads images if each program moves only 32 to 256 bytes of a pixel's
channels. This limits the speed of the kernels, which move memory in such pieces.
"""
COUNTERS = """\
Count what the hardware does in gconv's kernels, such as memory traffic, cache hits and bank conflicts, with
Nsight Compute (ncu).

  python -m benchmarks counters --suite resnext50_32x4d --passes forward

Exit code: 0 if everything was counted, 1 if Nsight Compute failed, 3 if --minutes ran out first.
"""
REPORT = """\
Write tables (report.md) and plots (*.png) from the results in a folder.

  python -m benchmarks report benchmarks/results/nvidia-h200
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parsed = _parser().parse_args(arguments)
    return run_resumable(lambda: parsed.command(parsed))


def run_layers(parsed: argparse.Namespace) -> int:
    """Measure layers, and return the exit code: 1 if a result was wrong."""
    suites = {name: SUITES[name] for name in parsed.suite}
    cases = list(layers.cases(suites, parsed.batch, parsed.dtypes, parsed.passes))
    device, store = this_device(), _store(parsed)
    runners = contenders(parsed.contenders or _able(cases[0][1], device))
    bandwidth = store.environment["copy_gb_per_s"] * 1e9
    done = store.settled("layers", layers.LayerRow, (*layers.LAYER_CASE, "runner", "layout"))

    def left(name: tuple, problem: Problem) -> list[Contender]:
        able = [who for who in runners if applies(who, problem, device)]
        return [who for who in able if (*name, who.runner, who.layout) not in done]

    def measure(case: tuple) -> list[TableRow]:
        return [asdict(row) for row in layers.measure(*case, left(*case), device, bandwidth)]

    todo = [case for case in cases if left(*case)]
    code = _measure_all(todo, len(cases), measure, store, "layers", parsed.minutes)
    print(columns(summary_table(store.read("layers", layers.LayerRow)), left=4, rule=True))
    return code


def run_networks(parsed: argparse.Namespace) -> int:
    """Measure networks, and return the exit code: 1 if a result was wrong."""
    device = this_device()
    modes = [mode for mode in parsed.modes if device.type == "cuda" or not mode.endswith("graphed")]
    if modes != parsed.modes:
        print("skipping the modes with CUDA graphs, because this machine has no GPU", file=sys.stderr)
    if not modes:
        fail("all chosen --modes need a GPU: choose from eager, compiled")
    store = _store(parsed)
    cases = list(networks.cases(parsed.network, parsed.tasks, modes, parsed.batch, parsed.image))
    done = store.settled("networks", networks.NetworkRow, networks.NETWORK_CASE)

    def measure(case: tuple) -> list[TableRow]:
        return [asdict(networks.measure(*case, device))]

    todo = [case for case in cases if (*asdict(case[0]).values(), *case[1:]) not in done]
    code = _measure_all(todo, len(cases), measure, store, "networks", parsed.minutes)
    print(columns(_networks_table(store.read("networks", networks.NetworkRow)), left=5, rule=True))
    return code


def _networks_table(rows: Iterable[TableRow]) -> list[tuple[str, ...]]:
    table = [(*networks.NETWORK_CASE, "images/s", "grouped", "problem")]
    for row in rows:
        speed = "" if row["images_per_second"] is None else f"{row['images_per_second']:,.0f} {spread(row)}"
        share = "" if row["grouped_share"] is None else f"{row['grouped_share']:.0%}"
        case = (str(row[name]) for name in networks.NETWORK_CASE)
        table.append((*case, speed, share, row["problem"] or ""))
    return table


def run_accuracy(parsed: argparse.Namespace) -> int:
    """Train networks and print their accuracy."""
    try:
        from benchmarks import accuracy
    except ModuleNotFoundError as error:
        fail(f"training needs {error.name}: pip install '.[train]'")
    device, store = this_device(), _store(parsed)
    cases = list(accuracy.cases(parsed.seeds, parsed.epochs, parsed.backend))
    done = store.settled("accuracy", accuracy.AccuracyRow, accuracy.ACCURACY_CASE)

    def measure(case: tuple) -> list[TableRow]:
        return [asdict(accuracy.measure(*case, device))]

    todo = [case for case in cases if case not in done]
    code = _measure_all(todo, len(cases), measure, store, "accuracy", parsed.minutes)
    rows = store.read("accuracy", accuracy.AccuracyRow)
    print(columns(accuracy.accuracy_table(rows), left=4, rule=True))
    return code


def run_pieces(parsed: argparse.Namespace) -> int:
    """Measure how fast the memory moves pieces of pixels."""
    from benchmarks import pieces  # imports Triton

    device = this_device()
    if device.type != "cuda":
        fail("pieces needs a GPU, but this machine has none")
    store = _store(parsed)
    rows = [asdict(row) for row in pieces.measure(device)]
    store.append("pieces", rows)
    table = [tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)]
    print(columns(table, left=1, rule=True))
    return 0


def run_counters(parsed: argparse.Namespace) -> int:
    """Read hardware counters layer by layer, and return the exit code: 1 if the profiler failed."""
    if this_device().type != "cuda":
        fail("counters needs a GPU, but this machine has none")
    profiler = counters.find_profiler()
    if profiler is None:
        fail("can't find Nsight Compute (ncu) on the PATH or in CUDA_HOME: install it, or add it to the PATH")
    suites = {name: SUITES[name] for name in parsed.suite}
    cases = list(layers.cases(suites, parsed.batch, parsed.dtypes, parsed.passes))
    store, metrics = _store(parsed), counters.available(profiler)
    done = store.settled("counters", counters.CounterRow, layers.LAYER_CASE)
    todo = [case for case in cases if case[0] not in done]
    layers_todo, all_layers = (
        [list(of_layer) for _, of_layer in groupby(some, key=lambda case: case[0][:-1])]
        for some in (todo, cases)
    )
    failed = []

    def measure(of_layer: list[tuple[tuple, Problem]]) -> list[TableRow]:
        rows = counters.measure(of_layer, profiler, metrics)
        failed.extend(row for row in rows if row.problem)
        return [asdict(row) for row in rows]

    code = _measure_all(layers_todo, len(all_layers), measure, store, "counters", parsed.minutes)
    return 1 if failed else code


def run_first(parsed: argparse.Namespace) -> int:
    """Run a step of the first half hour, and return the exit code: 1 if a part of it failed."""
    if this_device().type != "cuda":
        fail("first needs a GPU, but this machine has none")
    folder = parsed.out or Path("runs") / slug(torch.cuda.get_device_name())
    return first.run(parsed.step, folder, parsed.minutes)


def run_report(parsed: argparse.Namespace) -> int:
    """Write tables and plots."""
    from benchmarks.report import plots, write_report  # imports matplotlib

    folder = parsed.folder or _default_folder(environment(this_device()))
    if parsed.images is not None:
        from benchmarks.images import write_images  # imports Triton

        print(*write_images(folder, parsed.images), sep="\n")
        return 0
    for path in write_report(folder):
        print(path)
    if plots is None:
        print("no plots, because matplotlib isn't installed: pip install '.[bench]'", file=sys.stderr)
    return 0


def _measure_all(todo: list, total: int, measure: Callable, store: Store, table: str, minutes: float) -> int:
    """Measure the cases in ``todo`` and save the results.

    Returns:
        The exit code: 1 if a result was wrong, ``STOPPED`` if time ran out, otherwise 0.
    """
    done = total - len(todo)
    print(f"{total} cases: {done} already in {store.folder}, {len(todo)} to measure", file=sys.stderr)
    end, wrong = time.monotonic() + 60 * minutes, False
    for case in track(todo, "measuring"):
        if time.monotonic() > end:
            print("time is up: run the same command again to continue", file=sys.stderr)
            return 1 if wrong else STOPPED
        try:
            rows = measure(case)
        except torch.OutOfMemoryError as error:
            print(f"\nskipped, because it doesn't fit in memory: {case}: {error}", file=sys.stderr)
            continue
        store.append(table, rows)
        for row in rows:
            wrong |= is_wrong(row)
            if row["problem"]:
                what = ", ".join(row[name] for name in ("runner", "layout", "layer", "pass_") if name in row)
                print(f"\n{what}: {row['problem']}", file=sys.stderr)
    return 1 if wrong else 0


def _able(problem: Problem, device: torch.device) -> list[str]:
    """Return the runners to compare: all that can run on this machine, except the reference."""
    without = {"reference"} | (
        {"triton"} if why_not_triton(device, problem.dtype, problem.geometry) else set()
    )
    return [name for name in RUNNERS if name not in without]


def _store(parsed: argparse.Namespace) -> Store:
    device = this_device()
    facts = environment(device)
    folder = parsed.out or _default_folder(facts)
    return Store(folder, facts | {"copy_gb_per_s": round(copy_speed(device) / 1e9, 1)}, parsed.overwrite)


def _default_folder(facts: dict[str, Any]) -> Path:
    return RESULTS_FOLDER / slug(facts["gpu"] or "cpu")


def _parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = new_parser("python -m benchmarks", DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable, summary: str, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=summary, description=description, formatter_class=parser.formatter_class
        )
        added.set_defaults(command=function)
        return added

    _add_layers_options(add("run", run_layers, "time single passes of grouped layers", RUN))
    _add_networks_options(add("networks", run_networks, "time inference and training of networks", NETWORKS))
    _add_accuracy_options(add("accuracy", run_accuracy, "train a network fused and unfused", ACCURACY))
    _add_folder_options(add("pieces", run_pieces, "time memory for pieces of pixels", PIECES))
    _add_counters_options(add("counters", run_counters, "read hardware counters of the kernels", COUNTERS))
    _add_first_options(
        add("first", run_first, "check, profile, tune and time gconv on a new GPU", first.FIRST_HALF_HOUR)
    )
    report = add("report", run_report, "write tables and plots of results", REPORT)
    report.add_argument(
        "folder", type=Path, nargs="?", metavar="DIR",
        help="folder with environment.json and *.jsonl (default: benchmarks/results/ and the name of the "
        "GPU, or cpu)",
    )  # fmt: skip
    report.add_argument(
        "--images",
        type=Path,
        metavar="OUT",
        help="write only the plots of README.md, to the folder OUT (docs/images in this repository)",
    )
    return parser


def _add_layers_options(parser: argparse.ArgumentParser) -> None:
    add_names(parser, "--suite", SUITES, REAL, "networks whose grouped layers to measure")
    add_names(parser, "--passes", PASSES, purpose="passes to measure")
    add_names(parser, "--dtypes", TYPES, purpose=f"data types to measure, {TF32}")
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", choices=list(RUNNERS),
        help=f"implementations to compare: {', '.join(RUNNERS)} (default: all that this machine can run, "
        "except reference)",
    )  # fmt: skip
    add_batch(parser, [256, 32, 1], "batch sizes to measure")
    _add_results_options(parser)


def _add_networks_options(parser: argparse.ArgumentParser) -> None:
    default = ["resnext50_32x4d", "resnext101_32x8d", "resnet50"]
    add_names(parser, "--network", networks.NETWORKS, default, "networks to measure")
    add_names(parser, "--tasks", networks.TASKS, purpose="tasks to measure")
    purpose = "how to run the steps, where compiled uses torch.compile and graphed a CUDA graph"
    add_names(parser, "--modes", networks.MODES, purpose=purpose)
    parser.add_argument(
        "--image", type=_side, default=224, metavar="PIXELS",
        help="height and width of the images, at least 32 (default: 224)",
    )  # fmt: skip
    add_batch(parser, [256, 64], "batch sizes to measure")
    _add_results_options(parser)


def _add_accuracy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds", type=count, default=3, metavar="N", help="number of seeds for each network (default: 3)"
    )
    parser.add_argument(
        "--epochs", type=count, default=6, metavar="N", help="number of training epochs (default: 6)"
    )
    parser.add_argument(
        "--backend", choices=("triton", "reference"), default="reference",
        help="backend of the convolutions; only these two fuse batch norm (default: reference)",
    )  # fmt: skip
    _add_results_options(parser)


def _add_counters_options(parser: argparse.ArgumentParser) -> None:
    add_names(parser, "--suite", SUITES, ["resnext50_32x4d"], "networks whose grouped layers to run")
    add_names(parser, "--passes", PASSES, purpose="passes to run")
    add_names(parser, "--dtypes", TYPES, ["bfloat16"], f"data types to run, {TF32}")
    add_batch(parser, [256], "batch sizes to run")
    _add_results_options(parser)


def _add_first_options(parser: argparse.ArgumentParser) -> None:
    steps = list(first.STEPS)
    parser.add_argument("step", choices=steps, metavar="STEP", help=f"step to run: {', '.join(steps)}")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (default: runs/ and the GPU's name)"
    )
    parser.add_argument(
        "--minutes", type=minutes, default=9.5, metavar="M", help="stop after M minutes (default: 9.5)"
    )


def _add_results_options(parser: argparse.ArgumentParser) -> None:
    _add_folder_options(parser)
    parser.add_argument(
        "--minutes", type=minutes, default=float("inf"), metavar="M",
        help="stop after M minutes (default: never)",
    )  # fmt: skip


def _add_folder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for the results (default: benchmarks/results/ and the name of the GPU, or cpu)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the measurements that DIR already contains"
    )


def _side(text: str) -> int:
    if count(text) < 32:
        raise argparse.ArgumentTypeError(
            f"must be at least 32, because the network downsamples by 32, got {text!r}"
        )
    return count(text)


if __name__ == "__main__":
    sys.exit(main())
