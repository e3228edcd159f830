"""What ``fuse`` does to the graph of a network: norms into weights, sums and activations into kernels."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from gconv import ops
from gconv.functional import common_dtype, group_conv2d
from gconv.module import GroupConv2d, is_watched, pad_input
from gconv.networks import subclasses
from gconv.networks.convert import geometry_in_words
from gconv.text import columns

_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_METHODS = {"relu": "relu", "relu_": "relu"}
_SUMS = (operator.add, operator.iadd, torch.add)
_SUM_METHODS = ("add", "add_")
# Norms with an activation of their own in ``act``, which in evaluation is all they do beside.
_NORM_ACTS = ("timm.layers.norm_act.BatchNormAct2d.forward",)
_NORMS = ("torch.nn.modules.batchnorm._BatchNorm.forward", "torch.nn.modules.batchnorm.SyncBatchNorm.forward")
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)  # what evaluation makes of them


@dataclass
class FusedLayer:
    """One convolution as :func:`fuse` left it.

    Attributes:
        name: qualified name.
        geometry: in words.
        norm: name of the batch norm that is in its weights now.
        activation: that its kernel applies.
        residual: whether its kernel adds the shortcut.
        reason: why there is not more.
    """

    name: str
    geometry: str
    norm: str | None = None
    activation: str | None = None
    residual: bool = False
    reason: str = ""


@dataclass
class FusionReport:
    """What :func:`fuse` did and what it left, and why; prints as a table.

    Attributes:
        layers: the convolutions, in the order in which they run.
        norms_left: names of the batch norms that are still there, each with the reason.
        opaque: names of the modules that could not be traced as a whole, each with the reason.
    """

    layers: list[FusedLayer] = field(default_factory=list)
    norms_left: dict[str, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)

    @property
    def folded(self) -> list[str]:
        """Names of the batch norms that are gone."""
        return [layer.norm for layer in self.layers if layer.norm is not None]

    def __str__(self) -> str:
        rows = [("layer", "geometry", "folded in", "in the kernel", "left")]
        for layer in self.layers:
            inside = ["residual"] * layer.residual + [layer.activation] * (layer.activation is not None)
            rows.append(
                (layer.name, layer.geometry, layer.norm or "", ", ".join(map(str, inside)), layer.reason)
            )
        activations = sum(layer.activation is not None for layer in self.layers)
        residuals = sum(layer.residual for layer in self.layers)
        total = len(self.folded) + len(self.norms_left)
        lines = [columns(rows, left=5)] if self.layers else ["no nn.Conv2d in the model"]
        lines += [f"stays: {name}: {reason}" for name, reason in self.norms_left.items()]
        lines += [f"not looked into: {name}: {reason}" for name, reason in self.opaque.items()]
        lines.append(
            f"{len(self.folded)} of {total} batch norms folded; {activations} activations and {residuals} "
            "residuals taken into grouped convolutions"
        )
        return "\n".join(lines)


class AddingConv2d(GroupConv2d):
    """A ``GroupConv2d`` that adds a second input before its activation, inside the kernel."""

    def forward(self, input: Tensor, residual: Any, in_place: bool = False) -> Tensor:
        """activation(conv(input) + residual), of the convolution's type if ``in_place``, as ``+=`` is."""
        x, padding = pad_input(self, input)
        residual = torch.as_tensor(residual, device=x.device)
        if in_place:
            residual = residual.to(common_dtype(x, self.weight, self.bias, self.activation))
        settings = (self.stride, padding, self.dilation, self.groups)
        return group_conv2d(
            x, self.weight, self.bias, *settings, activation=self.activation, residual=residual
        )


class GraphFusion:
    """Fuses what a graph calls one after the other.

    Args:
        root: whose graph it is; its modules are changed.
        graph: is changed.
        opaque: classes of modules that the graph calls without knowing what they do, with the reasons.
    """

    def __init__(self, root: nn.Module, graph: Graph, opaque: dict[type, str]) -> None:
        self.root, self.graph, self.opaque, self.report = root, graph, opaque, FusionReport()
        self.calls = Counter(id(self._module(node)) for node in graph.nodes)
        # What has two names may be called by a module that is no part of the graph.
        self.names = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
        owners = (node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
        self.read = {id(root.get_submodule(owner)) for owner in owners}

    def run(self) -> FusionReport:
        """Changes graph and modules, and tells what it did."""
        for node in list(self.graph.nodes):
            module = self._module(node)
            if type(module) in _NOTHING and not is_watched(module) and len(node.args) == 1:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        for node in list(self.graph.nodes):
            module = self._module(node)
            if isinstance(module, nn.Conv2d):
                self.report.layers.append(self._fuse(node))
            elif module is not None and not is_norm(module):
                self._tell_of_parts(node.target, module)
        for node in self.graph.nodes:
            node.type = None  # an annotation that is a string could not be pickled
            if is_norm(self._module(node)):
                self.report.norms_left[node.target] = self._why_left(node)
        self.graph.lint()
        return self.report

    def _tell_of_parts(self, name: str, module: nn.Module) -> None:
        """What stays in a module that the graph does not look into."""
        parts = [(join(name, part), m) for part, m in module.named_modules()]
        convolutions = [(part, m) for part, m in parts if isinstance(m, nn.Conv2d)]
        norms = [part for part, m in parts if is_norm(m)]
        if not (convolutions or norms):
            return
        why = "it has hooks, or its forward was replaced"
        self.report.opaque[name] = self.opaque.get(type(module), why)
        left = f"{name} is not looked into"
        self.report.layers += [FusedLayer(p, geometry_in_words(m), reason=left) for p, m in convolutions]
        self.report.norms_left |= dict.fromkeys(norms, left)

    def _module(self, node: Node) -> nn.Module | None:
        """What a node calls, if it is a module."""
        return self.root.get_submodule(node.target) if node.op == "call_module" else None

    def _fuse(self, node: Node) -> FusedLayer:
        """One convolution with what follows it."""
        conv = self._module(node)
        layer = FusedLayer(node.target, geometry_in_words(conv))
        if self.calls[id(conv)] > 1 or self.names[id(conv)] > 1:
            layer.reason = "it is called more than once"
        elif is_watched(conv):
            layer.reason = "it has hooks, or its forward was replaced"
        elif len(node.args) != 1 or node.kwargs:
            layer.reason = "it is not called with its input alone"
        if layer.reason:
            return layer
        norm = self._next(node)
        if norm is not None and is_norm(self._module(norm)):
            layer.reason = self._why_not_fold(conv, self._module(norm)) or ""
            if not layer.reason:
                layer.norm = norm.target
                self._fold(node, norm)
        if subclasses.takes_activation(conv):
            node = self._take_residual(node, layer)
            self._take_activation(node, layer)
        return layer

    def _next(self, node: Node) -> Node | None:
        """The one that takes what ``node`` makes, where there is one only, and that as its first argument."""
        users = list(node.users)
        alone = len(users) == 1 and users[0].args and users[0].all_input_nodes.count(node) == 1
        return users[0] if alone else None

    def _why_not_fold(self, conv: nn.Conv2d, norm: nn.Module) -> str | None:
        if not subclasses.is_a_convolution(conv):
            return f"its class {type(conv).__name__} does more than convolve with its weight"
        if subclasses.name_of_method(type(norm), "forward") not in (*_NORMS, *_NORM_ACTS):
            return f"the batch norm's class {type(norm).__name__} does more than batch norm"
        if norm.running_mean is None:
            return "the batch norm has no running statistics"
        if self.calls[id(norm)] > 1 or self.names[id(norm)] > 1:
            return "the batch norm is called more than once"
        if {id(conv), id(norm)} & self.read:
            return "its parameters, or the batch norm's, are used elsewhere"
        return "the batch norm has hooks, or its forward was replaced" if is_watched(norm) else None

    def _fold(self, node: Node, norm_node: Node) -> None:
        """The batch norm into the convolution's weights; an activation of its own stays in its place."""
        conv, norm = self._module(node), self._module(norm_node)
        fold(conv, norm)
        activation = getattr(norm, "act", None)
        if activation is None or isinstance(activation, nn.Identity):
            norm_node.replace_all_uses_with(node)
            self.graph.erase_node(norm_node)
        else:
            self.root.set_submodule(norm_node.target, activation)

    def _take_residual(self, node: Node, layer: FusedLayer) -> Node:
        """The sum of the output with a shortcut into the kernel; the node that stands for both then."""
        conv, total = self._module(node), self._next(node)
        if total is None or type(conv) is not GroupConv2d or not _is_sum(total):
            return node
        other = next(argument for argument in total.args if argument is not node)
        if _in_place(total) and other is total.args[0]:
            return node  # it is the shortcut that is written into
        if any(map(self._may_write, _between(node, total))):  # the convolution's input, or a view of it
            layer.reason = layer.reason or "something may be written in place before the sum that follows"
            return node
        conv.__class__, layer.residual = AddingConv2d, True
        with self.graph.inserting_before(total):  # where both are there
            both = self.graph.call_module(node.target, (node.args[0], other, _in_place(total)))
        total.replace_all_uses_with(both)
        self.graph.erase_node(total)
        self.graph.erase_node(node)
        return both

    def _take_activation(self, node: Node, layer: FusedLayer) -> None:
        """The activation that follows into the kernel."""
        following = self._next(node)
        if following is None or following.args[0] is not node:
            return
        module = self._module(following)
        if following.op == "call_module" and not is_watched(module):
            layer.activation = _MODULES.get(type(module))
        elif following.op == "call_function":
            layer.activation = _FUNCTIONS.get(following.target)
        elif following.op == "call_method":
            layer.activation = _METHODS.get(following.target)
        if layer.activation is not None:
            self._module(node).activation = layer.activation
            following.replace_all_uses_with(node)
            self.graph.erase_node(following)

    def _may_write(self, node: Node) -> bool:
        """Whether a node may write into a tensor that was there before."""
        module = self._module(node)
        if module is None:
            return _in_place(node)
        known = type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.Conv2d)
        return not known or getattr(module, "inplace", False)

    def _why_left(self, node: Node) -> str:
        before = node.args[0] if node.args else None
        if not isinstance(before, Node) or not isinstance(self._module(before), nn.Conv2d):
            return "it follows no convolution"
        if len(before.users) > 1:
            return "its convolution's output goes elsewhere too"
        return next(layer.reason for layer in self.report.layers if layer.name == before.target)


def fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Batch norm with its running statistics into the weights of the convolution before it, in place.

    With scale = weight / sqrt(variance + eps) of the norm:

        w' = scale w,    b' = scale (b - mean) + bias of the norm
    """
    with torch.no_grad():
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        scale = torch.rsqrt(variance + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias = -mean if conv.bias is None else conv.bias.double() - mean
        bias = scale * bias if norm.bias is None else scale * bias + norm.bias.double()
        weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
        form = torch.channels_last if ops.is_channels_last(conv.weight) else torch.contiguous_format
        conv.weight = nn.Parameter(weight.to(conv.weight.dtype).contiguous(memory_format=form))
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))


def is_norm(module: nn.Module | None) -> bool:
    """Whether it is a batch norm, of whatever class."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _in_place(node: Node) -> bool:
    """Whether a function or method may write into its inputs, by its name."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or name.startswith(("i", "__i")) or "inplace" in node.kwargs


def _is_sum(node: Node) -> bool:
    """Whether a node adds two different values, neither of them scaled."""
    function = node.op == "call_function" and node.target in _SUMS
    method = node.op == "call_method" and node.target in _SUM_METHODS
    values = len(node.args) == 2 and all(isinstance(argument, Node) for argument in node.args)
    values = values and node.args[0] is not node.args[1]
    return (function or method) and values and not node.kwargs


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def join(*names: str) -> str:
    """A qualified name from parts, of which some may be empty."""
    return ".".join(filter(None, names))
