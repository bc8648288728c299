"""The losses and the training step, each against an oracle worked out apart."""

import keras
import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
import tensorflow as tf
from conftest import SMALL, Notebook

import vae_helpers


def test_kl_loss_is_that_of_a_monte_carlo_estimate(notebook):
    random = np.random.default_rng(0)
    z_mean, z_log_var = random.normal(size=[2, 5, 4]).astype(np.float32)
    kl = notebook.module.kl_loss(z_mean, z_log_var)
    posterior = scipy.stats.norm(z_mean, np.exp(z_log_var / 2))
    z = posterior.rvs([100_000, 5, 4], random_state=random)
    log_ratio = (posterior.logpdf(z) - scipy.stats.norm.logpdf(z)).sum(axis=2)
    standard_error = log_ratio.std(axis=0) / np.sqrt(len(z))
    assert np.all(np.abs(kl - log_ratio.mean(axis=0)) < 4 * standard_error)


def test_losses_are_a_negative_log_density_and_cross_entropies_of_grey_and_of_digits(notebook):
    names, random = notebook.module, np.random.default_rng(0)
    x, p = random.uniform(size=[2, 6, 784]).astype(np.float32)
    assert names.reconstruction_loss is names.gaussian_loss
    expected = -scipy.stats.norm.logpdf(x, p, names.decoder_std).sum(axis=1)
    np.testing.assert_allclose(names.reconstruction_loss(x, p), expected, rtol=1e-4)
    expected = -(scipy.special.xlogy(x, p) + scipy.special.xlogy(1 - x, 1 - p)).sum(axis=1)
    np.testing.assert_allclose(names.bernoulli_loss(x, p), expected, rtol=1e-5)
    (surely_wrong,) = names.bernoulli_loss(tf.ones([1, 784]), tf.zeros([1, 784])).numpy()
    assert surely_wrong == pytest.approx(784 * np.log(1e6), rel=1e-4)
    logits, digits = random.normal(size=[6, 10]).astype(np.float32), np.arange(6)
    expected = scipy.special.logsumexp(logits, axis=1) - logits[digits, digits]
    np.testing.assert_allclose(names.classification_loss(digits, logits), expected, rtol=1e-5)


def test_units_begin_with_a_spot_of_the_image_each(small_npz):
    names = Notebook().run(last="networks", data_path=str(small_npz)).module
    places = np.indices([28, 28]).reshape(2, -1)
    for network in (names.encoder, names.digit_classifier):
        squares = network.trainable_variables[0].numpy().astype(np.float64) ** 2  # [784, units]
        shares = squares / squares.sum(axis=0)
        centre = places @ shares  # [axis, units]
        spread = np.sqrt(places**2 @ shares - centre**2)
        assert spread.max() < 3  # of weights of all pixels: 8
        assert np.all(np.ptp(centre, axis=1) > 14)
        assert np.mean(squares) == pytest.approx(2 / (784 + squares.shape[1]), rel=0.05)  # Glorot's


def test_whom_the_losses_train_and_that_keys_decide_their_noise(notebook, monkeypatch):
    names = notebook.module
    networks = names.encoder, names.decoder, names.digit_classifier
    x, digits = tf.constant(names.test_images[:20]), names.test_digits[:20]

    def trained(loss):
        with tf.GradientTape() as tape:
            value = loss()
        gradients = tape.gradient(value, [network.trainable_variables for network in networks])
        return [np.sign(sum(tf.norm(g) for g in group if g is not None)) for group in gradients]

    def vae_losses(key=0, training=False):
        return names.model_losses(x, digits, [0, key], training)["vae_loss"]

    assert trained(vae_losses) == [1, 1, 0]  # stop_gradient
    assert trained(lambda: names.asked_digit_loss([0, 1])) == [0, 1, 0]
    monkeypatch.setattr(names, "stop_gradient", False)
    assert trained(vae_losses) == [1, 1, 1]
    one, same, other = (vae_losses(key, training=True).numpy() for key in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.all(one != other)


def test_a_step_is_as_long_as_the_gradient_or_for_each_unit_the_clip_norm(notebook, monkeypatch):
    names = notebook.module
    x, digits = (tf.constant(a[: names.batch_size]) for a in (names.test_images, names.test_digits))

    def step_taken(longest):
        monkeypatch.setattr(names, "optimizer", keras.optimizers.SGD(1.0))
        monkeypatch.setattr(names, "clip_norm", longest)
        before, restore = [w.numpy() for w in names.weights], vae_helpers.snapshot(names.networks)
        names.train_step(x, digits)
        step = [b - w.numpy() for b, w in zip(before, names.weights, strict=True)]
        restore()
        return step

    gradients, short, free = map(step_taken, (None, 0.1, 1e6))
    for gradient, step, unclipped in zip(gradients, short, free, strict=True):
        np.testing.assert_allclose(unclipped, gradient, atol=1e-5)
        lengths = np.linalg.norm(gradient, axis=0)
        expected = gradient * np.minimum(1, 0.1 / np.maximum(lengths, 1e-12))
        np.testing.assert_allclose(step, expected, atol=1e-6)
    assert max(np.linalg.norm(gradient, axis=0).max() for gradient in gradients) > 1


@pytest.mark.parametrize("shape", [(3, 3, 2, 5), (7, 4), (1, 4), (6,), (1,), ()])
def test_gradients_of_any_layer_are_shortened_by_unit(shape):
    gradient = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    (clipped,) = vae_helpers.clip([tf.constant(gradient)], 0.3)
    units = gradient.reshape(-1, shape[-1] if len(shape) > 1 else 1)
    expected = units * np.minimum(1, 0.3 / np.linalg.norm(units, axis=0))
    np.testing.assert_allclose(clipped, expected.reshape(shape), rtol=1e-5)
    assert vae_helpers.clip([gradient], None) == [gradient]


def test_a_layer_for_each_digit_is_the_mean_of_ten_layers():
    random = np.random.default_rng(0)
    x, digit_probs = random.normal(size=[6, 5]), random.dirichlet(np.ones(10), size=6)
    inputs = keras.Input([5]), keras.Input([10])
    network = keras.Model(inputs, vae_helpers.dense_by_digit(*inputs, units=3))
    kernel, bias = (random.normal(size=w.shape) for w in network.weights)
    network.set_weights([kernel, bias])
    of_each_digit = np.einsum("bi,ido->bdo", x, kernel.reshape(5, 10, 3)) + bias.reshape(10, 3)
    expected = np.einsum("bdo,bd->bo", of_each_digit, digit_probs)
    np.testing.assert_allclose(network.predict([x, digit_probs], verbose=0), expected, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 30, 127])
def test_distortion_moves_pixels_along_rows_and_then_columns_by_waves(count):
    images = np.random.default_rng(0).random([count, 784]).astype(np.float32)
    key = [3, count]
    np.testing.assert_array_equal(vae_helpers.distort(images, 0.0, key), images)
    np.testing.assert_allclose(vae_helpers.distort(images, 1e-9, key), images, atol=1e-6)
    bent = vae_helpers.distort(images, 2.0, key).numpy()
    assert bent.shape == images.shape
    ways = -(-count // 15)  # so many images are bent in the same way, whatever the minibatch
    shares = tf.random.stateless_uniform([15, 2, 4, 4], key, -1, 1).numpy().repeat(ways, axis=0)
    y, x = np.mgrid[:28, :28].astype(float)
    for image, distorted, share in zip(images, bent, shares, strict=False):
        moves = np.zeros([2, 28, 28])
        for axis, down, across in np.ndindex(2, 4, 4):
            wave = np.cos(np.pi * down * (y + 0.5) / 28) * np.cos(np.pi * across * (x + 0.5) / 28)
            moves[axis] += 2 / (1 + np.hypot(down, across)) * share[axis, down, across] * wave
        moved = image.reshape(28, 28)
        for source in ([y, x + moves[0]], [y + moves[1], x]):
            moved = scipy.ndimage.map_coordinates(moved, source, order=1, mode="grid-constant")
        np.testing.assert_allclose(distorted.reshape(28, 28), moved, atol=1e-4)
        assert np.abs(distorted - image).max() > 0.1


def test_bound_of_a_linear_gaussian_model_is_its_known_likelihood(small_npz):
    # A linear decoder with Gaussian pixels has a known P(x): x ~ N(offset, weights·weightsᵀ + σ²).
    random = np.random.default_rng(0)
    z_dim, std, offset = 3, 0.5, np.full(784, 0.5)
    loadings = random.normal(size=[784, z_dim]) * 0.01
    x = random.normal(size=[6, z_dim]) @ loadings.T + offset + std * random.normal(size=[6, 784])
    covariance = loadings @ loadings.T + std**2 * np.eye(784)
    expected = scipy.stats.multivariate_normal(offset, covariance).logpdf(x)
    precision = np.eye(z_dim) + loadings.T @ loadings / std**2
    # The true posterior has this mean and a covariance that is nearly diagonal; Q is a wider one.
    to_mean = loadings @ np.linalg.inv(precision) / std**2
    log_var = np.tile(np.log(np.diag(np.linalg.inv(precision))) + 0.5, [len(x), 1])
    offset, loadings, to_mean, log_var, x = map(np.float32, (offset, loadings, to_mean, log_var, x))
    linear = Notebook().run(last="loss", **{**SMALL, "data_path": str(small_npz), "z_dim": z_dim})
    names = linear.module
    names.encoder = lambda inputs: ((inputs[0] - offset) @ to_mean, log_var)
    names.decoder = lambda described: described[0] @ loadings.T + offset
    linear.run("bound", "bound")
    bounds = [names.log_likelihood_bound(x, tf.range(6), tf.constant(n)) for n in (1, 10, 5000)]
    one, ten, many = bounds
    assert np.mean(one) < np.mean(ten) < np.mean(many)
    np.testing.assert_allclose(many, expected, atol=0.05)
    assert np.abs(one - expected).max() > 0.3


def test_the_bounds_are_ordered_as_they_must_be(notebook):
    names = notebook.module
    given_true, log_p = names.log_p_given_true_digit, names.log_p
    expected = scipy.special.logsumexp(names.log_p_given_digit, axis=0) - np.log(10)
    np.testing.assert_allclose(log_p, expected, rtol=1e-5)
    assert np.all(log_p >= given_true - np.log(10) - 1e-3)
    bounded = names.bound_images, names.bound_digits
    one, all_draws = (names.log_likelihood_bound(*bounded, tf.constant(k)) for k in (1, 500))
    assert np.mean(one) < given_true.mean()
    assert np.all(all_draws == given_true)
