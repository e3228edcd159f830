"""Check this machine: do the kernels run here, are their results right, and how much faster are they?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from gconv import dispatch
from gconv.dispatch import this_device
from gconv.geometry import PASSES, ConvGeometry
from gconv.kinds import conv2d_call
from gconv.measure.environment import environment
from gconv.measure.problem import LAYOUTS, TYPES, Problem, run_poisoned
from gconv.measure.suites import SUITES
from gconv.measure.terminal import track
from gconv.measure.timing import Call, Times, copy_speed, cudnn_searching, time_together
from gconv.text import columns

LAYERS = [layer for layer in SUITES["resnext50_32x4d"] if layer.stride == 1]  # one per stage
BLOCKS = (3, 4, 6, 3)  # blocks per stage of a ResNeXt-50
TIMED_TYPE = "bfloat16"
IMAGES_CHECKED = 4  # enough to tell right from wrong
CUDNN_PLANS = 10  # cuDNN tries this many by default when a user sets torch.backends.cudnn.benchmark


@dataclass(frozen=True)
class CheckedPass:
    """Whether the result of one pass of a layer is right.

    Args:
        backend, type, pass_, layer: what ran.
        outcome: "right", "wrong", "failed", or "no memory" if the GPU's memory is too small.
        error: the largest difference from the float64 result, divided by its largest absolute value. None if
            the difference isn't finite or there is no result.
        message: what went wrong, or "".
    """

    backend: str
    type: str
    pass_: str
    layer: str
    outcome: str
    error: float | None = None
    message: str = ""


@dataclass(frozen=True)
class TimedPass:
    """How long one pass of a layer takes, in microseconds.

    Args:
        layer, pass_: what ran.
        floor: the memory floor: the time to move the compulsory bytes at the speed of a copy.
        gconv: time of gconv's kernels, in channels_last.
        channels_last, contiguous: time of PyTorch's convolution in each layout.
        auto: the backend that runs the pass after ``gconv.convert``, "triton" or "aten". The forward pass is
            decided without gradients, as in inference.
    """

    layer: str
    pass_: str
    floor: float
    gconv: Times
    channels_last: Times
    contiguous: Times
    auto: str

    @property
    def pytorch(self) -> Times:
        """Time of PyTorch's convolution in its faster layout."""
        return min(self.channels_last, self.contiguous, key=lambda times: times.p50)

    @property
    def converted(self) -> float:
        """Median time of the pass after ``gconv.convert``."""
        return self.gconv.p50 if self.auto == "triton" else self.channels_last.p50


@dataclass(frozen=True)
class CheckReport:
    """The findings of ``python -m gconv``. ``print`` shows them as tables.

    Args:
        environment: the machine and versions.
        reason: why ``auto`` chooses its backend on this machine.
        kernels: whether gconv's kernels can run on this machine.
        answers: the result of each check.
        batch: batch size of the timed layers.
        timings: times of each pass; empty without a GPU.
        untimed: passes that don't fit in the GPU's memory, such as "128/32, 56x56, forward".
    """

    environment: dict[str, Any]
    reason: str
    kernels: bool
    answers: tuple[CheckedPass, ...]
    batch: int
    timings: tuple[TimedPass, ...]
    untimed: tuple[str, ...] = ()

    @property
    def wrong(self) -> list[CheckedPass]:
        """The checks whose result is wrong or whose kernel failed."""
        return [answer for answer in self.answers if answer.outcome in ("wrong", "failed")]

    @property
    def verdict(self) -> str:
        """What converting a network would gain on this machine, in one sentence."""
        if self.wrong:
            return (
                f"{len(self.wrong)} of {len(self.answers)} results are WRONG: don't use gconv on this "
                "machine, and please report the output of python -m gconv --json."
            )
        if not self.kernels:
            return f"Nothing to gain here: {self.reason}."
        inference, training = self._gain(PASSES[:1]), self._gain(PASSES)
        if inference is None or training is None:
            return "Not timed: the layers don't fit in the GPU's memory. Try a smaller --batch."
        layers = "ResNeXt-50's grouped convolutions" + (" that fit in memory" if self.untimed else "")
        if max(inference[0], training[0]) < 1.02:
            return (
                f"Nothing to gain for {layers} with the backends that auto chooses now. Run "
                "python -m gconv tune to measure more tiles of the kernels; auto then uses the fastest."
            )
        return (
            f"gconv.convert(model) speeds up {layers} {training[0]:.2f}x in training and "
            f"{inference[0]:.2f}x in inference over PyTorch in its faster layout "
            f"({training[1]:.2f}x and {inference[1]:.2f}x over a contiguous network)."
        )

    def _gain(self, passes: Sequence[str]) -> tuple[float, float] | None:
        """Return the network's speedup over PyTorch in its faster layout, and in contiguous layout."""
        blocks = {layer.name: count for layer, count in zip(LAYERS, BLOCKS, strict=True)}
        rows = [(blocks[t.layer], t) for t in self.timings if t.pass_ in passes]
        if not rows:
            return None
        ours = sum(n * t.converted for n, t in rows)
        theirs = sum(n * t.pytorch.p50 for n, t in rows)
        return theirs / ours, sum(n * t.contiguous.p50 for n, t in rows) / ours

    def __str__(self) -> str:
        parts = [self._machine(), self._answers(), *([self._times()] if self.timings else []), self.verdict]
        return "\n\n".join(parts)

    def _machine(self) -> str:
        """Return lines about versions, the machine, and what ``auto`` uses."""
        facts = self.environment
        versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "triton") if facts[name])
        machine = facts["gpu"] or f"{facts['cpu']}; no CUDA or ROCm GPU"
        if facts["gpu"]:
            names = {"compute capability": "capability", "driver": "driver", "cuDNN": "cudnn"}
            known = [f"{label} {facts[name]}" for label, name in names.items() if facts.get(name)]
            machine = ", ".join([machine, *known])
        auto = f"PyTorch's convolution: {self.reason}"
        if self.kernels:
            auto = "gconv's kernels where they are faster than PyTorch's convolution"
        rows = [
            ("gconv", f"{facts['gconv'] or 'not installed'}, {versions}"),
            ("machine", machine),
            ("auto", auto),
        ]
        return columns(rows, left=2)

    def _answers(self) -> str:
        """Return a line for each backend, and one for each of its results that isn't right."""
        lines = []
        for backend in dict.fromkeys(answer.backend for answer in self.answers):
            answers = [answer for answer in self.answers if answer.backend == backend]
            types = ", ".join(dict.fromkeys(answer.type for answer in answers))
            right = sum(answer.outcome == "right" for answer in answers)
            lines.append(f"{backend}: {right} of {len(answers)} results match float64, in {types}")
            others = [answer for answer in answers if answer.outcome != "right"]
            lines += [f"  {a.layer}, {a.pass_}, {a.type}: {a.outcome.upper()}, {a.message}" for a in others]
        return "\n".join(lines)

    def _times(self) -> str:
        """Return the table of times, followed by remarks."""
        library = "MIOpen" if torch.version.hip else "cuDNN"
        rows = [
            ("layer", "pass", "floor", "gconv", "of floor", library, "contiguous", "speedup", "auto uses")
        ]
        for t in self.timings:
            times = (t.floor, t.gconv.p50, t.channels_last.p50, t.contiguous.p50)
            floor, ours, theirs, contiguous = (f"{time:.1f}" for time in times)
            share = f"{t.floor / t.gconv.p50:.0%}"
            speedup = "tie" if t.gconv.ties(t.pytorch) else f"{t.pytorch.p50 / t.gconv.p50:.2f}x"
            auto = "gconv" if t.auto == "triton" else library
            rows.append((t.layer, t.pass_, floor, ours, share, theirs, contiguous, speedup, auto))
        title = f"ResNeXt-50's grouped layers, {TIMED_TYPE}, batch size {self.batch}, times in us"
        return "\n".join([title, columns(rows, left=2, rule=True), *self._remarks()])

    def _remarks(self) -> Iterator[str]:
        """Yield the lines below the table."""
        if self.untimed:
            yield f"not timed, because it doesn't fit in the GPU's memory: {'; '.join(self.untimed)}"
        taken = [t for t in self.timings if t.auto == "triton"]
        slower = sum(t.gconv.p50 > t.channels_last.p50 and not t.gconv.ties(t.channels_last) for t in taken)
        if slower:
            yield (
                f"in {slower} of {len(taken)} passes, auto uses kernels that are slower here than PyTorch's "
                "convolution: run python -m gconv tune"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a dict that can be written as JSON."""
        return {**asdict(self), "verdict": self.verdict}


def check(batch: int = 256, processes: int | None = None) -> CheckReport:
    """Check and time gconv on this machine.

    Args:
        batch: batch size of the timed layers. Defaults to 256.
        processes: number of processes that compile kernels. Defaults to None, one per core.

    Returns:
        A report on which results are right and, on a GPU, on the times of the kernels and of PyTorch.
    """
    device = this_device()
    images = IMAGES_CHECKED if device.type == "cuda" else 1
    names = {layer.geometry(n): layer.name for layer in LAYERS for n in (images, batch)}
    small = [Problem(p, layer.geometry(images), type_) for type_ in TYPES for layer in LAYERS for p in PASSES]
    large = [Problem(p, layer.geometry(batch), TIMED_TYPE) for layer in LAYERS for p in PASSES]
    dtype, example = large[0].dtype, large[0].geometry
    reason = dispatch.decide_by_auto("forward", device, "channels_last", dtype, example).reason
    kernels = device.type == "cuda" and dispatch.why_not_triton(device, dtype, example) is None
    backends = ("triton",) if kernels else ("aten", "reference")
    if kernels:
        _compile([*small, *large], device, processes)
    else:
        small = [problem for problem in small if problem.type == "float32"]
    todo = [(backend, problem) for backend in backends for problem in small]
    answers = [
        _check(problem, backend, names[problem.geometry], device)
        for backend, problem in track(todo, "checking")
    ]
    timings, untimed = _time_all(large, names, device) if kernels else ([], [])
    facts = environment(device)
    return CheckReport(facts, reason, kernels, tuple(answers), batch, tuple(timings), tuple(untimed))


def _compile(problems: Sequence[Problem], device: torch.device, processes: int | None) -> None:
    """Compile on several cores what will run. Errors are dropped: they come again when the kernel runs."""
    from gconv.kernels import tile_of  # imports Triton
    from gconv.measure import compiled  # imports Triton

    target = compiled.target_of(device)
    jobs: dict[tuple[str, str, str], compiled.Job] = {}
    for problem in problems:
        with problem.precision():
            tile = tile_of(problem.pass_, problem.geometry, problem.dtype, device)
        for job in compiled.jobs_of(target, problem.type, problem.pass_, problem.geometry, tile=tile):
            jobs.setdefault(job.binary, job)
    for _ in compiled.compile_all(list(jobs.values()), processes):
        pass


def _check(problem: Problem, backend: str, layer: str, device: torch.device) -> CheckedPass:
    """Run a pass on a backend and compare it with float64."""
    ran = (backend, problem.type, problem.pass_, layer)
    try:
        with problem.precision():
            operands = problem.draw(device)
            result = run_poisoned(lambda o: problem.run(o, backend), operands)
            apart = problem.error(result, problem.truth(operands))
    except torch.OutOfMemoryError:
        return CheckedPass(*ran, "no memory", message="doesn't fit in the GPU's memory")
    except Exception as error:  # a kernel that doesn't compile or start is a finding
        return CheckedPass(*ran, "failed", message=f"{type(error).__name__}: {error}".splitlines()[0])
    if problem.matches(apart):
        return CheckedPass(*ran, "right", apart)
    if not math.isfinite(apart):
        return CheckedPass(*ran, "wrong", message="contains NaN or infinity")
    return CheckedPass(*ran, "wrong", apart, f"off by {apart:.1e}, relative to the largest value")


def _time_all(
    problems: Sequence[Problem], names: dict[ConvGeometry, str], device: torch.device
) -> tuple[list[TimedPass], list[str]]:
    """Time passes; return the times, and the names of passes that don't fit in the GPU's memory."""
    timings, untimed = [], []
    for problem in track(problems, "timing"):
        name = names[problem.geometry]
        try:
            timings.append(_time(problem, name, device))
        except torch.OutOfMemoryError:
            untimed.append(f"{name}, {problem.pass_}")
    return timings, untimed


def _time(problem: Problem, layer: str, device: torch.device) -> TimedPass:
    """Time a pass on the kernels, and on PyTorch's convolution in both layouts."""
    sets = {layout: problem.draw_sets(device, layout) for layout in LAYOUTS}
    calls: dict[str, list[Call]] = {
        "gconv": [partial(problem.run, o, "triton") for o in sets["channels_last"]],
        **{layout: [partial(problem.run_pytorch, o) for o in sets[layout]] for layout in LAYOUTS},
    }
    with cudnn_searching(CUDNN_PLANS):
        times = time_together(calls, device)
    in_us = {name: Times(*(round(1e6 * seconds, 2) for seconds in of_one)) for name, of_one in times.items()}
    passes = PASSES[:1] if problem.pass_ == "forward" else PASSES
    call = conv2d_call(problem.geometry)
    decided = dispatch.explain_call("auto", device, "channels_last", problem.dtype, call, passes)
    floor = round(1e6 * problem.bytes / copy_speed(device), 2)
    return TimedPass(layer, problem.pass_, floor, **in_us, auto=decided[problem.pass_].backend)
