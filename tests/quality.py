"""Measure how good the trained notebook is, as README's table says: python tests/quality.py.

It needs the real MNIST, which the environment variable MNIST_PATH names. It runs the notebook in
a kernel once for each row and has ten thousand generated images read by an independent judge: a
convolutional network that is trained here, on real images alone.
"""

import os
import sys

import keras
import numpy as np
from conftest import Kernel, vae_helpers

ARTICLE = {
    "batch_size": 100,
    "classification_weight": 10.0,
    "hidden_layers": [128],
    "activation": "sigmoid",
    "optimizer_name": "adam",
    "learning_rate": 0.001,
    "cosine_decay": False,
    "clip_norm": None,
    "encoder_sees_digit": False,
    "decoder_skips": False,
    "stop_gradient": False,
    "asked_digit_weight": 0.0,
    "distortion": 0.0,
}
RUNS = {
    "this notebook": {},
    "this notebook, 10 epochs": {"epochs": 10},
    'this notebook, `likelihood = "bernoulli"`': {"likelihood": "bernoulli"},
    "the article's settings": ARTICLE,
    "the article's settings, 1 epoch": {**ARTICLE, "epochs": 1},
}
SEEDS = (0, 1, 2, 3, 4)


def train_judge(data, epochs=6):
    """Train a small convolutional classifier on shifted real images and return it."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    judge = keras.Sequential(
        [
            keras.Input([784]),
            layers.Rescaling(1 / 255),
            layers.Reshape([28, 28, 1]),
            layers.RandomTranslation(0.07, 0.07, fill_mode="constant"),
        ]
    )
    for filters in (32, 64):
        for strides in (1, 2):
            judge.add(layers.Conv2D(filters, 3, strides, padding="same", activation="relu"))
            judge.add(layers.BatchNormalization())
    judge.add(layers.Flatten())
    judge.add(layers.Dense(128, "relu"))
    judge.add(layers.Dense(10))
    steps = epochs * -(-len(data.x_train) // 128)
    judge.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.002, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    judge.fit(data.x_train, data.y_train, batch_size=128, epochs=epochs, verbose=2)
    return judge


def measure(judge, parameters):
    """Run the notebook in a kernel; return the seven columns of its row, as numbers."""
    digits = np.arange(10_000) % 10
    with Kernel() as kernel:
        kernel.run(last="uses", **parameters)
        history = kernel.fetch("history")
        training = kernel.fetch("evaluate(data.x_train / np.float32(255), data.y_train)")
        weight = kernel.fetch("classification_weight")
        styles = "np.random.default_rng(1).standard_normal([10_000, z_dim])"
        images = kernel.fetch(f"generate({styles}, np.eye(10)[digits])", digits=digits)
        samples = kernel.fetch("samples")

    def read(images):
        return judge.predict(255 * images, batch_size=500, verbose=0).argmax(axis=1)

    rows = read(samples.reshape(-1, 784)).reshape(-1, 10) == np.arange(10)
    return (
        history["test_vae_loss"][-1],
        100 * history["test_accuracy"][-1],
        100 * np.mean(read(images) == digits),
        10 * rows.sum(axis=1).min(),
        training["vae_loss"],
        weight * training["classification_loss"],
        np.median(history["seconds"]),
    )


def main():
    """Train the judge, run the notebook for each row and seed, and print the table."""
    path = os.environ.get("MNIST_PATH") or sys.exit("MNIST_PATH must name an mnist.npz")
    data = vae_helpers.load_mnist(path)
    judge = train_judge(data)
    _, judge_accuracy = judge.evaluate(data.x_test, data.y_test, verbose=0)
    print(f"The judge reads {judge_accuracy:.2%} of the test images right.\n")
    columns = ["VAE loss", "accuracy, %", "asked digit, %", "worst row of the grid, %"]
    columns += ["training set: VAE loss", "weighted classification loss", "seconds an epoch"]
    print(f"| median of seeds {SEEDS} (range) | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name, parameters in RUNS.items():
        seeds = [measure(judge, {**parameters, "data_path": path, "seed": s}) for s in SEEDS]
        cells = [
            f"{np.median(values):.{places}f} ({min(values):.{places}f} to {max(values):.{places}f})"
            for values, places in zip(np.transpose(seeds), (1, 2, 2, 0, 1, 2, 1), strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
