"""Figures: the right data in the right place, and pixels that are a picture."""

from __future__ import annotations

import math
import sys

import matplotlib.colors
import numpy as np
import pytest

from prox24_lightning.monitoring.figures import mask_figure, overview_figure, rendered
from prox24_lightning.monitoring.history import SparsityHistory
from prox24_lightning.monitoring.statistics import SparsityStats

LAYERS = [f"model.blocks.{block}.{name}.weight" for block in range(2) for name in ("up", "down")]


def stats(fraction, flips=None, strength=None):
    zeros = (0.75 * (1 - fraction), 0.25 * (1 - fraction), 0.5 * fraction, 0.25 * fraction, 0.25 * fraction)
    return SparsityStats(
        groups=8,
        zeros=zeros,
        retained_squared_norm=0.8 + 0.2 * fraction,
        penalty=1.0,
        rms=1.0,
        mask_flips=flips,
        strength=strength,
    )


def history(steps=(0, 10, 20, 30), layers=LAYERS, loss=math.nan):
    record = SparsityHistory(layers)
    record.record_phase(0, "dense")
    for step in steps:
        if step > 10:
            record.record_phase(step, "frozen" if step == steps[-1] else "sparsify")
        fraction = step / 30
        whole = stats(fraction, 0.1 if step else None, 1.0 + step if 0 < step < 30 else None)
        record.record(
            step, whole, {name: stats(fraction * (1 - 0.1 * i)) for i, name in enumerate(layers)}, loss - step
        )
    return record


@pytest.fixture(scope="module")
def drawn():
    record = history()
    figure = overview_figure(record, "a title")
    pixels = rendered(figure)  # draws, so that tick labels exist
    return record, figure, pixels


def panel(figure, title):
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))
    return axes


def test_pixels(drawn):
    _, _, pixels = drawn
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.min() < 50
    assert pixels.max() == 255


def test_the_share_takes_the_place_of_a_loss_that_is_not_known(drawn):
    record, figure, _ = drawn
    line = figure.axes[0].lines[0]
    assert line.get_drawstyle() == "steps-post"
    assert line.get_xdata().tolist() == [0, 10, 20, 30]
    np.testing.assert_allclose(line.get_ydata(), record.groups_24)


def test_loss_and_metric_by_step():
    record = history(loss=40.0)
    record.record_metric(20, "val_acc", 0.5)
    record.record_metric(30, "val_acc", 0.75)
    figure = overview_figure(record)
    top = figure.axes[0]
    assert top.get_ylabel() == "training loss"
    assert top.lines[0].get_xydata().tolist() == [[0, 40], [10, 30], [20, 20], [30, 10]]
    (second,) = (axes for axes in figure.axes if axes.get_ylabel() == "val_acc (validation)")
    assert second.lines[0].get_xydata().tolist() == [[20, 0.5], [30, 0.75]]


def test_the_metric_alone_has_the_first_axis():
    record = history()
    record.record_metric(30, "val_acc", 0.75)
    assert overview_figure(record).axes[0].get_ylabel() == "val_acc (validation)"


def test_the_first_losses_from_scratch_do_not_press_the_rest_into_a_line():
    record = SparsityHistory(LAYERS[:1])
    for step in range(40):
        record.record(step, stats(0.0), {LAYERS[0]: stats(0.0)}, 100.0 if step == 0 else 2.0 - step / 100)
    assert overview_figure(record).axes[0].get_ylim()[1] < 3


def test_the_lower_panels_end_at_the_freeze():
    record = history(steps=(0, 10, 20))
    record.record(40, stats(1.0), {name: stats(1.0) for name in LAYERS})
    figure = overview_figure(record)
    assert figure.axes[0].get_xlim() == (0, 40)
    assert panel(figure, "groups of four by their number").get_xlim() == (0, 20)
    norm = panel(figure, "norm")
    assert norm.get_xlim() == (0, 20)
    assert np.isnan(norm.lines[0].get_ydata()[-1]), "a 2:4 layer retains all by construction"


def test_strength_on_a_second_logarithmic_axis(drawn):
    _, figure, _ = drawn
    (second,) = (axes for axes in figure.axes if axes.get_ylabel().startswith("strength"))
    assert second.get_yscale() == "log"
    np.testing.assert_array_equal(second.lines[0].get_ydata(), [np.nan, 11.0, 21.0, np.nan])


def test_phases_are_shaded_and_named(drawn):
    _, figure, _ = drawn
    axes = figure.axes[0]
    spans = [patch.get_x() for patch in axes.patches]
    assert spans == [0, 20, 30]
    assert [patch.get_width() for patch in axes.patches] == [20, 10, 0]
    assert [text.get_text() for text in axes.texts] == ["dense", "sparsify"]


def test_map_of_layers(drawn):
    record, figure, _ = drawn
    axes = panel(figure, "groups that are 2:4, layer by layer")
    edges = axes.collections[0].get_coordinates()[0, :, 0]
    assert edges.tolist() == [0, 10, 20, 30, 30], "a value holds from its step to the next"
    values = axes.collections[0].get_array().reshape(4, 4)
    np.testing.assert_allclose(values, np.asarray(record.fractions).T)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.up", "0.down", "1.up", "1.down"]
    assert "(model.blocks.*)" in axes.get_title(loc="left")
    bottom, top = axes.get_ylim()
    assert bottom > top, "the first layer is at the top"


def test_zeros_add_up_to_all_groups(drawn):
    record, figure, _ = drawn
    axes = panel(figure, "groups of four by their number of zeros")
    tops = [max(path.vertices[:, 1].max() for path in area.get_paths()) for area in axes.collections]
    assert len(tops) == 5
    assert tops[-1] == pytest.approx(1.0)
    assert tops[0] == pytest.approx(max(record.series["zeros_2"]))
    corners = axes.collections[0].get_paths()[0].vertices
    assert (np.diff(corners, axis=0) == 0).any(axis=1).all(), "steps are drawn as steps"


def test_energy_and_flips(drawn):
    record, figure, _ = drawn
    axes = panel(figure, "norm² in the two largest of four")
    np.testing.assert_allclose(axes.lines[0].get_ydata(), record.series["retained_squared_norm"])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), record.series["lowest_retained_squared_norm"])
    (flips,) = (a for a in figure.axes if any(line.get_label().startswith("mask flips") for line in a.lines))
    np.testing.assert_array_equal(flips.lines[0].get_xydata(), [[10, 0.1], [20, 0.1], [30, 0.1]])


def test_a_loss_of_one_batch_at_a_change_of_phase_is_not_drawn():
    record = history(steps=(0, 10, 20, 21, 30), loss=40.0)
    assert overview_figure(record).axes[0].lines[0].get_xdata().tolist() == [0, 10, 20, 30]


def test_a_single_step_can_be_drawn():
    assert rendered(overview_figure(history(steps=(0,), layers=LAYERS[:1]))).max() == 255


def test_many_layers_share_their_labels():
    figure = overview_figure(history(layers=[f"layers.{i}.mlp.weight" for i in range(200)]))
    assert len(panel(figure, "groups that are 2:4, layer").get_yticks()) <= 32


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="history is empty, so there is nothing to draw"):
        overview_figure(SparsityHistory(LAYERS))


def test_not_a_number_does_not_stop_the_drawing():
    record = SparsityHistory(LAYERS[:1])
    nan = SparsityStats(groups=8, zeros=(1.0, 0, 0, 0, 0), retained_squared_norm=np.nan, penalty=1.0, rms=1.0)
    record.record(0, nan, {LAYERS[0]: nan})
    assert rendered(overview_figure(record)).max() == 255


def test_mask_picture_shows_kept_pruned_and_zero():
    picture = np.array([[2, 2, 1, 0], [0, 0, 0, 2]])
    figure = mask_figure([("up.weight", picture), ("down.weight", picture)])
    assert [axes.get_title() for axes in figure.axes] == ["up.weight", "down.weight"]
    image = figure.axes[0].images[0]
    colors = image.cmap(image.norm(picture))[..., :3]
    black, grey, white = colors[0, 0].mean(), colors[0, 2].mean(), colors[0, 3].mean()
    assert black < 0.2 < grey < 0.9 < white
    assert matplotlib.colors.to_hex(image.cmap(image.norm(0))) == "#ffffff"
    rendered(figure)


def test_pyplot_is_not_touched():
    """pyplot keeps figures alive and may look for a window system."""
    before = "matplotlib.pyplot" in sys.modules
    rendered(overview_figure(history()))
    assert ("matplotlib.pyplot" in sys.modules) == before
