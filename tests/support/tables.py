"""Helpers for tests with tables of measured tiles."""

from __future__ import annotations

from gconv.kernels import choice


def forget() -> None:
    """Clear the caches of tables and of decisions based on them."""
    for kept in (choice.table, choice.nearest, choice.verdict, choice.pays_for_a_call):
        kept.cache_clear()
