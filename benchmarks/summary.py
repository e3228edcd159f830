"""Summaries of measurements: fractions of the floor, speedups and ties, the worst of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from benchmarks.layers import LAYER_CASE
from benchmarks.peers import PEERS
from benchmarks.store import TableRow
from gconv.measure.problem import LAYOUTS
from gconv.measure.timing import Times


class Gain(NamedTuple):
    """How many times as long one row takes as another, and whether that is more than chance.

    Args:
        ratio: of the medians: above 1, the other row is faster.
        tie: whether the times of both overlap, as :meth:`gconv.measure.timing.Times.ties` has it.
    """

    ratio: float
    tie: bool

    @classmethod
    def over(cls, theirs: TableRow | None, ours: TableRow | None) -> Gain | None:
        """Return the gain of ``ours`` over ``theirs``, None where one of them is missing."""
        if theirs is None or ours is None:
            return None
        return cls(theirs["p50"] / ours["p50"], quantiles(theirs).ties(quantiles(ours)))

    @property
    def claim(self) -> float:
        """The ratio, or 1 for a tie: what may be said of it."""
        return 1.0 if self.tie else self.ratio

    def __str__(self) -> str:
        return "tie" if self.tie else times(self.ratio)


def quantiles(row: TableRow) -> Times:
    """Return a row's times, in its own unit."""
    return Times(row["p20"], row["p50"], row["p80"])


def spread(row: TableRow) -> str:
    """Return the spread of a row's times, such as ±1.2%."""
    return f"±{100 * quantiles(row).spread:.1f}%"


@dataclass(frozen=True)
class Comparison:
    """One pass of one layer, and the row of each contender.

    Args:
        suite, layer, batch, type, pass_: what was run.
        rows: by (runner, layout).
    """

    suite: str
    layer: str
    batch: int
    type: str
    pass_: str
    rows: dict[tuple[str, str], TableRow]

    @property
    def ours(self) -> TableRow | None:
        """``auto`` in channels_last, where it is right."""
        return self._right("auto", "channels_last")

    @property
    def best_peer(self) -> TableRow | None:
        """The fastest of the peers that are right, in the layout that suits it."""
        return self.best(PEERS)

    @property
    def best_peers(self) -> list[TableRow]:
        """The best peer, and those that tie with it, the fastest first."""
        peers = self._ranked(PEERS)
        return [row for row in peers if quantiles(row).ties(quantiles(peers[0]))]

    def best(self, runners: Iterable[str]) -> TableRow | None:
        """The fastest right one among ``runners``, in any layout."""
        return next(iter(self._ranked(runners)), None)

    @property
    def fraction(self) -> float | None:
        """Of the floor's speed that ours reaches: 1 is as fast as a copy of the same bytes."""
        return None if self.ours is None else self.ours["floor"] / self.ours["p50"]

    @property
    def speedup(self) -> Gain | None:
        """Over the best peer."""
        return Gain.over(self.best_peer, self.ours)

    @property
    def speedup_over_conv2d(self) -> Gain | None:
        """Over F.conv2d at its best: cuDNN, on a GPU of NVIDIA's."""
        return Gain.over(self.best(["F.conv2d"]), self.ours)

    @property
    def least_gain(self) -> Gain | None:
        """What a user gains who leaves the layout as it is, in the worse of the two."""
        return worst_gain(Gain.over(self._right("F.conv2d", at), self._right("auto", at)) for at in LAYOUTS)

    @property
    def host_ratio(self) -> float | None:
        """Host time of an eager call, over that of F.conv2d in the same layout."""
        theirs = self._right("F.conv2d", "channels_last")
        if self.ours is None or theirs is None or not theirs["host"]:
            return None
        return self.ours["host"] / theirs["host"]

    def _right(self, runner: str, layout: str) -> TableRow | None:
        row = self.rows.get((runner, layout))
        return row if row is not None and row["p50"] is not None else None

    def _ranked(self, runners: Iterable[str]) -> list[TableRow]:
        """The right ones among ``runners`` in any layout, the fastest first."""
        found = [self._right(runner, layout) for runner in runners for layout in LAYOUTS]
        return sorted((row for row in found if row), key=lambda row: row["p50"])


def comparisons(rows: Sequence[TableRow]) -> list[Comparison]:
    """Group rows by case, in their order; the last row counts where one was measured again."""
    found: dict[tuple, dict[tuple[str, str], TableRow]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in LAYER_CASE), {})[row["runner"], row["layout"]] = row
    return [Comparison(*key, of_case) for key, of_case in found.items()]


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None."""
    there = [value for value in values if value is not None]
    return math.exp(sum(map(math.log, there)) / len(there)) if there else None


def mean_gain(gains: Iterable[Gain | None]) -> float | None:
    """Return the geometric mean of gains; ties count as measured, as chance cancels out in a mean."""
    return geometric_mean(gain and gain.ratio for gain in gains)


def least(values: Iterable[float | None]) -> float | None:
    """Return the least of the values that are not None."""
    return min((value for value in values if value is not None), default=None)


def worst_gain(gains: Iterable[Gain | None]) -> Gain | None:
    """Return the least gain; a tie counts as 1, so that it hides no loss."""
    there = [gain for gain in gains if gain is not None]
    return min(there, key=lambda gain: gain.claim, default=None)


def faster_tie_slower(gains: Iterable[Gain | None]) -> str:
    """Count the layers where ours is faster, ties or is slower, such as 5/1/1."""
    there = [gain for gain in gains if gain is not None]
    ties = sum(gain.tie for gain in there)
    faster = sum(gain.ratio > 1 and not gain.tie for gain in there)
    return f"{faster}/{ties}/{len(there) - ties - faster}" if there else ""


def summary_table(rows: Sequence[TableRow]) -> list[tuple[str, ...]]:
    """Return a line for each suite, batch, type and pass, under a head."""

    def key(case: Comparison) -> tuple:
        return case.suite, str(case.batch), case.type, case.pass_

    head = ("suite", "batch", "type", "pass", "layers", "of the floor", "least")
    head += ("over F.conv2d", "least", "over best peer", "least", "faster/tie/slower", "same layout, least")
    lines = [head]
    for name, group in groupby(sorted(comparisons(rows), key=key), key=key):
        of_group = list(group)
        fractions = [case.fraction for case in of_group]
        over_conv2d = [case.speedup_over_conv2d for case in of_group]
        over_peers = [case.speedup for case in of_group]
        lines.append(
            (
                *name,
                str(len(of_group)),
                percent(geometric_mean(fractions)),
                percent(least(fractions)),
                times(mean_gain(over_conv2d)),
                _or_nothing(worst_gain(over_conv2d)),
                times(mean_gain(over_peers)),
                _or_nothing(worst_gain(over_peers)),
                faster_tie_slower(over_peers),
                _or_nothing(worst_gain(case.least_gain for case in of_group)),
            )
        )
    return lines


def _or_nothing(gain: Gain | None) -> str:
    return "" if gain is None else str(gain)


def percent(value: float | None) -> str:
    """Format a fraction, such as 87% or 0.4%."""
    return "" if value is None else f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1g}%"


def times(value: float | None) -> str:
    """Format a ratio, such as 4.02x."""
    return "" if value is None else f"{value:.2f}x"
