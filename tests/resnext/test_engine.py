"""Training steps against a hand-written loop; precision, layout, moving average, learning rate."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engines import CPU, NETWORK, SGD, losses, make_engine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gconv
from resnext.config import Network, Options, Recipe, Settings, Source, defaults
from resnext.data import Data
from resnext.engine import Engine, learning_rate
from resnext.errors import UserError
from resnext.evaluation import evaluate
from resnext.world import World


def test_a_step_is_that_of_the_textbook(digits: Data) -> None:
    """Four passes of ten images give one update with the mean gradients and running statistics."""
    made = make_engine(digits)
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
            assert int(value) == 1, "a step updates the statistics once"


def test_smoothing_and_mixed_targets_are_trained_on(digits: Data) -> None:
    recipe = replace(SGD, label_smoothing=0.2, mixup=1.0)
    made = make_engine(digits, recipe)
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
    made = make_engine(digits, replace(SGD, ema=0.8))
    batches = made.loader.epoch(0)
    average = None
    for update in range(25):
        made.step(next(batches))
        now = made.model.fc.weight.detach().clone()
        decay = min(0.8, (1 + update) / (10 + update))
        average = now if average is None else decay * average + (1 - decay) * now
    torch.testing.assert_close(made.tested.fc.weight, average)
    assert made.tested is not made.model and not torch.equal(made.tested.fc.weight, made.model.fc.weight)
    assert make_engine(digits).tested is not made.model


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_autocast_trains_as_float32_does_but_for_roundings(
    digits: Data, precision: str, bound: float
) -> None:
    full, half = (losses(make_engine(digits, replace(SGD, precision=p))) for p in ("float32", precision))
    differences = [abs(a - b) for a, b in zip(full, half, strict=True)]
    assert 0 < max(differences) < bound, differences
    assert make_engine(digits, replace(SGD, precision=precision)).scaler.is_enabled() == (
        precision == "float16"
    )


def test_a_step_of_infinite_gradients_is_left_out_and_the_scale_falls(digits: Data) -> None:
    made = make_engine(digits, replace(SGD, precision="float16"))
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(list(made.model.parameters()))
    losses(made, 1)
    assert all(map(torch.equal, before, made.model.parameters()))
    assert made.scaler.get_scale() < 2.0**40


def test_layout_backend_and_fusion_do_not_change_the_numbers(digits: Data) -> None:
    expected = losses(make_engine(digits))
    contiguous = make_engine(digits, options=Options(channels_last=False))
    assert contiguous.model.layer1[0].conv2.weight.is_contiguous()
    with gconv.backend("reference"):
        reference = losses(make_engine(digits))
    for other in (losses(contiguous), reference, losses(make_engine(digits, fused=True))):
        assert max(abs(a - b) for a, b in zip(expected, other, strict=True)) < 1e-4, other


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_training_gives_the_same(
    digits: Data, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    plain, compile = losses(make_engine(digits)), torch.compile
    compiled = []

    def noting(model: nn.Module) -> Callable[..., Tensor]:
        compiled.append(model)
        return compile(model, backend=backend)

    monkeypatch.setattr(torch, "compile", noting)
    made = make_engine(digits, options=Options(compile=True))
    assert max(abs(a - b) for a, b in zip(plain, losses(made), strict=True)) < 1e-4
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
        (
            replace(SGD, batch_size=2000),
            CPU,
            "--batch-size must be at most 1,000, the number of training images, got 2000",
        ),
        (replace(SGD, warmup_epochs=3.0), CPU, "--warmup-epochs must be at most --epochs 2, got 3"),
        (
            replace(SGD, sync_batch_norm=True),
            World(CPU.device, 0, 2),
            "--sync-batch-norm needs GPUs, got CPUs",
        ),
        (
            replace(SGD, batch_size=40),
            World(CPU.device, 0, 3),
            "--batch-size must be a multiple of the 3 processes, got 40",
        ),
        (
            replace(SGD, batch_size=37),
            CPU,
            "--batch-size 37: 37 images per process can't be split into equal passes of 2 to 10 images",
        ),
        (replace(SGD, ema=1.0), CPU, "--ema must be below 1, got 1"),
    ):
        with pytest.raises(UserError, match=message):
            Engine(Settings(Source("digits"), NETWORK, recipe), digits, world, Options())
    synced = make_engine(digits, replace(SGD, sync_batch_norm=True)).model
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())
    assert not any(type(m) is nn.BatchNorm2d for m in synced.modules())


class NoDoubles(TorchDispatchMode):
    """Rejects float64, which Apple GPUs don't have."""

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        result = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.dtype == torch.float64]
        assert not found, func
        return result


def test_a_step_and_a_test_need_no_float64(digits: Data) -> None:
    made = make_engine(digits, replace(SGD, label_smoothing=0.1, ema=0.9, precision="bfloat16"))
    with NoDoubles():
        losses(made, 2)
        evaluate(made.tested, digits.test, digits.format, CPU)


def test_generators_go_on_too(digits: Data) -> None:
    """A ResNeXt doesn't use random generators, but a layer that someone adds to it may."""
    made = make_engine(digits)
    state = made.state_dict()

    def draws() -> tuple[list[float], float, float]:
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    first, second = draws(), draws()
    made.load_state_dict(state)
    assert draws() == first != second
