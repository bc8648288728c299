"""Time an epoch of the notebook beside other ways to train its model: python tests/benchmark.py.

The environment variable MNIST_PATH names the real mnist.npz; without it, the images take its place
that the notebook has without a network, repeated. Networks, losses and training step are the
notebook's own: its cells are run here. Each contender lives in a process of its own, so that its
peak memory is its own too, and they take turns, one epoch each. PyTorch and JAX take part where
torch and jax are installed.
"""

import contextlib
import functools
import importlib.util
import io
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from conftest import Kernel, Notebook, vae_helpers

ROUNDS = 5
ARTICLE_VAE_LOSS = 224.2  # of the test set, after the 20 epochs of the article's own code
# Settings for a short run: all that pays off later only is left out.
SHORT = {"epochs": 2, "distortion": 0.0, "learning_rate": 0.04}


def run_notebook(last, parameters, backend="tensorflow"):
    """Run the notebook's cells up to `last` with these parameters; return the module they fill."""
    os.environ["KERAS_BACKEND"] = backend
    importlib.import_module("keras")  # now: the notebook itself asks for TensorFlow
    return Notebook().run(last=last, **parameters).module


def notebook_epoch(parameters):
    """Return a function that trains an epoch as the notebook does."""
    names = run_notebook("epoch", parameters)
    random = np.random.default_rng(0)
    return lambda: names.train_epoch(random, lambda: None)


def keras_fit(parameters, whole_epochs=False):
    """Return an epoch of Keras' `fit`, as it comes or compiled with all steps in one execution."""
    names = run_notebook("step", parameters)

    class Model(names.keras.Model):
        def train_step(self, data):
            shapes = [names.batch_size, 784], [names.batch_size]  # which `fit` leaves open
            data = map(names.tf.ensure_shape, data, shapes)
            vae_loss, classification_loss = names.tf.unstack(names.train_step(*data))
            return {"vae_loss": vae_loss, "classification_loss": classification_loss}

    model = Model()
    if whole_epochs:
        model.compile(jit_compile=True, steps_per_execution=names.steps)
    else:
        model.compile()
    count = names.steps * names.batch_size
    images = names.data.x_train[:count].astype(np.float32) / 255
    digits = names.data.y_train[:count]
    return lambda: model.fit(images, digits, batch_size=names.batch_size, verbose=0).history


def python_loop(parameters):
    """Return an epoch of a Python loop that calls the training step as a `tf.function`."""
    names = run_notebook("step", parameters)
    step = names.tf.function(names.train_step)
    images = names.data.x_train.astype(np.float32) / 255
    random = np.random.default_rng(0)
    count = names.steps * names.batch_size

    def run():
        total = np.zeros(2)
        order = random.permutation(len(images))[:count]
        for batch in order.reshape(-1, names.batch_size):
            arrays = images[batch], names.data.y_train[batch]
            total += step(*map(names.tf.constant, arrays)).numpy()

    return run


def jax_epoch(parameters):
    """Return an epoch of the notebook's networks with the settings CORE, as one program of JAX."""
    import jax
    from jax import numpy as jnp

    names = run_notebook("networks", parameters, backend="jax")
    keras = names.keras
    images, digits = jnp.asarray(names.data.x_train), jnp.asarray(names.data.y_train)
    steps = len(images) // names.batch_size
    decay = keras.optimizers.schedules.CosineDecay(names.learning_rate, names.epochs * steps)
    optimizer = keras.optimizers.SGD(decay, names.momentum, nesterov=True)
    variables = [w for network in names.networks for w in network.trainable_variables]
    optimizer.build(variables)

    def total_loss(weights, x, y, noise):
        with keras.StatelessScope(list(zip(variables, weights, strict=True))):
            digit_logits = names.digit_classifier(x)
            digit_probs = jax.lax.stop_gradient(jax.nn.softmax(digit_logits))
            z_mean, z_log_var = names.encoder([x, digit_probs])
            image = names.decoder([z_mean + jnp.exp(z_log_var / 2) * noise, digit_probs])
        reconstruction = jnp.sum(jnp.square((x - image) / names.decoder_std), axis=1) / 2
        kl = jnp.sum(jnp.square(z_mean) + jnp.exp(z_log_var) - z_log_var - 1, axis=1) / 2
        vae_loss = jnp.mean(reconstruction + kl)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(digit_logits), y[:, None], axis=1)
        loss = vae_loss - names.classification_weight * jnp.mean(log_probs)
        return loss, jnp.stack([vae_loss, -jnp.mean(log_probs)])

    def clip(gradient):
        norm = jnp.linalg.norm(gradient, axis=0)
        return gradient * names.clip_norm / jnp.maximum(norm, names.clip_norm)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_epoch(weights, state, images, digits, order, noise):
        def step(i, carry):
            weights, state, total = carry
            x = images[order[i]].astype(jnp.float32) / 255
            gradient = jax.grad(total_loss, has_aux=True)
            gradients, losses = gradient(weights, x, digits[order[i]], noise[i])
            clipped = [clip(gradient) for gradient in gradients]
            return *optimizer.stateless_apply(state, clipped, weights), total + losses

        return jax.lax.fori_loop(0, steps, step, (weights, state, jnp.zeros(2)))

    weights, state = ([v.value for v in group] for group in (variables, optimizer.variables))
    random = np.random.default_rng(0)

    def run():
        nonlocal weights, state
        order = random.permutation(len(images))[: steps * names.batch_size]
        order = jnp.asarray(order.reshape(steps, -1), jnp.int32)
        noise = random.standard_normal([*order.shape, names.z_dim], np.float32)
        weights, state, total = train_epoch(weights, state, images, digits, order, noise)
        return np.asarray(total).tolist()

    return run


def pytorch(parameters):
    """Return an epoch of the same model written in PyTorch, eager."""
    import torch
    from torch.nn import functional

    names = run_notebook("data", parameters)  # for hyperparameters and data
    activation = getattr(functional, names.activation)

    class HiddenPart(torch.nn.Module):
        def __init__(self, inputs, widths, outputs, skips=False):
            super().__init__()
            self.inputs, self.skips = inputs, skips
            sizes = [inputs, *(width + skips * inputs for width in widths)]
            self.hidden = torch.nn.ModuleList(map(torch.nn.Linear, sizes, widths))
            self.output = torch.nn.Linear(sizes[-1], outputs)

        def forward(self, inputs):
            x = inputs
            for layer in self.hidden:
                x = activation(layer(x))
                x = torch.cat([x, inputs], dim=1) if self.skips else x
            return self.output(x)

    def by_digit(of_each_digit, digit_probs):
        return torch.einsum("bdi,bd->bi", of_each_digit.unflatten(1, [10, -1]), digit_probs)

    def decode(z, digit_probs):
        described = [z, by_digit(own_style(z), digit_probs), digit_probs]
        return torch.sigmoid(decoder(torch.cat(described, dim=1)))

    z_dim, widths = names.z_dim, names.hidden_layers
    encoder, classifier = HiddenPart(784, widths, 20 * z_dim), HiddenPart(784, widths, 10)
    own_style = torch.nn.Linear(z_dim, 10 * z_dim)
    decoder = HiddenPart(2 * z_dim + 10, widths[::-1], 784, skips=True)
    weights = [w for net in (encoder, classifier, own_style, decoder) for w in net.parameters()]
    optimizer = torch.optim.SGD(weights, names.learning_rate, names.momentum, nesterov=True)
    images = torch.tensor(names.data.x_train.astype(np.float32) / 255)
    digits = torch.tensor(names.data.y_train.astype(np.int64))
    position, half_periods = torch.arange(28.0), torch.arange(4.0)
    waves = torch.cos(math.pi * half_periods[:, None] * (position + 0.5) / 28)
    amplitudes = names.distortion / (1 + torch.hypot(half_periods[:, None], half_periods))
    basis = torch.einsum("ij,iy,jx->ijyx", amplitudes, waves, waves)

    def distort(x):
        warps = 2 * torch.rand([15, 2, 4, 4]) - 1
        moves = torch.tensordot(warps, basis, dims=2)
        source_x, source_y = moves[:, 0] + position, moves[:, 1] + position[:, None]
        row_weights = functional.relu(1 - abs(source_x[:, :, None] - position[:, None]))
        column_weights = functional.relu(1 - abs(source_y[:, None] - position[:, None, None]))
        moved = torch.einsum("gnyu,gyux->gnyx", x.view(15, -1, 28, 28), row_weights)
        return torch.einsum("gnvx,gvyx->gnyx", moved, column_weights).reshape(-1, 784)

    def step(x, y):
        logits = classifier(distort(x) if names.distortion else x)
        digit_probs = torch.softmax(logits, dim=1).detach()
        z_mean, z_log_var = by_digit(encoder(x), digit_probs).chunk(2, dim=1)
        z = z_mean + torch.exp(z_log_var / 2) * torch.randn_like(z_mean)
        reconstructions = decode(z, digit_probs)
        reconstruction = ((x - reconstructions) / names.decoder_std).square().sum(dim=1).mean() / 2
        kl = (z_mean.square() + z_log_var.exp() - z_log_var - 1).sum(dim=1).mean() / 2
        classification = functional.cross_entropy(logits, y)
        asked, style = torch.randint(10, [15]), torch.randn([15, z_dim])
        drawn = decode(style, functional.one_hot(asked, 10).float())
        frozen = {name: weight.detach() for name, weight in classifier.named_parameters()}
        read = torch.func.functional_call(classifier, frozen, drawn)
        loss = reconstruction + kl + names.classification_weight * classification
        loss = loss + names.asked_digit_weight * functional.cross_entropy(read, asked)
        optimizer.zero_grad()
        loss.backward()
        for weight in weights:
            norm = weight.grad.norm(dim=-1, keepdim=weight.ndim > 1)
            weight.grad *= names.clip_norm / norm.clamp(min=names.clip_norm)
        optimizer.step()
        return loss.item()

    def run():
        for batch in torch.randperm(len(images)).split(names.batch_size):
            step(images[batch], digits[batch])

    return run


def article_loop(parameters):
    """Return an epoch as the article's code runs it: a graph, fed one minibatch at a time."""
    names = run_notebook("data", parameters)
    tf = names.tf.compat.v1
    tf.disable_eager_execution()
    x, y = tf.placeholder(tf.float32, [None, 784]), tf.placeholder(tf.int32, [None])

    def network(inputs, outputs):
        for size, activation in ((128, tf.sigmoid), (outputs, lambda x: x)):
            kernel = tf.Variable(tf.random.truncated_normal([inputs.shape[1], size], stddev=0.05))
            inputs = activation(inputs @ kernel + tf.Variable(tf.zeros([size])))
        return inputs

    z_mean, z_log_var = tf.split(network(x, 20), 2, axis=1)
    z = z_mean + tf.exp(z_log_var / 2) * tf.random.normal(tf.shape(z_mean))
    logits = network(x, 10)
    image = tf.sigmoid(network(tf.concat([z, tf.nn.softmax(logits)], axis=1), 784))
    reconstruction = tf.reduce_sum(tf.square((x - image) / 0.5) / 2, axis=1)
    kl = tf.reduce_sum(tf.square(z_mean) + tf.exp(z_log_var) - z_log_var - 1, axis=1) / 2
    cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
    loss = tf.reduce_mean(reconstruction + kl + 10 * cross_entropy)
    train = tf.train.AdamOptimizer(0.001).minimize(loss)
    session = tf.Session()
    session.run(tf.global_variables_initializer())
    random = np.random.default_rng(0)
    images = names.data.x_train.astype(np.float32) / 255

    def run():
        for batch in random.permutation(len(images)).reshape(-1, 100):
            feed = {x: images[batch], y: names.data.y_train[batch]}
            session.run([train, loss], feed)

    return run


CONTENDERS = {
    "this notebook": (notebook_epoch, {}),
    "Keras fit, as it comes": (keras_fit, {}),
    "Keras fit, jit_compile, an epoch per execution": (keras_fit, {"whole_epochs": True}),
    "tf.function step in a Python loop": (python_loop, {}),
    "PyTorch, eager": (pytorch, {}),
    "the article's loop on the article's network": (article_loop, {}),
}
CORE = {"asked_digit_weight": 0.0, "distortion": 0.0}  # beside the same in JAX


def matmul_rate(size=2048):
    """Return this machine's best floating-point operations a second, in products of matrices."""
    import tensorflow as tf

    a = b = tf.random.normal([size, size])
    times = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ b).numpy()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def matmul_work(parameters):
    """Return the floating-point operations of the matrix products in an epoch of the notebook."""
    names = run_notebook("networks", parameters)

    def products(network):
        return [math.prod(w.shape) for w in network.trainable_variables if len(w.shape) == 2]

    encoder, classifier, decoder = map(
        products, (names.encoder, names.digit_classifier, names.decoder)
    )
    # Forward, weight gradient and, but where the input is data, input gradient.
    per_image = 3 * sum(encoder + classifier + decoder) - encoder[0] - classifier[0]
    per_image += 2 * 28 * 784 * bool(names.distortion)
    asked = 3 * sum(decoder) - decoder[0] + 2 * sum(classifier)
    per_step = names.batch_size * per_image
    per_step += 15 * asked * bool(names.asked_digit_weight)
    return 2 * per_step * (len(names.data.x_train) // names.batch_size)


def prepare(build, options, parameters):
    """Build a contender in a process of its own, and run the first epoch, which compiles."""
    global run_epoch
    sys.stdout = io.StringIO()  # the tables alone are shown
    run_epoch = build(parameters, **options)
    run_epoch()


def timed_epoch():
    """Run an epoch; return its seconds, the process's peak memory in GiB and the result."""
    start = time.perf_counter()
    result = run_epoch()
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, result


def in_turns(builds):
    """Run epochs of contenders in turns; return the results of all rounds by name.

    Takes a dict of the three arguments of `prepare`.
    """
    measured = {name: [] for name in builds}
    with contextlib.ExitStack() as stack:
        spawn, pools = multiprocessing.get_context("spawn"), {}
        for name, build in builds.items():
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, spawn, prepare, build))
        for _ in range(ROUNDS):
            for name, pool in pools.items():
                measured[name].append(pool.submit(timed_epoch).result())
    return measured


def compare(parameters):
    """Print the table of contenders and the floor; return the seconds of each contender."""
    builds = {
        name: (*build, parameters)
        for name, build in CONTENDERS.items()
        if name != "PyTorch, eager" or importlib.util.find_spec("torch")
    }
    measured = in_turns({**builds, "floor": (floor_epoch, {}, parameters)})
    floor = min(seconds for *_, seconds in measured.pop("floor"))
    medians = {
        name: np.median([m[:2] for m in rounds], axis=0) for name, rounds in measured.items()
    }
    ours = medians["this notebook"][0]
    print("\n| | seconds an epoch | ratio to ours | peak memory, GiB |\n|---|---|---|---|")
    for name, (seconds, peak) in medians.items():
        print(f"| {name} | {seconds:.2f} | {seconds / ours:.2f} | {peak:.2f} |")
    print(f"| the matrix products alone, at the best rate | {floor:.2f} | {floor / ours:.2f} | |")
    return {name: seconds for name, (seconds, _) in medians.items()}


def compare_with_jax(parameters):
    """Print how long an epoch of the core model takes here and in JAX, where it is installed."""
    if not importlib.util.find_spec("jax"):
        return
    parameters = {**parameters, **CORE}
    builds = {"here": (notebook_epoch, {}, parameters), "JAX": (jax_epoch, {}, parameters)}
    here, jax = ([seconds for seconds, *_ in rounds] for rounds in in_turns(builds).values())
    ratios = np.divide(jax, here)
    print(
        f"\nWith {', '.join(f'`{k} = {v}`' for k, v in CORE.items())}, an epoch takes "
        f"{np.median(here):.2f} s here and {np.median(jax):.2f} s in JAX, whose time is "
        f"{np.median(ratios):.2f} of ours ({min(ratios):.2f} to {max(ratios):.2f})."
    )


def floor_epoch(parameters):
    """Return a function that says how long an epoch's matrix products take at the best rate."""
    work = matmul_work(parameters)
    return lambda: work / matmul_rate()


def growth(parameters, images_path):
    """Print how the cost of an epoch grows with the images, the width and the batch."""
    counts = (15_000, 30_000, 60_000, 120_000)
    groups = [
        {f"{count:,} images": {"data_path": images_path(count)} for count in counts},
        {f"layers {widths}": {"hidden_layers": widths} for widths in ([256, 128], [1024, 512])},
        {f"batch of {size}": {"batch_size": size} for size in (75, 300, 600, 1000)},
    ]
    print("\n| | seconds an epoch | µs an image |\n|---|---|---|")
    for group in groups:
        builds = {name: (notebook_epoch, {}, {**parameters, **c}) for name, c in group.items()}
        for name, rounds in in_turns(builds).items():
            seconds = np.median([seconds for seconds, *_ in rounds])
            count = int(name.split()[0].replace(",", "")) if "images" in name else 60_000
            print(f"| {name} | {seconds:.2f} | {seconds / count * 1e6:.1f} |")


def time_to_article_quality(path, article_seconds):
    """Print how soon the notebook's model is as good as the article's, on the real MNIST."""
    with Kernel() as kernel:
        kernel.run(last="judge", data_path=str(path), **SHORT)
        history = kernel.fetch("history")
        right, asked = kernel.fetch("(judge_accuracy, asked_digit_accuracy)")
    seconds = sum(history["seconds"])
    print(
        f"\nThe notebook with {', '.join(f'`{k} = {v}`' for k, v in SHORT.items())}: VAE loss "
        f"{history['test_vae_loss'][-1]:.1f} on the test set (the article's code after 20 epochs: "
        f"{ARTICLE_VAE_LOSS}), asked digit {asked:.1%} by the notebook's judge, which reads "
        f"{right:.1%} of the test images right.\nTraining took {seconds:.1f} s; 20 epochs of the "
        f"article's loop take {20 * article_seconds:.1f} s, {20 * article_seconds / seconds:.1f} "
        "times as long."
    )


def main():
    """Run the whole benchmark and print its tables."""
    data = vae_helpers.load_mnist(os.environ.get("MNIST_PATH"))
    with tempfile.TemporaryDirectory() as folder:

        def images_path(count):
            path = Path(folder) / f"{count}.npz"
            arrays = {
                "x_train": np.resize(data.x_train, (count, 28, 28)),
                "y_train": np.resize(data.y_train, count),
                "x_test": data.x_test.reshape(-1, 28, 28),
                "y_test": data.y_test,
            }
            np.savez(path, **arrays)
            return str(path)

        parameters = {"data_path": images_path(60_000)}
        print(f"{data.name}, {os.cpu_count()} cores, {ROUNDS} rounds")
        seconds = compare(parameters)
        compare_with_jax(parameters)
        if data.name == "MNIST":
            article_seconds = seconds["the article's loop on the article's network"]
            time_to_article_quality(parameters["data_path"], article_seconds)
        growth(parameters, images_path)


if __name__ == "__main__":
    main()
