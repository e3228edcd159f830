"""Train the demo's network fused and unfused, with several seeds each: both should learn equally well."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import gconv
from resnext.config import Network, Recipe, Settings
from resnext.data import load_data
from resnext.loop import train
from resnext.world import World


@dataclass(frozen=True)
class AccuracyRow:
    """One training.

    Args:
        fused: whether the batch norms ran inside the convolutions.
        seed, epochs, backend: how the network was trained.
        accuracy, loss: accuracy in percent and mean cross-entropy on the 1,000 held-out digits.
        seconds: duration of the training.
        problem: always None; needed because rows of other tables can have a problem.
    """

    fused: bool
    seed: int
    epochs: int
    backend: str
    accuracy: float
    loss: float
    seconds: float
    problem: str | None = None


ACCURACY_CASE = ("fused", "seed", "epochs", "backend")


def cases(seeds: int, epochs: int, backend: str) -> Iterator[tuple[bool, int, int, str]]:
    """Yield all trainings, with those to be compared next to each other."""
    for seed, fused in product(range(seeds), (False, True)):
        yield fused, seed, epochs, backend


def measure(fused: bool, seed: int, epochs: int, backend: str, device: torch.device) -> AccuracyRow:
    """Train the demo's network and return its accuracy and loss."""
    recipe = replace(Recipe(seed=seed).lasting(epochs), micro_batch=Recipe.batch_size)
    settings = Settings(network=Network(fused=fused), recipe=recipe)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, gconv.backend(backend):
        run, world = Path(folder) / "run", World(device)
        result = train(settings, load_data("mnist5k"), run, world, Console(quiet=True))
    accuracy, loss = round(result.accuracy, 2), round(result.loss, 4)
    return AccuracyRow(fused, seed, epochs, backend, accuracy, loss, round(time.perf_counter() - start, 1))


def accuracy_table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a line for each backend, number of epochs and network, with the accuracies of all seeds."""
    table = [("network", "backend", "epochs", "accuracy of each seed", "mean", "deviation", "loss")]
    ways = dict.fromkeys((row["backend"], row["epochs"], row["fused"]) for row in rows)
    for backend, epochs, fused in sorted(ways):
        of = [
            row for row in rows if (row["backend"], row["epochs"], row["fused"]) == (backend, epochs, fused)
        ]
        accuracies = [row["accuracy"] for row in of]
        deviation = f"{statistics.stdev(accuracies):.2f}" if len(of) > 1 else ""
        table.append(
            (
                "fused" if fused else "unfused",
                backend,
                str(epochs),
                ", ".join(f"{accuracy:.1f}%" for accuracy in accuracies),
                f"{statistics.mean(accuracies):.2f}%",
                deviation,
                f"{statistics.mean(row['loss'] for row in of):.4f}",
            )
        )
    return table
