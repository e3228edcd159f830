"""The look of all plots in one place: colors, fonts, sizes and file formats.

Matplotlib is imported when a plot is drawn, so importing gconv doesn't need it. Figures are 7.3 inches wide,
which is 700 pixels at the 96 per inch of a web page, and the smallest text is 7 points (9 pixels).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
NO_MATPLOTLIB = "plots need matplotlib: install it with `pip install matplotlib`"
WIDTH = 7.3  # inches
SMALL, TINY = 8, 7  # points
DPI = 192  # of PNG files: twice the pixels of a web page


@dataclass(frozen=True)
class Theme:
    """Colors for a light or a dark page, which color-blind readers can tell apart (Okabe and Ito's).

    Attributes:
        background, text, muted, grid: the page, its text, less important text, and lines behind the bars.
        gconv, fused: gconv's kernels, alone and with batch norms inside.
        pytorch, compiled, depthwise: PyTorch's convolution, ``torch.compile``, and other depthwise kernels.
        other: everything else, such as dense convolutions.
    """

    background: str
    text: str
    muted: str
    grid: str
    gconv: str
    fused: str
    pytorch: str
    compiled: str
    depthwise: str
    other: str


LIGHT = Theme(
    "#ffffff", "#1f2328", "#59636e", "#d1d9e0",
    gconv="#0072b2", fused="#009e73", pytorch="#e69f00", compiled="#d55e00", depthwise="#cc79a7",
    other="#a3abb4",
)  # fmt: skip
DARK = Theme(
    "#0d1117", "#e6edf3", "#9198a1", "#3d444d",
    gconv="#56b4e9", fused="#2fbf93", pytorch="#e69f00", compiled="#f0783c", depthwise="#dd9bc0",
    other="#6e7681",
)  # fmt: skip


def check_path(path: str | PathLike[str]) -> Path:
    """Return ``path`` if a plot can be drawn and written there.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the file's suffix is not in ``SUFFIXES``.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"the name of a plot must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {path}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"can't write {path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(NO_MATPLOTLIB, name="matplotlib")
    return path


@contextmanager
def new_figure(
    path: str | PathLike[str], height: float, title: str, subtitle: str = "", dark: bool = False
) -> Iterator[tuple[Figure, Theme]]:
    """Yield an empty figure and its colors, and write it to ``path`` after the block.

    Args:
        path: the file; its suffix, one of ``SUFFIXES``, decides the format.
        height: in inches; the width is ``WIDTH``.
        title: the first line.
        subtitle: the second line, in smaller and less prominent text.
        dark: whether to draw light colors on a dark background. Defaults to False.

    Raises:
        ModuleNotFoundError, ValueError, FileNotFoundError: as ``check_path``.
    """
    path = check_path(path)
    from matplotlib import style
    from matplotlib.figure import Figure

    theme = DARK if dark else LIGHT
    with style.context(["default", _settings(theme)]):  # not the style of the caller
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, theme
        _add_titles(figure, theme, title, subtitle)
        no_date: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        figure.savefig(path, dpi=DPI, metadata=no_date.get(path.suffix.lower()))


def add_legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """Add a legend of ``axes`` below everything else, with bars before lines."""
    from matplotlib.lines import Line2D

    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    handles, labels = zip(*sorted(entries, key=lambda entry: isinstance(entry[0], Line2D)), strict=True)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _add_titles(figure: Figure, theme: Theme, title: str, subtitle: str) -> None:
    # matplotlib makes room for a suptitle only, which has one style: it stays invisible under the two lines.
    lines = [line for line in (title, subtitle) if line]
    figure.suptitle("\n".join("x" for _ in lines), alpha=0)
    height = figure.get_figheight()
    for i, line in enumerate(lines):
        style: dict[str, Any] = (
            {"fontsize": 10.5, "fontweight": "bold"} if i == 0 else {"fontsize": 8, "color": theme.muted}
        )
        figure.text(0.012, 1 - (0.09 + 0.19 * i) / height, line, va="top", parse_math=False, **style)


def _settings(theme: Theme) -> Any:
    """Return matplotlib's settings for a theme."""
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so that plots look the same everywhere
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.labelsize": 8,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "figure.titlesize": 10.5,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.text,
        "ytick.labelcolor": theme.text,
        "axes.edgecolor": theme.grid,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "ytick.major.size": 0,
        "svg.hashsalt": "gconv",  # the same plot gives the same file
    }
