"""The memory traffic of a network, against a count by hand, and the profiled times of its stages."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from rich.console import Console

import resnext
from resnext import ResNeXt, complexity, measured, tables

FORMS = ("inference", "fused_inference", "training", "fused_training")
small = partial(ResNeXt, (1, 1, 0, 0), 4, 4, 10, stem="small", stem_width=16)


def test_a_block_by_hand() -> None:
    """Counts the inputs and outputs of every operator in the second block of ResNeXt-50's first stage."""
    pixels = 56 * 56
    x = y = 256 * pixels
    z = 128 * pixels
    conv1, conv2, conv3 = x + z, z + z, z + y
    elementwise, addition = 2, 3  # tensors that an operator with one and with two inputs moves
    inference = conv1 + conv2 + conv3 + 4 * elementwise * z + elementwise * y + addition * y + elementwise * y
    fused = inference - 2 * elementwise * z  # norm and ReLU after conv2 run in its kernel
    norm, relu = 3 + 2 + 3, 2 + 3  # forward (statistics, norm) and backward (sums, gradient); ReLU both ways
    both_ways = 3  # the three passes of a convolution, each of which moves two tensors
    training = both_ways * (conv1 + conv2 + conv3) + 2 * (norm + relu) * z + (norm + relu) * y
    training += addition * y + addition * x
    # What remains of the norms and ReLUs around conv2: statistics of z1; norm and ReLU of z2; its sums and
    # gradient; the gradient of z1. The input gradient also reads z1; the weight gradient reads it anyway.
    middle = 1 + 2 + 2 + 3 + 3 + 1
    fused_training = training - 2 * (norm + relu) * z + middle * z
    with torch.device("meta"):
        model = ResNeXt((2, 1, 1, 1), 32, 4)
        one = ResNeXt((1, 1, 1, 1), 32, 4)
    (_, two, *_), (_, first, *_) = (complexity.traffic(net) for net in (model, one))
    for form, right in zip(FORMS, (inference, fused, training, fused_training), strict=True):
        assert getattr(two, form).total - getattr(first, form).total == 2 * right, form


def test_bytes_follow_the_type_and_the_pixels() -> None:
    with torch.device("meta"):
        model = resnext.resnext50_32x4d()
    half, full = (complexity.traffic(model, itemsize=itemsize) for itemsize in (2, 4))
    for a, b in zip(half[1:], full[1:], strict=True):
        assert b.training.total == 2 * a.training.total
    wide = complexity.traffic(model, (448, 224))
    assert wide[1].fused_training.total == 2 * half[1].fused_training.total
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        complexity.traffic(model, 0)


def test_fusing_brings_resnext_near_resnet() -> None:
    """By traffic, ResNeXt-50 trains at 0.79 of ResNet-50's speed, fused at 0.94, as the README says."""
    with torch.device("meta"):
        ours, other = resnext.resnext50_32x4d(), resnext.resnet50()
    resnext_, resnet = (complexity.total_traffic(complexity.traffic(net)) for net in (ours, other))
    assert round(resnet.training.total / resnext_.training.total, 2) == 0.79
    assert round(resnet.training.total / resnext_.fused_training.total, 2) == 0.94
    for form in FORMS:
        assert getattr(resnext_, form).read > getattr(resnext_, form).written > 0


def test_stages_are_profiled_and_laid_out() -> None:
    """On the CPU, as on a GPU, every stage has a time in every form."""
    times = measured.measure(small, 2, 16, torch.device("cpu"))
    assert [row.name for row in times] == ["conv1", "conv2", "conv3", "fc"]
    assert all(getattr(row, form) > 0 for row in times for form in FORMS)
    rows = complexity.traffic(small(), 16)
    assert [row.name for row in rows] == [row.name for row in times]
    console = Console(record=True, width=100)
    for table in tables.of_times("a network", rows, times, torch.device("cpu")):
        console.print(table)
    text = console.export_text()
    assert "training: microseconds per image; a copy moves" in text and "fused: copy" in text
