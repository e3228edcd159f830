"""Check this machine: whether the kernels run here, whether their results are right, what they gain."""

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

LAYERS = [layer for layer in SUITES["resnext50_32x4d"] if layer.stride == 1]  # one of each stage
BLOCKS = (3, 4, 6, 3)  # how often each of them occurs in a ResNeXt-50
TIMED_TYPE = "bfloat16"
IMAGES_CHECKED = 4  # enough to tell right from wrong
CUDNN_PLANS = 10  # plans that cuDNN tries, as for a user who sets torch.backends.cudnn.benchmark


@dataclass(frozen=True)
class CheckedPass:
    """Whether the result of one pass of a layer is right.

    Args:
        backend, type, pass_, layer: what ran.
        outcome: "right", "wrong", "failed", or "no memory" if the GPU's memory is too small.
        error: the largest difference from float64, divided by the largest float64 number; None if it is not
            finite, or if there is no result.
        message: what went wrong; empty if nothing did.
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
        floor: time to move the compulsory bytes at the speed of a copy.
        gconv: time of the kernels, in channels_last.
        channels_last, contiguous: time of PyTorch's own convolution in each layout.
        auto: who runs it after ``gconv.convert``, "triton" or "aten"; forward without gradients.
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
        """Time of PyTorch's own convolution in its faster layout."""
        return min(self.channels_last, self.contiguous, key=lambda times: times.p50)

    @property
    def converted(self) -> float:
        """Time after ``gconv.convert``."""
        return self.gconv.p50 if self.auto == "triton" else self.channels_last.p50


@dataclass(frozen=True)
class CheckReport:
    """Everything that ``python -m gconv`` found; ``print`` it as tables.

    Args:
        environment: machine and versions.
        reason: why ``auto`` chooses as it does here.
        kernels: whether the kernels can run here.
        answers: which results are right.
        batch: batch size of the timed layers.
        timings: times of each pass; empty without a GPU.
        untimed: passes too large for the GPU's memory, such as "128/32, 56x56, forward".
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
        """The answers that are wrong, and those of kernels that failed."""
        return [answer for answer in self.answers if answer.outcome in ("wrong", "failed")]

    @property
    def verdict(self) -> str:
        """What converting a network would gain here, in one sentence."""
        if self.wrong:
            return (
                f"{len(self.wrong)} of {len(self.answers)} results are WRONG: do not use gconv here, "
                "and please report the output of python -m gconv --json."
            )
        if not self.kernels:
            return f"Nothing to gain here: {self.reason}."
        inference, training = self._gain(PASSES[:1]), self._gain(PASSES)
        if inference is None or training is None:
            return "Not timed: the GPU's memory is too small. Try a smaller --batch."
        layers = "ResNeXt-50's grouped convolutions" if not self.untimed else "those of its layers that fit"
        if max(inference[0], training[0]) < 1.02:
            return (
                f"Nothing to gain for {layers} here, as auto decides now. python -m gconv tune measures more "
                "tiles of the kernels, and auto then uses what it found."
            )
        return (
            f"gconv.convert(model) makes {layers} {training[0]:.2f}x as fast in training and "
            f"{inference[0]:.2f}x in inference as PyTorch in its better layout "
            f"({training[1]:.2f}x and {inference[1]:.2f}x as fast as a contiguous network)."
        )

    def _gain(self, passes: Sequence[str]) -> tuple[float, float] | None:
        """Return the speedup of the network's layers over PyTorch in its better and in contiguous layout."""
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
        """Return lines about versions, the machine, and what ``auto`` takes."""
        facts = self.environment
        versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "triton") if facts[name])
        machine = facts["gpu"] or f"{facts['cpu']}; no CUDA or ROCm GPU"
        if facts["gpu"]:
            names = {"compute capability": "capability", "driver": "driver", "cuDNN": "cudnn"}
            known = [f"{label} {facts[name]}" for label, name in names.items() if facts.get(name)]
            machine = ", ".join([machine, *known])
        auto = "gconv's kernels where they are faster" if self.kernels else f"PyTorch's own: {self.reason}"
        rows = [
            ("gconv", f"{facts['gconv'] or 'not installed'}, {versions}"),
            ("machine", machine),
            ("auto", auto),
        ]
        return columns(rows, left=2)

    def _answers(self) -> str:
        """Return a line for each backend, and one for each of its results that is not right."""
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
        """Return the table of times, and remarks."""
        library = "MIOpen" if torch.version.hip else "cuDNN"
        rows = [
            ("layer", "pass", "floor", "gconv", "of floor", library, "contiguous", "speedup", "auto takes")
        ]
        for t in self.timings:
            times = (t.floor, t.gconv.p50, t.channels_last.p50, t.contiguous.p50)
            floor, ours, theirs, contiguous = (f"{time:.1f}" for time in times)
            share = f"{t.floor / t.gconv.p50:.0%}"
            speedup = "tie" if t.gconv.ties(t.pytorch) else f"{t.pytorch.p50 / t.gconv.p50:.2f}x"
            auto = "gconv" if t.auto == "triton" else library
            rows.append((t.layer, t.pass_, floor, ours, share, theirs, contiguous, speedup, auto))
        title = f"ResNeXt-50's grouped layers, {TIMED_TYPE}, {self.batch} images, in us"
        return "\n".join([title, columns(rows, left=2, rule=True), *self._remarks()])

    def _remarks(self) -> Iterator[str]:
        """Yield the lines below the table."""
        if self.untimed:
            yield f"too large for this GPU's memory: {'; '.join(self.untimed)}"
        taken = [t for t in self.timings if t.auto == "triton"]
        slower = sum(t.gconv.p50 > t.channels_last.p50 and not t.gconv.ties(t.channels_last) for t in taken)
        if slower:
            yield f"auto takes kernels that are slower here in {slower} passes: run python -m gconv tune"

    def as_dict(self) -> dict[str, Any]:
        """Return everything in a form that JSON can hold."""
        return {**asdict(self), "verdict": self.verdict}


def check(batch: int = 256, processes: int | None = None) -> CheckReport:
    """Check and time gconv on this machine.

    Args:
        batch: batch size of the timed layers. Defaults to 256.
        processes: how many processes compile kernels. Defaults to None, one per core.

    Returns:
        Which results are right, and on a GPU how long the kernels and PyTorch take.
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
    """Compile everything that will run, on several cores; what does not compile fails again when it runs."""
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
        return CheckedPass(*ran, "no memory", message="it does not fit this GPU")
    except Exception as error:  # a kernel that does not compile or start is a finding
        return CheckedPass(*ran, "failed", message=f"{type(error).__name__}: {error}".splitlines()[0])
    if problem.matches(apart):
        return CheckedPass(*ran, "right", apart)
    if not math.isfinite(apart):
        return CheckedPass(*ran, "wrong", message="it holds NaN or infinity")
    return CheckedPass(*ran, "wrong", apart, f"off by {apart:.1e} of the largest number")


def _time_all(
    problems: Sequence[Problem], names: dict[ConvGeometry, str], device: torch.device
) -> tuple[list[TimedPass], list[str]]:
    """Time passes; return the times, and the names of the passes that do not fit the GPU's memory."""
    timings, untimed = [], []
    for problem in track(problems, "timing"):
        name = names[problem.geometry]
        try:
            timings.append(_time(problem, name, device))
        except torch.OutOfMemoryError:
            untimed.append(f"{name}, {problem.pass_}")
    return timings, untimed


def _time(problem: Problem, layer: str, device: torch.device) -> TimedPass:
    """Time a pass on the kernels, and on PyTorch's own convolution in both layouts."""
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
