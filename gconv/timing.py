"""How long calls take on a device, side by side, and how fast its memory is copied."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

Call = Callable[[], Tensor]

GRAPH_SECONDS = 1e-3  # of work in a CUDA graph: launching it then costs next to nothing
MOST_IN_GRAPH = 64  # calls
CACHED = (
    256 * 2**20
)  # bytes, beyond what any L2 keeps: operands that are used in turn are that large together
SECONDS = 0.5  # that all rounds of a call should take at most, where that leaves LEAST_ROUNDS
ROUNDS, LEAST_ROUNDS = 21, 5


class Times(NamedTuple):
    """Quantiles of what one call took, in seconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Times:
        """The quantiles of single times."""
        ordered = sorted(rounds)
        return cls(*(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8)))


@contextmanager
def cudnn_searching() -> Iterator[None]:
    """Inside, cuDNN tries its algorithms and takes the fastest: the peer at its best."""
    before = torch._C._get_cudnn_benchmark()  # torch.backends is closed to changes where PyTorch tests itself
    torch._C._set_cudnn_benchmark(True)
    try:
        yield
    finally:
        torch._C._set_cudnn_benchmark(before)


def sets_of_operands(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of operands to use in turn, so that a GPU's cache holds none of them."""
    return min(MOST_IN_GRAPH, -(-CACHED // max(bytes_of_one, 1))) if device.type == "cuda" else 1


def time_together(contenders: Mapping[str, Sequence[Call]], device: torch.device) -> dict[str, Times]:
    """The time of one call of each contender on ``device``, in rounds that take them in turn.

    What disturbs the machine disturbs all of them. On a GPU the calls run in CUDA graphs, so that the host's
    time does not count, and the times are those of CUDA events.

    Args:
        contenders: for each a list of calls that do the same on different operands, as many as
            :func:`sets_of_operands` says. A call returns the tensor that it makes.
        device: where the calls run.
    """
    runs = {name: _prepare(calls, device) for name, calls in contenders.items()}
    rounds = max(run.rounds for run in runs.values())
    times: dict[str, list[Callable[[], float]]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            if i < run.rounds:
                times[name].append(run())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: Times.of([read() for read in reads]) for name, reads in times.items()}


def host_time(call: Call, device: torch.device, rounds: int = 30) -> float:
    """Seconds until ``call`` returns, its work on the device being under way; the median."""
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
    """The time of one of many calls in a row, host and device together, as a training loop sees it."""
    synchronize = torch.get_device_module(device).synchronize

    def round_of(count: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize()
        return (time.perf_counter() - start) / count

    for _ in range(2):  # compiles, and lets cuDNN choose
        once = round_of(1)
    count = max(1, round(seconds / LEAST_ROUNDS / max(once, 1e-9)))
    return Times.of([round_of(count) for _ in range(LEAST_ROUNDS)])


def extra_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that ``call`` takes at its peak beyond what it returns; None where no allocator counts."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    extra = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    del result  # only now: it is not extra
    return extra


@cache
def copy_speed(device: torch.device) -> float:
    """Bytes a second, read plus written, of copying a tensor that no cache holds; the best of 3 rounds."""
    if device.type == "meta":
        raise RuntimeError("the speed of a copy is measured on the input's device, and meta holds no data")
    size = CACHED if device.type == "cuda" else CACHED // 4
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    synchronize = torch.get_device_module(device).synchronize
    copies, seconds = 8, []
    for _ in range(3):
        synchronize()
        start = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size * copies / min(seconds)


class _HostRun:
    """Calls timed by the host's clock."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.turn = itertools.cycle(calls)
        for call in calls:
            call()
        self.rounds = _rounds_of(self()())

    def __call__(self) -> Callable[[], float]:
        """Runs one call; what is returned tells its time."""
        call = next(self.turn)
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return lambda: seconds


class _GraphRun:
    """Calls captured in a CUDA graph, timed by events around its replay."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self.device = device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for call in itertools.chain(calls, calls[:1]):  # compiles, and lets cuDNN choose
                call()
            once = self._between_events(calls[0])()
            self.count = max(1, min(MOST_IN_GRAPH, round(GRAPH_SECONDS / once)))
            self.graph, results = torch.cuda.CUDAGraph(), [None] * len(calls)
            with torch.cuda.graph(self.graph, stream=stream):
                for i in range(self.count):
                    results[i % len(calls)] = calls[i % len(calls)]()
            self.results = results  # each set has a result of its own, which must not be in the cache either
        torch.cuda.synchronize(device)
        self.graph.replay()
        self.rounds = _rounds_of(self()() * self.count)

    def __call__(self) -> Callable[[], float]:
        """Replays the graph; what is returned waits for it and tells the time of one call."""
        read = self._between_events(self.graph.replay)
        return lambda: read() / self.count

    def _between_events(self, run: Callable[[], object]) -> Callable[[], float]:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()

        def read() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return read


def _prepare(calls: Sequence[Call], device: torch.device) -> _HostRun | _GraphRun:
    return _GraphRun(calls, device) if device.type == "cuda" else _HostRun(calls)


def _rounds_of(seconds: float) -> int:
    """How many rounds a run of ``seconds`` gets."""
    return max(LEAST_ROUNDS, min(ROUNDS, int(SECONDS / max(seconds, 1e-9))))
