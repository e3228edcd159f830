"""Trained weights for the named networks, from files or published by torchvision and timm."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from resnext.torch_internals import COMPILED

Weights = str | PathLike[str] | Any  # the last is a member of torchvision's WeightsEnum
FILES = (".pth", ".pt", ".bin", ".safetensors")
_TORCHVISION = re.compile(r"(?:(\w+)_Weights\.)?([A-Z][A-Z0-9_]*)")
_WRAPPERS = re.compile(rf"^(?:module\.|{re.escape(COMPILED)})+")  # DistributedDataParallel adds "module."


def read_weights(weights: Weights, variant: str) -> dict[str, Tensor]:
    """Return a state dict of trained weights.

    Args:
        weights: one of

            - the path of a file with a state dict, at the top level or under "state_dict", "model" or
              "weights"; a file that ends in .safetensors has that format, any other one that of torch.save;
            - a name that torchvision publishes, such as "IMAGENET1K_V2" or "DEFAULT", or the member of
              torchvision's enumeration;
            - a name that timm publishes, such as "a1h_in1k" or "resnext50_32x4d.a1h_in1k".
        variant: name of the network, such as "resnext50_32x4d".

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``weights`` is none of these.
        ImportError: the library that publishes the weights isn't installed or doesn't load.
        OSError: the library can't load the weights, for instance without internet access.
        ValueError: the file is damaged or has no state dict, or the name isn't published for ``variant``.
    """
    if not isinstance(weights, str | PathLike) and hasattr(weights, "get_state_dict"):
        weights = f"{type(weights).__name__}.{weights.name}"
    if not isinstance(weights, str | PathLike):
        hint = "; to load a state dict, call load_state_dict" if isinstance(weights, Mapping) else ""
        raise TypeError(f"weights must be a file or a published name, got {type(weights).__name__}{hint}")
    path = Path(weights).expanduser()
    if isinstance(weights, PathLike) or path.suffix.lower() in FILES or path.is_file():
        return _from_file(path)
    if name := _TORCHVISION.fullmatch(weights):
        return _from_torchvision(weights, name[1], name[2], variant)
    return _from_timm(weights, variant)


def number_of_classes(state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of the classifier in ``state``, or None if there is no classifier."""
    weight = state.get("fc.weight")
    return None if weight is None or weight.ndim != 2 else len(weight)


def fit(model: nn.Module, state: Mapping[str, Tensor], source: Weights) -> None:
    """Load a state dict strictly, except for a classifier of another size, which stays untrained.

    Raises:
        ValueError: a key or a shape doesn't fit (the error names the first one), or ``model`` is on the meta
            device.
    """
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(f"can't load {source}: a network on the meta device has no memory for weights")
    classes = (number_of_classes(state), number_of_classes(own))
    if None not in classes and classes[0] != classes[1] and "fc.bias" in state:
        state = {**state, "fc.weight": own["fc.weight"], "fc.bias": own["fc.bias"]}
    for key in [*own, *state]:
        if key not in state or key not in own:
            where = "is missing" if key not in state else "has the unexpected"
            raise ValueError(f"{source} doesn't fit the network: it {where} key {key}")
        if state[key].shape != own[key].shape:
            sizes = f"{tuple(own[key].shape)}, got {tuple(state[key].shape)}"
            raise ValueError(f"{source} doesn't fit the network: {key} must have shape {sizes}")
    model.load_state_dict(state)


def _from_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        if path.suffix.lower() == ".safetensors":
            content = _import("safetensors.torch", f"reading {path} needs safetensors").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:  # each kind of damage has its own type
        # PyTorch's message suggests weights_only=False, which would run any code in the file.
        raise ValueError(
            f"can't read {path}: it is truncated, damaged, in another format, or more than a state dict "
            "(if it is a pickled model, save its state_dict() instead)"
        ) from error
    for key in ("state_dict", "model", "weights"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} has no state dict, at the top level or under state_dict, model or weights")
    return {_WRAPPERS.sub("", key): tensor for key, tensor in content.items()}


def _from_torchvision(weights: str, of: str | None, name: str, variant: str) -> dict[str, Tensor]:
    models = _import("torchvision.models", f"weights={weights!r} needs torchvision")
    published = models.get_model_weights(variant) if variant in models.list_models() else None
    if published is None or name not in published.__members__ or of not in (None, _stem(published)):
        names = list(published.__members__) if published else "nothing"
        raise ValueError(f"unknown weights {weights!r}: for {variant} torchvision publishes {names}")
    get = partial(published[name].get_state_dict, progress=True, check_hash=True)
    return _published("torchvision", weights, get)


def _published(library: str, weights: Weights, load: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the weights that a library loads, and raise OSError for any error in it."""
    try:
        return dict(load())
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"{library} couldn't load weights={weights!r}: {reason}") from error


def _stem(published: Any) -> str:
    return published.__name__.removesuffix("_Weights")


def _from_timm(weights: str, variant: str) -> dict[str, Tensor]:
    timm = _import("timm", f"weights={weights!r}: no such file, and looking up the name needs timm")
    tag = weights.removeprefix("timm/").removeprefix(f"{variant}.")
    published = timm.list_models(f"{variant}.*", pretrained=True)
    if f"{variant}.{tag}" not in published:
        names = [name.partition(".")[2] for name in published] or "nothing"
        raise ValueError(f"unknown weights {weights!r}: for {variant} timm publishes {names}")
    create = partial(timm.create_model, f"{variant}.{tag}", pretrained=True)
    return _published("timm", weights, lambda: create().state_dict())


def _import(name: str, why: str) -> ModuleType:
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(f"{why}: pip install {package}") from None
    except RuntimeError as error:  # compiled operators built for another version of torch
        raise ImportError(f"{why}, which doesn't load with this version of torch: {error}") from error
