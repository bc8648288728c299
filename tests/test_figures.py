"""Figures: what they show is what they were given."""

import matplotlib
import numpy as np
import pytest
from IPython.core.pylabtools import print_figure

import vae_helpers


def test_digit_grid_tiles_images_of_its_shape_alone():
    images = np.linspace(0, 1, 2 * 3 * 784).reshape(2, 3, 784)
    labels = {"row_labels": ["one", "two"], "column_labels": "abc"}
    figure = vae_helpers.plot_digit_grid(images, **labels, title="Grid")
    (ax,) = figure.axes
    tiled = ax.images[0].get_array()
    assert tiled.shape == (56, 84)
    np.testing.assert_allclose(tiled[28:, 56:], images[1, 2].reshape(28, 28), rtol=1e-6)
    assert ax.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    assert ax.get_title() == "Grid"
    assert vae_helpers.plot_digit_grid(images[:1], column_labels="abc", ax=ax) is figure
    with pytest.raises(ValueError, match=r"rows, columns, 784"):
        vae_helpers.plot_digit_grid(np.zeros([10, 784]))
    with pytest.raises(ValueError, match="label"):
        vae_helpers.plot_digit_grid(np.zeros([2, 10, 784]), row_labels=["one"])


def test_losses_are_drawn_for_both_sets():
    history = {"vae_loss": [3, 2], "test_vae_loss": [4, 3]}
    history |= {"classification_loss": [1, 0.5], "test_classification_loss": [2, 1]}
    figure = vae_helpers.plot_losses(history, title="Losses")
    for ax, name in zip(figure.axes, ("vae_loss", "classification_loss"), strict=True):
        drawn = [line.get_ydata().tolist() for line in ax.lines]
        assert drawn == [history[name], history[f"test_{name}"]]
        assert len(ax.get_legend().get_texts()) == 2
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "nats per image")


def test_confusions_are_in_per_cent_of_each_row_and_errors_are_coloured():
    truth, read = [0, 0, 0, 0, 1, 9], [0, 0, 0, 1, 1, 8]
    readings = {"true": (truth, read), "asked for": (read, truth)}
    figure = vae_helpers.plot_confusions(readings, title="Both")
    shown = [[float(text.get_text() or 0) for text in ax.texts] for ax in figure.axes]
    one, two = np.reshape(shown, [2, 10, 10])
    assert one[0].tolist() == [75, 25, 0, 0, 0, 0, 0, 0, 0, 0]
    assert one[1, 1] == one[9, 8] == 100
    assert one.sum() == 300  # rows without any are 0
    assert two[1].tolist() == [50, 50, 0, 0, 0, 0, 0, 0, 0, 0]
    assert np.argwhere(figure.axes[0].images[0].get_array()).tolist() == [[0, 1], [9, 8]]  # colour
    assert [ax.get_title() for ax in figure.axes] == ["66.67% read right"] * 2
    assert [ax.get_ylabel() for ax in figure.axes] == ["true", "asked for"]


@pytest.mark.parametrize("epochs", [3, 40, 41, 1000])
def test_a_grid_of_any_number_of_epochs_is_soon_drawn_and_small(epochs):
    random = np.random.default_rng(0)
    for finished in {0, 1, epochs // 2, epochs}:
        samples = np.zeros([epochs, 10, 784], np.float32)  # blank where an epoch is to come
        samples[:finished] = random.random([finished, 10, 784], np.float32) ** 3
        ax = vae_helpers.plot_samples(samples[:finished], epochs, "noise").axes[0]
        shown = [int(label.get_text().removeprefix("epoch ")) for label in ax.get_yticklabels()]
        assert len(shown) == min(epochs, 40)
        assert shown == sorted(set(shown))
        assert {*range(max(1, finished - 9), finished + 1)} <= {*shown}  # the last ten
        tiled = ax.images[0].get_array().reshape(len(shown), 28, 10, 28)
        tiles = tiled.swapaxes(1, 2).reshape(-1, 10, 784)
        np.testing.assert_array_equal(tiles, samples[np.subtract(shown, 1)])


def test_figures_are_the_same_whatever_a_person_has_set():
    def drawn():
        images = np.linspace(0, 1, 11 * 784).reshape(1, 11, 784)
        history = {"vae_loss": [3, 2], "classification_loss": [1, 0.5]}
        styles = np.random.default_rng(0).normal(size=[20, 3])
        figures = (
            vae_helpers.plot_digit_grid(images[:, :10], title="Grid"),
            vae_helpers.plot_losses(history, title="Losses"),
            vae_helpers.plot_styles(styles, np.arange(20) % 10, title="Styles"),
            vae_helpers.plot_confusions({"true": (np.arange(10), np.arange(10))}, title="All"),
            vae_helpers.plot_handwriting(images[0, 0].reshape(28, 28), images, title="Own"),
        )
        return [print_figure(f, "png") for f in figures], vae_helpers.digits_png(images).getvalue()

    expected = drawn()
    lines = {"image.origin": "lower", "axes.grid": True, "lines.linewidth": 9}
    for style in ("dark_background", {**lines, "font.size": 20, "font.family": "monospace"}):
        with matplotlib.style.context(style):
            assert drawn() == expected


def test_styles_are_drawn_by_principal_components():
    random = np.random.default_rng(0)
    z_mean = random.normal(size=[200, 5]) * [5, 3, 0.1, 0.1, 0.1]
    digits = random.integers(0, 10, 200)
    ax = vae_helpers.plot_styles(z_mean, digits, title="Styles").axes[0]
    assert len(ax.collections) == 10
    drawn = ax.collections[4].get_offsets()
    # The first two dimensions have nearly all the variance, so they are the plane but for signs.
    expected = (z_mean - z_mean.mean(axis=0))[digits == 4, :2]
    np.testing.assert_allclose(np.abs(drawn), np.abs(expected), atol=0.6)
