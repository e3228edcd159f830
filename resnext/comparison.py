"""Statistics of the study of cardinality: whether networks differ by more than their seeds do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from resnext.evaluation import standard_error

SIGNIFICANT = 0.05


@dataclass
class Compared:
    """A network of the study and the errors of its trainings.

    Attributes:
        cardinality: number of groups, C.
        width: channels per group, d.
        parameters: number of parameters of the network.
        flops: multiply-adds for one image.
        errors: top-1 error in percent of each seed.
    """

    cardinality: int
    width: int
    parameters: int
    flops: int
    errors: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean error in percent."""
        return statistics.mean(self.errors.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the errors in percentage points, None if there is only one seed."""
        return statistics.stdev(self.errors.values()) if len(self.errors) > 1 else None


def verdict(compared: Sequence[Compared], images: int) -> str:
    """Describe in words whether the networks differ by more than their seeds do, by a one-way ANOVA.

    Args:
        compared: the networks, with the same number of seeds each.
        images: number of test images.
    """
    groups = [list(pair.errors.values()) for pair in compared]
    best, worst = min(compared, key=lambda p: p.mean), max(compared, key=lambda p: p.mean)
    apart = (
        f"{best.cardinality} x {best.width}d has the lowest mean error ({best.mean:.2f}%) and "
        f"{worst.cardinality} x {worst.width}d the highest ({worst.mean:.2f}%)"
    )
    chance = (
        f"With {images:,} images a single error has a standard error of "
        f"{standard_error(best.mean, images):.2f} points"
    )
    if len(groups[0]) < 2:
        return f"{apart}. One seed each can't show whether that is more than noise; use more. {chance}."
    p = _p_value(groups)
    within = statistics.mean(statistics.variance(group) for group in groups) ** 0.5
    noise = f"seeds of one network already differ by {within:.2f} points (standard deviation)"
    if p >= SIGNIFICANT:
        return (
            f"Within the noise: {apart}, but {noise}. If all networks were equally good, {p:.0%} of such "
            f"studies would show differences at least this large (one-way ANOVA, p = {p:.2f}). {chance}."
        )
    return (
        f"More than noise: {apart}, while {noise} (one-way ANOVA, p = {p:.2g}). The test doesn't show "
        f"which of the other networks differ. {chance}."
    )


def _p_value(groups: list[list[float]]) -> float:
    from scipy.stats import f_oneway

    if len({error for group in groups for error in group}) == 1:
        return 1.0
    if all(len(set(group)) == 1 for group in groups):
        return 0.0  # the test would divide by zero
    return float(f_oneway(*groups).pvalue)
