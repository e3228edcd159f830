"""Complete trainings: accuracy, errors, signals, logs, and several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from commands import rows
from engines import CPU, NETWORK, QUIET, SGD, few_of
from torch import Tensor

from resnext import checkpoint, plots
from resnext.config import Options, Recipe, Settings, Source
from resnext.data import Data
from resnext.data.loader import Batch
from resnext.engine import Engine
from resnext.errors import UserError
from resnext.interruption import Interrupted
from resnext.loop import train

ROOT = Path(__file__).parents[2]


def test_a_loss_that_is_no_number_ends_it_and_keeps_the_last_good_network(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, data = Settings(Source("digits"), NETWORK, SGD), few_of(digits)
    far = replace(settings, recipe=replace(SGD, learning_rate=1e20))
    with pytest.raises(UserError, match=r"diverged: the loss of step .*; start again with a lower --lear"):
        train(far, data, tmp_path / "a", CPU, QUIET)
    step, calls = Engine.step, []

    def poisoned(self: Engine, batches: list[Batch]) -> Tensor:
        calls.append(1)
        return step(self, batches) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(Engine, "step", poisoned)
    with pytest.raises(UserError, match="the loss of step 4 is nan"):
        train(settings, data, tmp_path / "b", CPU, QUIET)
    assert all(t.isfinite().all() for t in checkpoint.load(tmp_path / "b").weights.values())

    def ruined(self: Engine, batches: list[Batch]) -> Tensor:
        counts = step(self, batches)
        if self.step_number == 4:
            self.model.fc.weight.data[0, 0] = torch.nan
        return counts

    monkeypatch.setattr(Engine, "step", ruined)
    with pytest.raises(UserError, match="diverged: step 4 made weights infinite or NaN"):
        train(settings, data, tmp_path / "c", CPU, QUIET)
    kept = checkpoint.load(tmp_path / "c")
    assert kept.epochs == 1 and all(t.isfinite().all() for t in kept.weights.values())


def test_a_signal_while_it_draws_still_ends_what_comes_after(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = plots.training_curves

    def interrupted(*arguments: object) -> None:
        draw(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(plots, "training_curves", interrupted)
    settings = Settings(Source("digits"), NETWORK, SGD)
    with pytest.raises(Interrupted, match=r"checkpoint.pt is saved \(2 epochs\)") as stopped:
        train(settings, few_of(digits), tmp_path, CPU, QUIET)
    assert stopped.value.number == signal.SIGTERM and (tmp_path / "samples").is_dir()


@pytest.mark.parametrize("what", ["resnext.run.evaluate", "resnext.checkpoint.save"])
def test_the_time_of_an_epoch_is_that_of_its_steps(
    what: str, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of testing and saving, an hour here, isn't counted."""
    clock, hours = time.perf_counter, [0]
    module, _, name = what.rpartition(".")
    original = getattr(sys.modules[module], name)

    def slow(*arguments: Any, **options: Any) -> Any:
        hours[0] += 1
        return original(*arguments, **options)

    monkeypatch.setattr(what, slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * hours[0])
    train(Settings(Source("digits"), NETWORK, SGD), few_of(digits), tmp_path, CPU, QUIET)
    assert hours[0] >= 2 and all(float(row["seconds"]) < 3600 for row in rows(tmp_path / "summary.csv"))


def test_training_learns(digits: Data, tmp_path: Path) -> None:
    recipe = Recipe(epochs=6, batch_size=20, micro_batch=20, warmup_epochs=1.0)
    result = train(Settings(Source("digits"), NETWORK, recipe), digits, tmp_path, CPU, QUIET)
    assert result.accuracy > 80, "guessing gets 10% of 10 classes right"
    assert result.top5 > result.accuracy


def test_tensorboard_gets_what_the_tables_have(digits: Data, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = Settings(Source("digits"), NETWORK, SGD)
    train(settings, few_of(digits), tmp_path, CPU, QUIET, options=Options(tensorboard=True))
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = [float(row["loss"]) for row in rows(tmp_path / "steps.csv")]
    assert [e.value for e in events.Scalars("loss/step")] == pytest.approx(losses)
    written = [e.value for e in events.Scalars("accuracy/test")]
    tested = [float(row["test_accuracy"]) for row in rows(tmp_path / "summary.csv")]
    assert written == pytest.approx(tested, abs=1e-3)


def test_tensorboard_that_is_missing_is_named(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    settings = Settings(Source("digits"), NETWORK, SGD)
    with pytest.raises(
        UserError, match="--tensorboard needs TensorBoard, which isn't installed: pip install tensorboard"
    ):
        train(settings, few_of(digits), tmp_path, CPU, QUIET, options=Options(tensorboard=True))


RUN = (
    *("--data", "cifar10", "--epochs", "2", "--batch-size", "40", "--micro-batch", "20", "--device", "cpu"),
    *("--repeats", "1,1,0,0", "--stem-width", "8", "--cardinality", "2", "--base-width", "4"),
    *("--mixup", "0.2", "--label-smoothing", "0.1", "--ema", "0.9", "--learning-rate", "0.05"),
)


def run(folder: Path, name: str, *more: str, processes: int = 1) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m"]
    if processes > 1:
        # Its own port, since other tests start processes at the same time.
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.run(
        [*launch, "resnext", "train", *RUN, str(folder / "cifar.tar.gz"), "--name", name, *more],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )


@pytest.mark.long
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Compares the losses of each step, the test results and the weights, with torchrun."""
    datasets.cifar10_binary(tmp_path / "cifar.tar.gz")
    for name, processes in (("one", 1), ("two", 2)):
        done = run(tmp_path, name, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("batch norm sees 20 at a time") == 1, "each process printed"
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    for ours, theirs in zip(rows(one / "steps.csv"), rows(two / "steps.csv"), strict=True):
        assert abs(float(ours.pop("loss")) - float(theirs.pop("loss"))) < 1e-5
        assert ours == theirs
    for ours, theirs in zip(rows(one / "summary.csv"), rows(two / "summary.csv"), strict=True):
        for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "test_top5"):
            assert abs(float(ours[key]) - float(theirs[key])) < 1e-4, key
    assert len(rows(one / "steps.csv")) == 10 and len(rows(one / "summary.csv")) == 2
    weights = [checkpoint.load(folder).weights for folder in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.long
def test_an_error_of_all_processes_is_printed_once(tmp_path: Path) -> None:
    datasets.cifar10_binary(tmp_path / "cifar.tar.gz")
    done = run(tmp_path, "x", "--batch-size", "41", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: --batch-size must be a multiple of the 2 processes, got 41") == 1
    assert "resnext/engine.py" not in done.stderr, "a traceback from resnext"
