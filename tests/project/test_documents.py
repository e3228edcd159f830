"""The documents: their code runs and prints what they quote; commands, options and links in them exist."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import documents
import pytest
import zoo

COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:python -m |torchrun \S+ -m )?(gconv|benchmarks|resnext)\b(?: ([a-z]+))?(.*)"
)
MEASURED = ("floor ",)  # how printed lines begin that differ between machines
PYTHON = [page for page in documents.ALL if "```python" in page.read_text()]


def squeezed(text: str) -> list[str]:
    """The lines of a text with single spaces between words."""
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize("page", PYTHON, ids=documents.name_of)
def test_python_in_a_document_runs_and_prints_what_it_quotes(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks run in order and share names. A quoted output starts with a line that one of them prints."""
    if "import timm" in page.read_text():
        zoo.load("timm")
    monkeypatch.chdir(tmp_path)  # where plots are written
    names: dict[str, object] = {}
    printed: list[list[str]] = []
    for block in documents.blocks(page):
        if block.language == "python":
            exec(compile(block.text, documents.name_of(page), "exec"), names)
            printed.append(squeezed(capsys.readouterr().out))
    for quoted in (squeezed(block.text) for block in documents.blocks(page) if block.language == "text"):
        for output in (lines for lines in printed if quoted[0] in lines):
            expected = {line for line in quoted if line != "..." and not line.startswith(MEASURED)}
            assert expected <= set(output)


@pytest.mark.parametrize(
    ("page", "outputs"), [("docs/getting-started.md", 2), ("docs/guide/fuse.md", 1), ("README.md", 1)]
)
def test_quoted_outputs_are_compared(page: str, outputs: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The first lines of the quotes are those of the reports, so that the test above finds them."""
    quoted = [block.text for block in documents.blocks(documents.ROOT / page) if block.language == "text"]
    starts = [text for text in quoted if text.startswith(("layer ", "GroupConv2d("))]
    assert len(starts) == outputs


@pytest.mark.parametrize("page", [documents.README, *documents.CONTRIBUTORS], ids=documents.name_of)
def test_links_outside_the_site_lead_to_files(page: Path) -> None:
    """`mkdocs build` checks those inside."""
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for link in filter(None, (name for pair in links for name in pair)):
        assert page.parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", [documents.README, *documents.CONTRIBUTORS], ids=documents.name_of)
def test_links_to_headings_lead_to_headings(page: Path) -> None:
    for file, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        target = page.parent.joinpath(file) if file else page
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{file}#{anchor}"


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (documents.ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in documents.ALL:
        for command in documents.commands(page):
            if command.startswith("make "):
                named = {word for word in command.split()[1:] if "=" not in word and word != "..."}
                assert named <= targets, f"{documents.name_of(page)}: {command}"


def test_commands_and_options_in_documents_exist(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    used: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for page in documents.ALL:
        for command in documents.commands(page):
            found = COMMAND.match(command)
            if found and not command.startswith("resnext/"):
                program, subcommand, rest = found.groups()
                key = (program, subcommand) if subcommand else (program,)
                used[key] |= set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest))
    assert len(used) > 12
    for (program, *subcommand), options in used.items():
        main = importlib.import_module(f"{program}.__main__").main
        monkeypatch.setattr(sys, "argv", [program, *subcommand, "--help"])
        with pytest.raises(SystemExit) as stop:
            main()
        text = capsys.readouterr().out
        assert not stop.value.code, f"{program} {subcommand}"
        for option in options:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{program} {subcommand} {option}"


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len(documents.README.read_bytes()) <= 8192


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        [scripts / "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=documents.ROOT,
        env=os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "guide" / "convert" / "index.html").exists()
