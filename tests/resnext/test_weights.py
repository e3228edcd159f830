"""Trained weights: exchange with torchvision, files, and published names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import zoo
from torch import nn

import resnext
from resnext import weights as reading

VARIANTS = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")


def untouched(name: str, **options: Any) -> nn.Module:
    """Return a network on the meta device, without weights."""
    with torch.device("meta"):
        return getattr(resnext, name)(**options).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_torchvisions_weights_load_strictly_and_give_the_same_both_ways(name: str) -> None:
    theirs = getattr(zoo.load("torchvision.models"), name)().eval()
    for buffer in theirs.buffers():  # as after training, since initial statistics would hide a mistake
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    x = torch.randn(1, 3, 64, 64)
    expected = theirs(x)

    ours = untouched(name)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    torch.testing.assert_close(ours(x), expected)

    with torch.device("meta"):
        back = getattr(zoo.load("torchvision.models"), name)().eval()
    back.load_state_dict(ours.state_dict(), strict=True, assign=True)
    assert torch.equal(back(x), expected)


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """Return a state dict of ``resnext50_32x4d`` with ten classes."""
    torch.manual_seed(5)
    return resnext.resnext50_32x4d(num_classes=10).state_dict()


def assert_loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    assert list(own) == list(state) and all(torch.equal(own[key], state[key]) for key in own)


WRITERS: dict[str, Callable[[dict, Path], object]] = {
    "w.pth": torch.save,
    "w.pt": lambda state, path: torch.save({"model": state, "epoch": 3}, path),
    "w.bin": lambda state, path: torch.save(
        {"state_dict": {f"module._orig_mod.{key}": tensor for key, tensor in state.items()}}, path
    ),
    "w.ckpt": lambda state, path: torch.save({"weights": state}, path),
    "w.SAFETENSORS": lambda state, path: pytest.importorskip("safetensors.torch").save_file(state, path),
    "w.safetensors": lambda state, path: pytest.importorskip("safetensors.torch").save_file(state, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_load(name: str, trained: dict, tmp_path: Path) -> None:
    WRITERS[name](trained, tmp_path / name)
    assert_loaded(resnext.resnext50_32x4d(weights=str(tmp_path / name)), trained)
    assert resnext.resnext50_32x4d(weights=tmp_path / name).fc.out_features == 10


def test_another_number_of_classes_starts_with_an_untrained_classifier(trained: dict, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "w.pth")
    model = resnext.resnext50_32x4d(weights=tmp_path / "w.pth", num_classes=7)
    own = model.state_dict()
    assert own["fc.weight"].shape == (7, 2048)
    assert all(torch.equal(own[key], trained[key]) for key in own if not key.startswith("fc."))


def test_what_is_no_file_or_does_not_fit_says_so_in_one_line(trained: dict, tmp_path: Path) -> None:
    load = resnext.resnext50_32x4d
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file"):
        load(weights="nowhere.pth")
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 half a file")
        with pytest.raises(
            ValueError,
            match=f"{name}: it is truncated, damaged, in another format, or more than a state dict",
        ):
            load(weights=tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(
        ValueError, match=r"list\.pth has no state dict, at the top level or under state_dict, model or"
    ):
        load(weights=tmp_path / "list.pth")
    torch.save(trained, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"layer1\.0\.conv1\.weight must have shape \(256, 64, 1, 1\), got \(128"
    ):
        resnext.resnext101_32x8d(weights=tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"it has the unexpected key layer1\.2\.conv1\.weight"):
        reading.fit(resnext.ResNeXt((2, 4, 6, 3)), trained, "w.pth")
    with pytest.raises(ValueError, match=r"it is missing key layer3\.6\.conv1\.weight"):
        reading.fit(resnext.ResNeXt((3, 4, 7, 3)), trained, "w.pth")
    without_bias = {key: tensor for key, tensor in trained.items() if key != "fc.bias"}
    with pytest.raises(ValueError, match=r"it is missing key fc\.bias"):
        reading.fit(resnext.resnext50_32x4d(num_classes=10), without_bias, "w.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.pth: not a file"):
        load(weights=tmp_path / "folder.pth")
    with torch.device("meta"), pytest.raises(ValueError, match="on the meta device has no memory"):
        load(weights=tmp_path / "w.pth")
    torch.save({"weights": trained, "made by": test_files_load}, tmp_path / "code.pth")
    with pytest.raises(
        ValueError,
        match=r"or more than a state dict \(if it is a pickled model, save its state_dict\(\) instead",
    ):
        load(weights=tmp_path / "code.pth")
    with pytest.raises(TypeError, match=r"weights must be a file or a published name, got int$"):
        load(weights=3)
    with pytest.raises(TypeError, match="got OrderedDict; to load a state dict, call load_state_dict"):
        load(weights=trained)


@pytest.mark.parametrize("name", ["IMAGENET1K_V2", "DEFAULT", "ResNeXt50_32X4D_Weights.IMAGENET1K_V2"])
@pytest.mark.parametrize("member", [False, True], ids=["name", "member"])
def test_torchvisions_names_load_through_torchvision(
    name: str, member: bool, trained: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, asked = zoo.load("torchvision.models._api"), []
    monkeypatch.setattr(api, "load_state_dict_from_url", lambda url, **_: asked.append(url) or trained)
    weights = api.get_model_weights("resnext50_32x4d")[name.rpartition(".")[2]] if member else name
    assert_loaded(resnext.resnext50_32x4d(weights=weights), trained)
    assert asked == ["https://download.pytorch.org/models/resnext50_32x4d-1a0047aa.pth"]


@pytest.mark.parametrize("name", ["a1h_in1k", "resnext50_32x4d.a1h_in1k", "timm/resnext50_32x4d.a1h_in1k"])
def test_timms_names_load_through_timm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder, asked = zoo.load("timm.models._builder"), []
    published = resnext.resnext50_32x4d().state_dict()

    def from_hub(source: Any, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        asked.append(str(source))
        return dict(published)

    for function in ("load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(builder, function, from_hub)
    assert_loaded(resnext.resnext50_32x4d(weights=name), published)
    assert len(asked) == 1 and "resnext50_32x4d" in asked[0] and "a1h" in asked[0]


@pytest.mark.parametrize("name", ["IMAGENET1K_V2", "a1h_in1k"])
def test_without_a_network_the_error_says_what_was_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(zoo.load("torchvision.models._api"), "load_state_dict_from_url", fail)
    for function in ("load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(zoo.load("timm.models._builder"), function, fail)
    with pytest.raises(OSError, match=f"couldn't load weights='{name}': <urlopen error Name or service"):
        resnext.resnext50_32x4d(weights=name)


def test_a_library_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(reading, "import_module", broken)
    with pytest.raises(
        ImportError, match="needs torchvision, which doesn't load with this version of torch: operator"
    ):
        resnext.resnext50_32x4d(weights="DEFAULT")


def test_unknown_names_are_refused_with_those_that_are_published() -> None:
    zoo.load("timm")
    load = resnext.resnext50_32x4d
    with pytest.raises(
        ValueError, match=r"torchvision publishes \['IMAGENET1K_V1', 'IMAGENET1K_V2', 'DEFAULT'\]"
    ):
        load(weights="IMAGENET22K")
    with pytest.raises(
        ValueError, match=r"ResNet50_Weights\.DEFAULT.*for resnext50_32x4d torchvision publishes"
    ):
        load(weights="ResNet50_Weights.DEFAULT")
    member = zoo.load("torchvision.models").ResNet50_Weights.IMAGENET1K_V1
    with pytest.raises(ValueError, match=r"ResNet50_Weights\.IMAGENET1K_V1.*for resnext50_32x4d torchvision"):
        load(weights=member)
    with pytest.raises(ValueError, match=r"'my-own'.*timm publishes \['a1_in1k'"):
        load(weights="my-own")
    with pytest.raises(ValueError, match="for resnext29_8x64d torchvision publishes nothing"):
        resnext.resnext29_8x64d(weights="DEFAULT")


@pytest.mark.parametrize(
    ("weights", "module", "told"),
    [
        ("IMAGENET1K_V1", "torchvision.models", "'IMAGENET1K_V1' needs torchvision: pip install torchvision"),
        ("nowhere.ckpt", "timm", r"'nowhere\.ckpt': no such file, and looking up the name needs timm: pip"),
        ("tv_in1k", "timm", "no such file, and looking up the name needs timm: pip install timm"),
        (
            "w.safetensors",
            "safetensors.torch",
            "reading w.safetensors needs safetensors: pip install safetensors",
        ),
    ],
)
def test_without_the_library_the_error_says_which(
    weights: str, module: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.safetensors").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=told):
        resnext.resnext50_32x4d(weights=weights)
