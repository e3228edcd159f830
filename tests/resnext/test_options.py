"""Options and help of the command line, which are made from the settings, and errors about options."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import fields

import pytest
from commands import Run, one_line

from resnext.cli.options import Parser, add_fields, default_of, given
from resnext.config import DATA_SETS, DEFAULT_OPTIONS, Network, Options, Recipe, Source, defaults

COMMANDS = ("train", "evaluate", "predict", "export", "cardinality", "summary", "complexity", "traffic")
FOLLOW = {"stem", "milestones"}  # from --network and --data


def parsed(settings: type, *words: str, default: object) -> Namespace:
    """Parse options made from all fields of ``settings``."""
    parser = Parser("resnext train")
    add_fields(parser, settings, defaults={"": default})
    return parser.parse_intermixed_args(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_and_the_first_page_names_it(run: Run, command: str) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "") and f"\n  {command} " in out
    for option in ("--help", "-h"):
        code, text, err = run(command, option)
        assert (code, err) == (0, "") and text.startswith(f"usage: resnext {command} ")


def test_without_a_command_it_prints_help(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (2, "") and out == run("--help")[1] and "To start:\n  resnext train  " in out
    code, out, err = run("--version")
    assert (code, err) == (0, "") and out.startswith("gconv ") and ", torch " in out


@pytest.mark.parametrize("settings", [Source, Network, Recipe, Options])
def test_each_setting_is_an_option_of_train(run: Run, settings: type) -> None:
    _, out, _ = run("train", "--help")
    names = {"Source": {"name": "--data", "path": "PATH"}}.get(settings.__name__, {})
    for field in fields(settings):
        name = names.get(field.name, f"--{field.name.replace('_', '-')}")
        found = re.search(rf"^  {name}[ ,\n]", out, re.MULTILINE)
        assert bool(found) == (field.name not in FOLLOW), field.name


def test_help_has_titles_and_defaults_by_data_set(run: Run) -> None:
    _, out, _ = run("train", "--help")
    for title in ("data", "network", "recipe", "execution", "output"):
        assert f"\n{title}:\n" in out
    words = " ".join(out.split())
    assert "number of training epochs (default: 8 for mnist5k; 30 for digits; 300 for cifar10" in words
    recipes = {data: defaults(data).recipe for data in DATA_SETS}
    networks = {data: defaults(data).network for data in DATA_SETS}
    assert default_of(recipes, "epochs") == (
        "8 for mnist5k; 30 for digits; 300 for cifar10, cifar100; 90 for folder"
    )
    assert default_of(networks, "repeats").endswith("3,3,3,0 for cifar10, cifar100; 3,4,6,3 for folder")
    assert default_of(recipes, "micro_batch") == "32"


def test_only_what_is_on_the_command_line_is_given() -> None:
    assert given(parsed(Recipe, default=Recipe()), Recipe) == {}
    assert given(parsed(Source, default=Source()), Source) == {}
    words = ("--epochs", "8", "--learning-rate", "1e-3", "--optimizer", "adamw", "--sync-batch-norm")
    assert given(parsed(Recipe, *words, default=Recipe()), Recipe) == {
        "epochs": 8, "learning_rate": 1e-3, "optimizer": "adamw", "sync_batch_norm": True,
    }  # fmt: skip
    found = parsed(Source, "--data", "folder", "photos", "--image-size", "64", default=Source())
    assert given(found, Source) == {"name": "folder", "path": "photos", "image_size": 64}
    found = parsed(Network, "--repeats", "1,2,3,0", default=Network())
    assert given(found, Network) == {"repeats": (1, 2, 3, 0)}
    for words, value in ((("--channels-last",), True), (("--no-channels-last",), False)):
        assert given(parsed(Options, *words, default=DEFAULT_OPTIONS), Options) == {"channels_last": value}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train --epochs 0", "--epochs must be a positive integer, got 0; see `resnext train --help`"),
        (f"train --epochs 1{400 * '0'}", "--epochs must be a positive integer, got 1000"),
        ("train --epochs x", "--epochs must be a positive integer, got x; see"),
        ("train --epochs 1.5", "--epochs must be a positive integer, got 1.5; see"),
        ("train --batch-size 1", "--batch-size must be an integer of at least 2, got 1; see"),
        ("train --seed -1", "--seed must be an integer from 0 to 2147483648, got -1; see"),
        ("train --image-size 4", "--image-size must be an integer from 8 to 4096, got 4; see"),
        ("train --mixup nan", "--mixup must be a finite number of at least 0, got nan; see"),
        ("train --ema 1.1", "--ema must be a finite number from 0 to 1, got 1.1; see"),
        ("train --repeats a", "--repeats must be integers separated by commas, such as 1,1,1,1, got a; see"),
        ("train --optimizer lion", "--optimizer must be one of adamw, sgd, got lion; see"),
        ("train --backend cudnn", "--backend must be one of auto, triton, aten, reference, got cudnn; see"),
        ("train --epochs", "--epochs: expected one argument; see `resnext train --help`"),
        ("train --epoch 3", "unrecognized arguments: --epoch; see `resnext train --help`"),
        ("train a b", "unrecognized arguments: b; see `resnext train --help`"),
        ("predict", "the following arguments are required: IMAGE; see `resnext predict --help`"),
        ("predict x.png --top 0", "--top must be an integer from 1 to 100, got 0; see"),
        ("cardinality --data folder", "--data must be one of cifar10, cifar100, got folder; see"),
        ("fly", "COMMAND must be one of train, evaluate, predict, export, cardinality, summary, comp"),
        ("--fly", "unrecognized arguments: --fly; see `resnext --help`"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_a_hint(run: Run, words: str, line: str) -> None:
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    one_line(err, f"error: {line}")
