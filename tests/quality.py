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
    "hidden_layers": [128],
    "activation": "sigmoid",
    "decoder_skips": False,
    "stop_gradient": False,
    "kl_weight_start": 1.0,
    "asked_digit_weight": 0.0,
    "distortion": 0.0,
    "optimizer_name": "adam",
    "learning_rate": 0.001,
    "cosine_decay": False,
    "clip_norm": None,
    "batch_size": 100,
}
RUNS = {
    "this notebook": {},
    'this notebook, `likelihood = "bernoulli"`': {"likelihood": "bernoulli"},
    "the article's settings": ARTICLE,
    "the article's settings, 1 epoch": {**ARTICLE, "epochs": 1},
}


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


def main():
    """Train the judge, run the notebook for each row and print the table."""
    path = os.environ.get("MNIST_PATH") or sys.exit("MNIST_PATH must name an mnist.npz")
    data = vae_helpers.load_mnist(path)
    judge = train_judge(data)
    _, judge_accuracy = judge.evaluate(data.x_test, data.y_test, verbose=0)
    digits = np.arange(10_000) % 10
    rows = []
    for name, parameters in RUNS.items():
        print(f"running {name} ...", flush=True)
        with Kernel() as kernel:
            kernel.run(last="train", data_path=path, **parameters)
            history = kernel.fetch("dict(history)")
            training = kernel.fetch("evaluate(data.x_train / np.float32(255), data.y_train)")
            weight = kernel.fetch("classification_weight")
            styles = "np.random.default_rng(1).standard_normal([10_000, z_dim])"
            images = kernel.fetch(f"generate({styles}, np.eye(10)[digits])", digits=digits)
        read = judge.predict(255 * images, batch_size=500, verbose=0).argmax(axis=1)
        rows.append(
            f"| {name} | {history['test_vae_loss'][-1]:.1f} | {history['test_accuracy'][-1]:.2%} "
            f"| {np.mean(read == digits):.2%} | {training['test_vae_loss']:.1f} "
            f"| {weight * training['test_classification_loss']:.2f} "
            f"| {np.median(history['seconds']):.1f} |"
        )
    print(f"\nThe judge reads {judge_accuracy:.2%} of the test images right.\n")
    print("| run | VAE loss | test accuracy | asked digit ", end="")
    print("| training set: VAE loss | weighted classification loss | seconds an epoch |")
    print("|---|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
