"""Write files so that a reader never sees a partial one."""

from __future__ import annotations

from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file next to ``path`` and rename it, so that ``path`` is always complete.

    Args:
        path: the file to write. Missing folders are created.
        text: its new content.

    Raises:
        OSError: the file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
