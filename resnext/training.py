"""What changes while a network is trained, and one step of it."""

from __future__ import annotations

import inspect
import math
import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from resnext.config import PRECISIONS, Options, Recipe, Settings, build
from resnext.data import Data
from resnext.data.augment import Augmentation
from resnext.data.loader import Batch, TrainLoader, micro_batch
from resnext.errors import UserError
from resnext.model import ResNeXt
from resnext.world import World


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The rate of update ``step``, counted from 0."""
    steps, warmup = recipe.epochs * steps_per_epoch, recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.learning_rate * (step + 1) / (warmup + 1)
    if recipe.schedule == "step":
        return recipe.learning_rate * 0.1 ** sum(step >= part * steps for part in recipe.milestones)
    return recipe.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


class RunningStatistics:
    """Moves the running statistics of batch norms once a step, towards the mean of all its passes.

    PyTorch's move with each forward pass, and each process has its own. Moved like this they are the same in
    all, and the same however the passes of a step are spread over processes.
    """

    def __init__(self, model: nn.Module, world: World, passes: int) -> None:
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.moving = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
        self.counts = [norm.num_batches_tracked for norm in norms]
        self.world, self.passes = world, passes

    def begin(self) -> None:
        """Before the first pass."""
        self.before = torch.cat(self.moving)  # all in one: a launch for each norm would take a GPU's time
        self.sums = torch.zeros_like(self.before)
        self.counts_before = torch.stack(self.counts)

    def after_pass(self) -> None:
        """After each pass of this process."""
        self.sums += torch.cat(self.moving)
        self._move(self.before)

    def end(self) -> None:
        """After the last."""
        self._move(self.world.sum(self.sums) / self.passes)
        torch._foreach_copy_(self.counts, list(self.counts_before + 1))

    def _move(self, to: Tensor) -> None:
        torch._foreach_copy_(self.moving, list(to.split([t.numel() for t in self.moving])))


class Training:
    """A network, what moves it, and how far it has come.

    Args:
        settings: of the run.
        data: what it is trained on.
        world: the processes that share the work.
        options: how it is carried out.

    Raises:
        UserError: settings that do not go together, or not with the device or the number of processes.
    """

    def __init__(self, settings: Settings, data: Data, world: World, options: Options) -> None:
        recipe = settings.recipe
        _check(recipe, data, world)
        self.network, self.recipe, self.world, self.options = settings.network, recipe, world, options
        self.micro = micro_batch(recipe.batch_size, recipe.micro_batch, world.size)
        self.passes = recipe.batch_size // self.micro
        self.grouped_input = self._tried_out(data)
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
        model = build(settings.network, len(data.classes), data.format.channels)
        if recipe.sync_batch_norm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model: ResNeXt = model.to(world.device, memory_format=self.layout)
        self.average = AveragedModel(self.model, use_buffers=True) if recipe.ema else None
        self.optimizer = _optimizer(self.model, recipe)
        scaled = recipe.precision == "float16"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)
        self.statistics = RunningStatistics(self.model, world, self.passes)
        self.forward = self._forward()
        self.epoch, self.step_of_epoch = 0, 0
        self.unreadable: set[str] = set()

    def _tried_out(self, data: Data) -> torch.Size:
        """The shape of what the first grouped convolution gets in a pass, tried on meta tensors.

        Raises:
            UserError: batch norm would get a single value of a channel, which has no variance.
        """
        recipe, processes, form, shapes = self.recipe, self.world.size, data.format, []
        seen = self.micro * (processes if recipe.sync_batch_norm else 1)
        with torch.device("meta"):
            twin = build(self.network, len(data.classes), form.channels)
            twin.layer1[0].conv2.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
            try:
                twin(torch.empty(seen, form.channels, form.size, form.size))
            except ValueError as error:
                if seen > 1:
                    raise
                shared = f", {processes} processes" if processes > 1 else ""
                raise UserError(
                    f"--batch-size {recipe.batch_size}, --micro-batch {recipe.micro_batch}{shared}: batch "
                    f"norm would see one image at a time, and {form.size} x {form.size} pixels become 1 x 1 "
                    "in this network: choose both so that it sees at least 2"
                ) from error
        return torch.Size((self.micro, *shapes[0][1:]))

    def _forward(self) -> nn.Module:
        """What is called in training: the model, in DistributedDataParallel, compiled."""
        forward, device = self.model, self.world.device
        if self.world.size > 1:
            # RunningStatistics sees to the buffers. Newer versions of PyTorch have another name for it.
            names = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
            device_ids = [device.index] if device.type == "cuda" else None
            forward = DistributedDataParallel(
                forward, device_ids, gradient_as_bucket_view=True, **{buffers: False}
            )
        return torch.compile(forward) if self.options.compile else forward

    @property
    def steps_per_epoch(self) -> int:
        """Updates in an epoch."""
        return self.loader.steps

    @property
    def step_number(self) -> int:
        """Updates made so far."""
        return self.epoch * self.steps_per_epoch + self.step_of_epoch

    @property
    def epochs(self) -> float:
        """Epochs trained so far."""
        return self.epoch + self.step_of_epoch / self.steps_per_epoch

    @property
    def tested(self) -> nn.Module:
        """The network that is tested and kept: the moving average, where there is one."""
        return self.average.module if self.average else self.model

    def step(self, batches: list[Batch]) -> Tensor:
        """One update by this process's passes: their (sum of losses, number right, number) (3,)."""
        self.model.train()
        rate = learning_rate(self.recipe, self.step_number, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
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
        """Adds the gradient of ``share`` of the mean loss; the last pass adds the other processes' too."""
        if batch.unreadable and not self.options.skip_corrupt:
            raise UserError(f"{batch.unreadable[0]}, or go on without it: --resume --skip-corrupt")
        if not len(batch.labels):
            raise UserError(f"no training image could be read; the first: {batch.unreadable[0]}")
        self.unreadable.update(batch.unreadable)
        device = self.world.device
        labels = batch.labels.to(device, non_blocking=True)
        images = batch.images.to(device, non_blocking=True)
        images, targets = self.augmentation(images, labels, batch.seed)
        precision = PRECISIONS[self.recipe.precision]
        alone = self.world.size == 1 or last
        with nullcontext() if alone else self._ddp().no_sync():
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = self.forward(images.contiguous(memory_format=self.layout))
                loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
            self.scaler.scale(loss * share).backward()
        right = (logits.detach().argmax(1) == labels).sum()
        n = len(labels)
        return torch.stack((loss.detach() * n, right.float(), loss.new_full((), n)))

    def _move_average(self, average: AveragedModel) -> None:
        """Moves the average towards the network: far at first, or a short training would be its start.

        ``update_parameters`` does the same, and makes the host wait for the GPU.
        """
        decay = min(self.recipe.ema, (1 + self.step_number) / (10 + self.step_number))
        pairs = list(zip(average.module.state_dict().values(), self.model.state_dict().values(), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), 1 - decay if average.n_averaged else 1.0)
        for count, of_model in (pair for pair in pairs if not pair[0].is_floating_point()):
            count.copy_(of_model)
        average.n_averaged += 1

    @property
    def is_finite(self) -> bool:
        """Whether every number of the network is one."""
        state = [t for t in self.model.state_dict().values() if t.is_floating_point()]
        return bool(torch.stack(torch._foreach_norm(state)).isfinite().all())

    def _ddp(self) -> DistributedDataParallel:
        return getattr(self.forward, "_orig_mod", self.forward)

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on to the bit."""
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
        """Goes back to where :meth:`state_dict` was called."""
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
        raise UserError(f"--batch-size {recipe.batch_size}: there are {len(data.train):,} training images")
    if recipe.warmup_epochs > recipe.epochs:
        raise UserError(f"--warmup-epochs {recipe.warmup_epochs:g}: there are {recipe.epochs} --epochs")
    for name in ("learning_rate", "weight_decay", "warmup_epochs", "mixup", "cutmix"):
        if not math.isfinite(getattr(recipe, name)):
            raise UserError(f"--{name.replace('_', '-')} {getattr(recipe, name)}: must be a finite number")
    if recipe.ema == 1:
        raise UserError("--ema 1: the average would never move; 0.9999 is usual")
    if recipe.sync_batch_norm and world.size > 1 and world.device.type == "cpu":
        raise UserError(
            "--sync-batch-norm: PyTorch's SyncBatchNorm runs on GPUs alone; on CPUs --micro-batch says how "
            "many images batch norm sees, whatever the number of processes"
        )


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=decay)


def _seed(seed: int) -> None:
    """Every generator that something in a network may draw from."""
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
    """Arrays as lists: a checkpoint holds what can be read without running code."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
