"""The sections after training: each against a small case worked out apart, in a real kernel."""

import io
import json
import os

import matplotlib.image
import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import NOTEBOOK, SMALL, Kernel, cell_source, printed
from nbclient.exceptions import CellExecutionError, DeadKernelError
from sklearn.metrics import confusion_matrix

import vae_helpers


@pytest.fixture(scope="module")
def kernel(small_npz):
    """Yield a kernel that has run the whole notebook on small settings and small data."""
    with Kernel() as kernel:
        yield kernel.run(data_path=str(small_npz), **SMALL)


def test_one_hand_writes_all_digits_in_its_style(kernel):
    z = np.random.default_rng(0).normal(size=[3, SMALL["z_dim"]])
    images = kernel.fetch("generate_all_digits(z)", z=z)
    assert images.shape == (3, 10, 784)
    one = kernel.fetch("generate(z[[2]], np.eye(10)[[7]])", z=z)
    np.testing.assert_allclose(images[2, 7], one[0], atol=1e-5)


def test_large_inputs_are_taken_in_parts(kernel, small_arrays):
    images = small_arrays["x_train"][:2500].reshape(-1, 784) / 255
    whole = kernel.fetch("infer(images)", images=images)
    ends = kernel.fetch("infer(images)", images=images[[0, 999, 1000, 2499]])
    for array, rows in zip(whole, ends, strict=True):
        assert len(array) == 2500
        np.testing.assert_allclose(array[[0, 999, 1000, 2499]], rows, atol=1e-4)


def test_traversal_varies_one_dimension_a_row(kernel):
    images = kernel.fetch("traverse(3, [-2.5, 0, 2.5])")
    z_dim = SMALL["z_dim"]
    assert images.shape == (z_dim, 3, 784)
    for dimension in range(z_dim):
        z = np.zeros([3, z_dim])
        z[:, dimension] = [-2.5, 0, 2.5]
        expected = kernel.fetch("generate(z, np.eye(10)[[3, 3, 3]])", z=z)
        np.testing.assert_allclose(images[dimension], expected, atol=1e-5)
    dimension_kl, order = kernel.fetch("dimension_kl, dimensions")
    assert np.all(np.diff(dimension_kl[order]) <= 0)
    total = kernel.fetch("evaluate(test_images, test_digits)['test_kl_loss']")
    assert dimension_kl.sum() == pytest.approx(total, rel=1e-4)


def test_the_probe_finds_what_there_is_to_find(kernel):
    # The same probe on a z that is the digit itself, and on one that knows nothing of it.
    source = cell_source(NOTEBOOK, "styles").split("vae_helpers.")[0]
    real_infer = kernel.fetch("probe_accuracy")
    assert 0 < real_infer < 1
    kernel.execute(
        "real_infer, real_z_mean = infer, z_mean\n"
        "random_z = np.random.default_rng(0)\n"
        "infer = lambda images: (np.eye(10)[data.y_train[:10_000]],)\n"
        "z_mean = np.eye(10)[test_digits]"
    )
    kernel.execute(source)
    assert kernel.fetch("probe_accuracy") == 1
    kernel.execute(
        "infer = lambda images: (random_z.normal(size=[len(images), 4]),)\n"
        "z_mean = random_z.normal(size=[len(test_digits), 4])"
    )
    kernel.execute(source)
    assert kernel.fetch("probe_accuracy") < 0.25
    kernel.execute("infer, z_mean = real_infer, real_z_mean")


def test_the_judge_is_nearest_neighbours_on_principal_components(kernel, small_arrays):
    x = small_arrays["x_train"].reshape(-1, 784) / 255
    test = small_arrays["x_test"].reshape(-1, 784) / 255
    mean = x.mean(axis=0)
    _, _, directions = np.linalg.svd(x - mean, full_matrices=False)
    features, test_features = ((a - mean) @ directions[:50].T for a in (x, test))
    distances = np.linalg.norm(features[None] - test_features[:, None], axis=2)
    neighbours = small_arrays["y_train"][np.argsort(distances, axis=1)[:, :3]]
    read = np.array([np.bincount(row).argmax() for row in neighbours])
    judged = kernel.fetch("judge.predict(test_images)")
    assert np.mean(read == judged) > 0.995  # but for ties
    accuracy, asked, asked_digits, read_digits = kernel.fetch(
        "judge_accuracy, asked_digit_accuracy, asked_digits, read_digits"
    )
    assert accuracy == np.mean(judged == small_arrays["y_test"]) > 0.9
    assert len(read_digits) == 10_000
    assert np.bincount(asked_digits).tolist() == [1000] * 10
    assert asked == np.mean(asked_digits == read_digits)


def test_confusions_are_in_per_cent_of_each_row():
    truth, read = [0, 0, 0, 0, 1, 9], [0, 0, 0, 1, 1, 8]
    counts = confusion_matrix(truth, read, labels=range(10))
    figure = vae_helpers.plot_confusions(
        {"one": counts, "two": counts.T}, row_name="true", column_name="read", title="Both"
    )
    shown = [[float(text.get_text()) for text in ax.texts] for ax in figure.axes]
    one, two = np.reshape(shown, [2, 10, 10])
    assert one[0].tolist() == [75, 25, 0, 0, 0, 0, 0, 0, 0, 0]
    assert one[1, 1] == one[9, 8] == 100
    assert one.sum() == 300  # rows without any are 0
    assert two[1].tolist() == [50, 50, 0, 0, 0, 0, 0, 0, 0, 0]
    assert [ax.get_title() for ax in figure.axes] == ["one", "two"]
    assert figure.axes[0].get_ylabel() == "true"


def test_styles_are_drawn_by_principal_components():
    random = np.random.default_rng(0)
    z_mean = random.normal(size=[200, 5]) * [5, 3, 0.1, 0.1, 0.1]
    digits = random.integers(0, 10, 200)
    ax = vae_helpers.plot_styles(z_mean, digits, title="Styles").axes[0]
    assert len(ax.collections) == 10
    drawn = ax.collections[4].get_offsets()
    assert len(drawn) == np.sum(digits == 4)
    # The first two dimensions have nearly all the variance, so they are the plane but for signs.
    expected = (z_mean - z_mean.mean(axis=0))[digits == 4, :2]
    np.testing.assert_allclose(np.abs(drawn), np.abs(expected), atol=0.6)


# A linear decoder with Gaussian pixels, whose P(x) is known: x ~ N(offset, weights·weightsᵀ + σ²).
LINEAR_GAUSSIAN = """
def encoder(images):
    return (images - offset) @ to_mean, tf.zeros([len(images), z_dim]) + log_var
def logit_decoder(description):
    z, digit_probs = description
    image = tf.clip_by_value(z @ tf.transpose(loadings) + offset, 1e-6, 1 - 1e-6)
    return tf.math.log(image / (1 - image))
reconstruction_loss = gaussian_loss
"""


def test_bound_of_a_linear_gaussian_model_is_its_known_likelihood(small_npz):
    random = np.random.default_rng(0)
    z_dim, std = 3, 0.5
    loadings = random.normal(size=[784, z_dim]) * 0.01
    offset = np.full(784, 0.5)
    x = random.normal(size=[6, z_dim]) @ loadings.T + offset + std * random.normal(size=[6, 784])
    covariance = loadings @ loadings.T + std**2 * np.eye(784)
    expected = scipy.stats.multivariate_normal(offset, covariance).logpdf(x)
    precision = np.eye(z_dim) + loadings.T @ loadings / std**2
    # The true posterior has this mean and a covariance that is nearly diagonal; Q is a wider one.
    to_mean = loadings @ np.linalg.inv(precision) / std**2
    names = {"offset": offset, "loadings": loadings, "to_mean": to_mean, "x": x}
    names |= {"log_var": np.log(np.diag(np.linalg.inv(precision))) + 0.5}
    names = {name: array.astype(np.float32) for name, array in names.items()}
    with Kernel() as kernel:
        kernel.run(last="loss", **{**SMALL, "data_path": str(small_npz), "z_dim": z_dim})
        kernel.run("bound", "bound")
        kernel.execute(LINEAR_GAUSSIAN)
        kernel.execute("compiled = tf.function(log_likelihood_bound)")
        bounds = {
            draws: kernel.fetch(
                f"compiled(x, tf.eye(10)[:6], tf.constant({draws})).numpy()", **names
            )
            for draws in (1, 10, 5000)
        }
    assert np.mean(bounds[1]) < np.mean(bounds[10]) < np.mean(bounds[5000])
    np.testing.assert_allclose(bounds[5000], expected, atol=0.05)
    assert np.abs(bounds[1] - expected).max() > 0.3


def test_the_bounds_are_ordered_as_they_must_be(kernel):
    given_true, given_each, log_p = kernel.fetch(
        "log_p_given_true_digit, log_p_given_digit, log_p.numpy()"
    )
    expected = scipy.special.logsumexp(given_each, axis=0) - np.log(10)
    np.testing.assert_allclose(log_p, expected, rtol=1e-5)
    assert np.all(log_p >= given_true - np.log(10) - 1e-3)
    one_draw = kernel.fetch("bounds(bound_digits, draws=1)")
    assert one_draw.mean() < given_true.mean()
    assert np.all(kernel.fetch("bounds(bound_digits, draws=500)") == given_true)


def test_bernoulli_loss_is_the_cross_entropy_of_grey_values(kernel):
    random = np.random.default_rng(0)
    x = random.uniform(size=[6, 784]).astype(np.float32)
    logits = random.normal(size=[6, 784]).astype(np.float32)
    loss = kernel.fetch("bernoulli_loss(x, logits).numpy()", x=x, logits=logits)
    p = scipy.special.expit(logits.astype(float))
    expected = scipy.special.xlogy(x, p) + scipy.special.xlogy(1 - x, 1 - p)
    np.testing.assert_allclose(loss, -expected.sum(axis=1), rtol=1e-5)
    assert kernel.fetch("reconstruction_loss is gaussian_loss")
    extreme = kernel.fetch("bernoulli_loss(tf.ones([1, 784]), -1000 * tf.ones([1, 784])).numpy()")
    assert extreme == 784_000


def test_the_closing_table_is_of_this_run(kernel):
    (table,) = [o.data["text/markdown"] for o in kernel.cell("results").outputs if "data" in o]
    rows = [[part.strip() for part in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    test = kernel.fetch("evaluate(test_images, test_digits)")
    assert float(rows[0][1]) == pytest.approx(test["test_vae_loss"], abs=0.006)
    assert float(rows[4][1]) == pytest.approx(100 * (1 - test["test_accuracy"]), abs=0.006)
    for _, ours, published, source, verdict in rows:
        assert verdict == ("ahead" if float(ours) < float(published) else "**behind**")
        assert source


def test_widgets_redraw_the_digits(kernel):
    def shown(name):
        return matplotlib.image.imread(io.BytesIO(kernel.fetch(f"bytes({name}.value)")))[..., 0]

    def expected():
        z = np.zeros([1, SMALL["z_dim"]])
        used, values = kernel.fetch("used, [slider.value for slider in sliders]")
        z[0, used] = values
        return 1 - kernel.fetch("generate_all_digits(z)", z=z)[0].reshape(10, 28, 28)

    assert kernel.fetch("used") == [
        j for j in kernel.fetch("dimensions") if kernel.fetch("dimension_kl")[j] > 0.1
    ]
    before = shown("all_digits")
    assert before.shape == (28, 280)
    np.testing.assert_allclose(before[:, :28], expected()[0], atol=0.01)
    kernel.execute("sliders[0].value = 1.7")
    after = shown("all_digits")
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(after[:, -28:], expected()[9], atol=0.01)
    kernel.execute("digit_choice.value = 8")
    np.testing.assert_allclose(shown("one_digit"), expected()[8], atol=0.01)
    kernel.execute("new_style.click()")
    assert kernel.fetch("sliders[0].value") != 1.7
    np.testing.assert_allclose(shown("one_digit"), expected()[8], atol=0.01)
    (output,) = kernel.cell("play").outputs
    assert "application/vnd.jupyter.widget-view+json" in output.data
    assert output.data["image/png"]


KEEP = {"encoder", "digit_classifier", "decoder", "hyperparameters", "history", "samples"}


def keep(kernel, folder):
    """Run the cell that keeps the run in this folder."""
    kernel.execute(f"output_dir = {str(folder)!r}")
    kernel.run("keep", "keep")


def test_kept_networks_draw_the_same_in_a_new_kernel(kernel, tmp_path):
    folder = tmp_path / "ein Lauf ☃" / "1"
    keep(kernel, folder)
    assert {path.stem for path in folder.iterdir()} == KEEP
    history = json.loads((folder / "history.json").read_text())
    assert history == kernel.fetch("dict(history)")
    settings = json.loads((folder / "hyperparameters.json").read_text())
    assert settings["hidden_layers"] == SMALL["hidden_layers"]
    kernel.run("load", "load")
    images = kernel.fetch("generate(z, np.eye(10))")
    samples = kernel.fetch("samples")
    with Kernel() as new:
        new.execute(f"output_dir = {str(folder)!r}")
        new.run("load", "load")
        np.testing.assert_array_equal(new.fetch("kept_images"), images)
        np.testing.assert_array_equal(new.fetch("kept.samples"), samples)
        assert "image/png" in new.cell("load").outputs[-1].data


def test_a_fault_between_files_leaves_whole_files_of_one_run(kernel, tmp_path):
    keep(kernel, tmp_path)
    kernel.execute(
        "real_replace, moved = os.replace, []\n"
        "def replace(*paths):\n"
        "    if len(moved) == 2:\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    moved.append(paths)\n"
        "    real_replace(*paths)\n"
        "os.replace = replace"
    )
    with pytest.raises(CellExecutionError, match="cannot be written .*No space left"):
        keep(kernel, tmp_path)
    kernel.execute("os.replace = real_replace")
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.keras", "digit_classifier.keras"}
    with pytest.raises(ValueError, match=r"decoder\.keras: not a whole file of a kept run"):
        vae_helpers.load_run(tmp_path)
    keep(kernel, tmp_path)  # what was trained is still in memory
    assert len(vae_helpers.load_run(tmp_path).samples) == SMALL["epochs"]


def test_a_full_disk_is_named_and_harms_no_earlier_run(kernel, tmp_path):
    keep(kernel, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # No file may grow beyond 10,000 bytes: as on a full disk, writing fails in the middle.
    kernel.execute("import resource\nlimits = resource.getrlimit(resource.RLIMIT_FSIZE)")
    kernel.execute("resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))")
    with pytest.raises(CellExecutionError, match="output_dir = .* cannot be written"):
        keep(kernel, tmp_path)
    kernel.execute("resource.setrlimit(resource.RLIMIT_FSIZE, limits)")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(kernel.fetch("samples")) == SMALL["epochs"]


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null", "a\0b", "x" * 300])
def test_a_folder_that_cannot_be_is_named(folder, kernel):
    with pytest.raises(CellExecutionError, match="output_dir = .* cannot be written"):
        keep(kernel, folder)


def test_a_kernel_that_dies_leaves_no_part_of_a_file(small_npz, tmp_path):
    with Kernel() as kernel:
        kernel.run(last="train", **SMALL, data_path=str(small_npz))
        kernel.execute("os.replace = lambda *paths: os._exit(9)")
        with pytest.raises(DeadKernelError):
            keep(kernel, tmp_path)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".unfinished-")]


@pytest.mark.parametrize("name", ["decoder.keras", "history.json", "samples.npz"])
def test_a_damaged_file_is_named(name, kernel, tmp_path):
    keep(kernel, tmp_path)
    path = tmp_path / name
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{name}: not a whole file"):
        vae_helpers.load_run(tmp_path)


def test_nothing_is_kept_by_default(kernel, small_npz):
    kernel.run("parameters", "parameters", **SMALL, data_path=str(small_npz))
    kernel.run("keep", "load")
    assert printed(kernel.cell("keep")) == "output_dir is None: nothing is kept\n"
    assert printed(kernel.cell("load")) == "output_dir is None: nothing to load\n"
