"""Training: a step against the same by hand, any number of processes, precision, layout, averages, rates."""

from __future__ import annotations

import copy
import csv
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_steps import SGD, SMALL, steps

import gconv
from resnext import checkpoint, plots
from resnext.config import Network, Options, Recipe, Settings, Source, defaults
from resnext.data import Data, Images
from resnext.data.loader import Batch
from resnext.errors import UserError
from resnext.evaluation import evaluate
from resnext.interruption import Interrupted
from resnext.train import train
from resnext.training import Training, learning_rate
from resnext.world import World

ROOT = Path(__file__).parents[2]
CPU = World(torch.device("cpu"))


def training(data: Data, recipe: Recipe = SGD, options: Options | None = None, **network: object) -> Training:
    settings = Settings(Source("digits"), replace(SMALL, **network), recipe)
    return Training(settings, data, CPU, options or Options())


def test_a_step_is_that_of_the_textbook(digits: Data) -> None:
    """Four passes of ten images: the mean of gradients and of running statistics, one update."""
    made = training(digits)
    model = copy.deepcopy(made.model)
    batches = next(made.loader.epoch(0))
    made.step(batches)

    losses, moments = [], []
    for batch in batches:
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.reset_running_stats()
        images, _ = made.augmentation(batch.images, batch.labels, batch.seed)
        loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), batch.labels)
        (loss / 4).backward()
        losses.append(loss)
        moments.append({k: v.clone() for k, v in model.named_buffers() if "running" in k})
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    optimizer.step()
    for (name, ours), theirs in zip(made.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    for name, value in made.model.named_buffers():
        if "running" in name:
            expected = torch.stack([moment[name] for moment in moments]).mean(0)
            torch.testing.assert_close(value, expected, msg=name)
        else:
            assert int(value) == 1, "a step is one update of the statistics"


def test_smoothing_and_mixed_targets_are_trained_on(digits: Data) -> None:
    recipe = replace(SGD, label_smoothing=0.2, mixup=1.0)
    made = training(digits, recipe)
    model = copy.deepcopy(made.model).train()
    batches = next(made.loader.epoch(0))
    total, right, seen = made.step(batches).tolist()
    expected, hits = 0.0, 0
    for batch in batches:
        images, targets = made.augmentation(batch.images, batch.labels, batch.seed)
        logits = model(images.contiguous(memory_format=torch.channels_last)).detach()
        smooth = 0.8 * targets + 0.2 / 10
        expected += float(-(smooth * logits.log_softmax(1)).sum())
        hits += int((logits.argmax(1) == batch.labels).sum())
    assert abs(total - expected) < 1e-3 and (right, seen) == (hits, 40)


def test_the_average_follows_the_weights(digits: Data) -> None:
    made = training(digits, replace(SGD, ema=0.8))
    batches = made.loader.epoch(0)
    average = None
    for update in range(25):
        made.step(next(batches))
        now = made.model.fc.weight.detach().clone()
        decay = min(0.8, (1 + update) / (10 + update))
        average = now if average is None else decay * average + (1 - decay) * now
    torch.testing.assert_close(made.tested.fc.weight, average)
    assert made.tested is not made.model and not torch.equal(made.tested.fc.weight, made.model.fc.weight)
    assert training(digits).tested is not made.model


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_autocast_trains_as_float32_does_but_for_roundings(
    digits: Data, precision: str, bound: float
) -> None:
    full, half = (steps(training(digits, replace(SGD, precision=p))) for p in ("float32", precision))
    differences = [abs(a - b) for a, b in zip(full, half, strict=True)]
    assert 0 < max(differences) < bound, differences
    assert training(digits, replace(SGD, precision=precision)).scaler.is_enabled() == (precision == "float16")


def test_a_step_of_infinite_gradients_is_left_out_and_the_scale_falls(digits: Data) -> None:
    made = training(digits, replace(SGD, precision="float16"))
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(list(made.model.parameters()))
    steps(made, 1)
    assert all(map(torch.equal, before, made.model.parameters()))
    assert made.scaler.get_scale() < 2.0**40


def test_layout_backend_and_fusion_do_not_change_the_numbers(digits: Data) -> None:
    expected = steps(training(digits))
    contiguous = training(digits, options=Options(channels_last=False))
    assert contiguous.model.layer1[0].conv2.weight.is_contiguous()
    with gconv.backend("reference"):
        reference = steps(training(digits))
    for other in (steps(contiguous), reference, steps(training(digits, fused=True))):
        assert max(abs(a - b) for a, b in zip(expected, other, strict=True)) < 1e-4, other


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_training_gives_the_same(
    digits: Data, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    plain, compile = steps(training(digits)), torch.compile
    compiled = []

    def noting(model: nn.Module) -> Callable[..., Tensor]:
        compiled.append(model)
        return compile(model, backend=backend)

    monkeypatch.setattr(torch, "compile", noting)
    made = training(digits, options=Options(compile=True))
    assert max(abs(a - b) for a, b in zip(plain, steps(made), strict=True)) < 1e-4
    assert compiled == [made.model]


def test_learning_rates_rise_and_fall_as_asked() -> None:
    cosine = Recipe(epochs=10, learning_rate=1.0, warmup_epochs=2.0)
    rates = [learning_rate(cosine, step, 10) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 21) and rates[19] == pytest.approx(20 / 21) and rates[20] == 1.0
    assert rates[60] == pytest.approx(0.5) and 0 < rates[99] < 0.001
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)
    cifar = defaults("cifar10").recipe
    tenths = {step: learning_rate(cifar, step * 10, 10) for step in (0, 149, 150, 224, 225, 299)}
    assert list(tenths.values()) == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert Recipe().lasting(1).warmup_epochs == 0.2 and Recipe().lasting(100).warmup_epochs == 1.0


def test_the_recipes_are_the_papers() -> None:
    cifar, imagenet = defaults("cifar100"), defaults("folder")
    assert (cifar.recipe.epochs, cifar.recipe.batch_size, cifar.recipe.weight_decay) == (300, 128, 5e-4)
    assert (imagenet.recipe.batch_size, imagenet.recipe.weight_decay) == (256, 1e-4)
    assert cifar.network == Network.of_variant("resnext29_8x64d")
    assert imagenet.network == Network.of_variant("resnext50_32x4d")
    assert {s.recipe.optimizer for s in (cifar, imagenet)} == {"sgd"}
    for settings in (cifar, imagenet, defaults("mnist5k")):
        assert Settings.from_dict(settings.to_dict()) == settings


def test_what_does_not_go_together_is_refused(digits: Data) -> None:
    for recipe, world, message in (
        (replace(SGD, batch_size=2000), CPU, "--batch-size 2000: there are 1,000 training images"),
        (replace(SGD, warmup_epochs=3.0), CPU, "--warmup-epochs 3: there are 2 --epochs"),
        (replace(SGD, sync_batch_norm=True), World(CPU.device, 0, 2), "SyncBatchNorm runs on GPUs alone"),
        (replace(SGD, batch_size=40), World(CPU.device, 0, 3), "3 processes cannot share it"),
        (replace(SGD, batch_size=37), CPU, "--batch-size 37: passes of the same size, at most 10 images"),
        (replace(SGD, ema=1.0), CPU, "--ema 1: the average would never move"),
    ):
        with pytest.raises(UserError, match=message):
            Training(Settings(Source("digits"), SMALL, recipe), digits, world, Options())
    synced = training(digits, replace(SGD, sync_batch_norm=True)).model
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())
    assert not any(type(m) is nn.BatchNorm2d for m in synced.modules())


def few(data: Data, count: int = 80, test: int = 40) -> Data:
    return replace(
        data,
        train=Images(data.train.images[:count], data.train.labels[:count]),
        test=Images(data.test.images[:test], data.test.labels[:test]),
    )


def test_a_loss_that_is_no_number_ends_it_and_keeps_the_last_good_network(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, data = Settings(Source("digits"), SMALL, SGD), few(digits)
    far = replace(settings, recipe=replace(SGD, learning_rate=1e20))
    with pytest.raises(UserError, match=r"diverged, the loss of step .*: start anew, with a lower --lear"):
        train(far, data, tmp_path / "a", CPU, quiet())
    step, calls = Training.step, []

    def poisoned(self: Training, batches: list[Batch]) -> Tensor:
        calls.append(1)
        return step(self, batches) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(Training, "step", poisoned)
    with pytest.raises(UserError, match="the loss of step 4 is nan"):
        train(settings, data, tmp_path / "b", CPU, quiet())
    assert all(t.isfinite().all() for t in checkpoint.load(tmp_path / "b").weights.values())

    def ruined(self: Training, batches: list[Batch]) -> Tensor:
        counts = step(self, batches)
        if self.step_number == 4:
            self.model.fc.weight.data[0, 0] = torch.nan
        return counts

    monkeypatch.setattr(Training, "step", ruined)
    with pytest.raises(UserError, match="diverged, step 4 left weights of nan"):
        train(settings, data, tmp_path / "c", CPU, quiet())
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
    settings = Settings(Source("digits"), SMALL, SGD)
    with pytest.raises(Interrupted, match=r"checkpoint.pt is whole \(2 epochs\)") as stopped:
        train(settings, few(digits), tmp_path, CPU, quiet())
    assert stopped.value.number == signal.SIGTERM and (tmp_path / "samples").is_dir()


class NoDoubles(TorchDispatchMode):
    """Refuses float64, which Apple's GPUs do not have."""

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        result = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.dtype == torch.float64]
        assert not found, func
        return result


def test_a_step_and_a_test_need_no_float64(digits: Data) -> None:
    made = training(digits, replace(SGD, label_smoothing=0.1, ema=0.9, precision="bfloat16"))
    with NoDoubles():
        steps(made, 2)
        evaluate(made.tested, digits.test, digits.format, CPU)


def quiet() -> Console:
    return Console(quiet=True)


def test_training_learns(digits: Data, tmp_path: Path) -> None:
    recipe = Recipe(epochs=6, batch_size=20, micro_batch=20, warmup_epochs=1.0)
    result = train(Settings(Source("digits"), SMALL, recipe), digits, tmp_path, CPU, quiet())
    assert result.accuracy > 80, "of 10 classes, guessing gets 10%"
    assert result.top5 > result.accuracy


def test_generators_go_on_too(digits: Data) -> None:
    """Nothing in a ResNeXt draws from them; what somebody puts into one may."""
    made = training(digits)
    state = made.state_dict()

    def draws() -> tuple[list[float], float, float]:
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    first, second = draws(), draws()
    made.load_state_dict(state)
    assert draws() == first != second


def test_tensorboard_gets_what_the_tables_have(digits: Data, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = Settings(Source("digits"), SMALL, SGD)
    train(settings, few(digits), tmp_path, CPU, quiet(), options=Options(tensorboard=True))
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = [float(row["loss"]) for row in rows(tmp_path, "steps.csv")]
    assert [e.value for e in events.Scalars("loss/step")] == pytest.approx(losses)
    written = [e.value for e in events.Scalars("accuracy/test")]
    tested = [float(row["test_accuracy"]) for row in rows(tmp_path, "summary.csv")]
    assert written == pytest.approx(tested, abs=1e-3)


def test_tensorboard_that_is_missing_is_named(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    settings = Settings(Source("digits"), SMALL, SGD)
    with pytest.raises(UserError, match="--tensorboard: it is not installed"):
        train(settings, few(digits), tmp_path, CPU, quiet(), options=Options(tensorboard=True))


RUN = (
    *("--data", "cifar10", "--epochs", "2", "--batch-size", "40", "--micro-batch", "20", "--device", "cpu"),
    *("--repeats", "1,1,0,0", "--stem-width", "8", "--cardinality", "2", "--base-width", "4"),
    *("--mixup", "0.2", "--label-smoothing", "0.1", "--ema", "0.9", "--learning-rate", "0.05"),
)


def run(folder: Path, name: str, *more: str, processes: int = 1) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m"]
    if processes > 1:
        # A port of its own: other tests start processes beside it.
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.run(
        [*launch, "resnext", "train", *RUN, str(folder / "cifar.tar.gz"), "--name", name, *more],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / name).read_text().splitlines()))


@pytest.mark.long
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """torchrun for real: losses step by step, what is tested, and the network."""
    datasets.cifar10_binary(tmp_path / "cifar.tar.gz")
    for name, processes in (("one", 1), ("two", 2)):
        done = run(tmp_path, name, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("batch norm sees 20 at a time") == 1, "each process printed"
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    for ours, theirs in zip(rows(one, "steps.csv"), rows(two, "steps.csv"), strict=True):
        assert abs(float(ours.pop("loss")) - float(theirs.pop("loss"))) < 1e-5
        assert ours == theirs
    for ours, theirs in zip(rows(one, "summary.csv"), rows(two, "summary.csv"), strict=True):
        for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "test_top5"):
            assert abs(float(ours[key]) - float(theirs[key])) < 1e-4, key
    assert len(rows(one, "steps.csv")) == 10 and len(rows(one, "summary.csv")) == 2
    weights = [checkpoint.load(folder).weights for folder in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.long
def test_an_error_of_all_processes_is_printed_once(tmp_path: Path) -> None:
    datasets.cifar10_binary(tmp_path / "cifar.tar.gz")
    done = run(tmp_path, "x", "--batch-size", "41", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: --batch-size 41: 2 processes cannot share it evenly") == 1
    assert "resnext/training.py" not in done.stderr, "a traceback of ours"
