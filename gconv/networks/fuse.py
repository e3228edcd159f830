"""``fuse``: a network for inference, its batch norms folded away and its activations inside the kernels."""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Callable, Collection
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.utils._pytree import tree_leaves

from gconv.module import is_watched
from gconv.networks.convert import check_model, convert
from gconv.networks.rewrite import FusionReport, GraphFusion


def fuse(
    model: nn.Module, example: Tensor | None = None, *, depthwise: bool = True
) -> tuple[nn.Module, FusionReport]:
    """A copy of ``model`` for inference, with fewer passes over memory.

    The batch norm that follows a convolution goes into its weights. Grouped convolutions become
    :class:`~gconv.GroupConv2d`, and take into their kernels the ReLU, ReLU6, SiLU or hardswish that follows,
    and the sum with a shortcut before it. The rest runs as it did. The model is traced by ``torch.fx``; a
    module that cannot be, because its path depends on its input, or that has hooks, stays as it is.

    Args:
        model: in evaluation mode; left as it is.
        example: an input to run both on, once; None trusts the trace. The outputs must agree to a part in a
            thousand of the largest number, a part in twenty in 16 bits.
        depthwise: take convolutions whose groups have one input channel as well.

    Returns:
        The new module, whose parameters take no gradients, and a report; ``print`` it. The module is a
        ``torch.fx.GraphModule``: its ``forward`` is the model's, with arguments of the same names in the same
        order, but optional ones keep their defaults: another value is refused. Other methods are not there.

    Raises:
        TypeError: ``model`` is no module, or a TorchScript module.
        ValueError: a part of it is in training mode, where a batch norm depends on the batch; or the model
            itself has hooks or a replaced forward, which would be lost.
        RuntimeError: the model itself cannot be traced, or the signature of its ``forward`` cannot be kept:
            fuse its parts; or the new module fails on ``example`` or puts out something else: the trace took
            a path that the model does not.
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
    graph, opaque = _trace(root)
    report = GraphFusion(root, graph, opaque).run()
    fused = _build(root, graph)
    fused.delete_all_unused_submodules()
    fused.requires_grad_(False)
    if example is not None:
        _compare(model, fused, example)
    return fused, report


class _Proxy(Proxy):
    """Keeps ``x += y`` as what it is: ``torch.fx`` makes ``x + y`` of it, which may have another type."""

    def __iadd__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(Tracer):
    """Looks into all modules but those that are fused as one, and those that it must not or cannot.

    Args:
        opaque: classes that it could not trace before; none where a pickled graph is loaded.
    """

    def __init__(self, opaque: Collection[type] = ()) -> None:
        super().__init__()
        self.opaque = tuple(opaque)
        self.blamed: nn.Module | None = None

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> Graph:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Was not able to add assertion")  # _declare_inputs does
            graph = super().trace(root, concrete_args)
        _declare_inputs(graph, inspect.signature(root.forward), concrete_args or {})
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, *self.opaque)
        return isinstance(m, whole) or is_watched(m) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.blamed = self.blamed or m  # the innermost one
            raise


def _trace(root: nn.Module) -> tuple[Graph, dict[type, str]]:
    """The graph of ``root``, and the classes of modules that it calls as a whole, each with the reason."""
    opaque: dict[type, str] = {}
    while True:
        tracer = _Tracer(opaque)
        try:
            return tracer.trace(root, _defaults(root)), opaque
        except Exception as error:  # whatever code makes of what is no tensor yet
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if tracer.blamed is None or type(tracer.blamed) in opaque:
                raise RuntimeError(f"the model cannot be traced, fuse its parts: {reason}") from error
            opaque[type(tracer.blamed)] = reason


def _defaults(root: nn.Module) -> dict[str, Any]:
    """The optional arguments of its forward, which are left out: as inputs they would count as given."""
    parameters = inspect.signature(root.forward).parameters.values()
    fixed = (type(None), bool, int, float, str, Enum, torch.dtype, torch.device, torch.memory_format)
    return {p.name: p.default for p in parameters if isinstance(p.default, fixed)}


def _declare_inputs(graph: Graph, signature: inspect.Signature, defaults: dict[str, Any]) -> None:
    """Give the inputs of ``graph`` the names and the order that they have in ``signature``.

    ``torch.fx`` puts ``*args`` after the arguments that follow it, where they take its values, and appends
    numbers to the names of those that keep their ``defaults``. Its checks that they do know no enumerations,
    and one that has been saved and loaded makes every later trace of the process fail.
    """
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = signature.parameters.values()
    as_traced = sorted(parameters, key=lambda parameter: parameter.kind in stars)
    placeholders = graph.find_nodes(op="placeholder")
    nodes = {p.name: node for p, node in zip(as_traced, placeholders, strict=True)}
    last = graph._root
    for parameter in parameters:
        node = nodes[parameter.name]
        if node.all_input_nodes:
            raise TypeError(f"the default of its argument {parameter.name!r} is a tensor")
        node.target = stars.get(parameter.kind, "") + parameter.name
        last.append(node)
        last = node
    for name, default in defaults.items():
        _erase_users(graph, nodes[name])  # the checks: the model itself was given the default
        with graph.inserting_after(last):
            kept = graph.call_function(operator.eq, (nodes[name], default))
        with graph.inserting_after(kept):
            message = f"{name} must be {default!r}, with which the network was fused"
            last = graph.call_function(torch._assert, (kept, message))


def _erase_users(graph: Graph, node: Node) -> None:
    for user in list(node.users):
        _erase_users(graph, user)
        graph.erase_node(user)


def _build(root: nn.Module, graph: Graph) -> GraphModule:
    """The module that runs ``graph``; raises RuntimeError if Python cannot read what ``torch.fx`` writes."""
    try:
        return GraphModule(root, graph, type(root).__name__)
    except (SyntaxError, NameError) as error:
        signature = inspect.signature(root.forward)
        raise RuntimeError(
            f"torch.fx cannot keep the signature of the model, forward{signature}: {error}; fuse its parts"
        ) from error


def _compare(model: nn.Module, fused: nn.Module, example: Tensor) -> None:
    """Raise RuntimeError unless ``fused`` runs on ``example`` and puts out what ``model`` does."""
    path = "tracing took a path that the model does not"
    with torch.no_grad():
        expected = tree_leaves(model(example.clone()))
        try:
            found = tree_leaves(fused(example.clone()))
        except Exception as error:  # whatever the operators make of each other's results
            problem = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"the fused network fails on the example: {path}: {problem}") from error
    if len(expected) != len(found):
        raise RuntimeError(f"the fused network puts out {len(found)} values, the model {len(expected)}")
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, Tensor) and one.numel():
            tolerance = 0.05 if one.dtype in (torch.float16, torch.bfloat16) else 1e-3
            apart = torch.inf
            if isinstance(other, Tensor) and other.shape == one.shape:
                right = one.double()
                apart = ((other.double() - right).abs().max() / right.abs().max().clamp(min=1e-12)).item()
            if not apart <= tolerance:
                raise RuntimeError(f"on the example the fused network is {apart:.1e} off: {path}")
