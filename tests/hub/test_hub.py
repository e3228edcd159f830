"""The kernel for the Hugging Face hub: it loads as their library loads it, and keeps their rules."""

from __future__ import annotations

import ast
import base64
import hashlib
import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import MethodType

import pytest
import torch
from torch import nn

import gconv
from gconv.commands.hub import main
from gconv.hub import layers
from gconv.hub.build import BACKENDS, PACKAGE, read_modules, relative_imports, write

KINDS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d")
# Loads two kernels as `kernels.get_local_kernel` does, then gconv itself, and compares them with PyTorch.
LOAD = """
import importlib.util, json, sys
from pathlib import Path
import torch, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

def load(folder):
    variant = Path(folder, "build", "torch-cpu")
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def check(module, backends):
    x, w = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(4, 2, 3, 3, requires_grad=True)
    expected = F.conv2d(x, w, padding=1, groups=2)
    grads = torch.autograd.grad(expected.sum(), (x, w))
    for backend in backends:
        y = module.group_conv2d(x, w, padding=1, groups=2, backend=backend)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad(y.sum(), (x, w))
        torch.testing.assert_close(found, grads, rtol=1e-4, atol=1e-4)
    with FlopCounterMode(display=False) as counter:  # calls the operator
        module.group_conv2d(x, w, padding=1, groups=2, backend="reference")
    (operator,) = counter.get_flop_counts()["Global"]
    assert str(operator) == f"{module.namespace.NAMESPACE}.forward"
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2), torch.nn.BatchNorm2d(4)).eval()
    before = net(x)
    assert module.convert(net) and type(net[0]) is module.GroupConv2d
    torch.testing.assert_close(net(x), before)
    torch.testing.assert_close(module.fuse(net, x)[0](x), before)

sys.modules["gconv"] = None  # importing it fails
modules = [load(folder) for folder in sys.argv[1:]]
check(modules[0], ["aten", "reference", "triton"])
check(modules[1], ["aten", "reference"])
del sys.modules["gconv"]
import gconv
check(gconv, ["aten", "reference"])
print(*(module.__name__ for module in modules), gconv.__file__)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    write(folder, repo_id="someone/gconv")
    return folder


def test_two_builds_and_gconv_itself_run_in_one_process(kernel: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", unique="other")
    command = [sys.executable, "-c", LOAD, kernel, tmp_path / "other"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    first, second, ours = done.stdout.split()
    assert first.startswith("_gconv_cpu_") and second == "_gconv_cpu_other"
    assert ours == str(PACKAGE / "__init__.py")


def test_modules_import_nothing_by_the_name_of_gconv(kernel: Path) -> None:
    """Besides themselves they import Python's own modules, torch and triton."""
    allowed = {*sys.stdlib_module_names, "torch", "triton", "matplotlib"}  # the last only for plots
    ours = {f"gconv.{p.removesuffix('.py').replace('/', '.')}" for p in read_modules()} | {"gconv.kernels"}
    for path in (kernel / "torch-ext" / "gconv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.partition(".")[0] for name in names} <= allowed, f"{path}: {names}"
            assert not (isinstance(node, ast.Constant) and node.value in ours), f"{path}: {node.value}"


def test_the_source_is_what_kernel_builder_reads(kernel: Path) -> None:
    build = tomllib.loads((kernel / "build.toml").read_text())
    assert build["general"]["name"] == "gconv" and build["general"]["hub"] == {"repo-id": "someone/gconv"}
    assert build["general"]["backends"] == list(BACKENDS)
    assert set(build["torch-noarch"]["pyext"]) == {"py", "json"}
    source = kernel / "torch-ext" / "gconv"
    assert not (source / "_ops.py").exists()  # kernel-builder generates it
    assert (source / "networks" / "convert.py").exists() and not (source / "commands").exists()
    (exported,) = [
        node.value
        for node in ast.parse((source / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert set(ast.literal_eval(exported)) == {*gconv.__all__, "layers"}


def test_measured_tables_are_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels" / "measured").mkdir(parents=True)
    for name in ("__init__.py", "hub/layers.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((PACKAGE / name).read_bytes())
    (tmp_path / "kernels" / "measured" / "some_gpu.json").write_text("{}")
    monkeypatch.setattr("gconv.hub.build.PACKAGE", tmp_path)
    assert read_modules()["kernels/measured/some_gpu.json"] == "{}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_metadata_name_the_build_and_the_digests_of_its_files(kernel: Path, backend: str) -> None:
    variant = kernel / "build" / f"torch-{backend}"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["backend"] == {"type": backend} and metadata["id"].isidentifier()
    found = {p.relative_to(variant).as_posix(): p.read_bytes() for p in variant.rglob("*") if p.is_file()}
    del found["metadata.json"]
    digests = {path: base64.b64encode(hashlib.sha256(data).digest()).decode() for path, data in found.items()}
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
    assert f"torch.ops.{metadata['id']}\n" in (variant / "_ops.py").read_text()


@pytest.mark.parametrize("name", KINDS)
def test_layers_have_a_forward_and_nothing_else(name: str) -> None:
    """What ``kernels.kernelize`` requires of a layer that takes the place of PyTorch's forward."""
    layer, original = getattr(layers, name), getattr(nn, name)
    assert layer.__init__ is nn.Module.__init__
    members = {name for name, _ in inspect.getmembers(layer)}
    assert members - {name for name, _ in inspect.getmembers(nn.Module)} <= {"can_torch_compile"}
    ours, theirs = (inspect.signature(cls.forward).parameters for cls in (layer, original))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("name", KINDS)
def test_layers_compute_what_the_modules_of_pytorch_do(name: str, backend: str) -> None:
    dims, transposed = int(name[-2]), "Transpose" in name
    options = {"output_padding": 1} if transposed else {"padding_mode": "circular"}
    module = getattr(nn, name)(4, 6, 3, stride=2, padding=1, groups=2, dtype=torch.float64, **options)
    x = torch.randn(2, 4, *[5] * dims, dtype=torch.float64)
    sizes = [[10] * dims] if transposed else []
    expected = module(x), module(x, *sizes)
    module.forward = MethodType(getattr(layers, name).forward, module)
    with gconv.backend(backend):
        torch.testing.assert_close((module(x), module(x, *sizes)), expected)


def test_the_command_writes_a_kernel_and_keeps_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kernel"
    for arguments, error in (
        (["--id", "a-b"], "--id must be letters, digits and underscores, got 'a-b'"),
        (["--repo-id", 'a"b'], "--repo-id must be ORGANIZATION/NAME, got 'a\"b'"),
        (["--version", "-1"], "--version must not be negative, got -1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(folder), *arguments])
        assert error in capsys.readouterr().err and not folder.exists()
    assert main([str(folder), "--id", "abc", "--version", "3"]) == 0
    assert capsys.readouterr().out.count("torch.ops._gconv_cuda_abc") == 1
    assert json.loads((folder / "build/torch-cuda/metadata.json").read_text())["version"] == 3
    with pytest.raises(SystemExit, match="2"):
        main([str(folder)])
    assert capsys.readouterr().err == f"error: {folder} isn't empty: choose a new folder\n"


def test_an_import_that_cannot_be_relative_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a\.py:2: write 'from gconv import"):
        relative_imports("import torch\nimport gconv.ops\n", "a.py")
