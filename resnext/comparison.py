"""The errors of networks of equal complexity, and whether they differ by more than their seeds do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from resnext.evaluation import standard_error

SIGNIFICANT = 0.05


@dataclass
class Compared:
    """A pair of cardinality and width, and the errors of its trainings.

    Attributes:
        cardinality, width: C and d.
        parameters: of the network.
        flops: multiply-adds for one image.
        errors: top-1, percent, by seed.
    """

    cardinality: int
    width: int
    parameters: int
    flops: int
    errors: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean of the errors."""
        return statistics.mean(self.errors.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the errors, None if there is only one."""
        return statistics.stdev(self.errors.values()) if len(self.errors) > 1 else None


def verdict(compared: Sequence[Compared], images: int) -> str:
    """Return in words whether the pairs differ by more than their seeds do, by a one-way ANOVA.

    Args:
        compared: pairs with the same number of errors each.
        images: number of images that they were tested on.
    """
    groups = [list(pair.errors.values()) for pair in compared]
    best, worst = min(compared, key=lambda p: p.mean), max(compared, key=lambda p: p.mean)
    apart = (
        f"{best.cardinality} x {best.width}d has the lowest mean error, {best.mean:.2f}%, "
        f"{worst.cardinality} x {worst.width}d the highest, {worst.mean:.2f}%"
    )
    chance = (
        f"With {images:,} images a single error is known to {standard_error(best.mean, images):.2f} points"
    )
    if len(groups[0]) < 2:
        return f"{apart}. With one seed each, nobody can tell whether that is more than noise. {chance}."
    p = _p_value(groups)
    within = statistics.mean(statistics.variance(group) for group in groups) ** 0.5
    noise = f"seeds of one network differ by {within:.2f} points (standard deviation)"
    if p >= SIGNIFICANT:
        return (
            f"Within the noise: {apart}, but {noise}; networks that do not differ would show as much in "
            f"{p:.0%} of such studies (one-way ANOVA, p = {p:.2f}). {chance}."
        )
    return (
        f"More than noise: {apart}, where {noise} (one-way ANOVA, p = {p:.2g}); which of the others differ, "
        f"this does not say. {chance}."
    )


def _p_value(groups: list[list[float]]) -> float:
    from scipy.stats import f_oneway

    if len({error for group in groups for error in group}) == 1:
        return 1.0
    if all(len(set(group)) == 1 for group in groups):
        return 0.0  # the test would divide by zero
    return float(f_oneway(*groups).pvalue)
