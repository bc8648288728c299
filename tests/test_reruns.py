"""Cells run again, in any order, on any setting: the same as from the start."""

import re

import numpy as np
import pytest
from conftest import CODE_CELLS, RESULT_CELLS, Notebook, printed, trained

import vae_helpers

# Other values than those of `tiny`, each of which must change the result of those before it.
OTHER = {
    "seed": 5, "batch_size": 50, "hidden_layers": [16, 16], "activation": "tanh",
    "z_dim": 3, "decoder_std": 0.3, "classification_weight": 3.0, "learning_rate": 0.02,
    "momentum": 0.5, "cosine_decay": False, "clip_norm": 2.0, "encoder_sees_digit": False,
    "decoder_skips": False, "stop_gradient": False, "asked_digit_weight": 0.0, "distortion": 0.0,
    "optimizer_name": "adam", "likelihood": "bernoulli", "epochs": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def used(tiny):
    """Return a notebook that has run as a whole, and what training left there."""
    notebook = Notebook(pictures=False).run(**tiny)
    return notebook, trained(notebook)


# For those after training, see test_result_cells_run_again_in_any_order_show_the_same.
@pytest.mark.parametrize("cell_id", CODE_CELLS[: -len(RESULT_CELLS)])
def test_any_cell_run_again_and_then_the_rest_gives_the_same(cell_id, used, tiny):
    notebook, first = used
    assert trained(notebook.run(cell_id, "train", **tiny)) == first
    assert len(notebook.fetch("samples")) == tiny["epochs"]
    assert notebook.fetch("train_steps.experimental_get_tracing_count()") == 1  # compiled once


def test_changed_hyperparameters_give_what_a_restart_gives(used, tiny):
    notebook, first = used
    assert set(OTHER) == set(notebook.fetch("hyperparameters")) - {"data_path", "output_dir"}
    parameters, results = dict(tiny), [first]
    for name, value in OTHER.items():  # one after the other, so that each could leave a trace
        parameters[name] = value
        results.append(trained(notebook.run("parameters", "train", **parameters)))
        assert results[-1] != results[-2], name
    assert trained(Notebook(pictures=False).run(last="train", **parameters)) == results[-1]
    assert trained(notebook.run("parameters", "train", **tiny)) == first


ODD_HIDDEN_PART = """def hidden_part(x, widths, skips=False):
    if x is image:
        x = keras.layers.Reshape([28, 28, 1])(x)
        x = keras.layers.Conv2D(4, 5, strides=3, activation=activation)(x)
        x = keras.layers.Flatten()(x)
    for width in widths:
        x = keras.layers.Dense(width, activation=activation)(x)
        x = keras.layers.BatchNormalization(momentum=0.5)(x)
        x = keras.layers.LayerNormalization()(x)
        x = keras.layers.Dropout(0.2)(x)
    return x
"""
LAPLACE = """def laplace_loss(images, decoded):
    distance = tf.abs(images - decoded) / decoder_std
    return tf.reduce_sum(distance + np.log(2 * decoder_std), axis=1)
likelihoods = {"laplace": laplace_loss, """


def test_own_layers_and_an_own_likelihood_train_start_afresh_and_are_kept(tiny, tmp_path):
    notebook = Notebook(pictures=False)
    networks, loss = notebook.cell("networks"), notebook.cell("loss")
    networks.source = re.sub(r"def hidden_part(.|\n)*?return x\n", ODD_HIDDEN_PART, networks.source)
    loss.source = loss.source.replace("likelihoods = {", LAPLACE)
    own = {"output_dir": str(tmp_path), "likelihood": "laplace", "encoder_sees_digit": False}
    first = trained(notebook.run(**tiny, **own))
    moving = "[v for v in encoder.non_trainable_variables if 'moving_mean' in v.path]"
    assert notebook.fetch(f"min(np.abs(v).max() for v in {moving})") > 0  # trained in its own mode
    losses = [notebook.fetch("evaluate(test_images, test_digits)") for _ in range(2)]
    assert losses[0] == losses[1]  # evaluated in its own mode: nothing drops out
    test_losses, results = notebook.fetch("history['test_vae_loss'], results")
    of_the_last = [results["vae_loss"], results["laplace_vae_loss"], losses[0]["vae_loss"]]
    assert of_the_last == [test_losses[-1]] * 3
    assert np.all(np.diff(test_losses) < 0)
    assert "laplace likelihood" in printed(notebook.cell("density"))
    drawn = "{}.predict([styles[0], np.eye(10)], verbose=0)"
    images = [notebook.fetch(drawn.format(decoder)) for decoder in ("decoder", "kept.decoder")]
    np.testing.assert_array_equal(*images)
    assert trained(notebook.run("train", "train")) == first


def assert_consistent(notebook, finished):
    """Check that history, grid and networks are of the same finished epochs, and figures work."""
    history, samples = notebook.fetch("history, samples")
    assert {len(values) for values in history.values()} <= {finished}
    assert samples.shape == (finished, 10, 784)
    assert np.isfinite(samples).all()
    if finished:
        last = notebook.fetch("decoder.predict([styles[len(samples) - 1], np.eye(10)], verbose=0)")
        np.testing.assert_array_equal(last, samples[-1])
        test_loss = notebook.fetch("evaluate(test_images, test_digits)['vae_loss']")
        assert test_loss == history["test_vae_loss"][-1]
    assert re.search("last finished epoch.*start afresh", printed(notebook.cell("train")))
    notebook.run(first="losses")
    assert np.isfinite(notebook.fetch("generate(np.zeros([1, z_dim]), np.eye(10)[:1])")).all()


def test_divergence_stops_at_the_last_good_epoch(tiny):
    notebook = Notebook(pictures=False).run(last="train", **{**tiny, "learning_rate": 1e9})
    assert "loss of epoch 1 is not finite: lower learning_rate" in printed(notebook.cell("train"))
    assert_consistent(notebook, 0)
    # A network that breaks in the third epoch.
    notebook.run("parameters", "epoch", **{**tiny, "epochs": 5})
    notebook.execute(
        "healthy_epoch = train_epoch\n"
        "def train_epoch(*arguments):\n"
        "    if len(samples) == 2:\n"
        "        weights[0].assign(weights[0] * np.inf)\n"
        "    return healthy_epoch(*arguments)"
    )
    notebook.run("train", "train")
    assert "The loss of epoch 3 is not finite" in printed(notebook.cell("train"))
    assert_consistent(notebook, 2)


@pytest.mark.parametrize(
    ("parameters", "message", "not_yet"),
    [
        ({"optimizer_name": "sdg"}, "optimizer_name = 'sdg': Input should be", "data"),
        ({"data_path": "nowhere.npz"}, "nowhere.npz: .*no such file", "encoder"),
        ({"likelihood": "normal"}, "likelihood = 'normal': .*'gaussian' or", "reconstruction_loss"),
        ({"batch_size": 601}, "batch_size = 601: .* less than or equal to 600", "optimizer"),
    ],
)
def test_the_notebook_stops_before_it_builds_on_it(parameters, message, not_yet, tiny):
    notebook = Notebook(pictures=False)
    with pytest.raises(ValueError, match=message):
        notebook.run(**{**tiny, **parameters})
    assert not notebook.fetch(f"{not_yet!r} in globals()")


@pytest.mark.parametrize("parameters", [
    {"hidden_layers": [1], "z_dim": 2, "batch_size": 600, "epochs": 1, "momentum": 0,
     "distortion": 5, "decoder_std": 0.001, "learning_rate": 1e-300,
     "classification_weight": 0, "clip_norm": 1e-6, "seed": 2**31 - 1},
    {"hidden_layers": [30] * 20, "activation": "selu", "z_dim": 100, "epochs": 1,
     "likelihood": "bernoulli", "optimizer_name": "adam", "learning_rate": 0.001,
     "decoder_std": 100, "clip_norm": None},
    {"batch_size": 127},  # no multiple of the 15 ways to bend, as 600 images are none of it
])  # fmt: skip
def test_the_notebook_runs_at_the_edges_of_what_is_allowed(parameters, tiny):
    parameters = {**tiny, **parameters}
    notebook = Notebook(pictures=False).run(**parameters)
    assert len(trained(notebook)["vae_loss"]) == parameters["epochs"]


@pytest.mark.parametrize("digits", [[3], [0, 1, 1, 2], [*range(10)] * 2])
def test_every_cell_works_on_few_images(digits, small_arrays, tiny, tmp_path):
    arrays = {name: array[: len(digits)] for name, array in small_arrays.items() if name[0] == "x"}
    np.savez(tmp_path / "few.npz", **arrays, y_train=digits, y_test=digits)
    few = {"data_path": str(tmp_path / "few.npz"), "batch_size": len(digits)}
    notebook = Notebook().run(**{**tiny, **few}, output_dir=str(tmp_path))
    assert len(vae_helpers.load_run(tmp_path).samples) == tiny["epochs"]
    assert np.isfinite(notebook.fetch("results['vae_loss']"))
