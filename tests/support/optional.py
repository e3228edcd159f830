"""Skip tests that need an optional package that is not installed, and name the package."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
# Packages whose import name differs from their name on PyPI.
IMPORTED_AS = {"pillow": "PIL", "pytest-benchmark": "pytest_benchmark", "scikit-learn": "sklearn"}


class OptionalModule(pytest.Module):
    """A test module that may import packages that are not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """Return the tests, or skip all of them."""
        with skipping(self.path.name):
            return super().collect()


@contextmanager
def skipping(what: str) -> Iterator[None]:
    """Skip ``what`` if importing a package of gconv's extras fails; raise other errors."""
    try:
        yield
    except (ModuleNotFoundError, pytest.Collector.CollectError) as error:
        package = missing_package(error.__cause__ or error)
        if package is None:
            raise
        pytest.skip(f"{what} needs {package}", allow_module_level=True)


def missing_package(error: BaseException | None) -> str | None:
    """Return the package of the extras that ``error`` reports missing, or None for other errors.

    Tests that hide an installed package, to check the error message, are not skipped.
    """
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    package = package_of(error.name)
    return package if package in MISSING else None


def package_of(module: str) -> str | None:
    """Return the package of the extras that contains a module, or None."""
    top = module.partition(".")[0]
    return next((name for name in optional_packages() if IMPORTED_AS.get(name, name) == top), None)


def optional_packages() -> list[str]:
    """Return the packages in the extras of pyproject.toml, by their names on PyPI."""
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    needs = (need for extra in extras.values() for need in extra)
    return [re.match(r"[\w-]+", need)[0] for need in needs if not need.startswith("gconv[")]


# Computed before any test hides a module.
MISSING = {name for name in optional_packages() if find_spec(IMPORTED_AS.get(name, name)) is None}
