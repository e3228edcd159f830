"""What a training says of itself before it starts."""

from __future__ import annotations

from functools import partial

import torch
from rich.console import Console

import gconv
from resnext.config import PRECISIONS
from resnext.data import Data
from resnext.data.loader import micro_batch
from resnext.training import Training


def announce(training: Training, data: Data, console: Console) -> None:
    """What is about to run, where, on what, and who runs its grouped convolutions."""
    say = partial(console.print, soft_wrap=True)
    model, device, world, recipe = training.model, training.world.device, training.world, training.recipe
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    processes = f", processes: {world.size}" if world.size > 1 else ""
    say(f"device    {device}{threads}{processes}")
    say(f"backend   {_backend(training)}")
    size = " x ".join(map(str, (data.format.channels, data.format.size, data.format.size)))
    say(
        f"data      {data.name}: {len(data.train):,} images to train on, {len(data.test):,} held out, "
        f"{len(data.classes)} classes, {size}"
    )
    parameters = sum(p.numel() for p in model.parameters())
    name = f"ResNeXt {model.repeats}, {model.cardinality} x {model.base_width}d"
    say(f"network   {name}, {parameters:,} parameters")
    say(f"batch     {_batch(training)}\n")
    if training.micro != (alone := micro_batch(recipe.batch_size, recipe.micro_batch, 1)):
        say(
            f"note: one process would show batch norm {alone} images at a time; a larger --batch-size, or "
            f"--micro-batch {training.micro} there, makes it the same\n"
        )


def _backend(training: Training) -> str:
    """Who runs the first grouped convolution, of an input as it will get in training."""
    device, recipe = training.world.device, training.recipe
    x = torch.empty(training.grouped_input, dtype=PRECISIONS[recipe.precision], device=device)
    conv = training.model.layer1[0].conv2
    with torch.autocast(device.type, x.dtype, enabled=x.dtype != torch.float32):
        choice = gconv.explain(conv, x.contiguous(memory_format=training.layout))
    return f"{choice.backend}: {choice.reason}"


def _batch(training: Training) -> str:
    batch, passes, world = training.recipe.batch_size, training.passes, training.world
    norm = "all processes' images" if training.recipe.sync_batch_norm else f"{training.micro} at a time"
    if passes == 1:
        return f"{batch} images in one pass"
    shared = f", {passes // world.size} on each process" if world.size > 1 else ""
    faster = ""
    if world.device.type == "cuda" and passes > world.size:
        faster = f"; fewer are faster, if memory allows: --micro-batch {batch // world.size}"
    return f"{batch} images in {passes} passes{shared}: batch norm sees {norm}{faster}"
