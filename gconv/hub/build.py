"""Write gconv as a kernel for the Hugging Face hub.

The hub's loader imports a kernel under a name that is unique to its build, so that several versions of it can
be loaded in one process. Every import inside the package is therefore made relative, and the operators get a
namespace of the build. The rules are in docs/source/kernel-requirements.md of huggingface/kernels.

The folder that ``write`` makes has the source, from which their ``kernel-builder`` makes builds, and such
builds, which their library loads without the hub: ``kernels.get_local_kernel(folder)``.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path, PurePosixPath

from gconv.hub import files

PACKAGE = Path(__file__).parents[1]
BACKENDS = ("cpu", "cuda", "rocm")
# What only `python -m gconv` runs.
LEFT_OUT = ("__main__.py", "commands/", "hub/", "kernels/__main__.py", "tune.py")


def write(folder: Path, version: int = 0, repo_id: str | None = None, unique: str | None = None) -> list[str]:
    """Write the kernel into a folder.

    Args:
        folder: where to. It is created, and must be empty if it exists.
        version: the kernel's major version on the hub. Defaults to 0, for an API that may still change.
        repo_id: its repository on the hub, "organization/name". Defaults to None, for a later choice.
        unique: suffix of the operators' namespaces: letters, digits and underscores. Defaults to None, a
            digest of the files.

    Returns:
        The namespaces of the operators in ``torch.ops``, one for each backend.

    Raises:
        FileExistsError: the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} isn't empty: choose a new folder")
    modules = read_modules()
    unique = digest_of(modules) if unique is None else unique
    hub = "" if repo_id is None else files.HUB.format(repo_id=repo_id)
    build = files.BUILD.format(version=version, hub=hub)
    _write_all(folder, {"build.toml": build, "flake.nix": files.FLAKE, "CARD.md": files.CARD})
    _write_all(folder / "torch-ext" / "gconv", modules)
    namespaces = [f"_gconv_{backend}_{unique}" for backend in BACKENDS]
    for backend, namespace in zip(BACKENDS, namespaces, strict=True):
        contents = modules | {"_ops.py": files.OPS.format(id=namespace)}
        metadata = _metadata(namespace, version, backend, contents)
        _write_all(folder / "build" / f"torch-{backend}", contents | {"metadata.json": metadata})
    return namespaces


def read_modules() -> dict[str, str]:
    """Return the kernel's modules and tables by their paths in it, all but ``_ops.py``."""
    found = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.glob("kernels/measured/*.json")])
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in found}
    layers = texts["hub/layers.py"]
    texts = {path: text for path, text in texts.items() if not path.startswith(LEFT_OUT)}
    texts |= {"layers.py": layers, "namespace.py": files.NAMESPACE}
    modules = {p: relative_imports(t, p) if p.endswith(".py") else t for p, t in texts.items()}
    return modules | {"__init__.py": _with_layers(modules["__init__.py"])}


def relative_imports(text: str, path: str) -> str:
    """Make the imports of gconv in a module relative.

    Args:
        text: the module.
        path: its path in the package, with slashes.

    Raises:
        ValueError: an ``import gconv.something``, which has no relative form.
    """
    lines, here = text.split("\n"), PurePosixPath(path).parent.parts
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            raise ValueError(f"{path}:{node.lineno}: write 'from gconv import ...' instead of 'import gconv'")
        if isinstance(node, ast.ImportFrom) and node.module and not node.level and _is_ours(node.module):
            there = tuple(node.module.split(".")[1:])
            shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(here, there, strict=False))))
            relative = "." * (len(here) - shared + 1) + ".".join(there[shared:])
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} import", f"from {relative} import", 1)
    return "\n".join(lines)


def digest_of(modules: Mapping[str, str]) -> str:
    """Return seven hexadecimal digits that differ between kernels."""
    return hashlib.sha256(json.dumps(modules, sort_keys=True).encode()).hexdigest()[:7]


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "gconv"


def _with_layers(text: str) -> str:
    """Add ``layers`` to ``__init__.py``, and a check of Python's version before its imports."""
    _, *body = ast.parse(text).body  # after the docstring
    first = next(n for n in body if not (isinstance(n, ast.ImportFrom) and n.module == "__future__"))
    lines = text.split("\n")
    lines.insert(first.lineno - 1, files.HEADER.rstrip())
    return "\n".join(lines).replace("__all__ = [\n", '__all__ = [\n    "layers",\n')


def _metadata(namespace: str, version: int, backend: str, contents: Mapping[str, str]) -> str:
    """Return ``metadata.json``, as kernel-builder writes it."""
    hashes = {path: hashlib.sha256(text.encode()).digest() for path, text in contents.items()}
    digest = {path: base64.b64encode(hash_).decode() for path, hash_ in sorted(hashes.items())}
    metadata = {
        "name": "gconv",
        "id": namespace,
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digest},
    }
    return json.dumps(metadata, indent=2) + "\n"


def _write_all(folder: Path, contents: Mapping[str, str]) -> None:
    for path, text in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8", newline="\n")
