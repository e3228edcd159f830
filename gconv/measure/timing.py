"""Time calls on a device, side by side, and measure how fast its memory is copied."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gconv.torch_internals import cudnn_search, sleep_on_gpu

Call = Callable[[], Tensor]
Name = TypeVar("Name")

GRAPH_SECONDS = 1e-3  # least work in a CUDA graph, so that launching it takes a negligible part of the time
MOST_SETS = 512  # limit on the number of sets of operands
LAUNCHES = 3  # launches of a graph that measure the host's time
LEAST_PAUSE = 5e-4  # least time in seconds that a GPU waits before a graph
HIGHEST_CLOCK = 3.5e9  # cycles per second; no GPU runs faster
LOWEST_CLOCK = 1e8  # cycles per second; a driver that reports less doesn't know the clock
SECONDS = 0.5  # time for all rounds of a call, if LEAST_ROUNDS fit in it
ROUNDS, LEAST_ROUNDS = 21, 5


class Times(NamedTuple):
    """Quantiles of the time of one call, in seconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Times:
        """Return the quantiles of ``rounds``, the times of single rounds."""
        ordered = sorted(rounds)
        return cls(*(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8)))

    @property
    def spread(self) -> float:
        """Half the distance from p20 to p80, divided by the median: 0.01 means the median ± 1%."""
        return (self.p80 - self.p20) / 2 / self.p50

    def ties(self, other: Times) -> bool:
        """Whether the ranges from p20 to p80 overlap, so that it isn't known which is faster."""
        return self.p20 <= other.p80 and other.p20 <= self.p80


@contextmanager
def cudnn_searching(limit: int = 0) -> Iterator[None]:
    """Let cuDNN try its execution plans inside the ``with`` block and use the fastest.

    Args:
        limit: number of plans to try. Defaults to 0, all of them, which takes a second or more per
            convolution.
    """
    settings = cudnn_search()
    before = {name: read() for name, (read, _) in settings.items()}
    for name, value in {"benchmark": True, "limit": limit}.items():
        if name in settings:
            settings[name][1](value)
    try:
        yield
    finally:
        for name, value in before.items():
            settings[name][1](value)


def sets_of_operands(bytes_of_one: int, device: torch.device) -> int:
    """Return how many sets of operands to use in turn so that none of them stays in the GPU's cache."""
    if device.type != "cuda":
        return 1
    cache_size = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, -(-3 * cache_size // max(bytes_of_one, 1)))


def time_together(contenders: Mapping[Name, Sequence[Call]], device: torch.device) -> dict[Name, Times]:
    """Time one call of each contender, in rounds in which the contenders take turns.

    A disturbance of the machine then affects all of them. On a GPU the calls run in CUDA graphs, which
    excludes the host's time, and CUDA events measure the time.

    Args:
        contenders: for each contender, a list of calls that do the same work on different operands, as many
            as ``sets_of_operands`` returns. A call returns the tensor that it computes.
        device: the device that the calls run on.

    Returns:
        The times by contender.
    """
    memory = _GraphMemory(device) if device.type == "cuda" else None
    runs = {
        name: _HostRun(calls) if memory is None else _GraphRun(calls, memory)
        for name, calls in contenders.items()
    }
    rounds = max(run.rounds for run in runs.values())
    reads: dict[Name, list[Callable[[], float]]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            if i < run.rounds:
                reads[name].append(run())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: Times.of([read() for read in of_one]) for name, of_one in reads.items()}


def pause_before(launch: Callable[[], object], synchronize: Callable[[], object], clock: float) -> int:
    """Return how many cycles a GPU should wait before ``launch``, so that all work is queued when it starts.

    A GPU that catches up with the host has to wait, and that wait would count as part of the work's time. The
    pause is therefore twice the longest of ``LAUNCHES`` launches, and at least ``LEAST_PAUSE``.

    Args:
        launch: enqueues the work and returns.
        synchronize: waits until the GPU is idle, so that only the host's own time is measured.
        clock: the GPU's highest clock, in cycles per second.
    """
    longest = 0.0
    for _ in range(LAUNCHES):
        synchronize()
        start = time.perf_counter()
        launch()
        longest = max(longest, time.perf_counter() - start)
    synchronize()
    return math.ceil(max(LEAST_PAUSE, 2 * longest) * clock)


def highest_clock(device: torch.device) -> float:
    """Return a GPU's highest clock in cycles per second, or ``HIGHEST_CLOCK`` if it isn't known."""
    kilohertz = getattr(torch.cuda.get_device_properties(device), "clock_rate", 0)
    return 1e3 * kilohertz if 1e3 * kilohertz > LOWEST_CLOCK else HIGHEST_CLOCK


def host_time(call: Call, device: torch.device, rounds: int = 30) -> float:
    """Return the median time in seconds until ``call`` returns, while the device may still be working."""
    synchronize = torch.get_device_module(device).synchronize
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    synchronize()
    return Times.of(times).p50


def wall_time(call: Callable[[], object], device: torch.device, seconds: float = 2.0) -> Times:
    """Time one of many consecutive calls, host and device together, as in a training loop.

    Args:
        call: what to time.
        device: the device that it runs on.
        seconds: about how long all rounds take together. With 0, a round is one call. Defaults to 2.
    """
    synchronize = torch.get_device_module(device).synchronize

    def round_of(count: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize()
        return (time.perf_counter() - start) / count

    for _ in range(2):  # the first compiles and lets cuDNN choose
        once = round_of(1)
    count = max(1, round(seconds / LEAST_ROUNDS / max(once, 1e-9)))
    return Times.of([round_of(count) for _ in range(LEAST_ROUNDS)])


def extra_memory(call: Call, device: torch.device) -> int | None:
    """Return the peak memory of ``call`` in bytes, without its result; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    gc.collect()  # garbage that is freed during the call would hide some of its memory
    torch.cuda.empty_cache()  # a cached block that is slightly too large would count in full
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    extra = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    del result  # only now, so that the result doesn't count as extra memory
    return extra


@cache
def copy_speed(device: torch.device) -> float:
    """Return the bytes per second, read plus written, of the faster of two ways to copy a large tensor.

    Raises:
        RuntimeError: ``device`` is the meta device.
    """
    if device.type == "meta":
        raise RuntimeError(
            "can't measure the speed of a copy on the meta device, which has no data: use an input on the "
            "CPU or a GPU"
        )
    source = torch.ones(2**26 if device.type == "cuda" else 2**24, device=device)  # float32
    target = torch.empty_like(source)
    ways = {"copy": [lambda: target.copy_(source)], "kernel": [lambda: torch.neg(source, out=target)]}
    return 2 * source.nbytes / min(times.p50 for times in time_together(ways, device).values())


class _HostRun:
    """Calls timed by the host's clock."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.turn = itertools.cycle(calls)
        for call in calls:
            call()
        self.rounds = _rounds_of(self()())

    def __call__(self) -> Callable[[], float]:
        """Run one call; return a function that returns its time."""
        call = next(self.turn)
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return lambda: seconds


class _GraphMemory:
    """Memory that all graphs share, and the stream that it belongs to.

    Sharing is safe because graphs are replayed one after the other, and nothing reads their results.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))


class _GraphRun:
    """Calls captured in a CUDA graph, timed by events around its replay.

    The graph uses every set of operands equally often.
    """

    def __init__(self, calls: Sequence[Call], memory: _GraphMemory) -> None:
        self.memory = memory
        with torch.cuda.device(memory.device), torch.cuda.stream(memory.stream):
            for call in calls:  # compile, and let cuDNN choose
                call()
        self._capture(calls, 1)
        seconds = min(self()() for _ in range(3))  # time of one call
        turns = max(1, round(GRAPH_SECONDS / (seconds * len(calls))))
        if turns > 1:
            self._capture(calls, turns)
        self.rounds = _rounds_of(self()() * self.count)

    def __call__(self) -> Callable[[], float]:
        """Replay the graph; return a function that waits for it and returns the time of one call."""
        with torch.cuda.device(self.memory.device):
            sleep_on_gpu(self.pause)
            start, end = self._launch()

        def read() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / self.count

        return read

    def _launch(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        return start, end

    def _capture(self, calls: Sequence[Call], turns: int) -> None:
        graph, count = torch.cuda.CUDAGraph(), turns * len(calls)
        results: list[Tensor | None] = [None] * len(calls)
        with torch.cuda.device(self.memory.device):
            with torch.cuda.graph(graph, pool=self.memory.pool, stream=self.memory.stream):
                for i in range(count):  # each set has its own result, which the cache then doesn't keep
                    results[i % len(calls)] = calls[i % len(calls)]()
            torch.cuda.synchronize()
            graph.replay()  # on the first replay, the host also prepares the graph
            # Drop the previous graph only now, because a memory pool must always have a graph.
            self.graph, self.count = graph, count
            self.pause = pause_before(self._launch, torch.cuda.synchronize, highest_clock(self.memory.device))


def _rounds_of(seconds: float) -> int:
    """Return the number of rounds for a run that takes ``seconds``."""
    return max(LEAST_ROUNDS, min(ROUNDS, int(SECONDS / max(seconds, 1e-9))))
