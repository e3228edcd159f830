"""The code that determines a result is found by name, across modules."""

from __future__ import annotations

import pytest

from benchmarks.sources import digests

FILES = {
    "gconv/__init__.py": "from gconv.layer import Layer\n",
    "gconv/layer.py": """
from gconv import sums
from gconv.other import unused

class Layer:
    def run(self, x):
        return sums.double(x)
""",
    "gconv/sums.py": """
from gconv.measure.terminal import show
FACTOR = 2

def double(x):
    \"\"\"Doubles.\"\"\"
    show(x)
    if x is None:
        raise TypeError("x is None")
    return FACTOR * x

def triple(x):
    return 3 * x
""",
    "gconv/other.py": "def unused(): ...\n",
    "gconv/measure/terminal.py": "def show(x): ...\n",
    "work.py": """
import gconv

def main():
    gconv.Layer().run(1)

if __name__ == '__main__':
    main()
""",
}


def found(**changes: str) -> dict[str, str]:
    """The digests of ``work`` after replacing a text in some files."""
    files = dict(FILES)
    for path, change in changes.items():
        before, after = change.split(" -> ")
        path = next(name for name in files if name.endswith(f"{path}.py"))
        assert before in files[path]
        files[path] = files[path].replace(before, after.replace("\\n", "\n"))
    return digests(["work:main"], files.get)


def test_what_decides_a_result_is_found_by_name_through_modules() -> None:
    assert [*found()] == ["gconv/layer.py", "gconv/sums.py", "work.py"]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("sums", "FACTOR = 2 -> FACTOR = 3"),
        ("sums", "FACTOR * x -> x * FACTOR"),
        ("sums", "TypeError -> ValueError"),
        ("layer", "double(x) -> triple(x)"),
        ("work", "run(1) -> run(2)"),
        ("sums", "FACTOR = 2 -> FACTOR = 2\\nprint(FACTOR)"),
    ],
)
def test_a_change_of_what_decides_a_result_is_seen(path: str, change: str) -> None:
    before, after = found(), found(**{path: change})
    changed = [name for name in after if after[name] != before[name]]
    assert next(name for name in FILES if name.endswith(f"{path}.py")) in changed


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("sums", "Doubles. -> Twice as much."),
        ("sums", "return FACTOR * x -> # why\\n    return (FACTOR\\n            * x)"),
        ("sums", "3 * x -> 4 * x"),
        ("sums", '"x is None" -> f"x must be a number, got {x}"'),
        ("other", "... -> return 1"),
        ("terminal", "... -> print(x)"),
        ("work", "__main__': -> __main__' and True:"),
    ],
)
def test_a_change_of_anything_else_is_not(path: str, change: str) -> None:
    assert found(**{path: change}) == found()
