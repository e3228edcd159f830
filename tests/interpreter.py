"""Triton's interpreter at three times its speed, for tests.

It patches ``triton.language`` before each call of a function inside a kernel, though the patch of the first
call holds until the launch ends, and computes each sum and product of integers a second time to see whether
it overflows. Here it patches once per launch, and looks for overflow where a test asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any


def hasten() -> None:
    """Change the interpreter for the rest of the process."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # globals of the functions that the running launch has called

    def launch_anew(self: Any, *args: Any, **options: Any) -> None:
        patched.clear()
        launch(self, *args, **options)

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_anew, patch_once
    _look_for_overflow(False)


def _look_for_overflow(look: bool) -> None:
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=look)


@contextmanager
def looking_for_overflow() -> Iterator[None]:
    """Fail where a sum or product of integers in a kernel leaves its type."""
    _look_for_overflow(True)
    try:
        yield
    finally:
        _look_for_overflow(False)
