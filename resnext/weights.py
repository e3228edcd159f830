"""Trained weights for the named networks: from a file, or as torchvision and timm publish them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Weights = str | PathLike[str] | Any  # the last is a member of torchvision's WeightsEnum
FILES = (".pth", ".pt", ".bin", ".safetensors")
_TORCHVISION = re.compile(r"(?:(\w+)_Weights\.)?([A-Z][A-Z0-9_]*)")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DistributedDataParallel's and torch.compile's


def read_weights(weights: Weights, variant: str) -> dict[str, Tensor]:
    """The state dict that ``weights`` names.

    Args:
        weights: a file that ends in .pth, .pt, .bin or .safetensors and holds a state dict, or one under
            "state_dict", "model" or "weights"; a name of torchvision's, such as "IMAGENET1K_V2" or "DEFAULT",
            or the member of its enumeration; or a name of timm's, such as "a1h_in1k" or
            "resnext50_32x4d.a1h_in1k".
        variant: the network's name, such as "resnext50_32x4d".

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``weights`` is neither.
        ImportError: the library that publishes the name is not installed or does not load.
        ValueError: the file is damaged or holds no weights; no such name is published for ``variant``.
    """
    if hasattr(weights, "get_state_dict"):
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    if not isinstance(weights, str | PathLike):
        raise TypeError(f"weights must be a file or a published name, got {weights!r}")
    if isinstance(weights, PathLike) or weights.endswith(FILES):
        return _from_file(Path(weights))
    if name := _TORCHVISION.fullmatch(weights):
        return _from_torchvision(weights, name[1], name[2], variant)
    return _from_timm(weights, variant)


def fit(model: nn.Module, state: Mapping[str, Tensor], source: Weights) -> None:
    """Loads ``state`` strictly, but for a classifier of another size, which stays as it was initialised.

    Raises:
        ValueError: keys or sizes do not fit; the first of them is named.
    """
    own = model.state_dict()
    if "fc.weight" in state and len(state["fc.weight"]) != len(own["fc.weight"]):
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
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            content = _import("safetensors.torch", f"{path}: needs safetensors").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:  # of half a dozen types for as many kinds of damage
        told = str(error).partition("\n")[0]
        raise ValueError(f"{path}: cut short, damaged, or more than weights: {told}") from None
    for key in ("state_dict", "model", "weights"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds no state dict")
    return {_WRAPPERS.sub("", key): tensor for key, tensor in content.items()}


def _from_torchvision(weights: str, of: str | None, name: str, variant: str) -> dict[str, Tensor]:
    models = _import("torchvision.models", f"weights={weights!r} are torchvision's")
    published = models.get_model_weights(variant) if variant in models.list_models() else None
    if published is None or name not in published.__members__ or of not in (None, _stem(published)):
        names = list(published.__members__) if published else "nothing"
        raise ValueError(f"weights={weights!r}: for {variant} torchvision publishes {names}")
    return read_weights(published[name], variant)


def _stem(published: Any) -> str:
    return published.__name__.removesuffix("_Weights")


def _from_timm(weights: str, variant: str) -> dict[str, Tensor]:
    timm = _import("timm", f"weights={weights!r} are no file ({', '.join(FILES)}) but timm's, if anybody's")
    tag = weights.removeprefix("timm/").removeprefix(f"{variant}.")
    published = timm.list_models(f"{variant}.*", pretrained=True)
    if f"{variant}.{tag}" not in published:
        names = [name.partition(".")[2] for name in published] or "nothing"
        raise ValueError(f"weights={weights!r}: for {variant} timm publishes {names}")
    return timm.create_model(f"{variant}.{tag}", pretrained=True).state_dict()


def _import(name: str, why: str) -> ModuleType:
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(f"{why}: install {package}") from None
    except RuntimeError as error:  # compiled operators that were built for another torch
        raise ImportError(f"{why}, and {package} does not load beside this torch: {error}") from error
