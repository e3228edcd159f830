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
from gconv.commands.options import add_batch, add_names, count, minutes, new_parser
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
Measure gconv beside PyTorch's own convolution (cuDNN), torch.compile and the memory floor.

  run        single passes of the grouped layers of well-known networks
  networks   whole networks, inference and training steps
  accuracy   the digits' network trained fused and unfused, some seeds of each
  pieces     the speed of memory for programs that each move a few bytes of a pixel
  counters   the hardware's counters of our kernels, by Nsight Compute
  first      the first half hour on a GPU, in three steps: right or wrong, where time goes, tuned and timed
  report     tables (report.md) and pictures (*.png) of a folder of results

A run writes each measurement as soon as it is made and can be stopped at any time; the same command goes on
from there. Wrong answers get no time. Exit codes: 0 when all is done, 1 if an answer was wrong, 3 if
--minutes were up before.

  python -m benchmarks run --suite resnext50_32x4d --dtypes bfloat16 --batch 256
  python -m benchmarks networks --batch 64 256
  python -m benchmarks report benchmarks/results/nvidia-h200
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parsed = _parser().parse_args(arguments)
    return run_resumable(lambda: parsed.command(parsed))


def run_layers(parsed: argparse.Namespace) -> int:
    """Measure layers; 1 if an answer was wrong."""
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
    """Measure networks; 1 if an answer was wrong."""
    device = this_device()
    modes = [mode for mode in parsed.modes if device.type == "cuda" or not mode.endswith("graphed")]
    if modes != parsed.modes:
        print("leaving out the modes with CUDA graphs: there is no GPU here", file=sys.stderr)
    if not modes:
        fail("--modes: none of them runs without a GPU")
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
        fail(f"training needs {error.name}: install gconv with its extra 'train'")
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
    """Measure how fast memory moves pieces of pixels."""
    from benchmarks import pieces  # imports Triton

    device = this_device()
    if device.type != "cuda":
        fail("pieces are measured on a GPU, and there is none here")
    store = _store(parsed)
    rows = [asdict(row) for row in pieces.measure(device)]
    store.append("pieces", rows)
    table = [tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)]
    print(columns(table, left=1, rule=True))
    return 0


def run_counters(parsed: argparse.Namespace) -> int:
    """Count what the hardware does in our kernels, a layer at a time; 1 if the profiler failed."""
    if this_device().type != "cuda":
        fail("counters are read on a GPU, and there is none here")
    profiler = counters.find_profiler()
    if profiler is None:
        fail(
            "Nsight Compute (ncu) is neither on the PATH nor in CUDA_HOME: install it, or add it to the PATH"
        )
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
    """Run a step of the first half hour; 1 if a part of it failed."""
    if this_device().type != "cuda":
        fail("the first half hour is spent on a GPU, and there is none here")
    folder = parsed.out or Path("runs") / slug(torch.cuda.get_device_name())
    return first.run(parsed.step, folder, parsed.minutes)


def run_report(parsed: argparse.Namespace) -> int:
    """Write tables and pictures."""
    from benchmarks.report import plots, write_report  # imports matplotlib

    folder = parsed.folder or _default_folder(environment(this_device()))
    if parsed.images is not None:
        from benchmarks.images import write_images  # imports Triton

        print(*write_images(folder, parsed.images), sep="\n")
        return 0
    for path in write_report(folder):
        print(path)
    if plots is None:
        print("no pictures: matplotlib is not installed (gconv's extra 'bench')", file=sys.stderr)
    return 0


def _measure_all(todo: list, total: int, measure: Callable, store: Store, table: str, minutes: float) -> int:
    """Measure and keep what is left to do; 1 if an answer was wrong, ``STOPPED`` if time was up, else 0."""
    print(f"{total} cases, {total - len(todo)} of them in {store.folder} already", file=sys.stderr)
    end, wrong = time.monotonic() + 60 * minutes, False
    for case in track(todo, "measuring"):
        if time.monotonic() > end:
            print("time is up; the same command goes on from here", file=sys.stderr)
            return 1 if wrong else STOPPED
        try:
            rows = measure(case)
        except torch.OutOfMemoryError as error:
            print(f"\nleft out, it does not fit the memory: {case}: {error}", file=sys.stderr)
            continue
        store.append(table, rows)
        for row in rows:
            wrong |= is_wrong(row)
            if row["problem"]:
                what = ", ".join(row[name] for name in ("runner", "layout", "layer", "pass_") if name in row)
                print(f"\n{what}: {row['problem']}", file=sys.stderr)
    return 1 if wrong else 0


def _able(problem: Problem, device: torch.device) -> list[str]:
    """Return the runners to compare: those that can run here, but the reference."""
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
    """Return the parser of all commands."""
    parser = new_parser("python -m benchmarks", DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)
        added.set_defaults(command=function)
        return added

    _add_layers_options(add("run", run_layers, "Measure single passes of grouped layers of known networks."))
    _add_networks_options(add("networks", run_networks, "Measure networks with gconv and with F.conv2d."))
    _add_accuracy_options(add("accuracy", run_accuracy, "Train the demo's network unfused and fused."))
    _add_folder_options(
        add("pieces", run_pieces, "Measure copies and reads in pieces of a pixel's channels.")
    )
    _add_counters_options(add("counters", run_counters, "Count what the hardware does, by Nsight Compute."))
    _add_first_options(add("first", run_first, first.FIRST_HALF_HOUR))
    report = add("report", run_report, "Write report.md and pictures of what a folder of results holds.")
    report.add_argument(
        "folder", type=Path, nargs="?", metavar="DIR",
        help="with environment.json and *.jsonl; default: that of this machine's runs",
    )  # fmt: skip
    report.add_argument(
        "--images", type=Path, metavar="OUT", help="write only the README's images, into OUT (docs/images)"
    )
    return parser


def _add_layers_options(parser: argparse.ArgumentParser) -> None:
    add_names(parser, "--suite", SUITES, REAL)
    add_names(parser, "--passes", PASSES)
    add_names(parser, "--dtypes", TYPES)
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", choices=list(RUNNERS),
        help=f"of {', '.join(RUNNERS)}; default: all that can run here, but reference",
    )  # fmt: skip
    add_batch(parser, [256, 32, 1], "batch sizes")
    _add_results_options(parser)


def _add_networks_options(parser: argparse.ArgumentParser) -> None:
    add_names(parser, "--network", networks.NETWORKS, ["resnext50_32x4d", "resnext101_32x8d", "resnet50"])
    add_names(parser, "--tasks", networks.TASKS)
    add_names(parser, "--modes", networks.MODES)
    parser.add_argument(
        "--image", type=_side, default=224, metavar="PIXELS", help="at least 32; default: 224"
    )
    add_batch(parser, [256, 64], "batch sizes")
    _add_results_options(parser)


def _add_accuracy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=count, default=3, metavar="N", help="of each; default: 3")
    parser.add_argument("--epochs", type=count, default=6, metavar="N", help="default: 6")
    parser.add_argument(
        "--backend", choices=("triton", "reference"), default="reference",
        help="runs the convolutions; on other backends nothing is fused. default: reference",
    )  # fmt: skip
    _add_results_options(parser)


def _add_counters_options(parser: argparse.ArgumentParser) -> None:
    add_names(parser, "--suite", SUITES, ["resnext50_32x4d"])
    add_names(parser, "--passes", PASSES)
    add_names(parser, "--dtypes", TYPES, ["bfloat16"])
    add_batch(parser, [256], "batch sizes")
    _add_results_options(parser)


def _add_first_options(parser: argparse.ArgumentParser) -> None:
    steps = list(first.STEPS)
    parser.add_argument("step", choices=steps, metavar="STEP", help=f"of {', '.join(steps)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/ and the GPU's name")
    parser.add_argument(
        "--minutes", type=minutes, default=9.5, metavar="M", help="stop after M; default: 9.5"
    )


def _add_results_options(parser: argparse.ArgumentParser) -> None:
    _add_folder_options(parser)
    parser.add_argument("--minutes", type=minutes, default=float("inf"), metavar="M", help="stop after M")


def _add_folder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: benchmarks/results/ and the GPU's name, or cpu"
    )
    parser.add_argument("--overwrite", action="store_true", help="drop earlier measurements in DIR")


def _side(text: str) -> int:
    if count(text) < 32:
        raise argparse.ArgumentTypeError(f"{text} is less than 32, which leaves the last stage no pixel")
    return count(text)


if __name__ == "__main__":
    sys.exit(main())
