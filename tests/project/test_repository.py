"""The repository: imports between packages, dependencies of the core, versions, CI."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import compat
import pytest

from gconv.kernels.launch import NEWEST_TRITON
from gconv.torch_internals import TESTED

ROOT = Path(__file__).parents[2]
# What each package may import from the others. Files that start a command may import everything.
MAY_IMPORT = {
    "gconv.commands": ("gconv.hub", "gconv.measure", "gconv", "gconv.kernels"),
    "gconv.hub": ("gconv",),
    "gconv.measure": ("gconv", "gconv.kernels"),
    "gconv.networks": ("gconv",),
    "gconv": (),
    "gconv.kernels": ("gconv",),
}
DOORS = ("gconv", "gconv.__main__")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Return the modules of the project that ``path`` imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name for name in submodules if (ROOT / (name.replace(".", "/") + ".py")).exists()}
            found |= known or {node.module}
    return {name for name in found if name.partition(".")[0] in ("gconv", "resnext", "benchmarks")}


def package_of(module: str) -> str:
    """Return the package of a module of gconv; a package is its own."""
    return module if module in MAY_IMPORT else module.rpartition(".")[0]


def test_gconv_imports_go_one_way() -> None:
    """The runtime does not import the tools, and there are no cycles."""
    files = {module_name(path): path for path in (ROOT / "gconv").rglob("*.py")}
    needs = {name: imports(path) for name, path in files.items()}
    for name in needs.keys() - set(DOORS):
        for imported in needs[name]:
            own, other = package_of(name), package_of(imported)
            assert imported not in DOORS or imported == "gconv.kernels", f"{name} imports {imported}"
            assert other == own or other in MAY_IMPORT[own], f"{name} imports {imported}"
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError


def test_resnext_takes_only_the_public_names_of_gconv() -> None:
    for path in (ROOT / "resnext").rglob("*.py"):
        assert not {name for name in imports(path) if name.startswith("gconv.")}, path


def test_gconv_and_the_model_need_torch_alone() -> None:
    """Not Triton, and no package of the ``train`` extra. Importing them draws no random number."""
    code = """
import sys
for name in ("triton", "rich", "matplotlib", "mlxtend", "sklearn", "PIL"):
    sys.modules[name] = None
import torch
state = torch.get_rng_state()
import gconv, resnext, resnext.forms, resnext.complexity
assert torch.get_rng_state().equal(state)
layer = gconv.GroupConv2d(8, 8, 3, groups=4)
print(layer(torch.randn(1, 8, 5, 5)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 8, 3, 3])" in done.stdout


def test_command_line_without_its_libraries_says_what_to_install() -> None:
    code = "import sys; sys.modules['rich'] = None; from resnext.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "error: the command line needs rich: install gconv with its extra 'train'\n"


def test_the_tested_versions_are_those_that_are_asked_for() -> None:
    """The lower bounds are the oldest pair of `make compat`, and the kernels know its newest Triton."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pairs, needs = project["tool"]["gconv"]["compat"], project["project"]["dependencies"]
    for package in ("torch", "triton"):
        bound = next(need for need in needs if need.startswith(package)).partition(";")[0]
        assert f"{bound}.0" == f"{package}>={pairs['oldest'][package]}"
    assert pairs["newest"]["triton"].startswith(f"{NEWEST_TRITON}.")
    oldest, newest = (pairs[pair]["torch"].rpartition(".")[0] for pair in ("oldest", "newest"))
    assert f"{oldest} to {newest}" == TESTED
    for package in ("gconv", "resnext"):
        assert f"hecked with PyTorch {TESTED}" in (ROOT / package / "torch_internals.py").read_text()


def test_ci_runs_the_python_versions_that_the_package_claims() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: 3."
    claimed = [f"3.{name.removeprefix(prefix)}" for name in project["classifiers"] if name.startswith(prefix)]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tested = re.search(r"python-version: \[(.*)\]", workflow)[1]
    assert [version.strip(' "') for version in tested.split(",")] == claimed
    assert f'make wheels PYTHONS="{" ".join(claimed)}"' in workflow
    assert project["requires-python"] == f">={claimed[0]}"


def test_pre_commit_runs_what_make_lint_runs() -> None:
    """With the tools of .venv, so that constraints.txt alone pins their versions."""
    rules = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    commands = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in rules.splitlines()]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"entry: (.*)", hooks) == commands


def test_no_test_imports_another() -> None:
    """What test files share is in tests/support."""
    for path in (ROOT / "tests").rglob("*.py"):
        modules = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        assert not re.search(r"\btest_", " ".join(modules)), path


@pytest.mark.long
@pytest.mark.parametrize("check", compat.CHECKS)
def test_each_check_of_other_versions_selects_tests(check: str) -> None:
    """Otherwise `make compat` would silently leave out a renamed test."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *compat.CHECKS[check]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:]
