"""Rewrite the graph of a network: fold batch norms into weights, move sums and activations into kernels."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from gconv.arguments import common_dtype
from gconv.kinds import kind_of
from gconv.module import GroupConv1d, GroupConv2d, GroupConvolution, is_watched, pad_input
from gconv.networks import subclasses
from gconv.networks.reports import FusedLayer, FusionReport, geometry_in_words
from gconv.torch_internals import BatchNormBase

_MODULES: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_METHODS: dict[Any, str] = {"relu": "relu", "relu_": "relu"}
_SUMS = (operator.add, operator.iadd, torch.add)
_SUM_METHODS = ("add", "add_")
# Batch norms with an activation ``act``, which do nothing else in evaluation mode.
_NORM_ACTS = ("timm.layers.norm_act.BatchNormAct2d.forward",)
_NORMS = ("torch.nn.modules.batchnorm._BatchNorm.forward", "torch.nn.modules.batchnorm.SyncBatchNorm.forward")
# Packages whose functions write to their inputs only if their names or arguments say so.
_PYTORCH = ("torch", "_operator", "builtins", "math")
_NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # in evaluation mode


class _Adding(GroupConvolution):
    """Base class of layers that add a second input before the activation, inside the kernel."""

    def forward(self, input: Tensor, residual: Any = None, in_place: bool = False) -> Tensor:
        """Compute activation(conv(input) + residual).

        Args:
            input: (N, C, H, W), or (N, C, L) for a 1-d layer.
            residual: tensor or number that broadcasts with the output. Defaults to None: nothing to add.
            in_place: whether to keep the dtype of the convolution, as ``+=`` does. Defaults to False: promote
                it, as ``+`` does.

        Returns:
            (N, K, P, Q) or (N, K, Q).
        """
        x, padding = pad_input(self, input)
        if residual is not None:
            exact = torch.float64 if isinstance(residual, float) else None  # the default rounds to float32
            residual = torch.as_tensor(residual, dtype=exact, device=x.device)
            if in_place:
                residual = residual.to(common_dtype(x, self.weight, self.bias, self.activation))
        settings = (self.stride, padding, self.dilation, self.groups)
        options = {"activation": self.activation, "residual": residual}
        return self._gconv_function(x, self.weight, self.bias, *settings, **options)


class AddingConv1d(_Adding, GroupConv1d):
    """A ``GroupConv1d`` that adds a second input to its output."""


class AddingConv2d(_Adding, GroupConv2d):
    """A ``GroupConv2d`` that adds a second input to its output."""


_ADDING: dict[type, type] = {GroupConv1d: AddingConv1d, GroupConv2d: AddingConv2d}


class GraphFusion:
    """Fuse consecutive operations of a graph, in place.

    Args:
        root: the traced module; its submodules are changed.
        graph: the graph, which is changed.
        opaque: classes of modules that were not traced, each with the reason.
    """

    def __init__(self, root: nn.Module, graph: Graph, opaque: dict[type, str]) -> None:
        self.root, self.graph, self.opaque, self.report = root, graph, opaque, FusionReport()
        self.calls = Counter(id(self._module(node)) for node in graph.nodes)
        # A module with two names can also be called inside a module that was not traced.
        self.names = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
        owners = (_target(node).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
        self.read = {id(root.get_submodule(owner)) for owner in owners}

    def run(self) -> FusionReport:
        """Fuse the graph and return a report."""
        self._remove_no_ops()
        for node in list(self.graph.nodes):
            module = self._module(node)
            if kind_of(module) is not None:
                self.report.layers.append(self._fuse(node, module))
            elif module is not None and not is_norm(module):
                self._report_opaque(_target(node), module)
        for node in self.graph.nodes:
            node.type = None  # string annotations can't be pickled
            if is_norm(self._module(node)):
                self.report.not_folded[_target(node)] = self._why_left(node)
        self.graph.lint()
        return self.report

    def _remove_no_ops(self) -> None:
        """Remove calls to modules that do nothing in evaluation mode."""
        for node in list(self.graph.nodes):
            module = self._module(node)
            if module is None or type(module) not in _NO_OPS or is_watched(module):
                continue
            if len(node.args) == 1 and isinstance(node.args[0], Node):
                self._replace(node, node.args[0])

    def _report_opaque(self, name: str, module: nn.Module) -> None:
        """Report the convolutions and batch norms inside a module that was not traced."""
        parts = [(_join(name, part), m) for part, m in module.named_modules()]
        convolutions = [(part, m) for part, m in parts if kind_of(m) is not None]
        norms = [part for part, m in parts if is_norm(m)]
        if not (convolutions or norms):
            return
        why = "it has hooks or a replaced forward"
        self.report.not_traced[name] = self.opaque.get(type(module), why)
        left = f"{name} was not traced"
        self.report.layers += [FusedLayer(p, geometry_in_words(m), reason=left) for p, m in convolutions]
        self.report.not_folded |= dict.fromkeys(norms, left)

    def _module(self, node: Node) -> nn.Module | None:
        """Return the module that a node calls, or None if it doesn't call one."""
        return self.root.get_submodule(_target(node)) if node.op == "call_module" else None

    def _replace(self, node: Node, by: Node) -> None:
        """Replace a node by another one for all its users, and erase it."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def _fuse(self, node: Node, conv: Any) -> FusedLayer:
        """Fuse a convolution with what follows it."""
        layer = FusedLayer(_target(node), geometry_in_words(conv))
        layer.reason = self._why_not_fuse(node, conv)
        if layer.reason:
            return layer
        self._take_norm(node, conv, layer)
        if subclasses.takes_activation(conv):
            node = self._take_residual(node, conv, layer)
            self._take_activation(node, conv, layer)
        return layer

    def _why_not_fuse(self, node: Node, conv: nn.Module) -> str:
        """Return why a call can't be fused, or "" if it can."""
        if self._called_more_than_once(conv):
            return "the convolution is called more than once"
        if is_watched(conv):
            return "the convolution has hooks or a replaced forward"
        if len(node.args) != 1 or node.kwargs:
            return "the convolution is called with keyword or additional arguments"
        return ""

    def _called_more_than_once(self, module: nn.Module) -> bool:
        return self.calls[id(module)] > 1 or self.names[id(module)] > 1

    def _take_norm(self, node: Node, conv: Any, layer: FusedLayer) -> None:
        """Fold the batch norm that follows into the weights; its activation, if any, replaces it."""
        following = _only_user(node)
        norm = None if following is None else self._module(following)
        if following is None or not is_norm(norm):
            return
        layer.reason = self._why_not_fold(conv, norm)
        if layer.reason:
            return
        if not fold(conv, norm):
            layer.reason = "the folded weights or biases would be larger than float16 can hold"
            return
        layer.norm = _target(following)
        activation = getattr(norm, "act", None)
        if activation is None or isinstance(activation, nn.Identity):
            self._replace(following, node)
        else:
            self.root.set_submodule(layer.norm, activation)

    def _why_not_fold(self, conv: Any, norm: BatchNormBase) -> str:
        """Return why a batch norm can't be folded, or "" if it can."""
        if not subclasses.is_a_convolution(conv):
            return f"class {type(conv).__name__} does more than convolve with its weight"
        if subclasses.name_of_method(type(norm), "forward") not in (*_NORMS, *_NORM_ACTS):
            return f"class {type(norm).__name__} does more than batch norm"
        if norm.running_mean is None:
            return "the batch norm has no running statistics"
        if norm.num_features != conv.out_channels:
            return f"the batch norm has {norm.num_features} channels, the convolution has {conv.out_channels}"
        if self._called_more_than_once(norm):
            return "the batch norm is called more than once"
        if {id(conv), id(norm)} & self.read:
            return "parameters of the convolution or the batch norm are used elsewhere"
        return "the batch norm has hooks or a replaced forward" if is_watched(norm) else ""

    def _take_residual(self, node: Node, conv: Any, layer: FusedLayer) -> Node:
        """Move the sum of the output and a shortcut into the kernel; return the node with the result."""
        total = _only_user(node)
        if total is None or type(conv) not in _ADDING or not _is_sum(total):
            return node
        other = next(argument for argument in total.args if argument is not node)
        if _in_place(total) and other is total.args[0]:
            return node  # the sum writes into the shortcut
        if any(map(self._may_write, _between(node, total))):  # into the convolution's input, or a view of it
            layer.reason = layer.reason or "an operation before the following sum may write in place"
            return node
        conv.__class__, layer.residual = _ADDING[type(conv)], True
        with self.graph.inserting_before(total):  # where both summands exist
            both = self.graph.call_module(layer.name, (node.args[0], other, _in_place(total)))
        self._replace(total, both)
        self.graph.erase_node(node)
        return both

    def _take_activation(self, node: Node, conv: GroupConvolution, layer: FusedLayer) -> None:
        """Move the activation that follows into the kernel."""
        following = _only_user(node)
        if following is None or following.args[0] is not node:
            return
        module = self._module(following)
        if module is not None and not is_watched(module):
            layer.activation = _MODULES.get(type(module))
        elif following.op == "call_function":
            layer.activation = _FUNCTIONS.get(following.target)
        elif following.op == "call_method":
            layer.activation = _METHODS.get(following.target)
        if layer.activation is not None:
            conv.activation = layer.activation
            self._replace(following, node)

    def _may_write(self, node: Node) -> bool:
        """Whether a node may write to a tensor that existed before it."""
        module = self._module(node)
        if module is None:
            return _in_place(node) or (node.op == "call_function" and not _is_known(node.target))
        simple = type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None
        known = (simple or kind_of(module) is not None) and not is_watched(module)
        return not known or bool(getattr(module, "inplace", False))

    def _why_left(self, node: Node) -> str:
        """Return why a batch norm was not folded."""
        before = node.args[0] if node.args else None
        if not isinstance(before, Node) or kind_of(self._module(before)) is None:
            return "it doesn't follow a convolution that gconv supports"
        if len(before.users) > 1:
            return "the output of the convolution is also used elsewhere"
        reason = next(layer.reason for layer in self.report.layers if layer.name == before.target)
        return reason or "something else runs between it and the convolution"


def fold(conv: Any, norm: BatchNormBase) -> bool:
    """Fold a batch norm with running statistics into the convolution before it, in place.

    Does nothing if w' or b' is larger than float16 can hold, because the network would then return infinity
    in float16. This happens if a channel hardly varies, far from zero.

    With the scale of the norm, weight / sqrt(variance + eps):

        w' = scale w,    b' = scale (b - mean) + bias of the norm

    Args:
        conv: the convolution, whose weight and bias (K,) are replaced. The weight is (K, C / groups, ...), or
            (C, K / groups, ...) if transposed.
        norm: the batch norm of its K output channels; must have running statistics.

    Returns:
        Whether the norm was folded.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    with torch.no_grad():
        scale = torch.rsqrt(variance.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias = -mean.double() if conv.bias is None else conv.bias.double() - mean.double()
        bias = scale * bias if norm.bias is None else scale * bias + norm.bias.double()
        old = conv.weight.double()
        if conv.transposed:  # all rows of a group share its output channels
            scale = (
                scale.view(conv.groups, 1, -1).expand(-1, conv.in_channels // conv.groups, -1).flatten(0, 1)
            )
        taps = old.flatten(2) * (scale if scale.ndim == 2 else scale.view(-1, 1)).unsqueeze(-1)
        if not taps.is_meta and max(taps.abs().max(), bias.abs().max()) > torch.finfo(torch.float16).max:
            return False
        weight = torch.empty_like(conv.weight).copy_(taps.view(old.shape))
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias.to(weight.dtype))
        return True


def is_norm(module: nn.Module | None) -> TypeGuard[BatchNormBase]:
    """Whether a module is a batch norm of any class."""
    return isinstance(module, BatchNormBase)


def _target(node: Node) -> str:
    """Return the qualified name of the module that a node calls, or of the attribute that it reads."""
    return str(node.target)


def _only_user(node: Node) -> Node | None:
    """Return the node that uses the output of ``node``, if there is only one and it uses it only once."""
    users = list(node.users)
    alone = len(users) == 1 and users[0].args and users[0].all_input_nodes.count(node) == 1
    return users[0] if alone else None


def _in_place(node: Node) -> bool:
    """Whether a function or method of PyTorch may write to its inputs, judging by its name and arguments."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = name.endswith("_") or name.startswith(("i", "__i"))
    return named or not {"inplace", "out"}.isdisjoint(node.kwargs)


def _is_known(function: Any) -> bool:
    """Whether a function is PyTorch's or Python's own. Operators in ``torch.ops`` can be anybody's."""
    home = str(getattr(function, "__module__", ""))
    return home.partition(".")[0] in _PYTORCH and not home.startswith("torch._ops")


def _is_sum(node: Node) -> bool:
    """Whether a node adds two different values without scaling either."""
    function = node.op == "call_function" and node.target in _SUMS
    method = node.op == "call_method" and node.target in _SUM_METHODS
    two_nodes = len(node.args) == 2 and all(isinstance(argument, Node) for argument in node.args)
    return (function or method) and two_nodes and node.args[0] is not node.args[1] and not node.kwargs


def _between(first: Node, last: Node) -> Iterator[Node]:
    """Yield the nodes between two nodes."""
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _join(*names: str) -> str:
    """Join parts of a qualified name, some of which may be empty."""
    return ".".join(filter(None, names))
