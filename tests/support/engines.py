"""Small training runs on scikit-learn's digits: a network, a recipe, an engine and its losses."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console

from resnext.config import DEFAULT_OPTIONS, Network, Options, Recipe, Settings, Source
from resnext.data import Data, Images
from resnext.engine import Engine
from resnext.world import World

CPU = World(torch.device("cpu"))
QUIET = Console(quiet=True)
NETWORK = Network((1, 1, 0, 0), cardinality=2, base_width=4, stem_width=8)
SGD = Recipe(2, 40, 10, "sgd", 0.1, 5e-4, "step", warmup_epochs=0.0)


def make_engine(
    data: Data, recipe: Recipe = SGD, options: Options = DEFAULT_OPTIONS, **network: object
) -> Engine:
    """Return an engine on the CPU; ``network`` changes fields of ``NETWORK``."""
    settings = Settings(Source("digits"), replace(NETWORK, **network), recipe)
    return Engine(settings, data, CPU, options)


def losses(engine: Engine, count: int = 3) -> list[float]:
    """Run the next steps of the epoch and return their losses."""
    batches = engine.batches()
    return [float(total / seen) for total, _, seen in (engine.step(next(batches)) for _ in range(count))]


def few_of(data: Data, count: int = 80, test: int = 40) -> Data:
    """Return the first images of a dataset."""
    return replace(
        data,
        train=Images(data.train.images[:count], data.train.labels[:count]),
        test=Images(data.test.images[:test], data.test.labels[:test]),
    )
