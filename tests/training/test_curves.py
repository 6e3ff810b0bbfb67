"""Curves of a report: what is drawn of many rows, and of a few that stand out."""

from __future__ import annotations

import numpy as np
import pytest

from llama_pro_fast.reporting import curves
from llama_pro_fast.reporting.record import Record


def losses_of(made, values) -> curves.Panel:
    rows = [{"kind": "train", "step": step, "loss": value} for step, value in enumerate(values, start=1)]
    return curves.panels([Record.read(made("run", rows))], only_losses=True)[0]


def test_a_spike_does_not_flatten_a_curve_and_is_not_hidden(made):
    values = [2 + 1 / step for step in range(1, 101)]
    values[40] = 1e6
    panel = losses_of(made, values)
    low, high = curves.limits(panel)
    assert low < 2.01
    assert high < 4
    assert "outside, to 1,000,000" in curves.svg(panel)


def test_a_curve_without_a_spike_is_seen_whole(made):
    values = [3 - step / 200 for step in range(200)]
    low, high = curves.limits(losses_of(made, values))
    assert low <= min(values) < max(values) <= high


def test_many_rows_are_thinned_to_their_lowest_and_highest():
    y = np.sin(np.arange(50_000) / 500)
    y[31_234], y[7] = 9.0, -9.0
    x, thin = curves._thinned(np.arange(50_000), y)
    assert len(thin) <= curves.MOST_POINTS
    assert (thin.max(), thin.min()) == (9.0, -9.0)
    assert np.array_equal(y[x], thin)


def test_the_smoothed_curve_is_the_mean_around_a_row():
    y = np.arange(200.0) % 2
    x, smooth = curves._smoothed(np.arange(200), y)
    assert np.array_equal(x, np.arange(200))
    half = 200 // 50
    assert smooth[100] == pytest.approx(y[100 - half : 101 + half].mean())
    assert smooth[0] == pytest.approx(y[: half + 1].mean())
