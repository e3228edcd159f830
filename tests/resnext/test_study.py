"""The study of cardinality: training, resuming, tables and plot, and its verdict about noise."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from commands import Run, cells, one_line, rows
from PIL import Image

from resnext import complexity, plots
from resnext import study as studying
from resnext.comparison import Compared, verdict
from resnext.data import Data, ImageFormat
from resnext.interruption import Interrupted
from resnext.study import PRESETS

STUDY = ("cardinality", "--seeds", "2", "--epochs", "1", "--device", "cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the small preset to two networks of one block."""
    small = PRESETS["small"]
    network = replace(small.settings.network, repeats=(1, 0, 0, 0), stem_width=4)
    settings = replace(small.settings, network=network)
    monkeypatch.setitem(PRESETS, "small", replace(small, settings=settings, pairs=((1, 4), (8, 1))))


def test_presets_are_of_equal_complexity(digits: Data) -> None:
    photographs = replace(digits, format=ImageFormat(3, 32, (0.0,) * 3, (1.0,) * 3))
    for data, preset in ((digits, PRESETS["small"]), (photographs, PRESETS["cifar"])):
        assert [c for c, _ in preset.pairs] == list(complexity.EQUAL_COMPLEXITY)
        compared = [studying._compared(preset, data, c, d) for c, d in preset.pairs]
        for what in ("parameters", "flops"):
            values = [getattr(pair, what) for pair in compared]
            assert max(values) / min(values) < 1.12, (what, values)
    assert PRESETS["cifar"].settings.recipe.epochs == 300
    assert PRESETS["cifar"].settings.network.repeats == (3, 3, 3, 0)


def test_a_study_is_trained_printed_and_drawn(
    quick: None, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(*STUDY)
    assert (code, err) == (0, "")
    folder = tmp_path / "runs" / "cardinality-small"
    table = rows(folder / "study.csv")
    assert [(row["cardinality"], row["seed"]) for row in table] == [
        ("1", "0"), ("1", "1"), ("8", "0"), ("8", "1")
    ]  # fmt: skip
    for row in table:
        run_of = folder / f"{row['cardinality']}x{row['width']}d-seed{row['seed']}"
        tested = float(rows(run_of / "summary.csv")[-1]["test_accuracy"])
        assert float(row["error"]) == pytest.approx(100 - tested, abs=1e-3)
    printed = {row[0]: row for row in cells(out) if row[0] in ("1", "8")}
    for cardinality, paper in (("1", "23.9%"), ("8", "22.3%")):
        errors = [float(row["error"]) for row in table if row["cardinality"] == cardinality]
        mean, deviation = sum(errors) / 2, abs(errors[0] - errors[1]) / 2**0.5
        assert printed[cardinality][4:6] == [f"{mean:.2f}%", f"{deviation:.2f}"]
        assert printed[cardinality][-1] == paper
    assert "noise" in out and "compare only their order" in out
    with Image.open(folder / "cardinality.png") as picture:
        assert picture.width > 1000

    def broken(*arguments: object) -> None:
        raise ValueError("no picture")

    monkeypatch.setattr(plots, "cardinality", broken)
    code, out, err = run(*STUDY)
    assert code == 2 and "compare only their order" in out, "the table must be printed even if the plot fails"
    one_line(
        err,
        "couldn't write runs/cardinality-small/cardinality.png (ValueError: no picture); ",
        "study.csv is written; run the same command again to plot it",
    )


@pytest.mark.long
def test_a_study_that_was_stopped_goes_on(
    quick: None, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calls = studying.train, []

    def interrupted_third(
        settings: object, data: object, folder: Path, *rest: object, **more: object
    ) -> object:
        calls.append(folder.name)
        if len(calls) == 3:
            raise Interrupted(2, "stopped")
        return train(settings, data, folder, *rest, **more)

    monkeypatch.setattr(studying, "train", interrupted_third)
    code, out, _ = run(*STUDY)
    assert code == 130 and "has everything up to 1x4d-seed1; run the same command again to continue" in out
    assert len(rows(tmp_path / "runs" / "cardinality-small" / "study.csv")) == 2
    assert run(*STUDY)[0] == 0
    assert calls == ["1x4d-seed0", "8x1d-seed0", "1x4d-seed1", "1x4d-seed1", "8x1d-seed1"]
    assert run(*STUDY)[0] == 0 and len(calls) == 5, "trained again"
    code, _, err = run("cardinality", "--seeds", "2", "--epochs", "2")
    assert code == 2
    one_line(err, "belongs to a study with other settings: epochs is 1, got 2; choose another --name")


def pairs(*errors: tuple[float, ...]) -> list[Compared]:
    return [Compared(2**i, 64, 1, 1, dict(enumerate(values))) for i, values in enumerate(errors)]


def test_differences_within_the_noise_are_called_that() -> None:
    assert verdict(pairs((5.0, 5.4, 5.2), (5.1, 5.3, 5.5)), 1000).startswith("Within the noise: 1 x 64d")
    clear = verdict(pairs((9.0, 9.1, 8.9), (5.1, 5.0, 5.2), (7.0, 7.1, 7.2)), 1000)
    assert clear.startswith(
        "More than noise: 2 x 64d has the lowest mean error (5.10%) and 1 x 64d the highest (9.00%)"
    )
    assert "One seed each can't show whether that is more than noise; use more" in verdict(
        pairs((9.0,), (5.0,)), 1000
    )
    assert verdict(pairs((5.0, 5.0), (5.0, 5.0)), 1000).startswith("Within the noise")
    assert verdict(pairs((5.0, 5.0), (6.0, 6.0)), 1000).startswith("More than noise")


def test_networks_that_do_not_differ_are_rarely_told_apart() -> None:
    """For five networks with the same distribution of errors, 1 study in 20 finds a difference."""
    draw = random.Random(0)
    studies = [pairs(*([draw.gauss(5, 0.3) for _ in range(3)] for _ in range(5))) for _ in range(400)]
    wrong = sum(verdict(study, 1000).startswith("More") for study in studies)
    assert 8 <= wrong <= 32, "of 400, 20 expected"
