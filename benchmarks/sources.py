"""Find the code that determines a result: all definitions that its roots reach by name, across our modules.

Edits that can't change a result must not make it outdated. So comments, docstrings, the messages of errors,
formatting and the order of definitions don't count, and definitions that aren't reached don't count either.
Code that is reached only through a string, such as ``dispatch.IMPLEMENTATIONS``, or as a method of an object
that no name refers to, isn't found: add it as a root.
"""

from __future__ import annotations

import ast
import hashlib
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
Read = Callable[[str], str | None]  # the text of a file, by its path from the root; None if it doesn't exist
# Code that prints, plots and writes, and doesn't affect any number: not followed.
SHOWS = (
    "gconv:__version__",
    "gconv.measure.explain",
    "gconv.measure.terminal",
    "gconv.text",
    "resnext.announcement",
    "resnext.checkpoint",
    "resnext.config:Option",
    "resnext.config:option",
    "resnext.errors",
    "resnext.files",
    "resnext.interruption",
    "resnext.logs",
    "resnext.plots",
    "resnext.progress",
    "resnext.tables",
)


def read_working_tree(path: str) -> str | None:
    """Return the text of a file of the repository as it is now, or None if it doesn't exist."""
    file = ROOT / path
    return file.read_text() if file.is_file() else None


def at_commit(commit: str) -> Read:
    """Return a function that reads files as they were at ``commit``."""
    return lambda path: _git("show", f"{commit}:{path}")


def resolve(commit: str) -> str | None:
    """Return the first twelve digits of a commit, or None if the repository doesn't have it."""
    digits = _git("rev-parse", "--verify", "--quiet", "--short=12", f"{commit}^{{commit}}")
    return digits.strip() if digits else None


def digests(roots: Iterable[str], read: Read = read_working_tree) -> dict[str, str]:
    """Return a digest for each file with definitions that determine what ``roots`` do.

    Args:
        roots: modules, such as "gconv.geometry", and definitions in modules, such as "gconv.geometry:PASSES".
        read: a function that reads a file of the repository. Defaults to reading the working tree.
    """
    search = _Search(read)
    for root in roots:
        module, _, name = root.partition(":")
        search.reach(module, name or None)
    return {
        path: hashlib.sha256("\n".join(sorted(shapes)).encode()).hexdigest()[:8]
        for path, shapes in sorted(search.shapes.items())
    }


def _git(*arguments: str) -> str | None:
    """Return what git prints, or None if it fails."""
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


class _Module:
    """The top level of a file.

    Attributes:
        definitions: the statements that define each name.
        imports: for each imported name, its module and its name there; None for a name that is a module.
        loose: statements that define nothing and run on import.
    """

    def __init__(self, path: str, text: str, is_module: Callable[[str], bool]) -> None:
        self.path = path
        self.definitions: dict[str, list[ast.stmt]] = defaultdict(list)
        self.imports: dict[str, tuple[str, str | None]] = {}
        self.loose: list[ast.stmt] = []
        tree = ast.parse(text)
        for node in tree.body:
            names = list(_defined(node))
            for name in names:
                self.definitions[name].append(node)
            if not (names or isinstance(node, ast.Import | ast.ImportFrom) or _decides_nothing(node)):
                self.loose.append(node)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.name if alias.asname else alias.name.partition(".")[0]
                    self.imports[alias.asname or name] = (name, None)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    target = (submodule, None) if is_module(submodule) else (node.module, alias.name)
                    self.imports[alias.asname or alias.name] = target


class _Search:
    """A search that follows names from module to module.

    Attributes:
        shapes: the statements found so far, normalized by ``_shape``, by file.
    """

    def __init__(self, read: Read) -> None:
        self.shapes: dict[str, set[str]] = defaultdict(set)
        self._read = cache(read)
        self._modules: dict[str, _Module | None] = {}
        self._seen: set[tuple[str, str | None]] = set()

    def reach(self, module: str, name: str | None) -> None:
        """Add a definition, or the entire module if ``name`` is None, and everything that it reaches."""
        here = self._module(module)
        if here is None or (module, name) in self._seen or f"{module}:{name}" in SHOWS:
            return
        self._seen.add((module, name))
        found = [*here.loose, *here.definitions.get(name, ())]
        for statement in found:
            self.shapes[here.path].add(_shape(statement))
            for dotted in _names(statement):
                self._follow(module, dotted)
        if name is None:
            for each in [*here.definitions]:
                self.reach(module, each)
        elif name not in here.definitions and name in here.imports:
            self.reach(*here.imports[name])

    def _follow(self, module: str, dotted: list[str]) -> None:
        """Reach the definition that a dotted name refers to in ``module``."""
        first, *rest = dotted
        here = self._modules[module]
        target, name = (
            (module, first) if first in here.definitions else here.imports.get(first, (module, first))
        )
        while name is None and rest:
            name = rest.pop(0)
            if self._is_module(f"{target}.{name}"):
                target, name = f"{target}.{name}", None
        self.reach(target, name)

    def _module(self, name: str) -> _Module | None:
        """Return a module of this repository; None for other modules and for those in ``SHOWS``."""
        if name not in self._modules:
            path, text = self._find(name)
            ours = text is not None and name not in SHOWS
            self._modules[name] = _Module(path, text, self._is_module) if ours else None
        return self._modules[name]

    def _is_module(self, name: str) -> bool:
        return self._find(name)[1] is not None

    def _find(self, name: str) -> tuple[str, str | None]:
        base = name.replace(".", "/")
        paths = (f"{base}.py", f"{base}/__init__.py")
        return next(
            ((path, self._read(path)) for path in paths if self._read(path) is not None), (base, None)
        )


def _defined(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def _names(node: ast.AST) -> Iterator[list[str]]:
    """Yield the dotted names in a statement, a.b.c as ["a", "b", "c"]."""
    parts: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        parts.insert(0, inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name):
        yield [inner.id, *parts]
        return
    for child in ast.iter_child_nodes(inner):
        yield from _names(child)


def _shape(node: object) -> str:
    """Return a text that is equal for pieces of syntax that do the same.

    It leaves out docstrings, positions and the messages of errors, and doesn't depend on the version of
    Python, unlike ``ast.dump``: newer versions add fields and leave out empty ones.
    """
    if isinstance(node, list):
        return f"[{','.join(map(_shape, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        fields["body"] = [statement for statement in node.body if not _is_docstring(statement)]
    if isinstance(node, ast.Raise):
        return f"Raise({_raised(node)})"
    said = [f"{name}={_shape(value)}" for name, value in fields.items() if value not in (None, [])]
    return f"{type(node).__name__}({','.join(said)})"


def _raised(node: ast.Raise) -> str:
    """Return the type of the error that a statement raises, without its message."""
    return _shape(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)


def _decides_nothing(node: ast.stmt) -> bool:
    """Whether a top-level statement is a docstring, or only for type checkers or the command line."""
    conditions = (["TYPE_CHECKING"], ["__name__"])
    return _is_docstring(node) or (
        isinstance(node, ast.If) and any(n in conditions for n in _names(node.test))
    )


def _is_docstring(node: ast.stmt) -> bool:
    """Whether a statement consists of a string."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
