"""Tuning: which tiles are tried and which one is kept."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from marks import interpreted

from gconv.geometry import PASSES
from gconv.kernels import rules, tiles
from gconv.kernels.device import Device, device_of
from gconv.measure import compiled, tuner
from gconv.measure.candidates import candidates
from gconv.measure.problem import LAYOUTS, TYPES, Problem
from gconv.measure.suites import SUITES

CPU = torch.device("cpu")


@interpreted
def test_tuning_leaves_out_what_is_wrong_and_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("forward", SUITES["tiny"][0].geometry(1), "float16")
    wrong, slow, fast = candidates("forward", problem.geometry, torch.float16, "ieee", device_of(CPU))[:3]
    run = tuner._run

    def run_some_badly(problem: Problem, operands: object, tile: object, form: object) -> torch.Tensor:
        time.sleep(0.05 if tile.stages == slow.stages else 0)
        result = problem.run_pytorch(operands).contiguous(memory_format=form)
        return result * 1.5 if tile == wrong else result

    monkeypatch.setattr(tuner, "_run", run_some_badly)
    finding = tuner.tune(problem, [wrong, slow, fast], CPU)
    assert replace(finding.tile, resident=fast.resident) == fast
    assert list(finding.wrong) == [wrong] and finding.wrong[wrong] > 0.1
    assert (
        finding.entry.tile == finding.tile
        and set(finding.times) >= {slow, fast}
        and wrong not in finding.times
    )
    assert set(finding.triton) == set(finding.aten) == set(LAYOUTS)

    monkeypatch.setattr(tuner, "_run", lambda *a: run(*a) * 1.5)
    finding = tuner.tune(problem, [fast], CPU)
    assert finding.tile is None and finding.triton == {} and set(finding.aten) == set(LAYOUTS)


def test_tuning_leaves_out_what_spills_or_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gpu = Device("cuda", "NVIDIA Test", 132, 90)
    problem = Problem("forward", SUITES["tiny"][0].geometry(1), "float16")
    broken, spilling, *others = candidates("forward", problem.geometry, torch.float16, "ieee", gpu)

    def compile_job(job: Any) -> SimpleNamespace:
        if job.tile == broken:
            raise ValueError("too large")
        return SimpleNamespace(spills=int(job.tile == spilling))

    monkeypatch.setattr(tuner, "device_of", lambda _: gpu)
    monkeypatch.setattr(compiled, "target_of", lambda _: "sm_90")
    monkeypatch.setattr(compiled.Job, "binary", property(lambda job: job.tile))
    monkeypatch.setattr(compiled, "compile_job", compile_job)
    monkeypatch.setattr(compiled, "ProcessPoolExecutor", lambda processes, _: ThreadPoolExecutor(processes))
    assert tuner.compile_candidates([problem], CPU) == {problem: others}
    printed = capsys.readouterr().err
    assert f"skipped a tile that doesn't compile: {broken}: ValueError('too large')" in printed


@interpreted
@pytest.mark.long
@pytest.mark.parametrize("pass_", PASSES)
def test_every_candidate_of_a_tiny_layer_is_right(pass_: str) -> None:
    for layer in SUITES["tiny"]:
        problem = Problem(pass_, layer.geometry(1), "float16")
        ((_, found),) = tuner.compile_candidates([problem], CPU).items()
        # The interpreter ignores stages and registers.
        to_run = list(dict.fromkeys(replace(tile, stages=1, registers=None) for tile in found))
        operands = problem.draw(CPU)
        errors = tuner._errors(problem, operands, to_run, problem.truth(operands))
        assert len(errors) == len(to_run) > 5
        assert all(map(problem.matches, errors.values())), errors


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("pass_", PASSES)
def test_candidates_begin_with_the_rule_and_differ(pass_: str, type_: str, no_tables: None) -> None:
    gpu = Device("cuda", "NVIDIA Test-1", 132, 90)
    dtype, precision = TYPES[type_]
    for layer in {layer for suite in SUITES.values() for layer in suite}:
        found = candidates(pass_, layer.geometry(256), dtype, precision, gpu)
        assert found[0] == rules.tile_by_rule(pass_, layer.geometry(256), dtype, precision, gpu)
        assert len(set(found)) == len(found) <= 80
        for tile in found:
            sides = (tile.pixels, tile.inputs, tile.outputs, tile.warps)
            assert all(side == tiles.power_of_two(side) for side in sides), tile
            whole = tile.kernel in ("slide", "residue") and pass_ != "weight_grad"  # no blocks of channels
            assert not whole or max(layer.geometry(256).channels_per_group) <= min(tile.inputs, tile.outputs)
