"""The wheel and the source distribution: what is in them, and that the wheel works without the checkout.

Uses the Python and the packages that run this test; `make wheels` installs them anew for each Python.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest
import wheels

import gconv

ROOT = Path(__file__).parents[2]
TABLE = "gconv/kernels/measured/made_up_gpu.json"
pytestmark = pytest.mark.long


def tracked() -> list[str]:
    """Return the files of the repository that exist, without what git ignores."""
    listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both distributions, of a copy of the repository with a table of measurements."""
    import_module("build")
    folder = tmp_path_factory.mktemp("dist")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    (folder / "source" / TABLE).parent.mkdir(exist_ok=True)
    (folder / "source" / TABLE).write_text("{}")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "out"]
    done = subprocess.run([*command, folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


def package_files() -> set[str]:
    """Return what both distributions have from the packages."""
    code = {name for name in tracked() if name.startswith(("gconv/", "resnext/")) and name.endswith(".py")}
    tables = {name for name in tracked() if name.startswith("gconv/kernels/measured/")}
    return code | tables | {TABLE, "gconv/py.typed", "resnext/py.typed"}


def test_wheel_has_the_packages_with_tables_and_types_and_nothing_else(dist: Path) -> None:
    (path,) = dist.glob("*.whl")
    assert path.name == f"gconv-{gconv.__version__}-py3-none-any.whl"
    with ZipFile(path) as archive:
        names = set(archive.namelist())
    described = {name for name in names if name.startswith(f"gconv-{gconv.__version__}.dist-info/")}
    assert names - described == package_files()
    assert any(name.endswith("/LICENSE") for name in described)


def test_source_distribution_has_the_packages_and_what_describes_them(dist: Path) -> None:
    top = f"gconv-{gconv.__version__}/"
    with tarfile.open(dist / f"gconv-{gconv.__version__}.tar.gz") as archive:
        names = {member.name.removeprefix(top) for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if name.startswith("gconv.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    documents = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
    assert names - made == package_files() | documents


def test_metadata_can_be_published(dist: Path) -> None:
    import_module("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_installed_wheel_works_without_the_checkout(dist: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows all other packages from this one."""
    environment = tmp_path / "environment"
    wheels.run([sys.executable, "-m", "venv", "--without-pip", environment])
    (path,) = dist.glob("*.whl")
    to = ["--python", environment / "bin" / "python"]
    wheels.run([sys.executable, "-m", "pip", *to, "install", "--quiet", "--no-deps", "--no-index", path])
    (packages,) = environment.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed))  # they come after the wheel
    assert f"python {sys.version.split()[0]} " in wheels.check(environment)
