"""Names of files, folders and classes, which may contain any bytes, as text that is safe everywhere."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

# Control characters, line and paragraph separators, direction marks, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_STEM = 100  # bytes; a file system allows 255 for a name


def shown(name: object) -> str:
    r"""Return ``name`` as one line of text that every terminal, file and format accepts.

    Bytes that aren't UTF-8 (which Python reads as lone surrogates), control characters and direction marks
    become escapes: ``\xff``, ``\n``, ``\u202e``. Everything else is unchanged. Idempotent.
    """
    return _UNPRINTABLE.sub(_escape, str(name))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return rf"\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else escape(match[0])


def escape(character: str) -> str:
    r"""Return the escape of ``character`` in Python and in bash: ``\n``, ``\u0085``, ``\u732b``.

    Never ``\x85``, which bash reads as a byte.
    """
    code = ord(character)
    return rf"\u{code:04x}" if 0x80 <= code <= 0xFF else character.encode("unicode_escape").decode("ascii")


def quoted(path: object) -> str:
    r"""Return ``path`` quoted for a shell, on one line: ``$'a\nb'`` if it isn't printable."""
    text = str(path)
    text = f"./{text}" if text.startswith("-") else text
    if shown(text) == text:
        return shlex.quote(text)
    return f"$'{shown(text.replace(chr(92), chr(92) * 2)).replace(chr(39), chr(92) + chr(39))}'"


def to_json(value: Any) -> str:
    """Return ``value`` as indented JSON without lone surrogates, which most parsers reject."""
    return json.dumps(_shown_within(value), indent=2)


def _shown_within(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shown_within(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shown_within(item) for item in value]
    return shown(value) if isinstance(value, str) else value


def file_stems(names: Sequence[str]) -> list[str]:
    """Return a file name without suffix for each of ``names``: all different, none hidden or too long."""
    stems: list[str] = []
    for i, name in enumerate(names):
        stem = re.sub(r"^\.|/", "_", shown(name)).encode()[:LONGEST_STEM].decode(errors="ignore")
        while stem in stems:
            stem = f"{stem}-{i}"
        stems.append(stem)
    return stems
