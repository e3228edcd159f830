"""The result of ``gconv.profile``, as tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Literal

from gconv.measure import plots
from gconv.measure.figures import check_path
from gconv.measure.recorder import RecordedCall
from gconv.text import columns, counted

THE_MODEL = "(the model)"  # instead of a name, for convolutions that the network itself calls
UNSTEADY = 0.2  # the spread of half of the convolutions above which a profile warns
UNSEEN = "convolutions inside exported or compiled graphs can't be recorded"


@dataclass(frozen=True)
class ProfiledConvolution:
    """A convolution of a network, and its times.

    Attributes:
        call: name, sizes, type, layout and passes.
        backends: the backend that ``auto`` chooses for each pass, and the reason. Always "aten" for dense
            convolutions, which ``convert`` skips.
        seconds: time of each pass on each backend, for those that were measured.
        floor: memory floor of all passes in seconds: the time to read or write each operand once at the speed
            of a copy. None on meta.
        in_channels_last: the same convolution in channels_last, the layout after ``convert``. Only for 2-d
            convolutions that run in contiguous layout on a GPU; otherwise None.
        spread: the largest spread of its times between repeats: half the distance from the 20th to the 80th
            percentile, divided by the median.
    """

    call: RecordedCall
    backends: Mapping[str, tuple[str, str]]
    seconds: Mapping[str, Mapping[str, float]]
    floor: float | None
    in_channels_last: ProfiledConvolution | None = None
    spread: float = 0.0

    @property
    def converted(self) -> ProfiledConvolution:
        """The convolution in the layout that it has after ``convert``."""
        return self.in_channels_last or self

    @property
    def grouped(self) -> bool:
        """Whether the convolution has more than one group."""
        return self.call.convolution.groups > 1

    def total(self, backend: str) -> float | None:
        """Return the seconds of all passes on "auto", "aten" or "triton"; None if one wasn't measured."""
        chosen = {p: self.backends[p][0] if backend == "auto" else backend for p in self.call.passes}
        return _sum(self.seconds.get(p, {}).get(name) for p, name in chosen.items())


@dataclass(frozen=True)
class Profile:
    """The times that ``profile`` measured: ``print`` them as a table, or ``plot`` them.

    Attributes:
        convolutions: the convolutions, in the order in which they ran.
        training: True for a training step, False for a forward pass without gradients.
        network: seconds of the complete network on PyTorch's own convolutions; None on meta.
    """

    convolutions: tuple[ProfiledConvolution, ...]
    training: bool
    network: float | None

    def total(self, backend: str, grouped: bool = False) -> float | None:
        """Return the total time of the convolutions.

        Args:
            backend: "auto", "aten" (PyTorch's convolution), "triton" (gconv's kernels), or "floor" for the
                memory floor.
            grouped: whether to count only grouped convolutions. Defaults to False.

        Returns:
            Seconds; None if one of the convolutions wasn't measured.
        """
        chosen = [c for c in self.convolutions if c.grouped or not grouped]
        return _sum(c.floor if backend == "floor" else c.total(backend) for c in chosen)

    def total_converted(self, grouped: bool = False) -> float | None:
        """Return the total time of the convolutions after ``convert(model, depthwise=True)``.

        Grouped convolutions, including depthwise convolutions, then run on the backend that ``auto`` chooses.
        On a GPU all convolutions run in channels_last.

        Args:
            grouped: whether to count only grouped convolutions. Defaults to False.

        Returns:
            Seconds; None if one of the convolutions wasn't measured.
        """
        chosen = [c for c in self.convolutions if c.grouped or not grouped]
        return _sum(c.converted.total("auto" if c.grouped else "aten") for c in chosen)

    @property
    def network_with_gconv(self) -> float | None:
        """Estimated seconds of the network after ``convert``, if everything else takes as long as now."""
        before, after = self.total("aten"), self.total_converted()
        if self.network is None or before is None or after is None:
            return None
        return self.network - before + after

    def __str__(self) -> str:
        if not self.convolutions:
            return f"no convolution ran in a {self._run}; {UNSEEN}"
        first = self.convolutions[0].call
        lines = [
            f"{self._count}, {first.dtype} on {first.device}, in us",
            *["cl: in channels_last, the layout after gconv.convert"] * self._has_both_layouts,
            columns(self._rows(), left=3, rule=True),
            "",
            columns(self._summary(), left=1),
        ]
        return "\n".join([*lines, *self._remarks()])

    def __repr__(self) -> str:
        return f"<Profile: {self._count}; print it for the times>"

    def plot(
        self,
        path: str | PathLike[str],
        kind: Literal["time", "roofline"] = "time",
        *,
        title: str | None = None,
        dark: bool = False,
    ) -> Path:
        """Draw the times as a plot; needs matplotlib.

        Convolutions of equal sizes share one entry, which is named after the first of them.

        Args:
            path: the file to write. Its suffix decides the format: .png, .svg or .pdf.
            kind: "time" draws the time of each convolution on PyTorch and on gconv's kernels, and its memory
                floor. "roofline" draws the FLOP/s of each convolution over its FLOP per byte, below the most
                that the device's memory and arithmetic allow, which is measured first. Defaults to "time".
            title: the first line. Defaults to None, the number of convolutions.
            dark: whether to draw for a dark page. Defaults to False.

        Returns:
            The path.

        Raises:
            ValueError: ``path`` has another suffix, ``kind`` is unknown, or nothing was timed.
            FileNotFoundError: the folder of ``path`` doesn't exist.
            ModuleNotFoundError: matplotlib isn't installed.

        Examples:
            >>> result = gconv.profile(model.eval(), torch.randn(32, 3, 224, 224))
            >>> result.plot("layers.svg")
            >>> result.plot("roofline.png", "roofline")
        """
        if kind not in ("time", "roofline"):
            raise ValueError(f"kind must be 'time' or 'roofline', got {kind!r}")
        check_path(path)  # before anything is measured
        layers = self._layer_times()
        if not layers:
            raise ValueError(f"there are no times to plot: {self._why_no_times()}")
        call = self.convolutions[0].call
        size = " x ".join(map(str, call.convolution.input_size))
        where = f"{call.dtype} on {plots.device_name(call.device)}, first input {size}"
        lines = (self._count, where) if title is None else (title, f"{self._count}, {where}")
        if kind == "time":
            return plots.draw_times(path, layers, *lines, dark)
        return plots.draw_roofline(path, layers, plots.roofs_of(call.device, call.dtype), *lines, dark)

    def _layer_times(self) -> list[plots.LayerTimes]:
        """Return what to plot of each convolution that was timed; equal sizes share an entry."""
        alike: dict[RecordedCall, list[ProfiledConvolution]] = {}
        for c in self.convolutions:
            alike.setdefault(replace(c.call, name=""), []).append(c)
        layers = []
        for call, (c, *others) in alike.items():
            times: dict[str, float | None] = {
                plots.PYTORCH: c.total("aten"),
                plots.PYTORCH_CHANNELS_LAST: c.in_channels_last.total("aten") if c.in_channels_last else None,
                plots.KERNELS: c.converted.total("triton"),
            }
            seconds = {name: time for name, time in times.items() if time is not None}
            if c.floor is not None and seconds:
                name, sizes, flops = c.call.name or THE_MODEL, str(call.convolution), call.geometry.flops
                work = flops / call.convolution.compulsory_bytes(call.dtype.itemsize)
                what = (name, 1 + len(others), sizes, c.grouped, work, flops * len(call.passes))
                layers.append(plots.LayerTimes(*what, c.floor, seconds))
        return layers

    def _why_no_times(self) -> str:
        if not self.convolutions:
            return f"no convolution ran in a {self._run}; {UNSEEN}"
        if self.convolutions[0].floor is None:
            return "the network is on meta; profile it on a CPU or GPU"
        return f"convolutions in {self.convolutions[0].call.dtype} aren't timed separately"

    @property
    def _run(self) -> str:
        return "training step" if self.training else "forward pass"

    @property
    def _count(self) -> str:
        return f"{counted(len(self.convolutions), 'convolution')} in a {self._run}"

    @property
    def _has_both_layouts(self) -> bool:
        return any(c.in_channels_last for c in self.convolutions)

    def _rows(self) -> list[tuple[str, ...]]:
        """Return a row for each convolution, below a header."""
        timed = [b for b in ("aten", "triton") if any(c.total(b) is not None for c in self.convolutions)]
        both = [f"{b} cl" for b in timed] if self._has_both_layouts else []
        rows: list[tuple[str, ...]] = [("layer", "convolution", "auto", "floor", *timed, *both)]
        for c in self.convolutions:
            names = {p: c.converted.backends[p][0] for p in c.call.passes}
            auto = names["forward"] if len({*names.values()}) == 1 else "/".join(names.values())
            times = [c.floor, *map(c.total, timed), *(map(c.converted.total, timed) if both else ())]
            shown = map(_microseconds, times)
            rows.append(
                (c.call.name or THE_MODEL, str(c.call.convolution), auto if c.grouped else "dense", *shown)
            )
        return rows

    def _summary(self) -> list[tuple[str, ...]]:
        """Return rows of totals: the memory floor, now, and after ``convert``."""
        after = self.network_with_gconv
        gain = "" if self.network is None or after is None else f"{self.network / after:.2f}x"
        rows = (
            ("floor", self.total("floor"), self.total("floor", grouped=True), None, ""),
            ("now", self.total("aten"), self.total("aten", grouped=True), self.network, ""),
            ("converted", self.total_converted(), self.total_converted(grouped=True), after, gain),
        )
        shown = [(name, *map(_microseconds, times), note) for name, *times, note in rows]
        return [("", "all", "grouped", "network", ""), *shown]

    def _remarks(self) -> Iterator[str]:
        """Yield the lines below the tables."""
        grouped = [c for c in self.convolutions if c.grouped]
        if not grouped:
            yield "none of them is grouped, so there is nothing to gain from gconv"
        decided = [c.converted.backends[p] for c in grouped for p in c.call.passes]
        reasons = dict.fromkeys(reason for backend, reason in decided if backend == "aten")
        yield from (f"aten: {reason}" for reason in reasons)
        unmeasured = {str(c.call.dtype) for c in self.convolutions if c.floor and c.total("aten") is None}
        if unmeasured:
            yield f"not timed separately: {', '.join(sorted(unmeasured))}"
        if (spread := median(c.spread for c in self.convolutions)) > UNSTEADY:
            yield f"warning: times vary by ±{spread:.0%} between repeats; is this machine busy?"
        depthwise = sum(c.call.convolution.channels_per_group[0] == 1 for c in grouped)
        if depthwise:
            are = "is" if depthwise == 1 else "are"
            yield (
                f"{depthwise} of the grouped convolutions {are} depthwise: "
                "convert(..., depthwise=True) converts those too"
            )


def _sum(times: Iterable[float | None]) -> float | None:
    """Return the sum of times; None if one of them wasn't measured."""
    total = 0.0
    for time in times:
        if time is None:
            return None
        total += time
    return total


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.0f}"
