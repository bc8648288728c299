"""Time an epoch of the notebook beside other ways to train its model: python tests/benchmark.py.

The environment variable MNIST_PATH names the real mnist.npz; without it, the images take its place
that the notebook has without a network, repeated. Networks, losses and training step are the
notebook's own: its cells are run here. Each contender lives in a process of its own, so that its
peak memory is its own too, and they take turns, one epoch each. PyTorch and JAX take part where
torch and jax are installed.
"""

import importlib.util
import io
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from conftest import Kernel, Notebook, vae_helpers

ROUNDS = 5
SHORT = {"epochs": 2, "distortion": 0.0, "learning_rate": 0.04}  # without what pays off later only
CORE = {"asked_digit_weight": 0.0, "distortion": 0.0}  # what is left out beside JAX


def shuffled(random, data, batch_size):
    """Return the numbers of all training images in random minibatches: [steps, batch_size]."""
    steps = len(data.x_train) // batch_size
    return random.permutation(len(data.x_train))[: steps * batch_size].reshape(steps, batch_size)


def epoch_in_python(step, data, batch_size, to_array=np.asarray):
    """Return an epoch that gives `step` one minibatch at a time and returns the sum of losses."""
    images, digits = to_array(data.x_train.astype(np.float32) / 255), to_array(data.y_train)
    batches = partial(shuffled, np.random.default_rng(0), data, batch_size)
    return lambda: sum(step(images[batch], digits[batch]) for batch in batches())


def notebook_epoch(parameters):
    """Return a function that trains an epoch as the notebook does."""
    names = Notebook().run(last="epoch", **parameters).module
    return partial(names.train_epoch, np.random.default_rng(0), lambda: None)


def keras_fit(parameters, whole_epochs=False):
    """Return an epoch of Keras' `fit`, as it comes or compiled with all steps in one execution."""
    names = Notebook().run(last="step", **parameters).module

    class Model(names.keras.Model):
        def train_step(self, data):
            shapes = [names.batch_size, 784], [names.batch_size]  # which `fit` leaves open
            losses = names.train_step(*map(names.tf.ensure_shape, data, shapes))
            return {"vae_loss": losses[0], "classification_loss": losses[1]}

    model = Model()
    whole = {"jit_compile": True, "steps_per_execution": names.steps}
    model.compile(**whole if whole_epochs else {})
    images = names.data.x_train[: names.steps * names.batch_size].astype(np.float32) / 255
    digits = names.data.y_train[: len(images)]
    return lambda: model.fit(images, digits, batch_size=names.batch_size, verbose=0).history


def python_loop(parameters):
    """Return an epoch of a Python loop that calls the training step as a `tf.function`."""
    names = Notebook().run(last="step", **parameters).module
    step = names.tf.function(names.train_step)
    return epoch_in_python(lambda *arrays: step(*arrays).numpy(), names.data, names.batch_size)


def jax_epoch(parameters):
    """Return an epoch of the notebook's networks with the settings CORE, as one program of JAX."""
    import jax
    from jax import numpy as jnp

    os.environ["KERAS_BACKEND"] = "jax"
    import keras  # now: the notebook itself asks for TensorFlow

    names = Notebook().run(last="networks", **parameters).run("step", "step").module
    images, digits = jnp.asarray(names.data.x_train), jnp.asarray(names.data.y_train)

    @partial(jax.grad, has_aux=True)
    def gradients_and_losses(weights, x, y, noise):
        with keras.StatelessScope(list(zip(names.weights, weights, strict=True))):
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

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_epoch(weights, state, images, digits, order, noise):
        def step(i, carry):
            weights, state, total = carry
            x = images[order[i]].astype(jnp.float32) / 255
            gradients, losses = gradients_and_losses(weights, x, digits[order[i]], noise[i])
            norms = [jnp.maximum(jnp.linalg.norm(g, axis=0), names.clip_norm) for g in gradients]
            clipped = [g * names.clip_norm / norm for g, norm in zip(gradients, norms, strict=True)]
            return *names.optimizer.stateless_apply(state, clipped, weights), total + losses

        return jax.lax.fori_loop(0, names.steps, step, (weights, state, jnp.zeros(2)))

    weights, state = ([v.value for v in g] for g in (names.weights, names.optimizer.variables))
    random = np.random.default_rng(0)

    def run():
        nonlocal weights, state
        order = jnp.asarray(shuffled(random, names.data, names.batch_size), jnp.int32)
        noise = random.standard_normal([*order.shape, names.z_dim], np.float32)
        weights, state, total = train_epoch(weights, state, images, digits, order, noise)
        return np.asarray(total).tolist()

    return run


def pytorch(parameters):
    """Return an epoch of the same model written in PyTorch, eager."""
    import torch
    from torch.nn import functional

    names = Notebook().run(last="data", **parameters).module  # for hyperparameters and data
    activation = getattr(functional, names.activation)

    class Network(torch.nn.ModuleList):
        def __init__(self, inputs, widths, outputs, skips=False):
            sizes = [inputs, *(width + skips * inputs for width in widths)]
            super().__init__(map(torch.nn.Linear, sizes, [*widths, outputs]))
            self.skips = skips

        def forward(self, inputs):
            x, (*hidden, output) = inputs, self
            for layer in hidden:
                x = activation(layer(x))
                x = torch.cat([x, inputs], dim=1) if self.skips else x
            return output(x)

    def by_digit(of_each_digit, digit_probs):
        return torch.einsum("bdi,bd->bi", of_each_digit.unflatten(1, [10, -1]), digit_probs)

    def decode(z, digit_probs):
        described = [z, by_digit(own_style(z), digit_probs), digit_probs]
        return torch.sigmoid(decoder(torch.cat(described, dim=1)))

    z_dim, widths = names.z_dim, names.hidden_layers
    encoder, classifier = Network(784, widths, 20 * z_dim), Network(784, widths, 10)
    own_style = torch.nn.Linear(z_dim, 10 * z_dim)
    decoder = Network(2 * z_dim + 10, widths[::-1], 784, skips=True)
    weights = [w for net in (encoder, classifier, own_style, decoder) for w in net.parameters()]
    options = {"momentum": names.momentum, "nesterov": True, "weight_decay": 0.003}
    optimizer = torch.optim.SGD(weights, names.learning_rate, **options)
    position, half_periods = torch.arange(28.0), torch.arange(4.0)
    waves = torch.cos(math.pi * half_periods[:, None] * (position + 0.5) / 28)
    amplitudes = names.distortion / (1 + torch.hypot(half_periods[:, None], half_periods))
    basis = torch.einsum("ij,iy,jx->ijyx", amplitudes, waves, waves)

    def distort(x):
        moves = torch.tensordot(2 * torch.rand([15, 2, 4, 4]) - 1, basis, dims=2)
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
        errors = (x - decode(z, digit_probs)) / names.decoder_std
        kl = (z_mean.square() + z_log_var.exp() - z_log_var - 1).sum(dim=1).mean() / 2
        asked, style = torch.randint(10, [15]), torch.randn([15, z_dim])
        drawn = decode(style, functional.one_hot(asked, 10).float())
        read = torch.func.functional_call(classifier, classifier.state_dict(), drawn)  # detached
        loss = errors.square().sum(dim=1).mean() / 2 + kl
        loss = loss + names.classification_weight * functional.cross_entropy(logits, y.long())
        loss = loss + names.asked_digit_weight * functional.cross_entropy(read, asked)
        optimizer.zero_grad()
        loss.backward()
        for weight in weights:
            weight.grad /= (weight.grad.norm(dim=-1, keepdim=True) / names.clip_norm).clamp(min=1)
        optimizer.step()
        return loss.item()

    return epoch_in_python(step, names.data, names.batch_size, torch.tensor)


def article_loop(parameters):
    """Return an epoch as the article's code runs it: a graph, fed one minibatch at a time."""
    names = Notebook().run(last="loss", **parameters).module  # whose losses are the article's, too
    tf = names.tf.compat.v1
    tf.disable_eager_execution()
    x, y = tf.placeholder(tf.float32, [None, 784]), tf.placeholder(tf.int32, [None])

    def network(inputs, outputs):
        for size, activation in ((128, tf.sigmoid), (outputs, tf.identity)):
            kernel = tf.Variable(tf.random.truncated_normal([inputs.shape[1], size], stddev=0.05))
            inputs = activation(inputs @ kernel + tf.Variable(tf.zeros([size])))
        return inputs

    z_mean, z_log_var = tf.split(network(x, 20), 2, axis=1)
    z = z_mean + tf.exp(z_log_var / 2) * tf.random.normal(tf.shape(z_mean))
    logits = network(x, 10)
    image = tf.sigmoid(network(tf.concat([z, tf.nn.softmax(logits)], axis=1), 784))
    vae_loss = names.gaussian_loss(x, image) + names.kl_loss(z_mean, z_log_var)
    loss = tf.reduce_mean(vae_loss + 10 * names.classification_loss(y, logits))
    train = tf.train.AdamOptimizer(0.001).minimize(loss)
    session = tf.Session()
    session.run(tf.global_variables_initializer())

    def step(images, digits):
        return session.run([train, loss], {x: images, y: digits})[1]

    return epoch_in_python(step, names.data, batch_size=100)


def floor(parameters):
    """Return a function that says how long an epoch's matrix products take at the best rate."""
    names = Notebook().run(last="step", **parameters).module
    tf, size = names.tf, names.batch_size
    step = tf.function(names.train_step)
    graph = step.get_concrete_function(tf.zeros([size, 784]), tf.zeros([size], tf.int32)).graph
    products = [o for o in graph.get_operations() if o.type == "MatMul"]
    multiplications = sum(math.prod(o.inputs[0].shape) * o.outputs[0].shape[1] for o in products)
    multiplications += 2 * 28 * 784 * size * bool(names.distortion)  # which is no `MatMul`
    matrix = tf.random.normal([2048, 2048])
    share = names.steps * multiplications / 2048**3  # of the work of its product with itself
    return lambda: share * min(timeit.repeat(lambda: (matrix @ matrix).numpy(), number=1))


CONTENDERS = {
    "this notebook": notebook_epoch,
    "Keras fit, as it comes": keras_fit,
    "Keras fit, jit_compile, an epoch per execution": partial(keras_fit, whole_epochs=True),
    "tf.function step in a Python loop": python_loop,
    **({"PyTorch, eager": pytorch} if importlib.util.find_spec("torch") else {}),
    "the article's loop on the article's network": article_loop,
    "the matrix products alone, at the best rate": floor,
}


def prepare(build, parameters):
    """Build a contender in a process of its own, and run the first epoch, which compiles."""
    global run_epoch
    sys.stdout = io.StringIO()  # the tables alone are shown
    run_epoch = build(parameters)
    run_epoch()


def timed_epoch():
    """Run an epoch; return its seconds, the process's peak memory in GiB and the result."""
    start = time.perf_counter()
    result = run_epoch()
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, result


def compare(title, contenders):
    """Print a table of contenders, each two arguments of `prepare`; return medians of seconds."""
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, prepare, c) for c in contenders.values()]
    rounds = [[pool.submit(timed_epoch).result() for pool in pools] for _ in range(ROUNDS)]
    for pool in pools:
        pool.shutdown()
    print(f"\n| {title} | seconds an epoch | ratio to the first | peak memory, GiB | µs an image |")
    print("|---|---|---|---|---|")
    medians = {}
    for index, (name, (build, parameters)) in enumerate(contenders.items()):
        seconds, peaks, results = zip(*(measured[index] for measured in rounds), strict=True)
        seconds = [min(results)] * ROUNDS if build is floor else seconds
        ratios = np.divide(seconds, [measured[0][0] for measured in rounds])  # in the same round
        medians[name] = np.median(seconds)
        count = len(np.load(parameters["data_path"])["y_train"])
        figures = np.median(ratios), min(ratios), max(ratios), np.median(peaks)
        row = "| {} | {:.2f} | {:.2f} ({:.2f} to {:.2f}) | {:.2f} | {:.1f} |"
        print(row.format(name, medians[name], *figures, medians[name] / count * 1e6))
    return medians


def time_to_article_quality(parameters, article_seconds):
    """Print how soon the notebook's model is as good as the article's, on the real MNIST."""
    with Kernel() as kernel:
        kernel.run(last="judge", **parameters, **SHORT)
        history, right, asked = kernel.fetch("history, judge_accuracy, asked_digit_accuracy")
    seconds = sum(history["seconds"])
    print(
        f"\nThe notebook with {SHORT}: VAE loss {history['test_vae_loss'][-1]:.1f} on the test set "
        f"(the article's code after 20 epochs: 224.2), asked digit {asked:.1%} by the "
        f"notebook's judge, which reads {right:.1%} of the test images right.\nTraining took "
        f"{seconds:.1f} s; 20 epochs of the article's loop take {20 * article_seconds:.1f} s, "
        f"{20 * article_seconds / seconds:.1f} times as long."
    )


def main():
    """Run the whole benchmark and print its tables."""
    data = vae_helpers.load_mnist(os.environ.get("MNIST_PATH"))
    print(f"{data.name}, {os.cpu_count()} cores, {ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as folder:
        sizes = {n: {"data_path": f"{folder}/{n}.npz"} for n in (15_000, 30_000, 60_000, 120_000)}
        arrays = {"x_test": data.x_test.reshape(-1, 28, 28), "y_test": data.y_test}
        for count, size in sizes.items():
            arrays["x_train"] = np.resize(data.x_train, [count, 28, 28])
            arrays["y_train"] = np.resize(data.y_train, count)
            np.savez(size["data_path"], **arrays)
        usual = sizes[60_000]
        seconds = compare("contender", {name: (build, usual) for name, build in CONTENDERS.items()})
        if importlib.util.find_spec("jax"):
            core = {**usual, **CORE}
            compare(f"with {CORE}", {"here": (notebook_epoch, core), "JAX": (jax_epoch, core)})
        if data.name == "MNIST":
            time_to_article_quality(usual, seconds["the article's loop on the article's network"])
        for group in (
            {f"{count:,} images": size for count, size in sizes.items()},
            {f"layers {w}": {**usual, "hidden_layers": w} for w in ([256, 128], [1024, 512])},
            {f"batch of {n}": {**usual, "batch_size": n} for n in (75, 300, 600, 1000)},
        ):
            compare("this notebook", {name: (notebook_epoch, p) for name, p in group.items()})


if __name__ == "__main__":
    import benchmark  # by a name that the notebook, which becomes `__main__`, leaves to it

    benchmark.main()
