"""What rows of measurements come to: fractions of the floor, speedups, the worst of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from benchmarks.layers import CASE
from benchmarks.peers import PEERS
from gconv.problem import LAYOUTS

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One pass of one layer, and everyone's row.

    Args:
        suite, layer, batch, type, pass_: what was run.
        rows: by (runner, layout).
    """

    suite: str
    layer: str
    batch: int
    type: str
    pass_: str
    rows: dict[tuple[str, str], dict[str, Any]]

    @property
    def ours(self) -> dict[str, Any] | None:
        """``auto`` in channels_last, where it is right."""
        return self._right("auto", "channels_last")

    @property
    def best_peer(self) -> dict[str, Any] | None:
        """The fastest of the peers that are right, in the layout that suits it."""
        return self.best(PEERS)

    def best(self, runners: Iterable[str]) -> dict[str, Any] | None:
        """The fastest right one among ``runners``, in any layout."""
        found = [self._right(runner, layout) for runner in runners for layout in LAYOUTS]
        return min((row for row in found if row), key=lambda row: row["p50"], default=None)

    @property
    def fraction(self) -> float | None:
        """Of the floor's speed that ours reaches: 1 is as fast as a copy of the same bytes."""
        return None if self.ours is None else self.ours["floor"] / self.ours["p50"]

    @property
    def speedup(self) -> float | None:
        """Over the best peer."""
        return _ratio(self.best_peer, self.ours)

    @property
    def speedup_over_conv2d(self) -> float | None:
        """Over F.conv2d at its best: cuDNN, on a GPU of NVIDIA's."""
        return _ratio(self.best(["F.conv2d"]), self.ours)

    @property
    def least_gain(self) -> float | None:
        """What a user gains who leaves the layout as it is, in the worse of the two: 1 is nothing."""
        gains = [_ratio(self._right("F.conv2d", at), self._right("auto", at)) for at in LAYOUTS]
        return min((gain for gain in gains if gain is not None), default=None)

    @property
    def host_ratio(self) -> float | None:
        """Host time of an eager call, over that of F.conv2d in the same layout."""
        theirs = self._right("F.conv2d", "channels_last")
        if self.ours is None or theirs is None or not theirs["host"]:
            return None
        return self.ours["host"] / theirs["host"]

    def _right(self, runner: str, layout: str) -> dict[str, Any] | None:
        row = self.rows.get((runner, layout))
        return row if row is not None and row["p50"] is not None else None


def _ratio(theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> float | None:
    return None if theirs is None or ours is None else theirs["p50"] / ours["p50"]


def cases(rows: Rows) -> list[Case]:
    """The rows case by case, in their order; of a row that was measured again, the last."""
    found: dict[tuple, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in CASE), {})[row["runner"], row["layout"]] = row
    return [Case(*key, of_case) for key, of_case in found.items()]


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return math.exp(sum(map(math.log, there)) / len(there)) if there else None


def least(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    return min((value for value in values if value is not None), default=None)


def in_short(rows: Rows) -> list[tuple[str, ...]]:
    """A line for each suite, batch, type and pass, under a head."""

    def key(case: Case) -> tuple:
        return case.suite, str(case.batch), case.type, case.pass_

    head = ("suite", "batch", "type", "pass", "layers", "of the floor", "least")
    head += ("over F.conv2d", "least", "over best peer", "least", "same layout, least")
    lines = [head]
    for name, group in groupby(sorted(cases(rows), key=key), key=key):
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
                times(geometric_mean(over_conv2d)),
                times(least(over_conv2d)),
                times(geometric_mean(over_peers)),
                times(least(over_peers)),
                times(least(case.least_gain for case in of_group)),
            )
        )
    return lines


def percent(value: float | None) -> str:
    """Such as 87%, or 0.4%."""
    return "" if value is None else f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1g}%"


def times(value: float | None) -> str:
    """Such as 4.02x."""
    return "" if value is None else f"{value:.2f}x"
