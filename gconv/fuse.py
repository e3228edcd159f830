"""``fuse``: a network for inference, its batch norms folded away and its activations inside the kernels."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer
from torch.utils._pytree import tree_leaves

from gconv.convert import check_model, convert, geometry_in_words
from gconv.graph import FusedLayer, FusionReport, GraphFusion, is_norm, join


def fuse(
    model: nn.Module, example: Tensor | None = None, *, depthwise: bool = True
) -> tuple[nn.Module, FusionReport]:
    """A copy of ``model`` for inference, with fewer passes over memory.

    The batch norm that follows a convolution goes into its weights. Grouped convolutions become
    :class:`~gconv.GroupConv2d`, and take into their kernels the ReLU, ReLU6, SiLU or hardswish that follows,
    and the sum with a shortcut before it. The rest runs as it did. The model is traced by ``torch.fx``; what
    cannot be traced, modules whose path depends on their input, is left as it is, and its parts are fused
    one by one.

    Args:
        model: in evaluation mode; left as it is.
        example: an input to run both on, once; None trusts the trace. The outputs must agree to a part in a
            thousand of the largest number, a part in twenty in 16 bits.
        depthwise: take convolutions whose groups have one input channel as well.

    Returns:
        The new module, whose parameters take no gradients, and a report; ``print`` it. The module is a
        ``torch.fx.GraphModule``: its ``forward`` is the model's, other methods are not there.

    Raises:
        TypeError: ``model`` is no module, or a TorchScript module.
        ValueError: a part of it is in training mode, where a batch norm depends on the batch.
        RuntimeError: the outputs on ``example`` differ: the trace took a path that the model does not.
    """
    check_model(model)
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = "the model" if training[0] == "" else f"layer {training[0]!r}"
        raise ValueError(f"{where} is in training mode: call .eval() first")
    fused = copy.deepcopy(model)
    convert(fused, depthwise=depthwise)
    report = FusionReport()
    fused = _fuse(fused, "", report)
    fused.requires_grad_(False)
    if example is not None:
        _compare(model, fused, example)
    return fused, report


class _Tracer(Tracer):
    """Looks into all modules but those that are fused as one, and those that it could not trace before."""

    def __init__(self, opaque: Collection[type] = ()) -> None:  # none where a pickled graph is loaded
        super().__init__()
        self.opaque = opaque
        self.blamed: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, *self.opaque)
        return isinstance(m, whole) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.blamed = self.blamed or m  # the innermost one
            raise


def _fuse(root: nn.Module, name: str, report: FusionReport) -> nn.Module:
    """``root``, whose name in the model is ``name``, as a fused graph; its parts, where it has no graph."""
    opaque: dict[type, str] = {}
    while True:
        tracer = _Tracer(opaque)
        try:
            graph = tracer.trace(root, _defaults(root))
            break
        except Exception as error:  # whatever code makes of what is no tensor yet
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if tracer.blamed is None:
                return _fuse_parts(root, name, reason, report)
            opaque[type(tracer.blamed)] = reason
    for target in dict.fromkeys(node.target for node in graph.nodes if node.op == "call_module"):
        module = root.get_submodule(target)
        if type(module) in opaque:
            _fuse_parts(module, join(name, target), opaque[type(module)], report)
    GraphFusion(root, graph, name, tuple(opaque), report).run()
    fused = GraphModule(root, graph, type(root).__name__)
    fused.delete_all_unused_submodules()
    return fused


def _defaults(root: nn.Module) -> dict[str, Any]:
    """The optional arguments of its forward, which are left out: as inputs they would count as given."""
    parameters = inspect.signature(root.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _fuse_parts(module: nn.Module, name: str, reason: str, report: FusionReport) -> nn.Module:
    """``module``, its children fused: those of one input, which can be traced without whoever calls them."""
    report.opaque[name or "the model"] = reason
    for child_name, child in list(module.named_children()):
        at = join(name, child_name)
        if isinstance(child, nn.Conv2d):
            left = "the module around it cannot be traced"
            report.layers.append(FusedLayer(at, geometry_in_words(child), reason=left))
        elif is_norm(child):
            report.norms_left[at] = "the module around it cannot be traced"
        elif any(True for _ in child.children()):
            one_input = len(inspect.signature(child.forward).parameters) == 1
            parts = child if one_input else _fuse_parts(child, at, "it takes more than one input", report)
            setattr(module, child_name, _fuse(child, at, report) if one_input else parts)
    return module


def _compare(model: nn.Module, fused: nn.Module, example: Tensor) -> None:
    """Raises RuntimeError where the two put out something else."""
    with torch.no_grad():
        expected, found = (tree_leaves(network(example.clone())) for network in (model, fused))
    if len(expected) != len(found):
        raise RuntimeError(f"the fused network puts out {len(found)} values, the model {len(expected)}")
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, Tensor) and one.numel():
            tolerance = 0.05 if one.dtype in (torch.float16, torch.bfloat16) else 1e-3
            same = other.shape == one.shape
            apart = (other - one).abs().max() / one.abs().max().clamp(min=1e-12) if same else torch.inf
            if not apart <= tolerance:
                problem = f"on the example the fused network is {float(apart):.1e} off"
                raise RuntimeError(f"{problem}: tracing took a path that the model does not")
