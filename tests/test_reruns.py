"""Cells run again, in any order, on any setting: the same as from the start."""

import hashlib

import numpy as np
import pytest
from conftest import CODE_CELLS, RESULT_CELLS, Notebook, printed

# Other values than those of TINY, each of which must change the result.
OTHER = {
    "seed": 5,
    "epochs": 3,
    "batch_size": 50,
    "hidden_layers": [16, 16],
    "activation": "tanh",
    "z_dim": 3,
    "likelihood": "bernoulli",
    "decoder_std": 0.3,
    "classification_weight": 3.0,
    "optimizer_name": "adam",
    "learning_rate": 0.02,
    "momentum": 0.5,
    "cosine_decay": False,
    "clip_norm": 2.0,
    "mean_image_bias": False,
    "encoder_sees_digit": False,
    "decoder_skips": False,
    "stop_gradient": False,
    "asked_digit_weight": 0.0,
    "asked_digit_batch": 30,
    "distortion": 0.0,
}


def result(notebook):
    """Return a digest of the losses, the digit grid and all weights that a notebook holds."""
    history, samples, networks = notebook.fetch("(history, samples, networks)")
    assert {len(values) for values in history.values()} == {len(samples)}
    digest = hashlib.sha256(repr({**history, "seconds": 0}).encode())
    for array in (samples, *(w for network in networks for w in network.get_weights())):
        digest.update(array.tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def used(tiny):
    """Return a notebook that has run as a whole, and its result."""
    notebook = Notebook(pictures=False).run(**tiny)
    return notebook, result(notebook)


# For those after training, see test_any_fifty_result_cells_in_any_order_show_the_same.
@pytest.mark.parametrize("cell_id", CODE_CELLS[: -len(RESULT_CELLS)])
def test_any_cell_run_again_and_then_the_rest_gives_the_same(cell_id, used, tiny):
    notebook, first = used
    notebook.run(first=cell_id, **tiny)
    assert result(notebook) == first
    assert len(notebook.fetch("samples")) == tiny["epochs"]


@pytest.mark.parametrize("name", OTHER)
def test_a_changed_hyperparameter_gives_what_a_restart_gives(name, used, tiny):
    notebook, first = used
    parameters = {**tiny, name: OTHER[name]}
    notebook.run("parameters", "train", **parameters)
    changed = result(notebook)
    assert changed != first
    assert result(Notebook(pictures=False).run(last="train", **parameters)) == changed


def test_all_hyperparameters_but_paths_are_changed_in_these_tests(used):
    settings = used[0].fetch("hyperparameters.model_dump()")
    assert set(OTHER) == set(settings) - {"data_path", "output_dir"}


def test_the_training_cell_alone_starts_afresh(used, tiny):
    notebook, first = used
    notebook.run("parameters", "train", **tiny)
    assert result(notebook) == first
    notebook.run("train", "train")
    assert result(notebook) == first
    assert "compiled in 0.0 s" in printed(notebook.cell("train"))  # it has not changed


ODD_NETWORKS = """
def hidden_part(inputs, widths, skips=False):
    x = inputs
    if inputs is image:
        x = keras.layers.Reshape([28, 28, 1])(x)
        x = keras.layers.Conv2D(4, 5, strides=3, activation=activation)(x)
        x = keras.layers.Flatten()(x)
    for width in widths:
        x = keras.layers.Dense(width, activation=activation)(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.LayerNormalization()(x)
        x = keras.layers.Dropout(0.2)(x)
    return x
"""


def test_any_layers_train_start_afresh_and_are_kept(tiny, tmp_path):
    notebook = Notebook(pictures=False).run(
        last="hidden-part", **tiny, output_dir=str(tmp_path), encoder_sees_digit=False
    )
    notebook.execute(ODD_NETWORKS)
    notebook.run("networks")
    first = result(notebook)
    moving = "[v for v in encoder.non_trainable_variables if 'moving_mean' in v.path]"
    assert notebook.fetch(f"min(np.abs(v).max() for v in {moving})") > 0  # trained in its own mode
    losses = [notebook.fetch("evaluate(test_images, test_digits)") for _ in range(2)]
    assert losses[0] == losses[1]  # evaluated in its own mode: nothing drops out
    assert losses[0]["vae_loss"] == notebook.fetch("history['test_vae_loss'][-1]")
    assert np.all(np.diff(notebook.fetch("history['test_vae_loss']")) < 0)
    notebook.run("train", "train")
    assert result(notebook) == first
    drawn = notebook.fetch("generate(kept_z, np.eye(10))")
    np.testing.assert_array_equal(notebook.fetch("kept_images"), drawn)


LAPLACE = """
def laplace_loss(images, image_logits):
    distance = tf.abs(images - tf.sigmoid(image_logits)) / decoder_std
    return tf.reduce_sum(distance + np.log(2 * decoder_std), axis=1)

likelihoods["laplace"] = laplace_loss
"""


def test_a_likelihood_more_is_a_function_and_an_entry(tiny):
    notebook = Notebook(pictures=False).run(last="loss", **tiny, likelihood="laplace")
    notebook.execute(LAPLACE)
    notebook.run("data")
    shown = notebook.cell("measures").outputs[0].data["text/markdown"]
    loss = notebook.fetch("evaluate(test_images, test_digits)['vae_loss']")
    assert f"| VAE loss, laplace | {loss:.2f} |" in shown
    assert "laplace likelihood" in printed(notebook.cell("density-show"))
    assert np.diff(notebook.fetch("history['test_vae_loss']")) < 0


def assert_consistent(notebook, finished):
    """Check that history, grid and networks are of the same finished epochs, and figures work."""
    history = dict(notebook.fetch("dict(history)"))
    assert {len(values) for values in history.values()} <= {finished}
    samples = notebook.fetch("samples")
    assert samples.shape == (finished, 10, 784)
    assert np.isfinite(samples).all()
    if finished:
        style = "np.tile(styles[len(samples) - 1], [10, 1])"
        last = notebook.fetch(f"generate({style}, np.eye(10))")
        np.testing.assert_array_equal(last, samples[-1])
        test_loss = notebook.fetch("evaluate(test_images, test_digits)['vae_loss']")
        assert test_loss == history["test_vae_loss"][-1]
    said = printed(notebook.cell("train"))
    assert f"Stopped after {finished} of" in said
    assert "start afresh" in said
    notebook.run(first="losses")
    assert np.isfinite(notebook.fetch("generate(np.zeros([1, z_dim]), np.eye(10)[:1])")).all()


def test_divergence_stops_at_the_last_good_epoch(tiny):
    notebook = Notebook(pictures=False).run(last="train", **{**tiny, "learning_rate": 1e9})
    said = printed(notebook.cell("train"))
    assert "The loss of epoch 1 is not finite: lower learning_rate" in said
    assert_consistent(notebook, 0)
    # A network that breaks in the third epoch.
    notebook.run("parameters", "epoch", **{**tiny, "epochs": 5})
    notebook.execute(
        "healthy_epoch = train_epoch\n"
        "def train_epoch(random, parts):\n"
        "    if len(samples) == 2:\n"
        "        weights[0].assign(weights[0] * np.inf)\n"
        "    return healthy_epoch(random, parts)"
    )
    notebook.run("train", "train")
    assert "The loss of epoch 3 is not finite" in printed(notebook.cell("train"))
    assert_consistent(notebook, 2)


@pytest.mark.parametrize(
    ("parameters", "cell_id", "message"),
    [
        ({"optimizer_name": "sdg"}, "data", "optimizer_name = 'sdg': Input should be the name"),
        ({"likelihood": "normal"}, "data", "likelihood = 'normal': Input should be 'gaussian' or"),
        ({"batch_size": 10_000}, "data", "batch_size = 10000: .* less than or equal to 600"),
        ({"data_path": "nowhere.npz"}, "data", "nowhere.npz: no such file"),
    ],
)
def test_the_notebook_stops_before_it_builds(parameters, cell_id, message, tiny):
    notebook = Notebook(pictures=False)
    with pytest.raises(ValueError, match=message):
        notebook.run(**{**tiny, **parameters})
    assert not notebook.fetch("'encoder' in globals()")
    assert notebook.index(cell_id) < notebook.index("networks")


# Values at the edges of what is allowed.
EXTREMES = [
    {
        "hidden_layers": [1],
        "z_dim": 2,
        "batch_size": 600,
        "epochs": 1,
        "asked_digit_batch": 1,
        "momentum": 0.0,
        "distortion": 5,
        "decoder_std": 0.001,
        "learning_rate": 1e-300,
        "classification_weight": 0,
        "clip_norm": 1e-6,
        "seed": 2**31 - 1,
    },
    {
        "hidden_layers": [30] * 20,
        "activation": "selu",
        "z_dim": 100,
        "epochs": 1,
        "likelihood": "bernoulli",
        "optimizer_name": "adam",
        "learning_rate": 0.001,
        "decoder_std": 100,
        "clip_norm": None,
    },
]


@pytest.mark.parametrize("parameters", EXTREMES)
def test_the_notebook_runs_at_the_edges(parameters, tiny):
    notebook = Notebook(pictures=False).run(**{**tiny, **parameters})
    assert len(notebook.fetch("history['vae_loss']")) == 1
