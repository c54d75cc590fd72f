"""What all pictures share: a canvas of bounded size, colours, markers, and names as text."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

DPI = 120
MOST_PANELS = 12
_LARGEST = 30.0  # inches, of either side of a picture
# Okabe & Ito's colours, told apart with every kind of colour vision; black is for averages.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F5200")
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
# Where DejaVu Sans has no glyph; only those that are installed are asked.
_FURTHER_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "WenQuanYi Zen Hei", "Arial Unicode MS",
    "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Noto Sans Arabic",
)  # fmt: skip


def palette(count: int) -> list[Any]:
    """So many colours, none twice: the eye's best seven, or steps of viridis, dark to light."""
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    viridis = matplotlib.colormaps["viridis"]
    return [viridis(0.92 * i / (count - 1)) for i in range(count)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def line(index: int) -> str:
    return LINES[index % len(LINES)]


def draw(make: Callable[[], Figure]) -> bytes:
    """The PNG of the figure that `make` returns, whatever the user's own matplotlib settings."""
    with _settings():
        figure = make()
        width, height = figure.get_size_inches()
        figure.set_size_inches(min(width, _LARGEST), min(height, _LARGEST))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


@contextmanager
def _settings() -> Iterator[None]:
    """matplotlib's own defaults, with text as it is: a `$` in a name opens no formula."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "text.parse_math": False,
            "font.family": _families(),
            "font.size": 9,
            "axes.titlesize": 10,
        })  # fmt: skip
        yield


def _families() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FURTHER_FONTS if name in installed)]


def panels(
    count: int, width: float, height: float, beside: float = 0.0
) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels in rows of up to three, with so many inches beside them."""
    columns = min(3, count) if count != 4 else 2
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns + beside, height * rows), layout="constrained")
    FigureCanvasAgg(figure)  # its own canvas: pyplot's global state is left alone
    found = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in found[count:]:
        panel.set_axis_off()
    return figure, found[:count]


def logarithmic(panel: Any, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, its numbers as they are written: others would be formulas."""
    getattr(panel, f"set_{which}scale")("log")
    axis = getattr(panel, f"{which}axis")
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


def text_width(names: Sequence[str], size: float = 9.0) -> float:
    """About how many inches the longest name takes at this size in points."""
    return max(map(_columns, names), default=0) * size * 0.62 / 72


def _columns(name: str) -> float:
    """Characters, where those of East Asian scripts and the like count twice."""
    return sum(2 if ord(c) > 0x2E80 else 1 for c in name)
