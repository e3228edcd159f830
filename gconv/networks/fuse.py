"""``fuse``: copy a network for inference, with batch norms folded away and activations in the kernels."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gconv.module import is_watched
from gconv.networks.convert import check_model, convert
from gconv.networks.reports import FusionReport
from gconv.networks.rewrite import GraphFusion
from gconv.networks.trace import build, trace
from gconv.torch_internals import tree_leaves


def fuse(
    model: nn.Module, example: Tensor | None = None, *, depthwise: bool = True
) -> tuple[nn.Module, FusionReport]:
    """Copy a model for inference, with fewer passes over memory.

    Folds each batch norm that follows a supported convolution into the weights of that convolution. Converts
    grouped convolutions to gconv's layers, and lets their kernels apply the ReLU, ReLU6, SiLU or hardswish
    that follows. 1-d and 2-d kernels that aren't transposed also add a shortcut. Everything else runs as
    before, including transposed convolutions called with an ``output_size``. The input must be a batch:
    ``nn.BatchNorm1d`` takes (C, L) for C images of L channels, but a folded one takes it for one image.

    The model is traced by ``torch.fx``. A module whose control flow depends on its input, or that has hooks,
    can't be traced and is kept unchanged.

    Args:
        model: a model in evaluation mode; it is not changed.
        example: an input on which to compare the outputs of both models. They must agree to 1e-3 of the
            largest number, or 5e-2 in 16 bits. Defaults to None: no comparison.
        depthwise: whether to convert depthwise convolutions too, whose groups have one input channel.
            Defaults to True.

    Returns:
        The fused module, a ``torch.fx.GraphModule`` whose parameters don't require gradients. Its ``forward``
            has the same arguments as the model's, with the same names and order, but optional arguments
            accept only their default values. It has no other methods.
        A report of what was fused; ``print`` it.

    Raises:
        TypeError: ``model`` is not a module, or is a TorchScript module.
        ValueError: a module is in training mode, in which batch norms depend on the batch, or the model
            itself has hooks or a replaced forward, which would be lost.
        RuntimeError: the model itself can't be traced or its signature can't be reproduced (fuse its
            submodules instead), or the fused module fails on ``example`` or returns something else, because
            the model takes another path than the one that was traced.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fused, report = gconv.fuse(model)
        >>> report.folded
        ['1']
    """
    check_model(model)
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = "the model" if training[0] == "" else f"layer {training[0]!r}"
        raise ValueError(f"{where} is in training mode: call .eval() first")
    if is_watched(model):
        raise ValueError(
            "the model has hooks or a replaced forward, which fuse would lose: fuse its submodules instead"
        )
    root = copy.deepcopy(model)
    convert(root, depthwise=depthwise)
    graph, opaque = trace(root)
    report = GraphFusion(root, graph, opaque).run()
    fused = build(root, graph)
    fused.delete_all_unused_submodules()
    fused.requires_grad_(False)
    if example is not None:
        _compare(model, fused, example)
    return fused, report


def _compare(model: nn.Module, fused: nn.Module, example: Tensor) -> None:
    """Raise RuntimeError unless ``fused`` runs on ``example`` and returns what ``model`` does."""
    path = "the model takes another path than the one that was traced"
    with torch.no_grad():
        expected = tree_leaves(model(example.clone()))
        try:
            found = tree_leaves(fused(example.clone()))
        except Exception as error:  # operators can raise any error on unexpected results
            problem = f"{type(error).__name__}: {error}"
            raise RuntimeError(
                f"the fused network fails on the example, because {path}: {problem}"
            ) from error
    if len(expected) != len(found):
        raise RuntimeError(
            f"the fused network returns {len(found)} values, the model {len(expected)}: {path}"
        )
    for right, result in zip(expected, found, strict=True):
        if isinstance(right, Tensor) and right.numel():
            apart = _relative_error(result, right)
            tolerance = 0.05 if right.dtype in (torch.float16, torch.bfloat16) else 1e-3
            if not apart <= tolerance:  # also true for NaN
                raise RuntimeError(f"on the example the fused network has an error of {apart:.1e}: {path}")


def _relative_error(result: object, right: Tensor) -> float:
    """Return the largest difference divided by the largest number of ``right``; infinity if shapes differ."""
    if not isinstance(result, Tensor) or result.shape != right.shape:
        return torch.inf
    exact = right.double()
    return ((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-12)).item()
