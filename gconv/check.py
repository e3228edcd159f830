"""``python -m gconv``: whether the kernels run on this machine, are right, and what they gain."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gconv import dispatch
from gconv.environment import environment
from gconv.geometry import PASSES
from gconv.problem import LAYOUTS, TYPES, Problem, run_poisoned
from gconv.suites import SUITES
from gconv.terminal import columns, count, track
from gconv.timing import Times, copy_speed, cudnn_searching, sets_of_operands, time_together

LAYERS = [layer for layer in SUITES["resnext50_32x4d"] if layer.stride == 1]  # one of each stage
BLOCKS = (3, 4, 6, 3)  # how often a ResNeXt-50 has them
TIMED = "bfloat16"
FEW = 4  # images, which are enough to be right or wrong
PLANS = 10  # that cuDNN tries, as it does for a user who sets torch.backends.cudnn.benchmark

DESCRIPTION = """\
Shows what gconv does on this machine, in a minute on a GPU and some seconds elsewhere:

  the environment, and which convolution `auto` takes here
  whether the kernels are right: every pass, in every type, beside float64
  what they gain: ResNeXt-50's grouped layers beside cuDNN and the speed of the memory

Ends in one sentence: what gconv.convert(model) would bring here. Exits with 1 if a kernel is wrong; please
report that, with the output of --json.
"""


@dataclass(frozen=True)
class Answer:
    """What one pass of a layer gave.

    Args:
        backend, type, pass_, layer: what ran.
        error: the largest difference from float64, as a part of the largest number; None where it failed.
        problem: what is wrong with it; None if nothing is.
    """

    backend: str
    type: str
    pass_: str
    layer: str
    error: float | None
    problem: str | None = None


@dataclass(frozen=True)
class Timing:
    """What one pass of a layer takes, in microseconds.

    Args:
        layer, pass_: what ran.
        floor: its compulsory bytes at the speed of a copy.
        gconv: the kernels', in channels_last.
        channels_last, contiguous: PyTorch's own convolution's, in either layout.
        auto: who runs it after ``gconv.convert``: "triton" or "aten".
    """

    layer: str
    pass_: str
    floor: float
    gconv: Times
    channels_last: Times
    contiguous: Times
    auto: str

    @property
    def best(self) -> float:
        """PyTorch's own, in the layout that suits it."""
        return min(self.channels_last.p50, self.contiguous.p50)

    @property
    def converted(self) -> float:
        """What it takes after ``gconv.convert``."""
        return self.gconv.p50 if self.auto == "triton" else self.channels_last.p50


@dataclass(frozen=True)
class Findings:
    """All that ``python -m gconv`` found; prints as its tables.

    Args:
        environment: machine and versions.
        reason: why ``auto`` takes what it takes here.
        kernels: whether the kernels can run here.
        answers: whether results are right.
        batch: images in what was timed.
        timings: what was timed; nothing without a GPU.
    """

    environment: dict[str, Any]
    reason: str
    kernels: bool
    answers: tuple[Answer, ...]
    batch: int
    timings: tuple[Timing, ...]

    @property
    def wrong(self) -> list[Answer]:
        """The answers that are not right."""
        return [answer for answer in self.answers if answer.problem]

    @property
    def verdict(self) -> str:
        """One sentence: what converting would bring here."""
        if self.wrong:
            return (
                f"{len(self.wrong)} of {len(self.answers)} results are WRONG: do not use gconv here, "
                "and please report the output of python -m gconv --json."
            )
        if not self.kernels:
            return f"Nothing to gain here: {self.reason}."
        if not self.timings:
            return "The kernels are right, but nothing could be timed."
        inference, training = (self._gain(passes) for passes in (PASSES[:1], PASSES))
        if max(inference[0], training[0]) < 1.02:
            return (
                "Nothing to gain for ResNeXt-50 here, as auto decides now. python -m gconv tune measures "
                "more tiles of the kernels, and auto then goes by what it found."
            )
        return (
            f"gconv.convert(model) makes ResNeXt-50's grouped convolutions {training[0]:.2f}x as fast in "
            f"training and {inference[0]:.2f}x in inference as PyTorch in its better layout "
            f"({training[1]:.2f}x and {inference[1]:.2f}x as fast as a contiguous network)."
        )

    def _gain(self, passes: Sequence[str]) -> tuple[float, float]:
        """How many times as fast the network's layers are, over PyTorch at its best, and over contiguous."""
        often = {layer.name: blocks for layer, blocks in zip(LAYERS, BLOCKS, strict=True)}
        rows = [(often[t.layer], t) for t in self.timings if t.pass_ in passes]
        ours = sum(n * t.converted for n, t in rows)
        return sum(n * t.best for n, t in rows) / ours, sum(n * t.contiguous.p50 for n, t in rows) / ours

    def __str__(self) -> str:
        parts = [
            self._head(),
            self._answers_in_short(),
            *([self._table()] if self.timings else []),
            self.verdict,
        ]
        return "\n\n".join(parts)

    def _head(self) -> str:
        facts = self.environment
        versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "triton") if facts[name])
        machine = facts["gpu"] or f"{facts['cpu']}; no CUDA or ROCm GPU"
        if facts["gpu"]:
            known = {"compute capability": "capability", "driver": "driver", "cuDNN": "cudnn"}
            told = [f"{word} {facts[name]}" for word, name in known.items() if facts.get(name)]
            machine = ", ".join([machine, *told])
        auto = "gconv's kernels where they are faster" if self.kernels else f"PyTorch's own: {self.reason}"
        rows = [
            ("gconv", f"{facts['gconv'] or 'not installed'}, {versions}"),
            ("machine", machine),
            ("auto", auto),
        ]
        return columns(rows, left=2)

    def _answers_in_short(self) -> str:
        told = []
        for backend in dict.fromkeys(answer.backend for answer in self.answers):
            of_it = [answer for answer in self.answers if answer.backend == backend]
            types = dict.fromkeys(answer.type for answer in of_it)
            wrong = [answer for answer in of_it if answer.problem]
            result = f"{len(wrong)} of them WRONG" if wrong else "all right"
            told.append(f"{backend}: {len(of_it)} results beside float64, in {', '.join(types)}: {result}")
            told += [f"  {a.layer}, {a.pass_}, {a.type}: {a.problem}" for a in wrong]
        return "\n".join(told)

    def _table(self) -> str:
        library = "MIOpen" if torch.version.hip else "cuDNN"
        rows = [
            ("layer", "pass", "floor", "gconv", "of floor", library, "contiguous", "speedup", "auto takes")
        ]
        for t in self.timings:
            tie = t.gconv.ties(t.channels_last) or t.gconv.ties(t.contiguous)
            times = (t.floor, t.gconv.p50, t.channels_last.p50, t.contiguous.p50)
            floor, ours, theirs, contiguous = (f"{time:.1f}" for time in times)
            share, speedup = f"{t.floor / t.gconv.p50:.0%}", "tie" if tie else f"{t.best / t.gconv.p50:.2f}x"
            auto = "gconv" if t.auto == "triton" else library
            rows.append((t.layer, t.pass_, floor, ours, share, theirs, contiguous, speedup, auto))
        title = f"ResNeXt-50's grouped layers, {TIMED}, {self.batch} images, in us"
        return f"{title}\n{columns(rows, left=2, rule=True)}"

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {**asdict(self), "verdict": self.verdict}


def check(batch: int = 256, processes: int | None = None) -> Findings:
    """Check and time gconv on this machine.

    Args:
        batch: images in what is timed.
        processes: that compile kernels; by default one for each core.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = FEW if device.type == "cuda" else 1
    few = [Problem(p, layer.geometry(images), type_) for type_ in TYPES for layer in LAYERS for p in PASSES]
    timed = [Problem(p, layer.geometry(batch), TIMED) for layer in LAYERS for p in PASSES]
    names = {layer.geometry(n): layer.name for layer in LAYERS for n in (images, batch)}
    reason = dispatch.decide_by_auto(
        "forward", device, "channels_last", torch.bfloat16, timed[0].geometry
    ).reason
    kernels = dispatch.why_not_triton(device, torch.bfloat16, timed[0].geometry) is None
    if not (kernels and device.type == "cuda"):
        few = [problem for problem in few if problem.type == "float32"]
        todo = [(backend, problem) for backend in ("aten", "reference") for problem in few]
        timed = []
    else:
        _compile([*few, *timed], device, processes)
        todo = [("triton", problem) for problem in few]
    answers = [
        _answer(problem, backend, names[problem.geometry], device)
        for backend, problem in track(todo, "checking")
    ]
    timings = []
    for problem in track(timed, "timing"):
        with suppress(torch.OutOfMemoryError):  # of a small GPU, on which the other layers are timed
            timings.append(_time(problem, names[problem.geometry], device))
    return Findings(environment(device), reason, bool(timed), tuple(answers), batch, tuple(timings))


def _compile(problems: Sequence[Problem], device: torch.device, processes: int | None) -> None:
    """Compile all that will run, on several cores; what fails to, fails again where it is run."""
    from gconv.kernels import compiled, tile_of, tuning  # imports Triton

    target, jobs = compiled.target_of(device), {}
    for problem in problems:
        with problem.precision():
            tile = tile_of(problem.pass_, problem.geometry, problem.dtype, device)
        for job in compiled.jobs_of(target, problem.type, problem.pass_, problem.geometry, tile):
            jobs.setdefault(job.binary, job)
    for _ in tuning.compile_all(list(jobs.values()), processes):
        pass


def _answer(problem: Problem, backend: str, layer: str, device: torch.device) -> Answer:
    what = (backend, problem.type, problem.pass_, layer)
    try:
        with problem.precision():
            operands = problem.draw(device)
            result = run_poisoned(lambda o: problem.run(o, backend), operands)
            error = problem.error(result, problem.truth(operands))
    except Exception as error:  # a kernel that does not compile or start is a finding
        return Answer(*what, None, f"{type(error).__name__}: {error}".splitlines()[0])
    if problem.matches(error):
        return Answer(*what, error)
    return Answer(*what, error, f"off by {error:.1e} of the largest number")


def _time(problem: Problem, layer: str, device: torch.device) -> Timing:
    sets = {}
    for layout in LAYOUTS:
        sets[layout] = [problem.draw(device, layout) for _ in range(sets_of_operands(problem.bytes, device))]
    calls = {
        "gconv": [lambda o=o: problem.run(o, "triton") for o in sets["channels_last"]],
        **{layout: [lambda o=o: problem.run_pytorch(o) for o in sets[layout]] for layout in LAYOUTS},
    }
    with cudnn_searching(PLANS):
        times = time_together(calls, device)
    in_us = {name: Times(*(round(1e6 * seconds, 2) for seconds in of_one)) for name, of_one in times.items()}
    x = sets["channels_last"][0].x
    auto = dispatch.decide_call("auto", x, problem.dtype, problem.geometry)[problem.pass_].backend
    floor = round(1e6 * problem.bytes / copy_speed(device), 2)
    return Timing(layer, problem.pass_, floor, **in_us, auto=auto)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the check."""
    parser.add_argument(
        "--batch", type=count, default=256, metavar="N", help="images in what is timed; default: 256"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for a report")
    parser.add_argument(
        "--processes", type=count, default=os.cpu_count(), metavar="N",
        help="compile kernels in N processes; default: one for each core",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Check as the command line asks, and print it."""
    found = check(arguments.batch, arguments.processes)
    print(json.dumps(found.as_dict(), indent=1) if arguments.json else found)
    return 1 if found.wrong else 0
