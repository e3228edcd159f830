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
    """Trace a network; modules that can't be traced become single calls.

    Args:
        root: the network. In the graph, its arguments with simple defaults always have those values.

    Returns:
        The graph, and the classes of modules that could not be traced, each with the reason.

    Raises:
        RuntimeError: ``root`` itself can't be traced.
    """
    opaque: dict[type, str] = {}
    while True:
        tracer = _Tracer(opaque)
        try:
            return tracer.trace(root, _simple_defaults(root)), opaque
        except Exception as error:  # a model can raise any error for a proxy instead of a tensor
            first_line = str(error).partition("\n")[0]
            reason = f"{type(error).__name__}: {first_line}"
            if tracer.blamed is None or type(tracer.blamed) in opaque:
                raise RuntimeError(
                    f"the model can't be traced: {reason}; fuse its submodules instead"
                ) from error
            opaque[type(tracer.blamed)] = reason


def build(root: nn.Module, graph: Graph) -> GraphModule:
    """Make a module that runs ``graph`` with the parameters and buffers of ``root``.

    Raises:
        RuntimeError: ``torch.fx`` generates a signature that isn't valid Python.
    """
    try:
        return GraphModule(root, graph, type(root).__name__)
    except (SyntaxError, NameError) as error:
        signature = inspect.signature(root.forward)
        raise RuntimeError(
            f"torch.fx can't reproduce the signature of the model, forward{signature}: {error}; fuse its "
            "submodules instead"
        ) from error


class _Proxy(Proxy):
    """Record ``x += y`` as such: ``torch.fx`` records ``x + y``, which can have another dtype."""

    def __iadd__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(Tracer):
    """Trace into modules, except convolutions, batch norms, those with hooks and those that can't be traced.

    A pickled graph refers to this class and creates an instance without arguments when it is loaded.

    Args:
        opaque: classes that can't be traced. Defaults to none.
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
            self.blamed = self.blamed or m  # the innermost module
            raise


def _simple_defaults(root: nn.Module) -> dict[str, Any]:
    """Return the optional arguments of ``forward`` that are fixed at their defaults while tracing."""
    parameters = inspect.signature(root.forward).parameters.values()
    simple = (type(None), bool, int, float, str, Enum, torch.dtype, torch.device, torch.memory_format)
    return {p.name: p.default for p in parameters if isinstance(p.default, simple)}


def _declare_inputs(graph: Graph, signature: inspect.Signature, defaults: dict[str, Any]) -> None:
    """Give the inputs of ``graph`` the names and order of ``signature``, and check their ``defaults``.

    ``torch.fx`` moves ``*args`` behind the arguments that follow it, so that positional values end up in the
    wrong arguments, and appends numbers to the names of arguments fixed at their ``defaults``. Its own checks
    of defaults don't support enums, and once such a check is saved and loaded, all later traces in the
    process fail.
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
    """Give the inputs the names and order of ``parameters``; return the last input."""
    last = graph_root(graph)
    for parameter in parameters:
        node = nodes[parameter.name]
        if node.all_input_nodes:
            raise TypeError(f"the default of argument {parameter.name!r} is a tensor")
        node.target = _STARS.get(parameter.kind, "") + parameter.name
        last.append(node)
        last = node
    return last


def _check_default(graph: Graph, node: Node, default: Any, after: Node) -> Node:
    """Add a check that an input has its default value; return the last added node."""
    with graph.inserting_after(after):
        is_default = graph.call_function(operator.eq, (node, default))
    message = f"{node.target} must be {default!r}, the default with which the network was fused"
    with graph.inserting_after(is_default):
        return graph.call_function(fx_assert, (is_default, message))


def _erase_users(graph: Graph, node: Node) -> None:
    """Erase everything that depends on a node."""
    for user in list(node.users):
        _erase_users(graph, user)
        graph.erase_node(user)
