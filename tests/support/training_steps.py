"""A small training: its network, its recipe, and the losses of its first steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resnext.config import Network, Recipe

if TYPE_CHECKING:
    from resnext.training import Training

SMALL = Network((1, 1, 0, 0), cardinality=2, base_width=4, stem_width=8)
SGD = Recipe(2, 40, 10, "sgd", 0.1, 5e-4, "step", warmup_epochs=0.0)


def steps(made: Training, count: int = 3) -> list[float]:
    """Return the losses of the first ``count`` steps of the first epoch."""
    batches = made.loader.epoch(0)
    return [float(total / seen) for total, _, seen in (made.step(next(batches)) for _ in range(count))]
