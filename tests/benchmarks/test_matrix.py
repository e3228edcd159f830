"""``make matrix``: all tables and their stamp are written together, or nothing is written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import triton

from benchmarks import matrix, stamps


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """``make matrix`` in an empty folder, with a compiler that does nothing. Tables in ``spills`` fail."""
    state = SimpleNamespace(out=tmp_path / "compiled", runs=[], stamped=[], spills=set())

    def run(arguments: list[str], stdout: object, env: dict[str, str], cwd: Path) -> SimpleNamespace:
        name = Path(stdout.name).stem
        state.runs.append(name)
        stdout.write(f"table of {name}\n")
        return SimpleNamespace(returncode=int(name in state.spills))

    monkeypatch.setattr(matrix, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "COMMITTED", state.out)
    monkeypatch.setattr(stamps, "stamp", lambda name, commit: state.stamped.append(name))
    monkeypatch.setattr(stamps, "write_table", lambda: None)
    return state


def test_matrix_writes_all_tables_and_their_stamp_or_none(fake: SimpleNamespace) -> None:
    fake.out.mkdir()
    (fake.out / "old.txt").touch()
    fake.spills = {"norm"}
    assert matrix.main([]) == 1 and fake.stamped == []
    assert fake.runs == [*matrix.TABLES] and [*fake.out.iterdir()] == [fake.out / "old.txt"]
    fake.spills = set()
    assert matrix.main([]) == 0 and fake.stamped == ["compiled"]
    assert fake.runs == [*matrix.TABLES, "norm"], "tables are not made twice"
    files = {path.relative_to(fake.out).as_posix() for path in fake.out.rglob("*") if path.is_file()}
    assert files == {f"triton-{triton.__version__}/{name}.txt" for name in matrix.TABLES}


def test_matrix_leaves_the_tables_where_only_a_part_is_compiled(
    fake: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["--suite", "tiny"])
    message = "only the complete matrix can replace the committed tables: add --out DIR"
    assert message in capsys.readouterr().err and fake.runs == []
    assert matrix.main(["--suite", "tiny", "--out", str(tmp_path / "part")]) == 0
    assert fake.stamped == [] and not fake.out.exists() and (tmp_path / "part").exists()
