"""``python -m gconv kernels``: spills fail the command, and wrong options are errors."""

from __future__ import annotations

import sys

import pytest

from gconv.commands import kernels as command
from gconv.measure import compiled


def test_a_kernel_that_spills_fails_the_command_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def kernel(target: str, spills: int) -> compiled.Kernel:
        return compiled.Kernel(target, "slide_kernel", "float16", "64 x 16", (), 255, spills, 0, "", 0.3)

    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    monkeypatch.setattr(sys, "argv", ["python -m gconv kernels"])
    monkeypatch.setattr(command, "_compile", lambda arguments: [kernel("sm_90", 0), kernel("gfx942", 8)])
    assert command.main() == 0
    monkeypatch.setattr(command, "_compile", lambda arguments: [kernel("sm_90", 0), kernel("sm_80", 8)])
    assert command.main() == 1
    said = capsys.readouterr().err
    assert "error: 1 of 2 kernels spill" in said and "sm_80" in said and "sm_90" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "sm_91"], "invalid choice: 'sm_91'"),
        (["--dtypes", "float64"], "invalid choice: 'float64'"),
    ],
)
def test_wrong_names_are_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m gconv kernels", *options])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_interpreter_compiles_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    monkeypatch.setattr(sys, "argv", ["python -m gconv kernels"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: TRITON_INTERPRET is set")
