"""The summary that a training prints before it starts."""

from __future__ import annotations

from functools import partial

import torch
from rich.console import Console

import gconv
from resnext.config import PRECISIONS
from resnext.data import Data
from resnext.data.loader import micro_batch
from resnext.engine import Engine


def announce(engine: Engine, data: Data, console: Console) -> None:
    """Print the device, the backend of the grouped convolutions, the data, the network and the batch."""
    say = partial(console.print, soft_wrap=True)
    model, device, world, recipe = engine.model, engine.world.device, engine.world, engine.recipe
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    processes = f", processes: {world.size}" if world.size > 1 else ""
    say(f"device    {device}{threads}{processes}")
    say(f"backend   {_backend(engine)}")
    size = " x ".join(map(str, (data.format.channels, data.format.size, data.format.size)))
    say(
        f"data      {data.name}: {len(data.train):,} training images, {len(data.test):,} held out, "
        f"{len(data.classes)} classes, {size}"
    )
    parameters = sum(p.numel() for p in model.parameters())
    name = f"ResNeXt {model.repeats}, {model.cardinality} x {model.base_width}d"
    say(f"network   {name}, {parameters:,} parameters")
    say(f"batch     {_batch(engine)}")
    epochs = f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''}"
    say(f"recipe    {epochs}, {recipe.optimizer}, learning rate {recipe.learning_rate:g}\n")
    if engine.micro != (alone := micro_batch(recipe.batch_size, recipe.micro_batch, 1)):
        say(
            f"note: in a single process, batch norm would see {alone} images at a time; for the same results "
            f"there, pass --micro-batch {engine.micro}, or choose a larger --batch-size\n"
        )


def _backend(engine: Engine) -> str:
    """Return the backend that runs the first grouped convolution on training inputs, and the reason."""
    device, recipe = engine.world.device, engine.recipe
    x = torch.empty(engine.grouped_input, dtype=PRECISIONS[recipe.precision], device=device)
    conv = engine.model.get_submodule("layer1.0.conv2")
    assert isinstance(conv, gconv.GroupConv2d)
    with torch.autocast(device.type, x.dtype, enabled=x.dtype != torch.float32):
        choice = gconv.explain(conv, x.contiguous(memory_format=engine.layout))
    return f"{choice.backend}: {choice.reason}"


def _batch(engine: Engine) -> str:
    batch, passes, world = engine.recipe.batch_size, engine.passes, engine.world
    norm = "the images of all processes" if engine.recipe.sync_batch_norm else f"{engine.micro} at a time"
    if passes == 1:
        return f"{batch} images in one forward pass"
    shared = f", {passes // world.size} on each process" if world.size > 1 else ""
    faster = ""
    if world.device.type == "cuda" and passes > world.size:
        faster = f"; fewer passes are faster if memory allows: --micro-batch {batch // world.size}"
    return f"{batch} images in {passes} forward passes{shared}: batch norm sees {norm}{faster}"
