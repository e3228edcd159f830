"""Trained weights for the named networks: from a file, or as torchvision and timm publish them."""

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
_WRAPPERS = re.compile(rf"^(?:module\.|{re.escape(COMPILED)})+")  # "module." is DistributedDataParallel's


def read_weights(weights: Weights, variant: str) -> dict[str, Tensor]:
    """Return the state dict that ``weights`` names.

    Args:
        weights: one of

            - a file that holds a state dict, or one under "state_dict", "model" or "weights": in safetensors'
              format if its name ends so, else in that of torch.save;
            - a name of torchvision's, such as "IMAGENET1K_V2" or "DEFAULT", or the member of its enumeration;
            - a name of timm's, such as "a1h_in1k" or "resnext50_32x4d.a1h_in1k".
        variant: the network's name, such as "resnext50_32x4d".

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``weights`` is none of these.
        ImportError: the library that publishes the name is not installed or does not load.
        OSError: the library could not load them, for instance without internet access.
        ValueError: the file is damaged or holds no weights; no such name is published for ``variant``.
    """
    if not isinstance(weights, str | PathLike) and hasattr(weights, "get_state_dict"):
        weights = f"{type(weights).__name__}.{weights.name}"
    if not isinstance(weights, str | PathLike):
        hint = "; load_state_dict takes a state dict" if isinstance(weights, Mapping) else ""
        raise TypeError(f"weights must be a file or a published name, got {type(weights).__name__}{hint}")
    path = Path(weights).expanduser()
    if isinstance(weights, PathLike) or path.suffix.lower() in FILES or path.is_file():
        return _from_file(path)
    if name := _TORCHVISION.fullmatch(weights):
        return _from_torchvision(weights, name[1], name[2], variant)
    return _from_timm(weights, variant)


def number_of_classes(state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of the classifier in ``state``, None if it has no classifier."""
    weight = state.get("fc.weight")
    return None if weight is None or weight.ndim != 2 else len(weight)


def fit(model: nn.Module, state: Mapping[str, Tensor], source: Weights) -> None:
    """Load ``state`` strictly, except for a classifier of another size, which stays untrained.

    Raises:
        ValueError: a key or size does not fit, and the first is named; or ``model`` is on meta.
    """
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(f"{source}: a network on the meta device has no memory for weights")
    classes = (number_of_classes(state), number_of_classes(own))
    if None not in classes and classes[0] != classes[1] and "fc.bias" in state:
        state = {**state, "fc.weight": own["fc.weight"], "fc.bias": own["fc.bias"]}
    for key in [*own, *state]:
        if key not in state or key not in own:
            where = "has no" if key not in state else "has, beyond the network, a"
            raise ValueError(f"{source}: does not fit the network: it {where} {key}")
        if state[key].shape != own[key].shape:
            sizes = f"{tuple(state[key].shape)}, not {tuple(own[key].shape)}"
            raise ValueError(f"{source}: does not fit the network: its {key} is {sizes}")
    model.load_state_dict(state)


def _from_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        if path.suffix.lower() == ".safetensors":
            content = _import("safetensors.torch", f"{path}: needs safetensors").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:  # of half a dozen types for as many kinds of damage
        # Its own text would have people run whatever code the file may hold.
        raise ValueError(
            f"{path}: cut short, damaged, in another format, or more than a state dict "
            "(a whole model, say: save its state_dict())"
        ) from error
    for key in ("state_dict", "model", "weights"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds no state dict, nor one under state_dict, model or weights")
    return {_WRAPPERS.sub("", key): tensor for key, tensor in content.items()}


def _from_torchvision(weights: str, of: str | None, name: str, variant: str) -> dict[str, Tensor]:
    models = _import("torchvision.models", f"weights={weights!r} are torchvision's")
    published = models.get_model_weights(variant) if variant in models.list_models() else None
    if published is None or name not in published.__members__ or of not in (None, _stem(published)):
        names = list(published.__members__) if published else "nothing"
        raise ValueError(f"weights={weights!r}: for {variant} torchvision publishes {names}")
    get = partial(published[name].get_state_dict, progress=True, check_hash=True)
    return _published("torchvision", weights, get)


def _published(library: str, weights: Weights, load: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what a library loads; raise one kind of error for everything that can go wrong there."""
    try:
        return dict(load())
    except Exception as error:
        told = str(error).partition("\n")[0]
        raise OSError(f"weights={weights!r}: {library} could not load them: {told}") from error


def _stem(published: Any) -> str:
    return published.__name__.removesuffix("_Weights")


def _from_timm(weights: str, variant: str) -> dict[str, Tensor]:
    timm = _import("timm", f"weights={weights!r}: no such file, and a name like this would be timm's")
    tag = weights.removeprefix("timm/").removeprefix(f"{variant}.")
    published = timm.list_models(f"{variant}.*", pretrained=True)
    if f"{variant}.{tag}" not in published:
        names = [name.partition(".")[2] for name in published] or "nothing"
        raise ValueError(f"weights={weights!r}: for {variant} timm publishes {names}")
    create = partial(timm.create_model, f"{variant}.{tag}", pretrained=True)
    return _published("timm", weights, lambda: create().state_dict())


def _import(name: str, why: str) -> ModuleType:
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(f"{why}: install {package}") from None
    except RuntimeError as error:  # compiled operators that were built for another torch
        raise ImportError(f"{why}, and {package} does not load beside this torch: {error}") from error
