"""Options of the command line, made from the fields of the settings and read back into settings."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, get_type_hints

from resnext.checkpoint import Checkpoint
from resnext.config import Network, Option, Options, Recipe, Settings, Source, difference
from resnext.data import Data, ImageFiles
from resnext.errors import UserError
from resnext.world import local_size

RUNS = Path("runs")
DEMO = RUNS / "demo"
BACKENDS = ("auto", "triton", "aten", "reference")
MOST_WORKERS = 8
FOLDER_CHECKPOINT_STEPS = 1000


class Parser(argparse.ArgumentParser):
    """A parser that raises a ``UserError`` for a wrong command line: one line that points to the help."""

    def __init__(self, prog: str, **details: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, allow_abbrev=False, formatter_class=formatter, **details)

    def error(self, message: str) -> NoReturn:
        """Raise ``message``, which argparse may have prefixed with "argument --epochs: "."""
        message = re.sub(r"^argument (\S+): (?=must )", r"\1 ", message).removeprefix("argument ")
        raise UserError(f"{message}; see `{self.prog} --help`")


class Group(Protocol):
    """A parser or one of its argument groups."""

    def add_argument(self, *names: str, **details: Any) -> Any:
        """Add an option or a positional argument."""


def number(
    kind: type[int] | type[float], least: float = -math.inf, most: float = math.inf
) -> Callable[[str], int | float]:
    """Return an argparse type: an integer or a finite number from ``least`` to ``most``."""
    what, largest = ("an integer", 2**63) if kind is int else ("a finite number", math.inf)
    if most < math.inf:
        what += f" from {least:g} to {most:.0f}"
    elif kind is int and least == 1:
        what = "a positive integer"
    elif least > -math.inf:
        what += f" of at least {least:g}"

    def read(text: str) -> int | float:
        try:
            value: int | float = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and abs(value) < largest):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text}")
        return value

    return read


def one_of(*choices: str) -> dict[str, Any]:
    """Return arguments of ``add_argument`` for an option whose value is one of ``choices``."""

    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(choices)}, got {text}")
        return text

    return {"type": read, "metavar": f"{{{','.join(choices)}}}"}


def integers(text: str) -> tuple[int, ...]:
    """Return the integers in a comma-separated list; an argparse type."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be integers separated by commas, such as 1,1,1,1, got {text}"
        ) from None


def add_fields(group: Group, settings: type, *names: str, defaults: Mapping[str, Any]) -> None:
    """Add an option for each field of a dataclass that declares one.

    Options that aren't on the command line don't appear in the parsed arguments; see `given`.

    Args:
        group: parser or group to add the options to.
        settings: a dataclass of ``resnext.config``.
        names: names of the fields to add. Defaults to all.
        defaults: instances of ``settings`` whose values the help shows as defaults, by the name of the data
            set or preset that they belong to.
    """
    types = get_type_hints(settings)
    for field, declared in _declared(settings):
        if names and field.name not in names:
            continue
        details = _reading(types[field.name], field, declared)
        default = declared.default or default_of(defaults, field.name)
        text = f"{declared.help} (default: {default})" if default else declared.help
        name = _name(field, declared)
        flag = name if name.isupper() else f"--{name.replace('_', '-')}"
        if name.isupper():
            flag, details = name.lower(), {"nargs": "?", "metavar": name}
        group.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **details)


def given(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Return the values of a dataclass's fields that are on the command line."""
    values = vars(arguments)
    found = ((field.name, _name(field, declared).lower()) for field, declared in _declared(settings))
    return {field: values[name] for field, name in found if name in values}


def _declared(settings: type) -> Iterator[tuple[Field[Any], Option]]:
    for field in fields(settings):
        if "option" in field.metadata:
            yield field, field.metadata["option"]


def _name(field: Field[Any], declared: Option) -> str:
    return declared.name or field.name


def _reading(kind: Any, field: Field[Any], declared: Option) -> dict[str, Any]:
    """Return arguments of ``add_argument`` for a field of type ``kind``."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
    if declared.choices:
        return one_of(*declared.choices)
    if kind == tuple[int, ...]:
        return {"type": integers, "metavar": "N,N,N,N"}
    if kind in (int, int | None):
        return {"type": number(int, declared.least, declared.most), "metavar": "N"}
    if kind in (float, float | None):
        return {"type": number(float, declared.least, declared.most), "metavar": "X"}
    if kind in (str, str | None):
        return {}
    raise TypeError(f"can't make an option of field {field.name}: unsupported type {kind}")


def default_of(defaults: Mapping[str, Any], field: str) -> str:
    """Describe the default of a field: "8 for mnist5k; 30 for digits", or "8" if all have the same.

    Args:
        defaults: settings by the name of the data set or preset that they belong to.
        field: name of a field of the settings.
    """
    holders: dict[str, list[str]] = {}
    for name, settings in defaults.items():
        holders.setdefault(_in_words(getattr(settings, field)), []).append(name)
    if len(holders) == 1:
        return next(iter(holders))
    return "; ".join(f"{value} for {', '.join(names)}" for value, names in holders.items())


def _in_words(value: Any) -> str:
    if value is None or value is False:  # off, which needs no mention
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_device(group: Group) -> None:
    """Add ``--device``."""
    text = "device to run on: auto (a GPU if there is one), cpu, cuda, cuda:1 or mps (default: auto)"
    group.add_argument("--device", default="auto", help=text)


def add_machine(group: Group) -> None:
    """Add ``--device`` and ``--backend``."""
    add_device(group)
    text = (
        "backend of the grouped convolutions: auto picks the fastest, triton is gconv's kernels, aten is "
        "PyTorch's convolution, and reference is plain PyTorch for checking (default: auto)"
    )
    group.add_argument("--backend", default="auto", help=text, **one_of(*BACKENDS))


def add_run(parser: Parser) -> None:
    """Add the argument RUN."""
    text = f"checkpoint file or folder of a run (default: {DEMO})"
    parser.add_argument("run", nargs="?", type=Path, default=DEMO, metavar="RUN", help=text)


def settings_of(arguments: argparse.Namespace, base: Settings, resumed: Checkpoint | None = None) -> Settings:
    """Return the settings ``base``, overridden by the options on the command line.

    Args:
        arguments: parsed command line.
        base: default settings, or those of the resumed run.
        resumed: checkpoint of the resumed run. Defaults to None.

    Raises:
        UserError: the options differ from the settings of the resumed run.
    """
    source, recipe = given(arguments, Source), given(arguments, Recipe)
    variant = getattr(arguments, "network", None)
    if "path" in source:
        source["path"] = str(Path(source["path"]).expanduser().absolute())
    network = Network.of_variant(variant) if variant else base.network
    lasting = base.recipe.lasting(recipe["epochs"]) if "epochs" in recipe and not resumed else base.recipe
    settings = Settings(
        replace(base.source, **source),
        replace(network, **given(arguments, Network)),
        replace(lasting, **recipe),
    )
    if resumed and (differs := difference(resumed.settings, settings)):
        raise UserError(
            f"can't change settings of {resumed.path}: {differs}; drop the option or choose another --name"
        )
    return settings


def options_of(arguments: argparse.Namespace, data: Data) -> Options:
    """Return the options on the command line, with defaults that depend on the data."""
    in_files = isinstance(data.train, ImageFiles)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(MOST_WORKERS, max(1, cores // local_size())) if in_files else 0
    steps = FOLDER_CHECKPOINT_STEPS if data.name == "folder" else 0
    return Options(**{"workers": workers, "checkpoint_steps": steps, **given(arguments, Options)})
