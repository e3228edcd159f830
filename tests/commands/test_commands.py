"""``python -m gconv COMMAND``: help, errors and interruptions."""

from __future__ import annotations

import pytest

from gconv import dispatch
from gconv.commands.main import COMMANDS, main


def test_help_names_the_other_commands_and_they_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    help_ = capsys.readouterr().out
    assert all(f"  {name} " in help_ for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: python -m gconv {name} ")
    for wrong, message in (
        (["profiel"], "invalid choice: 'profiel'"),
        (["--json", "tune"], "put the options after the command: python -m gconv tune ..."),
        (["--batch", "0"], "--batch must be a positive integer, got '0'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert message in capsys.readouterr().err


def test_kernels_need_triton_and_an_interruption_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    with pytest.raises(SystemExit, match="2"):
        main(["kernels"])
    message = "error: kernels needs Triton, which isn't installed: pip install triton\n"
    assert capsys.readouterr().err == message

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gconv.commands.check.check", interrupt)
    assert main([]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
