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
    """Copy ``model`` for inference, with fewer passes over memory.

    A batch norm that follows a convolution that gconv takes is folded into its weights. Grouped
    convolutions become gconv's layers, and their kernels also apply the ReLU, ReLU6, SiLU or hardswish that
    follows and, if they are 1-d or 2-d and not transposed, add a shortcut. Everything else runs as before,
    and so does a transposed convolution that is called with an ``output_size``. The model is traced by
    ``torch.fx``; a module whose path depends on its input, or that has hooks, cannot be traced and stays as
    it is.

    Args:
        model: in evaluation mode; it is not changed.
        example: an input to compare both on; the outputs must agree to 1e-3 of the largest
            number, to 5e-2 in 16 bits. Defaults to None, which trusts the trace.
        depthwise: also take convolutions whose groups have one input channel. Defaults to True.

    Returns:
        The new module, whose parameters need no gradients, and a report; ``print`` it. The module is a
        ``torch.fx.GraphModule``: its ``forward`` has the arguments of the model's, with the same names in the
        same order, but refuses other values than the defaults for optional ones. It has no other methods.

    Raises:
        TypeError: ``model`` is not a module, or is a TorchScript module.
        ValueError: a part of it is in training mode, where a batch norm depends on the batch; or the model
            itself has hooks or a replaced forward, which would be lost.
        RuntimeError: the model itself cannot be traced, or the signature of its ``forward`` cannot be kept:
            fuse its parts instead; or the new module fails on ``example`` or returns something else, because
            the trace took a path that the model does not.
    """
    check_model(model)
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = "the model" if training[0] == "" else f"layer {training[0]!r}"
        raise ValueError(f"{where} is in training mode: call .eval() first")
    if is_watched(model):
        raise ValueError("the model has hooks or a forward that was replaced, which would be lost")
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
    path = "tracing took a path that the model does not"
    with torch.no_grad():
        expected = tree_leaves(model(example.clone()))
        try:
            found = tree_leaves(fused(example.clone()))
        except Exception as error:  # operators may raise anything on each other's results
            problem = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"the fused network fails on the example: {path}: {problem}") from error
    if len(expected) != len(found):
        raise RuntimeError(f"the fused network returns {len(found)} values, the model {len(expected)}")
    for right, result in zip(expected, found, strict=True):
        if isinstance(right, Tensor) and right.numel():
            apart = _relative_error(result, right)
            tolerance = 0.05 if right.dtype in (torch.float16, torch.bfloat16) else 1e-3
            if not apart <= tolerance:  # NaN is not, either
                raise RuntimeError(f"on the example the fused network is {apart:.1e} off: {path}")


def _relative_error(result: object, right: Tensor) -> float:
    """Return the largest difference over the largest number of ``right``; infinity if shapes differ."""
    if not isinstance(result, Tensor) or result.shape != right.shape:
        return torch.inf
    exact = right.double()
    return ((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-12)).item()
