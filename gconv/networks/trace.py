"""Turn a network into a ``torch.fx`` graph with the same signature, and such a graph into a network."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer

from gconv.kinds import KINDS
from gconv.module import is_watched
from gconv.torch_internals import BatchNormBase, fx_assert, graph_root

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def trace(root: nn.Module) -> tuple[Graph, dict[type, str]]:
    """Trace a network, and call the modules that cannot be traced as a whole.

    Args:
        root: the network. Its arguments with simple defaults keep them in the graph.

    Returns:
        The graph, and the classes of the modules that could not be traced, each with the reason.

    Raises:
        RuntimeError: ``root`` itself cannot be traced.
    """
    opaque: dict[type, str] = {}
    while True:
        tracer = _Tracer(opaque)
        try:
            return tracer.trace(root, _simple_defaults(root)), opaque
        except Exception as error:  # a model may raise anything when it meets a proxy instead of a tensor
            first_line = str(error).partition("\n")[0]
            reason = f"{type(error).__name__}: {first_line}"
            if tracer.blamed is None or type(tracer.blamed) in opaque:
                raise RuntimeError(f"the model cannot be traced, fuse its parts: {reason}") from error
            opaque[type(tracer.blamed)] = reason


def build(root: nn.Module, graph: Graph) -> GraphModule:
    """Make a module that runs ``graph`` with the parameters and buffers of ``root``.

    Raises:
        RuntimeError: ``torch.fx`` writes a signature that Python cannot read.
    """
    try:
        return GraphModule(root, graph, type(root).__name__)
    except (SyntaxError, NameError) as error:
        signature = inspect.signature(root.forward)
        raise RuntimeError(
            f"torch.fx cannot keep the signature of the model, forward{signature}: {error}; fuse its parts"
        ) from error


class _Proxy(Proxy):
    """Keep ``x += y`` in the graph: ``torch.fx`` makes it ``x + y``, which may have another dtype."""

    def __iadd__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(Tracer):
    """Trace into all modules except those that are fused as one, are watched or cannot be traced.

    A pickled graph names this class, and makes one without arguments when it is loaded.

    Args:
        opaque: classes that could not be traced before.
    """

    def __init__(self, opaque: Collection[type] = ()) -> None:
        super().__init__()
        self.opaque = tuple(opaque)
        self.blamed: nn.Module | None = None

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> Graph:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Was not able to add assertion")  # _declare_inputs adds them
            graph = super().trace(root, concrete_args)
        forward = root.forward if isinstance(root, nn.Module) else root
        _declare_inputs(graph, inspect.signature(forward), concrete_args or {})
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = (*(kind.layer for kind in KINDS), BatchNormBase, *self.opaque)
        return isinstance(m, whole) or is_watched(m) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.blamed = self.blamed or m  # the innermost one
            raise


def _simple_defaults(root: nn.Module) -> dict[str, Any]:
    """Return the optional arguments of ``forward`` to leave out: as inputs they would count as given."""
    parameters = inspect.signature(root.forward).parameters.values()
    simple = (type(None), bool, int, float, str, Enum, torch.dtype, torch.device, torch.memory_format)
    return {p.name: p.default for p in parameters if isinstance(p.default, simple)}


def _declare_inputs(graph: Graph, signature: inspect.Signature, defaults: dict[str, Any]) -> None:
    """Give the inputs of ``graph`` the names and the order of ``signature``, and check their ``defaults``.

    ``torch.fx`` puts ``*args`` after the arguments that follow it, where they take its values, and appends
    numbers to the names of arguments that keep their ``defaults``. Its own checks of the defaults don't know
    enumerations, and once such a check has been saved and loaded, every later trace in the process fails.
    """
    parameters = list(signature.parameters.values())
    as_traced = sorted(parameters, key=lambda parameter: parameter.kind in _STARS)
    placeholders = graph.find_nodes(op="placeholder")
    nodes = {p.name: node for p, node in zip(as_traced, placeholders, strict=True)}
    last = _name_in_order(graph, parameters, nodes)
    for name, default in defaults.items():
        _erase_users(graph, nodes[name])  # the checks of torch.fx
        last = _check_default(graph, nodes[name], default, last)


def _name_in_order(graph: Graph, parameters: Iterable[inspect.Parameter], nodes: dict[str, Node]) -> Node:
    """Name the inputs as ``parameters`` are named, in their order; return the last of them."""
    last = graph_root(graph)
    for parameter in parameters:
        node = nodes[parameter.name]
        if node.all_input_nodes:
            raise TypeError(f"the default of its argument {parameter.name!r} is a tensor")
        node.target = _STARS.get(parameter.kind, "") + parameter.name
        last.append(node)
        last = node
    return last


def _check_default(graph: Graph, node: Node, default: Any, after: Node) -> Node:
    """Add a check that an input has its default; return the last node that was added."""
    with graph.inserting_after(after):
        is_default = graph.call_function(operator.eq, (node, default))
    message = f"{node.target} must be {default!r}, with which the network was fused"
    with graph.inserting_after(is_default):
        return graph.call_function(fx_assert, (is_default, message))


def _erase_users(graph: Graph, node: Node) -> None:
    """Erase everything that depends on a node."""
    for user in list(node.users):
        _erase_users(graph, user)
        graph.erase_node(user)
