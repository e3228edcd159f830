"""From what the command line says to the settings of a run, and from its defaults to help."""

from __future__ import annotations

from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import typer

from resnext.checkpoint import Checkpoint
from resnext.config import Network, Recipe, Settings, defaults, difference
from resnext.data import DATA_SETS
from resnext.errors import UserError

T = TypeVar("T")


def default_of(part: str, field: str) -> str:
    """What holds for a setting where it is not given, as help says it: 8: mnist5k; 30: digits; ..."""
    holders: dict[str, list[str]] = {}
    for data in DATA_SETS:
        value = getattr(getattr(defaults(data), part), field)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        holders.setdefault(text, []).append(data)
    if len(holders) == 1:
        return f"[{text}]"
    listed = (f"{text}: {', '.join(names)}" for text, names in holders.items())
    return f"[{'; '.join(listed)}]"


def choices_of(context: typer.Context) -> dict[str, Any]:
    """What was said on the command line, as plain values; defaults are not in it."""
    said = {
        key: value
        for key, value in context.params.items()
        if context.get_parameter_source(key).name == "COMMANDLINE"
    }
    return {key: value.value if isinstance(value, StrEnum) else value for key, value in said.items()}


def settings_of(choices: dict[str, Any], saved: Checkpoint | None = None) -> Settings:
    """Those of the run that is resumed, else the data set's, with what was said in their place.

    Raises:
        UserError: a resumed run was made with others.
    """
    base = saved.settings if saved else defaults(choices.get("data", Settings().source.name))
    network = Network.of_variant(choices["network"]) if "network" in choices else base.network
    if "repeats" in choices:
        network = replace(network, repeats=_numbers(choices["repeats"]))
    recipe = base.recipe.lasting(choices["epochs"]) if "epochs" in choices and not saved else base.recipe
    settings = Settings(
        _replaced(
            base.source,
            name=choices.get("data"),
            path=_absolute(choices.get("path")),
            **_of(choices, "image_size"),
        ),
        _replaced(network, **_of(choices, "cardinality", "base_width", "stem_width", "fused")),
        _replaced(recipe, **_of(choices, *(f.name for f in fields(Recipe)))),
    )
    if saved and (differs := difference(saved.settings, settings)):
        raise UserError(f"{saved.path}: a resumed run keeps its settings: {differs}; choose another --name")
    return settings


def _of(choices: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: choices.get(name) for name in names}


def _replaced(base: T, **changes: Any) -> T:
    """``base`` with those ``changes`` that are not None."""
    return replace(base, **{name: value for name, value in changes.items() if value is not None})


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().absolute())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"--repeats {text}: not whole numbers with commas between, such as 1,1,1,1") from None
