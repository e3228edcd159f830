"""``make wheels``: install the wheel in a new environment of each supported Python, and check it there.

An environment gets the pinned torch without CUDA libraries, as in compat.py, the wheel with its extra
``train``, and the pinned versions of everything that these need. It is kept for the next run, which only
replaces gconv.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cuda_stubs import stub_cuda

ROOT = Path(__file__).parents[2]
CLASSIFIER = "Programming Language :: Python :: 3."
# Imports every module, and compares a converted network and the kernels with PyTorch.
USE = """
import importlib, pkgutil, sys
from pathlib import Path
import torch
import torch.nn.functional as F
import gconv, resnext

for package in (gconv, resnext):
    assert Path(package.__file__).is_relative_to(sys.prefix), f"{package.__file__} is not the wheel's"
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)

torch.manual_seed(0)
x = torch.randn(2, 8, 9, 9)
net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=4), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
before = net(x)
gconv.convert(net)
assert type(net[0]) is gconv.GroupConv2d
torch.testing.assert_close(net(x), before)
with gconv.backend("triton"):
    torch.testing.assert_close(net(x), before)
print("python", sys.version.split()[0], "torch", torch.__version__)
"""


def main(dist: str, folder: str, *versions: str) -> int:
    """Check the wheel in ``dist`` with every Python that is found.

    Args:
        dist: where the wheel is.
        folder: where the environments are made.
        versions: Pythons that must be found, such as "3.12". Defaults to those that pyproject.toml names,
            of which those that are not found are skipped.

    Returns:
        0, or 1 if a check failed or a Python is missing.
    """
    (wheel,) = Path(dist).resolve().glob("*.whl")
    failed = False
    for version in versions or supported():
        python = find(version)
        if python is None:
            print(f"python {version}: not found on PATH, {'a failure' if versions else 'skipped'}")
            failed |= bool(versions)
            continue
        start = time.perf_counter()
        try:
            environment = install(python, wheel, Path(folder).resolve() / f"python-{version}")
            said = check(environment)
        except RuntimeError as error:
            print(f"python {version}: failed: {error}", flush=True)
            failed = True
        else:
            print(f"python {version}: passed in {time.perf_counter() - start:.0f} s, {said}", flush=True)
    return int(failed)


def supported() -> list[str]:
    """Return the versions of Python that pyproject.toml names, such as "3.12"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [f"3.{name.removeprefix(CLASSIFIER)}" for name in project["classifiers"] if CLASSIFIER in name]


def find(version: str) -> str | None:
    """Return the path of a Python on PATH that starts, None if there is none."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        return None  # some version managers put a script on PATH that only fails
    return python


def install(python: str, wheel: Path, environment: Path) -> Path:
    """Install the wheel and what it needs into an environment, which is made if it is not there."""
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not (environment / "complete").exists():
        shutil.rmtree(environment, ignore_errors=True)
        run([python, "-m", "venv", environment])
        run([*pip, "--no-deps", "--constraint", ROOT / "constraints.txt", "torch"])
        (packages,) = environment.glob("lib/python*/site-packages")
        do_without_cuda(packages)
    run([*pip, "--constraint", ROOT / "constraints.txt", f"{wheel}[train]"])
    run([*pip, "--no-deps", "--force-reinstall", wheel])  # one of the same version may be there
    run([*pip[:3], "check"])
    (environment / "complete").touch()
    return environment


def do_without_cuda(packages: Path) -> None:
    """Put stubs in the place of torch's CUDA libraries, and delete those from what it requires."""
    stub_cuda(packages / "torch" / "lib")
    (metadata,) = packages.glob("torch-*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    metadata.write_text(re.sub(r"(?m)^Requires-Dist: (cuda|nvidia)-.*\n", "", text), encoding="utf-8")


def check(environment: Path) -> str:
    """Use gconv as it is installed in an environment; return which Python and torch it ran with.

    Raises:
        RuntimeError: something failed.
    """
    scripts = environment / "bin"
    python = [scripts / "python", "-I"]  # neither this folder nor PYTHONPATH
    for command in ([*python, "-m", "gconv", "--help"], [scripts / "resnext", "--help"]):
        assert "usage:" in run(command).lower()
    assert '"outcome": "right"' in run([*python, "-m", "gconv", "--json"])  # exits with 1 if one is wrong
    return run([*python, "-c", USE], TRITON_INTERPRET="1").strip()


def run(command: Sequence[str | Path], **variables: str) -> str:
    """Run a program without PYTHONPATH, and return what it printed.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, **variables}
    environment.pop("PYTHONPATH", None)
    to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, env=environment, text=True, **to)
    if done.returncode:
        line = " ".join(map(str, command))
        raise RuntimeError(f"{line} exited with {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
