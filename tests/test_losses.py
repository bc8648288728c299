"""The networks and losses, each against an oracle that is computed in another way."""

import keras
import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
import tensorflow as tf
from conftest import SMALL, run_cells

import vae_helpers

MODEL_CELLS = [
    "setup",
    "parameters",
    "settings",
    "data",
    "networks",
    "losses",
    "sample-normal",
    "article-model",
    "optimizer",
    "epoch",
    "better-encoder",
    "better-decoder",
    "requested-digit-loss",
    "better-model",
    "bound",
]


@pytest.fixture(scope="module")
def names(small_npz):
    """Return the namespace of the notebook's cells that define the models."""
    return run_cells(MODEL_CELLS, data_path=str(small_npz), **SMALL)


def test_the_article_networks_have_its_layers_and_numbers_of_parameters(names):
    vae = names.DigitVAE(names.current_settings())
    z_dim = SMALL["z_dim"]
    hidden = 784 * 128 + 128
    assert vae.encoder.count_params() == hidden + 2 * (128 * z_dim + z_dim)
    assert vae.digit_classifier.count_params() == hidden + 128 * 10 + 10
    assert vae.decoder.count_params() == (z_dim + 10) * 128 + 128 + 128 * 784 + 784
    assert vae.encoder.output_shape == [(None, z_dim), (None, z_dim)]
    assert vae.digit_classifier.output_shape == (None, 10)
    assert vae.decoder.output_shape == (None, 784)
    for network in (vae.encoder, vae.digit_classifier, vae.decoder):
        dense = [layer for layer in network.layers if isinstance(layer, keras.layers.Dense)]
        assert (dense[0].units, dense[0].activation) == (128, keras.activations.sigmoid)


def test_kl_loss_equals_a_monte_carlo_estimate(names):
    rng = np.random.default_rng(0)
    z_mean, z_log_var = rng.normal(size=[2, 5, 4]).astype(np.float32)
    kl = names.kl_loss(z_mean, z_log_var)
    posterior = scipy.stats.norm(z_mean, np.exp(z_log_var / 2))
    z = posterior.rvs([100_000, 5, 4], random_state=rng)
    log_ratio = (posterior.logpdf(z) - scipy.stats.norm.logpdf(z)).sum(axis=2)
    standard_error = log_ratio.std(axis=0) / np.sqrt(len(z))
    assert np.all(np.abs(kl - log_ratio.mean(axis=0)) < 4 * standard_error)


def test_gaussian_loss_is_a_negative_log_density(names):
    x, decoded = np.random.default_rng(0).uniform(size=[2, 6, 784]).astype(np.float32)
    expected = -scipy.stats.norm.logpdf(x, decoded, 0.3).sum(axis=1)
    np.testing.assert_allclose(names.gaussian_loss(x, decoded, 0.3), expected, rtol=1e-4)


def test_classification_loss_is_the_cross_entropy(names):
    logits = np.random.default_rng(0).normal(size=[6, 10]).astype(np.float32)
    digits = np.arange(6)
    expected = scipy.special.logsumexp(logits, axis=1) - logits[digits, digits]
    np.testing.assert_allclose(names.classification_loss(digits, logits), expected, rtol=1e-5)


def test_the_losses_train_the_networks_that_they_should(names):
    settings = names.current_settings()
    images = tf.constant(names.test_images[:20])
    digits = names.test_digits[:20]

    def trained_networks(vae, compute_loss):
        """Return which of encoder, classifier and decoder get a gradient."""
        networks = [vae.encoder, vae.digit_classifier, vae.decoder]
        with tf.GradientTape() as tape:
            loss = compute_loss(vae)
        gradients = tape.gradient(loss, [network.trainable_weights for network in networks])
        return [any(g is not None and tf.norm(g) > 0 for g in group) for group in gradients]

    def vae_loss(vae):
        return vae.losses(images, digits, tf.constant([0, 1]), training=True)["vae_loss"]

    def requested_loss(vae):
        key = tf.constant([0, 1])
        return names.requested_digit_loss(vae.decoder, vae.digit_classifier, SMALL["z_dim"], key)

    assert trained_networks(names.DigitVAE(settings), vae_loss) == [True, True, True]
    better_vae = names.BetterDigitVAE(settings)
    assert trained_networks(better_vae, vae_loss) == [True, False, True]
    assert trained_networks(better_vae, requested_loss) == [False, False, True]
    leaking = names.BetterDigitVAE(settings.model_copy(update={"stop_gradient": False}))
    assert trained_networks(leaking, vae_loss) == [True, True, True]


def test_the_key_determines_all_noise(names):
    vae = names.BetterDigitVAE(names.current_settings())
    images = tf.constant(names.test_images[:20])
    digits = names.test_digits[:20]
    one = vae.total_loss(images, digits, tf.constant([0, 1]))[0].numpy()
    same = vae.total_loss(images, digits, tf.constant([0, 1]))[0].numpy()
    other = vae.total_loss(images, digits, tf.constant([0, 2]))[0].numpy()
    assert one == same
    assert one != other


def test_dense_by_digit_averages_ten_dense_layers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=[6, 5])
    digit_probs = rng.dirichlet(np.ones(10), size=6)
    inputs = [keras.Input([5]), keras.Input([10])]
    network = keras.Model(inputs, vae_helpers.dense_by_digit(*inputs, units=3))
    kernel, bias = (rng.normal(size=weight.shape) for weight in network.weights)
    network.set_weights([kernel, bias])
    outputs = np.einsum("bi,ido->bdo", x, kernel.reshape(5, 10, 3)) + bias.reshape(10, 3)
    expected = np.einsum("bdo,bd->bo", outputs, digit_probs)
    np.testing.assert_allclose(network.predict([x, digit_probs], verbose=0), expected, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 30, 127])
def test_distortion_moves_pixels_along_rows_and_then_columns_by_cosine_waves(count):
    images = np.random.default_rng(0).random([count, 784]).astype(np.float32)
    key = [3, count]
    np.testing.assert_array_equal(vae_helpers.distort(images, 0.0, key), images)
    np.testing.assert_allclose(vae_helpers.distort(images, 1e-9, key), images, atol=1e-6)
    distorted = vae_helpers.distort(images, 2.0, key).numpy()
    images_per_field = -(-count // 30)
    coefficients = tf.random.stateless_uniform([30, 2, 4, 4], key, -1, 1).numpy()
    coefficients = coefficients.repeat(images_per_field, axis=0)
    y, x = np.mgrid[:28, :28].astype(float)
    for image, found, coefficient in zip(images, distorted, coefficients, strict=False):
        displacement = np.zeros([2, 28, 28])
        for axis, i, j in np.ndindex(2, 4, 4):
            wave = np.cos(np.pi * i * (y + 0.5) / 28) * np.cos(np.pi * j * (x + 0.5) / 28)
            displacement[axis] += 2 / (1 + np.hypot(i, j)) * coefficient[axis, i, j] * wave
        expected = image.reshape(28, 28)
        for source in ([y, x + displacement[0]], [y + displacement[1], x]):
            expected = scipy.ndimage.map_coordinates(
                expected, source, order=1, mode="grid-constant"
            )
        np.testing.assert_allclose(found.reshape(28, 28), expected, atol=1e-4)


def test_the_bound_of_a_linear_gaussian_model_approaches_its_likelihood(names):
    # With a linear decoder, P(x|digit) is Gaussian with covariance weights·weightsᵀ + σ².
    rng = np.random.default_rng(0)
    z_dim = SMALL["z_dim"]
    std = 0.5
    mean = np.full(784, 0.5)
    loadings = rng.normal(size=[784, z_dim]) * 0.01
    noise = std * rng.normal(size=[6, 784])
    x = rng.normal(size=[6, z_dim]) @ loadings.T + mean + noise
    covariance = loadings @ loadings.T + std**2 * np.eye(784)
    expected = scipy.stats.multivariate_normal(mean, covariance).logpdf(x)
    # The true posterior has this mean and a nearly diagonal covariance; Q is a wider one.
    precision = np.eye(z_dim) + loadings.T @ loadings / std**2
    to_mean = np.float32(loadings @ np.linalg.inv(precision) / std**2)
    log_var = np.log(np.diag(np.linalg.inv(precision))) + 0.5
    log_var = np.float32(np.tile(log_var, [len(x), 1]))
    vae = names.DigitVAE(names.current_settings())
    vae.encoder = lambda inputs: ((inputs[0] - np.float32(mean)) @ to_mean, log_var)
    vae.decoder = lambda inputs: inputs[0] @ np.float32(loadings.T) + np.float32(mean)
    bounds = []
    for draws in (1, 10, 5000):
        x32 = tf.constant(x, tf.float32)
        bounds.append(names.log_likelihood_bound(vae, x32, tf.range(6), tf.constant(draws)).numpy())
    one, ten, many = bounds
    assert np.mean(one) < np.mean(ten) < np.mean(many)
    np.testing.assert_allclose(many, expected, atol=0.1)
    assert np.abs(one - expected).max() > 0.3
