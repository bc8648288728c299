"""Figures and picture files show what they were given."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import vae_helpers
from PIL import Image
from scipy import ndimage


@pytest.fixture(scope="module")
def digits(small_arrays):
    """Return real images, float32 [2, 10, 784] in [0, 1]."""
    return small_arrays["x_test"][:20].reshape(2, 10, 784) / np.float32(255)


def tick_labels(axis):
    """Return the texts at the ticks of an axis of a figure."""
    return [label.get_text() for label in axis.get_ticklabels()]


def tiles(ax, rows, columns):
    """Return the images in a grid, [rows, columns, 784]."""
    picture = np.asarray(ax.images[0].get_array())
    return picture.reshape(rows, 28, columns, 28).swapaxes(1, 2).reshape(rows, columns, 784)


def test_a_digit_grid_shows_images_and_labels(digits):
    figure = vae_helpers.plot_digit_grid(digits, row_labels=["one", "two"], title="Grid")
    (ax,) = figure.axes
    np.testing.assert_array_equal(tiles(ax, 2, 10), digits)
    assert ax.images[0].get_clim() == (0, 1)
    assert tick_labels(ax.xaxis) == [str(digit) for digit in range(10)]
    assert tick_labels(ax.yaxis) == ["one", "two"]
    assert ax.get_title() == "Grid"
    assert vae_helpers.plot_digit_grid(digits, ax=ax) is figure


def test_a_digit_grid_refuses_other_shapes_and_numbers_of_labels(digits):
    with pytest.raises(ValueError, match=r"\[rows, columns, 784\], not \[10, 784\]"):
        vae_helpers.plot_digit_grid(digits[0])
    with pytest.raises(ValueError, match="label"):
        vae_helpers.plot_digit_grid(digits, row_labels=["one"])


@pytest.mark.parametrize(
    ("epochs", "finished"), [(1, 0), (3, 2), (40, 40), (41, 41), (1000, 500), (1000, 1000)]
)
def test_samples_are_drawn_in_the_rows_of_their_epochs(epochs, finished, digits):
    samples = np.linspace(0, 1, finished)[:, None, None] * digits[0]
    (ax,) = vae_helpers.plot_samples(samples, epochs, "Samples").axes
    shown = [int(label.removeprefix("epoch ")) for label in tick_labels(ax.yaxis)]
    assert len(shown) == min(epochs, 40)
    assert (shown[0], shown[-1]) == (1, epochs)
    for epoch, row in zip(shown, tiles(ax, len(shown), 10), strict=True):
        expected = samples[epoch - 1] if epoch <= finished else np.zeros([10, 784])
        np.testing.assert_array_equal(row, expected)


def test_samples_of_models_are_drawn_side_by_side(digits):
    samples = {"first": digits, "second": digits[:1]}
    left, right = vae_helpers.plot_samples_side_by_side(samples).axes
    assert (left.get_title(), right.get_title()) == ("first", "second")
    np.testing.assert_array_equal(tiles(left, 2, 10), digits)
    np.testing.assert_array_equal(tiles(right, 1, 10), digits[:1])


def test_losses_are_drawn_for_both_sets():
    history = {
        "vae_loss": [3, 2],
        "test_vae_loss": [4, 3],
        "classification_loss": [1, 0.5],
        "test_classification_loss": [2, 1],
    }
    figure = vae_helpers.plot_losses(history, title="Losses")
    assert figure.get_suptitle() == "Losses"
    for ax, name in zip(figure.axes, ("vae_loss", "classification_loss"), strict=True):
        training, test = ax.lines
        assert training.get_xdata().tolist() == test.get_xdata().tolist() == [1, 2]
        assert list(training.get_ydata()) == history[name]
        assert list(test.get_ydata()) == history[f"test_{name}"]
        assert (training.get_label(), test.get_label()) == ("training set", "test set")
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "nats per image")


def test_styles_are_drawn_in_the_plane_of_their_principal_components():
    rng = np.random.default_rng(0)
    z_mean = rng.normal(size=[200, 5]) * [0.01, 5, 0.01, 3, 0.01]
    digits = rng.integers(0, 10, 200)
    (ax,) = vae_helpers.plot_styles(z_mean, digits, title="Styles").axes
    assert len(ax.collections) == 10
    expected = (z_mean - z_mean.mean(axis=0))[digits == 4][:, [1, 3]]
    drawn = ax.collections[4].get_offsets()
    correlations = np.corrcoef(np.transpose(drawn), expected.T)[:2, 2:]
    np.testing.assert_allclose(np.abs(correlations.diagonal()), 1, atol=0.02)
    assert "variance" in ax.get_xlabel()


def test_confusions_are_in_percent_of_each_row():
    truth = [0, 0, 0, 0, 1, 9]
    judged = [0, 0, 0, 1, 1, 8]
    pairs = {"true": (truth, judged), "requested": (judged, truth)}
    first, second = vae_helpers.plot_confusions(pairs, title="Both").axes
    shown = np.reshape([float(text.get_text() or 0) for text in first.texts], [10, 10])
    expected = np.zeros([10, 10])
    expected[0, 0] = 75
    expected[0, 1] = 25
    expected[[1, 9], [1, 8]] = 100
    np.testing.assert_array_equal(shown, expected)
    assert (first.get_ylabel(), second.get_ylabel()) == ("true", "requested")
    assert first.get_title() == second.get_title() == "66.67% on the diagonal"


def test_a_reading_shows_the_picture_its_frame_and_the_probabilities(digits):
    picture = vae_helpers.make_photo(digits[0, 0])
    probs = np.linspace(0, 0.2, 10)
    figure = vae_helpers.plot_reading(picture, digits[0, 0], probs, digits[:1], title="Read")
    left, middle, right, bottom = figure.axes
    np.testing.assert_array_equal(left.images[0].get_array(), picture)
    np.testing.assert_array_equal(middle.images[0].get_array(), digits[0, 0].reshape(28, 28))
    assert [bar.get_height() for bar in right.patches] == probs.tolist()
    np.testing.assert_array_equal(tiles(bottom, 1, 10), digits[:1])
    assert figure.get_suptitle() == "Read"


def test_a_png_of_digits_is_dark_on_white(digits):
    picture = Image.open(io.BytesIO(vae_helpers.digits_png(digits)))
    assert (picture.format, picture.size) == ("PNG", (280, 56))
    gray = np.asarray(picture, np.float32) / 255
    np.testing.assert_allclose(1 - gray[28:, 28:56].ravel(), digits[1, 1], atol=0.005)


def crop_to_ink(gray):
    """Cut a light-on-dark picture to the box of its ink; return it with 56×140 pixels."""
    (box,) = ndimage.find_objects(np.int8(gray > 0.3))
    return np.asarray(Image.fromarray(np.float32(gray[box])).resize((140, 56)))


def test_no_style_draws_lines_over_the_digits(digits):
    with plt.style.context("ggplot"):
        (ax,) = vae_helpers.plot_digit_grid(digits).axes
    lines = [*ax.get_xgridlines(), *ax.get_ygridlines()]
    assert not any(line.get_visible() for line in lines)


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_an_animation_shows_every_frame_and_is_small(file_format, digits):
    fade = np.linspace(0, 1, 40, dtype=np.float32)[:, None, None]
    frames = (1 - fade) * digits[0] + fade * digits[1]
    content = vae_helpers.make_animation(frames, file_format, frames_per_second=10)
    assert len(content) <= 400_000
    animation = Image.open(io.BytesIO(content))
    assert (animation.format, animation.n_frames) == (file_format, 40)
    assert animation.info["duration"] == 100
    for number in (0, 39):
        animation.seek(number)
        shown = 1 - np.asarray(animation.convert("L")) / 255
        rows = frames[number].reshape(2, 5, 28, 28).swapaxes(1, 2).reshape(56, 140)
        correlation = np.corrcoef(crop_to_ink(shown).ravel(), crop_to_ink(rows).ravel())[0, 1]
        assert correlation > 0.9
