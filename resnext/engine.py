"""A training step and the state that it changes: network, optimizer, moving average and generators."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnext.config import PRECISIONS, Options, Recipe, Settings, build
from resnext.data import Data
from resnext.data.augment import Augmentation
from resnext.data.loader import Batch, TrainLoader, micro_batch
from resnext.errors import UserError
from resnext.model import ResNeXt
from resnext.torch_internals import copy_all, keep_buffers, place
from resnext.world import World

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    steps, warmup = recipe.epochs * steps_per_epoch, recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.learning_rate * (step + 1) / (warmup + 1)
    if recipe.schedule == "step":
        return recipe.learning_rate * 0.1 ** sum(step >= part * steps for part in recipe.milestones)
    return recipe.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


class RunningStatistics:
    """Updates the running statistics of batch norms once per step, with the mean over all its passes.

    PyTorch updates them in each forward pass, separately in each process. Updated once per step, they are the
    same in all processes, and don't depend on how the passes are distributed.
    """

    def __init__(self, model: nn.Module, world: World, passes: int) -> None:
        norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
        pairs = ((norm.running_mean, norm.running_var) for norm in norms)
        self.moving = [tensor for pair in pairs for tensor in pair if tensor is not None]
        self.counts = [n for norm in norms if (n := norm.num_batches_tracked) is not None]
        self.world, self.passes = world, passes

    def begin(self) -> None:
        """Remember the statistics before the first pass."""
        self.before = torch.cat(self.moving)  # one launch instead of one per norm
        self.sums = torch.zeros_like(self.before)
        self.counts_before = torch.stack(self.counts)

    def after_pass(self) -> None:
        """Add the statistics after a pass of this process to the sums, and restore those before it."""
        self.sums += torch.cat(self.moving)
        self._move(self.before)

    def end(self) -> None:
        """Set the statistics to their mean after the last pass."""
        self._move(self.world.sum(self.sums) / self.passes)
        copy_all(self.counts, list(self.counts_before + 1))

    def _move(self, to: Tensor) -> None:
        copy_all(self.moving, to.split([t.numel() for t in self.moving]))


class Engine:
    """The state of a training and the step that advances it.

    Args:
        settings: settings of the run.
        data: data set to train on.
        world: processes that share the work.
        options: options of the run.

    Raises:
        UserError: the settings don't fit together, or don't fit the data, the device or the number of
            processes.
    """

    def __init__(self, settings: Settings, data: Data, world: World, options: Options) -> None:
        recipe = settings.recipe
        _check(recipe, data, world)
        self.network, self.recipe, self.world, self.options = settings.network, recipe, world, options
        self.micro = micro_batch(recipe.batch_size, recipe.micro_batch, world.size)
        self.passes = recipe.batch_size // self.micro
        self.grouped_input = self._try_out(data)
        self.loader = TrainLoader(
            data.train,
            recipe.batch_size,
            self.micro,
            recipe.seed,
            world.rank,
            world.size,
            options.workers,
            options.skip_corrupt,
            pin=world.device.type == "cuda",
        )
        self.augmentation = Augmentation(
            data.name, data.format, len(data.classes), recipe.mixup, recipe.cutmix
        )
        _seed(recipe.seed)
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = place(_model(settings, data), world.device, self.layout)
        self.average = AveragedModel(self.model, use_buffers=True) if recipe.ema else None
        self.optimizer = _optimizer(self.model, recipe)
        scaled = recipe.precision == "float16"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)
        self.statistics = RunningStatistics(self.model, world, self.passes)
        self.parallel = _parallel(self.model, world) if world.size > 1 else None
        called = self.model if self.parallel is None else self.parallel
        self.forward: Callable[[Tensor], Tensor] = torch.compile(called) if options.compile else called
        self.epoch, self.step_of_epoch = 0, 0
        self.unreadable: set[str] = set()

    def _try_out(self, data: Data) -> torch.Size:
        """Return the input shape of the first grouped convolution in a pass, computed on the meta device.

        Raises:
            UserError: batch norm would get a single value per channel, which has no variance.
        """
        recipe, processes, form = self.recipe, self.world.size, data.format
        seen = self.micro * (processes if recipe.sync_batch_norm else 1)
        shapes: list[torch.Size] = []
        with torch.device("meta"):
            twin = build(self.network, len(data.classes), form.channels)
            conv = twin.get_submodule("layer1.0.conv2")
            conv.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
            try:
                twin(torch.empty(seen, form.channels, form.size, form.size))
            except ValueError as error:
                if seen > 1:
                    raise
                shared = f", {processes} processes" if processes > 1 else ""
                raise UserError(
                    f"--batch-size {recipe.batch_size}, --micro-batch {recipe.micro_batch}{shared}: batch "
                    f"norm would get one value per channel, because each pass has one image and the network "
                    f"shrinks {form.size} x {form.size} pixels to 1 x 1; choose both for at least 2 images "
                    "per pass"
                ) from error
        return torch.Size((self.micro, *shapes[0][1:]))

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch."""
        return self.loader.steps

    @property
    def step_number(self) -> int:
        """Number of steps made so far."""
        return self.epoch * self.steps_per_epoch + self.step_of_epoch

    @property
    def epochs(self) -> float:
        """Number of epochs trained so far, with a fraction in the middle of an epoch."""
        return self.epoch + self.step_of_epoch / self.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.recipe, self.step_number, self.steps_per_epoch)

    @property
    def tested(self) -> nn.Module:
        """The network to test and save: the moving average if there is one."""
        return self.average.module if self.average else self.model

    def batches(self) -> Iterator[list[Batch]]:
        """Yield this process's batches of each remaining step of the epoch."""
        return self.loader.epoch(self.epoch, self.step_of_epoch)

    def step(self, batches: list[Batch]) -> Tensor:
        """Update the weights once.

        Args:
            batches: a batch for each pass of this process.

        Returns:
            A tensor (3,) with the sum of losses, the number of correctly classified images and the number of
                images, for the images of this process.
        """
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.zero_grad()
        self.statistics.begin()
        counts = torch.zeros(3, device=self.world.device)
        for i, batch in enumerate(batches):
            counts += self._pass(batch, share=1 / len(batches), last=i == len(batches) - 1)
            self.statistics.after_pass()
        self.statistics.end()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self._move_average(self.average)
        self.step_of_epoch += 1
        return counts

    def _pass(self, batch: Batch, share: float, last: bool) -> Tensor:
        """Add the gradient of the mean loss times ``share``; the last pass also sums over processes."""
        if batch.unreadable and not self.options.skip_corrupt:
            raise UserError(f"{batch.unreadable[0]}, or skip it with --resume --skip-corrupt")
        if not len(batch.labels):
            raise UserError(f"none of the training images could be read; first error: {batch.unreadable[0]}")
        self.unreadable.update(batch.unreadable)
        device = self.world.device
        labels = batch.labels.to(device, non_blocking=True)
        images = batch.images.to(device, non_blocking=True)
        images, targets = self.augmentation(images, labels, batch.seed)
        precision = PRECISIONS[self.recipe.precision]
        with self.parallel.no_sync() if self.parallel and not last else nullcontext():
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = self.forward(images.contiguous(memory_format=self.layout))
                loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
            self.scaler.scale(loss * share).backward()
        right = (logits.detach().argmax(1) == labels).sum()
        n = len(labels)
        return torch.stack((loss.detach() * n, right.float(), loss.new_full((), n)))

    def _move_average(self, average: AveragedModel) -> None:
        """Move the average towards the network.

        Early steps move it further, because in a short training it would otherwise stay near the initial
        weights. ``AveragedModel.update_parameters`` does the same but makes the host wait for the GPU.
        """
        decay = min(self.recipe.ema, (1 + self.step_number) / (10 + self.step_number))
        pairs = list(zip(average.module.state_dict().values(), self.model.state_dict().values(), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        averages, weights = ([pair[i] for pair in floats] for i in (0, 1))
        get_ema_multi_avg_fn(decay if average.n_averaged else 0.0)(averages, weights, None)
        for count, of_model in (pair for pair in pairs if not pair[0].is_floating_point()):
            count.copy_(of_model)
        average.n_averaged += 1

    @property
    def is_finite(self) -> bool:
        """Whether all numbers of the network are finite."""
        state = [t for t in self.model.state_dict().values() if t.is_floating_point()]
        return bool(nn.utils.get_total_norm(state).isfinite())

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `load_state_dict` needs to continue with identical bits."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step_of_epoch": self.step_of_epoch,
            "unreadable": sorted(self.unreadable),
            "random": _random_state(self.world.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step_of_epoch = state["epoch"], state["step_of_epoch"]
        self.unreadable = set(state["unreadable"])
        _set_random_state(state["random"], self.world.device)


def _check(recipe: Recipe, data: Data, world: World) -> None:
    if recipe.batch_size > len(data.train):
        raise UserError(
            f"--batch-size must be at most {len(data.train):,}, the number of training images, "
            f"got {recipe.batch_size}"
        )
    if recipe.warmup_epochs > recipe.epochs:
        raise UserError(
            f"--warmup-epochs must be at most --epochs {recipe.epochs}, got {recipe.warmup_epochs:g}"
        )
    if recipe.ema == 1:
        raise UserError("--ema must be below 1, got 1, with which the average never moves; try 0.9999")
    if recipe.sync_batch_norm and world.size > 1 and world.device.type == "cpu":
        raise UserError(
            "--sync-batch-norm needs GPUs, got CPUs; drop it: there --micro-batch sets how many images batch "
            "norm sees, independently of the number of processes"
        )


def _model(settings: Settings, data: Data) -> ResNeXt:
    model = build(settings.network, len(data.classes), data.format.channels)
    if settings.recipe.sync_batch_norm:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place: only submodules are replaced
    return model


def _parallel(model: nn.Module, world: World) -> DistributedDataParallel:
    """Wrap ``model`` to average gradients over processes; `RunningStatistics` handles the buffers."""
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    options: dict[str, Any] = {"gradient_as_bucket_view": True, **keep_buffers()}
    return DistributedDataParallel(model, device_ids, **options)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=decay)


def _seed(seed: int) -> None:
    """Seed every generator that a network might draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _random_state(device: torch.device) -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": _plain(np.random.get_state(legacy=False)),
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])


def _plain(value: Any) -> Any:
    """Return arrays as lists, since a checkpoint contains only what can be read without running code."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
