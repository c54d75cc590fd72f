"""Pictures: drawn for every name and number of tasks, of bounded size, with nothing cut off."""

import struct
import time
from dataclasses import replace
from itertools import pairwise

import matplotlib
import numpy as np
import pytest

from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.report import LayerImportance, Outcome
from hf_ewc.report.canvas import _settings, palette
from hf_ewc.report.curves import curves
from hf_ewc.report.heat_maps import heat_maps
from hf_ewc.report.importance import importance
from hf_ewc.report.lambda_search import lambda_search
from hf_ewc.report.names import numbered, printable, shortened
from hf_ewc.report.pictures import draw
from hf_ewc.report.tables import search_table
from hf_ewc.report.trade_off import trade_off

FIGURES = {
    "accuracy_matrix.png": heat_maps,
    "curves.png": curves,
    "stability_plasticity.png": trade_off,
    "importance.png": importance,
}
LONG = "a name of about forty characters, this {}"


def runs(tasks, methods=("EWC",), seeds=2, **options):
    """Runs over so many tasks, or over those with these names."""
    names = [f"task {i}" for i in range(tasks)] if isinstance(tasks, int) else list(tasks)
    size, chance = len(names), np.random.default_rng(0)
    layers = {f"bert.encoder.layer.{i}": LayerImportance(i + 0.1, 10) for i in range(size)}
    found = {}
    for method in methods:
        found[method] = {}
        for seed in range(seeds):
            scores = np.tril(chance.uniform(0.3, 1, (size, size)))
            scores[np.triu_indices(size, 1)] = np.nan
            matrix = AccuracyMatrix(names, scores, **options)
            found[method][seed] = Outcome(matrix, importance=layers)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "a $x_{$ b", "$$", "$\\frac$", "\\$x$", "\ud800", "a\udfff", "\x00\x07", "a\nb\tc",
        "日本語のタスク", "🙂", "x" * 300, "", " ", "{}%s", "_hidden",
    ],
)  # fmt: skip
def test_names_are_text_not_mathematics(name):
    given = runs([name, "b"], (f"{name}plain", f"{name}EWC"), seeds=1)
    with matplotlib.rc_context({"text.usetex": True, "text.parse_math": True}):
        for figure in ("accuracy_matrix.png", "stability_plasticity.png", "curves.png"):
            assert draw(figure, given).startswith(b"\x89PNG")
        assert matplotlib.rcParams["text.usetex"]


def test_a_name_with_an_underscore_stands_in_the_legend():
    given = runs(["_a", "b"], ("_plain", "EWC"))
    shown = [
        [t.get_text().strip() for t in f(given).legends[0].get_texts()] for f in (curves, trade_off)
    ]
    assert shown == [["_a", "b", "average"], ["_plain", "EWC"]]


@pytest.mark.parametrize(
    ("figure", "tasks", "methods"),
    [
        ("accuracy_matrix.png", 100, 1),
        ("accuracy_matrix.png", 400, 2),
        ("accuracy_matrix.png", 2, 14),
        ("curves.png", 1, 1),
        ("curves.png", 100, 3),
        ("stability_plasticity.png", 2, 40),
        ("importance.png", 100, 1),
        ("importance.png", 400, 14),
    ],
)
def test_pictures_are_bounded_in_size_and_cost(figure, tasks, methods):
    given = runs(tasks, [f"method {i}" for i in range(methods)], seeds=1)
    begin = time.process_time()
    png = draw(figure, given)
    assert time.process_time() - begin < 8
    width, height = struct.unpack(">II", png[16:24])
    assert max(width, height) <= 3600
    assert min(width, height) >= 250


def laid_out(figure, given):
    """The figure as it is drawn: its size, its panels, and the texts that show, in pixels."""
    with _settings():
        drawn = FIGURES[figure](given)
        drawn.set_dpi(120)
        drawn.canvas.draw()
        texts = [text for legend in drawn.legends for text in legend.get_texts()]
        for panel in drawn.axes:
            texts += [panel.title, panel.xaxis.label, panel.yaxis.label]
            texts += ticks(panel.xaxis) + ticks(panel.yaxis)
        shown = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]
        panels = [panel.get_window_extent() for panel in drawn.axes]
    return drawn.get_size_inches() * 120, panels, shown


def ticks(axis):
    """The labels of an axis within its limits; matplotlib keeps more, which it does not draw."""
    low, high = sorted(axis.get_view_interval())
    found = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [label for place, label in found if low <= place <= high]


@pytest.mark.parametrize(
    ("figure", "tasks", "methods"),
    [
        ("accuracy_matrix.png", 2, 2),
        ("accuracy_matrix.png", 4, 4),
        ("accuracy_matrix.png", 20, 1),
        ("accuracy_matrix.png", 12, 3),
        ("curves.png", 2, 1),
        ("curves.png", 4, 2),
        ("curves.png", 20, 1),
        ("curves.png", 12, 6),
        ("stability_plasticity.png", 2, 12),
        ("importance.png", 12, 2),
    ],
)
@pytest.mark.parametrize("names", [LONG, "{}"])
def test_nothing_is_cut_off_and_panels_are_large_enough(figure, names, tasks, methods):
    ways = [names.format(f"way {i}") for i in range(methods)]
    given = runs([names.format(i) for i in range(tasks)], ways, seeds=1)
    (width, height), panels, shown = laid_out(figure, given)
    for text, extent in shown:
        assert extent.x0 >= -2, text
        assert extent.x1 <= width + 2, text
        assert extent.y0 >= -2, text
        assert extent.y1 <= height + 2, text
    for panel in panels[:methods]:
        assert min(panel.width, panel.height) >= 180
    if names == LONG and figure in ("accuracy_matrix.png", "curves.png"):
        assert f"{tasks}  {shortened(LONG.format(tasks - 1))}" in [text for text, _ in shown]


@pytest.mark.parametrize("names", [LONG, "t{}"])
@pytest.mark.parametrize("tasks", [4, 20, 100])
def test_names_beside_rows_do_not_overlap(names, tasks):
    given = runs([names.format(i) for i in range(tasks)], seeds=1)
    with _settings():
        drawn = heat_maps(given)
        drawn.set_dpi(120)
        drawn.canvas.draw()
        rows = [text.get_window_extent() for text in drawn.axes[0].get_yticklabels()]
        columns = [text.get_window_extent() for text in drawn.axes[0].get_xticklabels()]
    heights = sorted((row.y0, row.y1) for row in rows)
    assert all(above[0] >= below[1] - 1 for below, above in pairwise(heights))
    if names == LONG:
        sides = sorted((column.x0, column.x1) for column in columns)
        assert all(right[0] >= left[1] for left, right in pairwise(sides))


def test_cells_have_their_numbers_while_these_can_be_read():
    assert len(heat_maps(runs(12)).axes[0].texts) == 12 * 13 / 2
    assert len(heat_maps(runs(20)).axes[0].texts) == 20 * 21 / 2
    assert not heat_maps(runs(30)).axes[0].texts
    assert not heat_maps(runs(20, "abcdef")).axes[0].texts


# Machado et al. 2009, severity 1: what is seen without the M, L or S cones, in linear RGB.
BLINDNESS = {
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
}


@pytest.mark.parametrize("kind", [None, *BLINDNESS])
@pytest.mark.parametrize(("count", "apart"), [(2, 20), (5, 12), (7, 12), (8, 5), (20, 2)])
def test_colours_differ_for_every_kind_of_sight(kind, count, apart):
    seen = [lab(matplotlib.colors.to_rgb(colour), BLINDNESS.get(kind)) for colour in palette(count)]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(distances) > apart


def lab(rgb, seen_as=None):
    """CIE Lab of an sRGB colour, in which a distance of 2 is just noticed."""
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb])
    if seen_as is not None:
        linear = np.clip(np.array(seen_as) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ linear / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("tasks", [2, 11, 24, 40])
def test_no_two_tasks_look_alike(tasks):
    lines = curves(runs(tasks)).axes[0].lines[:-1]
    looks = {(tuple(np.atleast_1d(line.get_color())), line.get_marker()) for line in lines}
    assert len({look[0] for look in looks}) == len(looks) == tasks


@pytest.mark.parametrize("kind", ["lower", "both", "wide"])
def test_figures_of_which_less_is_better(kind):
    names = {"lower": ["a", "b"], "both": ["a"], "wide": ["a", "b"]}[kind]
    given = runs(["a", "b"], ("plain", "EWC"), lower_is_better=dict.fromkeys(names, "perplexity"))
    for repeats in given.values():
        for outcome in repeats.values():
            outcome.matrix.scores *= np.array(
                [-1e9 if kind == "wide" else -1, 1 if kind == "both" else -1]
            )
    panel = heat_maps(given).axes
    if kind == "both":
        assert panel[-1].get_ylabel().startswith("from the worst")
    else:
        assert panel[-1].get_ylabel() == "perplexity (lower is better)"
        assert panel[0].images[0].cmap.name == "viridis_r"
        assert np.nanmin(panel[0].images[0].get_array()) > 0
    assert (curves(given).axes[0].get_yscale() == "log") == (kind == "wide")
    for figure in ("accuracy_matrix.png", "curves.png"):
        assert draw(figure, given)


def test_names_for_pictures():
    assert shortened("x" * 41) == "x" * 20 + "…" + "x" * 19
    assert len(shortened("x" * 300)) == 40
    assert shortened("a\n b") == "a b"
    assert printable("\ud800a\x00") == "\ufffda\ufffd"
    assert numbered(["b", "a"]) == ["1  b", "2  a"]


def with_searches(by_improvement):
    """Runs with a search before the second task, over scores that have the other sign or not."""
    sign = -1 if by_improvement else 1
    trials = [
        {"ewc_lambda": strength, "score": sign * score, "kept": kept, "stopped": False,
         "steps": 4, "seconds": 1.0}
        for strength, score, kept in ((0.0, 4.084, None), (300.0, 5.25, 0.8), (30.0, 4.125, 0.99))
    ]  # fmt: skip
    search = {"task": "task 1", "trials": trials, "chosen": 30.0, "by_improvement": by_improvement}
    found = runs(2)
    return {m: {s: replace(o, searches=[search]) for s, o in r.items()} for m, r in found.items()}


@pytest.mark.parametrize("by_improvement", [False, True])
def test_a_search_shows_figures_as_evaluation_gave_them(by_improvement):
    given = with_searches(by_improvement)
    with _settings():
        figure = lambda_search(given)
        figure.canvas.draw()
        (panel,) = figure.axes
    labels = [text.get_text() for text in (*panel.get_xticklabels(), *panel.get_xticklabels(True))]
    assert {"1", "10", "100"} <= {*labels}
    assert not any("$" in label or "math" in label for label in labels)
    assert list(panel.lines[0].get_ydata()) == [4.084, 4.125, 5.25]
    assert panel.lines[1].get_ydata() == pytest.approx(4.125)
    assert ("less is better" in panel.get_ylabel()) == by_improvement
    table = search_table(given)
    assert "4.084" in table
    assert "-4.084" not in table
    assert ("task 1 ↓" in table) == by_improvement


def test_numbers_of_a_logarithmic_axis_are_no_formulas():
    given = runs(3, lower_is_better={f"task {i}": "perplexity" for i in range(3)})
    for repeats in given.values():
        for outcome in repeats.values():
            outcome.matrix.scores[:] = -np.array([[50.0, 900, 4e3]] * 3)
    with _settings():
        figure = curves(given)
        figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert figure.axes[0].get_yscale() == "log"
    assert {"100", "1000"} <= {*labels}
