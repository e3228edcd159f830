"""Summarize measurements: fractions of the memory floor, speedups, ties, and the worst cases."""

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
    """The speedup of a row over another, and whether it could be chance.

    Args:
        ratio: the other row's median time divided by this row's: above 1, this row is faster.
        tie: whether the times of both overlap, see ``gconv.measure.timing.Times.ties``.
    """

    ratio: float
    tie: bool

    @classmethod
    def over(cls, theirs: TableRow | None, ours: TableRow | None) -> Gain | None:
        """Return the gain of ``ours`` over ``theirs``, or None if one of them is missing."""
        if theirs is None or ours is None:
            return None
        return cls(theirs["p50"] / ours["p50"], quantiles(theirs).ties(quantiles(ours)))

    @property
    def claim(self) -> float:
        """The speedup that can be claimed: the ratio, or 1 for a tie."""
        return 1.0 if self.tie else self.ratio

    def __str__(self) -> str:
        return "tie" if self.tie else times(self.ratio)


def quantiles(row: TableRow) -> Times:
    """Return a row's times, in the row's unit."""
    return Times(row["p20"], row["p50"], row["p80"])


def spread(row: TableRow) -> str:
    """Return the spread of a row's times, such as ±1.2%."""
    return f"±{100 * quantiles(row).spread:.1f}%"


@dataclass(frozen=True)
class Comparison:
    """One pass of one layer, with the row of each contender.

    Args:
        suite, layer, batch, type, pass_: the pass that was run.
        rows: the rows by (runner, layout).
    """

    suite: str
    layer: str
    batch: int
    type: str
    pass_: str
    rows: dict[tuple[str, str], TableRow]

    @property
    def ours(self) -> TableRow | None:
        """The row of ``auto`` in channels_last, or None if its result is wrong."""
        return self._right("auto", "channels_last")

    @property
    def best_peer(self) -> TableRow | None:
        """The fastest peer with a right result, in its faster layout."""
        return self.best(PEERS)

    @property
    def best_peers(self) -> list[TableRow]:
        """The best peer and the peers that tie with it, the fastest first."""
        peers = self._ranked(PEERS)
        return [row for row in peers if quantiles(row).ties(quantiles(peers[0]))]

    def best(self, runners: Iterable[str]) -> TableRow | None:
        """Return the fastest row of ``runners`` with a right result, in any layout."""
        return next(iter(self._ranked(runners)), None)

    @property
    def fraction(self) -> float | None:
        """The memory floor divided by our time: 1 is as fast as a copy of the same bytes."""
        return None if self.ours is None else self.ours["floor"] / self.ours["p50"]

    @property
    def speedup(self) -> Gain | None:
        """Our speedup over the best peer."""
        return Gain.over(self.best_peer, self.ours)

    @property
    def speedup_over_conv2d(self) -> Gain | None:
        """Our speedup over F.conv2d in its faster layout, which is cuDNN on an NVIDIA GPU."""
        return Gain.over(self.best(["F.conv2d"]), self.ours)

    @property
    def least_gain(self) -> Gain | None:
        """Our speedup over F.conv2d in the same layout, the smaller of both layouts."""
        return worst_gain(Gain.over(self._right("F.conv2d", at), self._right("auto", at)) for at in LAYOUTS)

    @property
    def host_ratio(self) -> float | None:
        """Host time of an eager call, divided by that of F.conv2d in the same layout."""
        theirs = self._right("F.conv2d", "channels_last")
        if self.ours is None or theirs is None or not theirs["host"]:
            return None
        return self.ours["host"] / theirs["host"]

    def _right(self, runner: str, layout: str) -> TableRow | None:
        row = self.rows.get((runner, layout))
        return row if row is not None and row["p50"] is not None else None

    def _ranked(self, runners: Iterable[str]) -> list[TableRow]:
        """Return the rows of ``runners`` with right results, in any layout, the fastest first."""
        found = [self._right(runner, layout) for runner in runners for layout in LAYOUTS]
        return sorted((row for row in found if row), key=lambda row: row["p50"])


def comparisons(rows: Sequence[TableRow]) -> list[Comparison]:
    """Group rows by case, in order. If a case was measured again, its last row counts."""
    found: dict[tuple, dict[tuple[str, str], TableRow]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in LAYER_CASE), {})[row["runner"], row["layout"]] = row
    return [Comparison(*key, of_case) for key, of_case in found.items()]


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of the values that aren't None."""
    there = [value for value in values if value is not None]
    return math.exp(sum(map(math.log, there)) / len(there)) if there else None


def mean_gain(gains: Iterable[Gain | None]) -> float | None:
    """Return the geometric mean of gains. Ties count as measured, because chance cancels out in a mean."""
    return geometric_mean(gain and gain.ratio for gain in gains)


def least(values: Iterable[float | None]) -> float | None:
    """Return the smallest of the values that aren't None."""
    return min((value for value in values if value is not None), default=None)


def worst_gain(gains: Iterable[Gain | None]) -> Gain | None:
    """Return the smallest gain. A tie counts as 1, so that it doesn't hide a loss."""
    there = [gain for gain in gains if gain is not None]
    return min(there, key=lambda gain: gain.claim, default=None)


def faster_tie_slower(gains: Iterable[Gain | None]) -> str:
    """Return the numbers of layers where gconv is faster, ties or is slower, such as "5/1/1"."""
    there = [gain for gain in gains if gain is not None]
    ties = sum(gain.tie for gain in there)
    faster = sum(gain.ratio > 1 and not gain.tie for gain in there)
    return f"{faster}/{ties}/{len(there) - ties - faster}" if there else ""


def summary_table(rows: Sequence[TableRow]) -> list[tuple[str, ...]]:
    """Return a head and a line for each suite, batch size, type and pass."""

    def key(case: Comparison) -> tuple:
        return case.suite, str(case.batch), case.type, case.pass_

    head = ("suite", "batch", "type", "pass", "layers", "of the floor", "worst")
    head += ("over F.conv2d", "worst", "over best peer", "worst", "faster/tie/slower", "same layout, worst")
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
    """Format a fraction as a percentage, such as 87% or 0.4%."""
    return "" if value is None else f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1g}%"


def times(value: float | None) -> str:
    """Format a ratio, such as 4.02x."""
    return "" if value is None else f"{value:.2f}x"
