"""The notebook in a real kernel: what it holds after Run All, its losses, and its reruns."""

import ast
import base64
import io
import re

import nbformat
import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import NOTEBOOK, ROOT, SMALL, Kernel, printed
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier


@pytest.fixture(scope="module")
def kernel(small_npz):
    """Yield a kernel that has run the whole notebook on small settings and small data."""
    with Kernel() as kernel:
        yield kernel.run(data_path=str(small_npz), **SMALL)


def figures(kernel, cell_id):
    """Return the pictures that a cell shows."""
    outputs = kernel.cell(cell_id).outputs
    return [
        Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        for output in outputs
        if "image/png" in output.get("data", {})
    ]


def test_run_all_leaves_what_other_programs_rely_on(kernel, small_arrays):
    images = small_arrays["x_test"][:7].reshape(-1, 784) / 255
    z_mean, z_log_var, digit_probs = kernel.fetch("infer(images)", images=images)
    assert z_mean.shape == z_log_var.shape == (7, SMALL["z_dim"])
    assert digit_probs.shape == (7, 10)
    np.testing.assert_allclose(digit_probs.sum(axis=1), 1, rtol=1e-5)
    generated = kernel.fetch("generate(z, digit_probs)", z=z_mean, digit_probs=digit_probs)
    assert generated.shape == (7, 784)
    assert generated.dtype == z_mean.dtype == z_log_var.dtype == digit_probs.dtype == np.float32
    assert generated.min() >= 0
    assert generated.max() <= 1
    assert kernel.fetch(
        "[isinstance(n, keras.Model) for n in (encoder, decoder, digit_classifier)]"
    )
    samples = np.asarray(kernel.fetch("samples"))
    assert samples.shape == (SMALL["epochs"], 10, 784)
    assert samples.min() >= 0
    assert samples.max() <= 1
    assert len(np.unique(samples.reshape(-1, 784), axis=0)) == SMALL["epochs"] * 10


def test_losses_decrease(kernel):
    history = kernel.fetch("history")
    for name in ("vae_loss", "classification_loss", "test_vae_loss", "test_classification_loss"):
        assert len(history[name]) == SMALL["epochs"]
        assert np.all(np.diff(history[name]) < 0), name
    assert len(history["seconds"]) == len(history["test_accuracy"]) == SMALL["epochs"]
    assert min(history["seconds"]) > 0
    assert history["test_accuracy"][-1] > 0.8


def test_one_figure_and_a_line_for_each_epoch(kernel):
    assert len(figures(kernel, "train")) == 1
    lines = printed(kernel.cell("train")).splitlines()
    progress = [line for line in lines if line.startswith("epoch")]
    assert len(progress) == SMALL["epochs"]
    assert all(
        re.search(
            r"VAE loss \d+\.\d .*classification loss \d.* accuracy \d+\.\d+%  \d+\.\d s", line
        )
        for line in progress
    )


def test_every_output_is_clean(kernel):
    for cell in kernel.notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


def test_python_warnings_and_later_errors_are_shown(kernel):
    cell = kernel.execute("import os, warnings\nwarnings.warn('Python', stacklevel=1)")
    assert "Python" in printed(cell)
    cell = kernel.execute("_ = os.write(2, b'from C++')\ntime.sleep(1)")
    assert "from C++" in printed(cell)


def test_kl_loss_is_that_of_a_monte_carlo_estimate(kernel):
    random = np.random.default_rng(0)
    z_mean = random.normal(size=[5, 4]).astype(np.float32)
    z_log_var = random.normal(size=[5, 4]).astype(np.float32)
    kl = kernel.fetch("kl_loss(a, b).numpy()", a=z_mean, b=z_log_var)
    posterior = scipy.stats.norm(z_mean, np.exp(z_log_var / 2))
    z = posterior.rvs([100_000, 5, 4], random_state=random)
    log_ratio = (posterior.logpdf(z) - scipy.stats.norm.logpdf(z)).sum(axis=2)
    standard_error = log_ratio.std(axis=0) / np.sqrt(len(z))
    assert np.all(np.abs(kl - log_ratio.mean(axis=0)) < 4 * standard_error)


def test_reconstruction_loss_is_the_negative_log_density(kernel):
    random = np.random.default_rng(0)
    x, mean = random.uniform(size=[2, 6, 784]).astype(np.float32)
    logits = scipy.special.logit(mean)
    loss = kernel.fetch("reconstruction_loss(a, b).numpy()", a=x, b=logits)
    expected = -scipy.stats.norm.logpdf(x, mean, kernel.fetch("decoder_std")).sum(axis=1)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_classification_loss_is_the_cross_entropy(kernel):
    logits = np.random.default_rng(0).normal(size=[6, 10]).astype(np.float32)
    digits = np.arange(6)
    loss = kernel.fetch("classification_loss(a, b).numpy()", a=digits, b=logits)
    expected = scipy.special.logsumexp(logits, axis=1) - logits[digits, digits]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


GRADIENTS = """
def gradient_norms(loss):
    with tf.GradientTape() as tape:
        value = loss()
    networks = (encoder, decoder, digit_classifier)
    gradients = tape.gradient(value, [network.trainable_variables for network in networks])
    return [sum(float(tf.norm(g)) for g in group if g is not None) for group in gradients]
"""


def test_whom_the_losses_train(kernel):
    kernel.execute(GRADIENTS)
    vae = "gradient_norms(lambda: sum(model_losses(x, d, tf.zeros([20, z_dim]), x)[:2]))"
    batch = "tf.constant(test_images[:20]), test_digits[:20]"
    kernel.execute(f"x, d = {batch}")
    encoder, decoder, classifier = kernel.fetch(vae)
    assert encoder > 0
    assert decoder > 0
    assert classifier == 0  # stop_gradient
    assert kernel.fetch(vae, stop_gradient=False)[2] > 0
    kernel.execute("stop_gradient = True")
    encoder, decoder, classifier = kernel.fetch("gradient_norms(lambda: asked_digit_loss([0, 0]))")
    assert decoder > 0
    assert encoder == classifier == 0


STEP = """
def step_taken(longest):
    global optimizer, clip_norm
    kept = optimizer, clip_norm, [weight.numpy() for weight in weights]
    optimizer, clip_norm = keras.optimizers.SGD(1.0), longest
    train_step(tf.constant(test_images[:batch_size]), tf.constant(test_digits[:batch_size]))
    optimizer, clip_norm, before = kept
    after = [weight.numpy() for weight in weights]
    for weight, value in zip(weights, before):
        weight.assign(value)
    return np.concatenate([(b - a).ravel() for b, a in zip(before, after)]).astype(float)
"""


def test_a_step_is_as_long_as_the_gradient_or_the_clip_norm(kernel):
    kernel.execute(STEP)
    gradient, short, free = (kernel.fetch(f"step_taken({c})") for c in (None, 0.5, 1e6))
    length = np.linalg.norm(gradient)
    assert length > 1
    np.testing.assert_allclose(short, 0.5 / length * gradient, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(short), 0.5, rtol=1e-4)
    np.testing.assert_allclose(free, gradient, atol=1e-5)


def test_distortion_is_an_affine_map_of_the_plane(kernel):
    matrix_code = "distort(tf.eye(784), [3, 4]).numpy()"  # by which images are multiplied
    identity = kernel.fetch(matrix_code, distortion=0.0)
    np.testing.assert_allclose(identity, np.eye(784), atol=1e-6)
    matrix = kernel.fetch(matrix_code, distortion=1.0)
    y, x = np.divmod(np.arange(784), 28)
    inside = np.isclose(matrix.sum(axis=0), 1, atol=1e-5)  # new pixels that come from the image
    assert inside.mean() > 0.7
    # Where a new pixel comes from is an affine function of where it is.
    design = np.stack([x, y, np.ones(784)], axis=1)[inside]
    for source in (x @ matrix, y @ matrix):
        fit, *_ = np.linalg.lstsq(design, source[inside], rcond=None)
        np.testing.assert_allclose(design @ fit, source[inside], atol=1e-3)
    assert not np.allclose(matrix, np.eye(784), atol=0.1)


def test_rerun_with_other_hyperparameters_is_as_in_a_new_kernel(kernel, small_npz):
    other = {**SMALL, "data_path": str(small_npz), "epochs": 2, "seed": 7, "z_dim": 3}
    other |= {"hidden_layers": [32, 16], "activation": "sigmoid", "batch_size": 30}
    other |= {"optimizer_name": "adam", "learning_rate": 0.002, "clip_norm": None}
    other |= {"distortion": 0.0, "asked_digit_weight": 0.0, "kl_anneal_epochs": 0}
    other |= {"decoder_skips": False, "cosine_decay": False, "stop_gradient": False}
    result = "{**history, 'seconds': 0}, np.asarray(samples), decoder.get_weights()"
    with Kernel() as new:
        history, samples, weights = new.run(last="train", **other).fetch(result)
    kernel.run(first="parameters", last="generate", **other)
    again_history, again_samples, again_weights = kernel.fetch(result)
    assert history == again_history
    assert len(history["vae_loss"]) == 2
    np.testing.assert_array_equal(samples, again_samples)
    for weight, again in zip(weights, again_weights, strict=True):
        np.testing.assert_array_equal(weight, again)
    # The training cell alone starts afresh.
    kernel.run(first="train", last="train")
    assert kernel.fetch(result)[0] == history


def test_offline_default_ends_in_a_readable_grid(tmp_path):
    # No cached copy, and nothing answers where the download goes.
    offline = {"KERAS_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    with Kernel(**offline) as kernel:
        kernel.run()
        assert "No MNIST" in printed(kernel.cell("data"))
        assert kernel.fetch("data.name") == "scikit-learn digits"
        assert kernel.fetch("history['test_accuracy'][-1]") > 0.97
        samples = np.asarray(kernel.fetch("samples"))
        images, digits = kernel.fetch("data.x_train, data.y_train")
    judge = KNeighborsClassifier(3).fit(images / 255, digits)  # knows real images alone
    read = judge.predict(samples[-5:].reshape(-1, 784))
    assert np.mean(read == np.tile(np.arange(10), 5)) >= 0.98


def test_short_run_on_real_mnist(mnist):
    with Kernel() as kernel:
        kernel.run(data_path=mnist, epochs=2)
        history = kernel.fetch("history")
    assert history["test_vae_loss"][-1] < 235
    assert history["test_accuracy"][-1] > 0.96
    assert np.diff(history["vae_loss"]) < 0


def test_hyperparameters_are_flat_literals_with_comments():
    (cell,) = [c for c in NOTEBOOK.cells if "parameters" in c.metadata.get("tags", [])]
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign)
        assert statement.targets[0].id.islower()
        ast.literal_eval(statement.value)
    assert all("  # " in line for line in cell.source.splitlines() if line)


def test_committed_outputs_are_of_one_clean_run_on_mnist():
    code = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert max(len(cell.source.splitlines()) for cell in code) <= 40
    assert NOTEBOOK.metadata.kernelspec.name == "python3"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"(?<![\w.:])/(home|root|tmp|usr|work|Users)/", nbformat.writes(NOTEBOOK))
    assert (ROOT / "vae2.ipynb").stat().st_size < 2e6
    assert "widgets" not in NOTEBOOK.metadata
    assert not [
        o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})
    ]
    by_id = {cell.id: cell for cell in code}
    (played,) = by_id["play"].outputs
    assert played.data["image/png"]
    assert printed(by_id["data"]).startswith("MNIST: 60,000 training images, 10,000 test images")
    progress = re.findall(r"^epoch", printed(by_id["train"]), re.MULTILINE)
    assert len(progress) == 20


def test_readme_shows_the_committed_digit_grid():
    (cell,) = [cell for cell in NOTEBOOK.cells if cell.id == "train"]
    (picture,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    assert base64.b64decode(picture) == (ROOT / ".github" / "digit-grid.png").read_bytes()
    assert ".github/digit-grid.png" in (ROOT / "README.md").read_text()
