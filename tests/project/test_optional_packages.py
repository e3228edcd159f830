"""Tests whose optional package is missing are skipped by its name; a broken import of ours is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optional
import pytest
from optional import IMPORTED_AS, missing_package, optional_packages, package_of

TESTS = Path(__file__).parents[1]
PROJECT = TESTS.parent / "pyproject.toml"
MODULES = {
    "test_module.py": "import kornia.augmentation\n\n\ndef test_of_module() -> None: ...\n",
    "test_inside.py": "def test_of_call() -> None:\n    import PIL.Image\n",
    "test_fixture.py": "def test_of_fixture(mnist) -> None: ...\n",
    "test_broken.py": "import gconv.nothing\n",
    "test_name.py": "from gconv import nothing\n",
    "test_stranger.py": "def test_of_stranger() -> None:\n    import stranger\n",
    "test_sound.py": "def test_of_nothing() -> None: ...\n",
}
WITHOUT = """
import sys
sys.modules |= dict.fromkeys(("kornia", "PIL"))
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("error", [ImportError("no name", name="kornia"), KeyError("kornia"), None])
def test_only_a_module_that_is_not_found_is_missing(error: BaseException | None) -> None:
    assert missing_package(error) is None


def test_packages_are_known_by_the_name_of_their_module() -> None:
    assert set(IMPORTED_AS) <= set(optional_packages())
    for module, package in (("PIL.Image", "pillow"), ("sklearn.datasets", "scikit-learn"), ("rich", "rich")):
        assert package_of(module) == package
    for module in ("gconv.nothing", "resnext", "torch", "triton", "oracle"):
        assert package_of(module) is None


def test_a_package_that_is_only_hidden_is_not_missing() -> None:
    """Else a test of what we say without it would be skipped where we say nothing."""
    assert missing_package(ModuleNotFoundError("", name="rich.console")) is None
    optional.MISSING.add("rich")
    try:
        assert missing_package(ModuleNotFoundError("", name="rich.console")) == "rich"
    finally:
        optional.MISSING.remove("rich")


def test_a_missing_package_skips_what_needs_it(tmp_path: Path) -> None:
    """At import, in a test and in a fixture; all else that cannot be imported is an error."""
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    options = ["-q", "-rA", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-p", "conftest"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *options, f"--config-file={PROJECT}", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{PROJECT.parent}{os.pathsep}{TESTS}"},
    )
    summary = done.stdout.partition("short test summary info")[2]
    for what in ("test_module.py needs kornia", "test_of_call needs pillow", "test_of_fixture needs pillow"):
        assert what in summary, done.stdout
    assert "1 failed, 1 passed, 3 skipped, 2 errors" in summary, done.stdout
