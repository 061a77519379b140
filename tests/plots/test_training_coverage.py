"""Shares of entries by how many clients train them, and the figures of them."""

import numpy as np

from cahfp_cli.plots.bound import PANELS, draw_bound
from cahfp_cli.plots.training_coverage import by_layer, by_round, draw_by_layer, draw_by_round

WHOLE = {"first": [0, 2, 6], "second": [4, 0, 4]}
RUNS = [[WHOLE, {}], [{"first": [8, 0], "second": [0, 8]}, WHOLE]]
"""Two runs of two rounds of up to two clients: a round that failed, one in which only one client replied."""


def test_by_round_is_over_all_layers_and_a_failed_round_trains_nothing() -> None:
    # Of 16 entries: 4, 2, 10 in the whole round; 8, 8, 0 with one client.
    whole, nothing, alone = np.array([4, 2, 10]) / 16, np.array([1, 0, 0]), np.array([8, 8, 0]) / 16
    assert np.allclose(by_round(RUNS, 2), [(whole + alone) / 2, (nothing + whole) / 2])


def test_by_layer_is_over_the_rounds_that_did_not_fail() -> None:
    names, shares = by_layer(RUNS, 2)
    assert names == ["first", "second"]
    assert np.allclose(shares, [[1 / 3, 1 / 6, 1 / 2], [1 / 3, 1 / 3, 1 / 3]])


def test_a_panel_a_method_and_a_legend_of_all_numbers_of_clients() -> None:
    methods = {name: by_round(RUNS, 2) for name in ("a", "b", "c", "d", "e")}
    for figure in (draw_by_round(methods, "t"), draw_by_layer(dict.fromkeys(methods, by_layer(RUNS, 2)), "t")):
        assert [axes.get_title() for axes in figure.axes] == list(methods)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no client", "1", "2"]


def test_runs_of_failed_rounds_alone_are_drawn() -> None:
    draw_by_layer({"a": by_layer([[{}, {}]], 2)}, "t")
    assert by_round([[{}, {}]], 2).tolist() == [[1, 0, 0], [1, 0, 0]]


def test_the_bound_has_a_panel_a_term_with_means_over_runs() -> None:
    runs = [[dict.fromkeys(PANELS, value) for value in values] for values in ((1.0, 2.0), (3.0, -4.0))]
    figure = draw_bound({"a": runs}, "t")
    assert [axes.get_title() for axes in figure.axes] == list(PANELS.values())
    lines = [np.asarray(axes.lines[0].get_ydata(), float).tolist() for axes in figure.axes]
    assert lines[1] == [2.0, -1.0]
    assert lines[0][0] == 2.0 and np.isnan(lines[0][1])
