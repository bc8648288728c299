"""Time an epoch of the notebook and of other ways to train its model: tests/benchmark.py [ROUNDS].

The environment variable MNIST_PATH names an mnist.npz. Each contender has a process of its own, so
that its peak memory is its own too. In a round they take turns and train one epoch each, with the
same minibatches. The first epoch is not counted, because it includes the compilation.

JAX takes part if jax is installed. It trains the notebook's Keras networks without requested digits
and distortion, and is compared with the notebook without these two.
"""

import importlib.util
import multiprocessing
import os
import resource
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
from conftest import CODE, run_cells, vae_helpers

MODEL_CELLS = ["setup", "parameters", "settings", "data", "networks", "losses", "sample-normal"]
MODEL_CELLS += ["article-model", "optimizer", "epoch", "better-encoder", "better-decoder"]
MODEL_CELLS += ["requested-digit-loss", "better-model"]


def notebook_epoch(path, settings, model_class="BetterDigitVAE"):
    """Return a function that trains an epoch as the notebook does: minibatches → mean VAE loss."""
    notebook = run_cells(MODEL_CELLS, data_path=path)
    tf = notebook.tf
    notebook.keras.utils.set_random_seed(settings.seed)
    vae = getattr(notebook, model_class)(settings)
    images = tf.constant(notebook.data.x_train)
    digits = tf.constant(notebook.data.y_train)
    train_epoch = notebook.compile_epoch(vae, len(images) // settings.batch_size)

    def run_epoch(minibatches):
        return train_epoch(images, digits, tf.constant(minibatches)).numpy()[0]

    return run_epoch


def keras_fit_epoch(path, settings):
    """Return an epoch of Keras' `fit` with a compiled training step."""
    notebook = run_cells(MODEL_CELLS, data_path=path)
    tf = notebook.tf
    keras = notebook.keras
    keras.utils.set_random_seed(settings.seed)
    vae = notebook.BetterDigitVAE(settings)
    data = notebook.data

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.mean_vae_loss = keras.metrics.Mean()

        def train_step(self, batch):
            # `fit` leaves the batch size open, and `distort` needs it.
            images = tf.ensure_shape(batch[0], [settings.batch_size, vae_helpers.PIXELS])
            digits = tf.ensure_shape(batch[1], [settings.batch_size])
            key = tf.stack([settings.seed, tf.cast(self.optimizer.iterations, tf.int32)])
            with tf.GradientTape() as tape:
                loss, losses = vae.total_loss(tf.cast(images, tf.float32) / 255, digits, key)
            self.optimizer.apply(tape.gradient(loss, vae.trainable_weights), vae.trainable_weights)
            self.mean_vae_loss.update_state(losses["vae_loss"])
            return {"vae_loss": self.mean_vae_loss.result()}

    steps = len(data.x_train) // settings.batch_size
    model = Model()
    optimizer = notebook.build_optimizer(vae, steps)
    model.compile(optimizer, jit_compile=True)

    def run_epoch(minibatches):
        order = minibatches.ravel()
        images = data.x_train[order]
        digits = data.y_train[order]
        options = {"batch_size": settings.batch_size, "shuffle": False, "verbose": 0}
        return model.fit(images, digits, **options).history["vae_loss"][0]

    return run_epoch


def jax_epoch(path, settings):
    """Return an epoch of the notebook's networks in JAX, as one compiled function."""
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras  # before the notebook imports it for TensorFlow
    from jax import numpy as jnp

    notebook = run_cells(MODEL_CELLS, data_path=path)
    keras.utils.set_random_seed(settings.seed)
    vae = notebook.BetterDigitVAE(settings)
    images = jnp.asarray(notebook.data.x_train)
    digits = jnp.asarray(notebook.data.y_train)
    steps = len(images) // settings.batch_size
    optimizer = notebook.build_optimizer(vae, steps)

    # The part of `gaussian_loss` that does not depend on the images.
    gaussian_constant = vae_helpers.PIXELS * np.log(settings.decoder_std * np.sqrt(2 * np.pi))

    def total_loss(weights, x, y, key):
        with keras.StatelessScope(list(zip(vae.trainable_weights, weights, strict=True))):
            digit_logits = vae.digit_classifier(x)
            digit_probs = jax.lax.stop_gradient(jax.nn.softmax(digit_logits))
            z_mean, z_log_var = vae.encoder([x, digit_probs])
            z = z_mean + jnp.exp(z_log_var / 2) * jax.random.normal(key, z_mean.shape)
            decoded = vae.decoder([z, digit_probs])
        squared_error = jnp.square((x - decoded) / settings.decoder_std)
        reconstruction = jnp.sum(squared_error, axis=1) / 2 + gaussian_constant
        kl = jnp.sum(jnp.square(z_mean) + jnp.exp(z_log_var) - z_log_var - 1, axis=1) / 2
        vae_loss = jnp.mean(reconstruction + kl)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(digit_logits), y[:, None], axis=1)
        return vae_loss - settings.classification_weight * jnp.mean(log_probs), vae_loss

    def train_step(state, minibatch):
        weights, optimizer_variables, key = state
        key, noise_key = jax.random.split(key)
        x = images[minibatch].astype(jnp.float32) / 255
        gradient_function = jax.grad(total_loss, has_aux=True)
        gradients, vae_loss = gradient_function(weights, x, digits[minibatch], noise_key)
        updated = optimizer.stateless_apply(optimizer_variables, gradients, weights)
        return (*updated, key), vae_loss

    weights = [weight.value for weight in vae.trainable_weights]
    optimizer_variables = [variable.value for variable in optimizer.variables]
    state = (weights, optimizer_variables, jax.random.key(settings.seed))
    train_epoch = jax.jit(partial(jax.lax.scan, train_step), donate_argnums=0)

    def run_epoch(minibatches):
        nonlocal state
        state, vae_losses = train_epoch(state, jnp.asarray(minibatches))
        return float(vae_losses.mean())

    return run_epoch


def serve(connection, build, path, settings):
    """Build a contender, and time an epoch for each array of minibatches that arrives."""
    run_epoch = build(path, settings)
    minibatches = connection.recv()
    while minibatches is not None:
        start = time.perf_counter()
        vae_loss = float(run_epoch(minibatches))
        seconds = time.perf_counter() - start
        peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB → GiB
        connection.send({"seconds": seconds, "GiB": peak_memory, "VAE loss": vae_loss})
        minibatches = connection.recv()


def compare(contenders, path, settings, rounds):
    """Print a table of contenders; ratios are to the first of them, in the same round."""
    context = multiprocessing.get_context("spawn")
    connections = {}
    processes = []
    for name, build in contenders.items():
        connections[name], connection = context.Pipe()
        arguments = (connection, build, path, settings)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        processes.append(process)
        connection.close()  # this process's copy; `recv` fails if the other process ends
    rng = np.random.default_rng(settings.seed)
    image_count = len(vae_helpers.load_mnist(path).x_train)
    steps = image_count // settings.batch_size
    measured = {name: [] for name in contenders}
    for _ in range(1 + rounds):
        order = rng.permutation(image_count)[: steps * settings.batch_size].astype(np.int32)
        for name, connection in connections.items():
            connection.send(order.reshape(steps, settings.batch_size))
            measured[name].append(connection.recv())
    for connection in connections.values():
        connection.send(None)
    for process in processes:
        process.join()
    summary = {}
    for name, rows in measured.items():
        table = pd.DataFrame(rows[1:])
        if not summary:
            first_seconds = table["seconds"]
        ratio = table["seconds"] / first_seconds
        summary[name] = {
            "seconds per epoch": f"{table['seconds'].median():.2f}",
            "ratio": f"{ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f})",
            "peak memory, GiB": f"{table['GiB'].max():.2f}",
            "VAE loss, last epoch": f"{table['VAE loss'].iloc[-1]:.1f}",
        }
    print(pd.DataFrame(summary).T.to_string(), flush=True)


def main():
    """Print the tables of all contenders that are installed."""
    path = os.environ.get("MNIST_PATH") or sys.exit("MNIST_PATH must name an mnist.npz")
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    parameters = {}
    exec(CODE["parameters"].source, {}, parameters)
    settings = vae_helpers.check_settings(**parameters)
    contenders = {
        "this notebook": notebook_epoch,
        "Keras fit": keras_fit_epoch,
        "the article's model": partial(notebook_epoch, model_class="DigitVAE"),
    }
    print(f"{os.cpu_count()} cores, {rounds} rounds")
    compare(contenders, path, settings, rounds)
    if importlib.util.find_spec("jax"):
        print("Without requested digits and distortion:")
        settings = settings.model_copy(update={"asked_digit_weight": 0.0, "distortion": 0.0})
        compare({"this notebook": notebook_epoch, "JAX": jax_epoch}, path, settings, rounds)


if __name__ == "__main__":
    main()
