"""Measure how good the trained notebook is, as README's table says: python tests/quality.py.

It needs the real MNIST, which the environment variable MNIST_PATH names. It runs the notebook in
a kernel once for each row and has ten thousand generated images read by an independent judge: a
convolutional network that is trained here, on real images alone. Its last hidden layer also says
how far generated and reconstructed images are, as a whole, from the test images.
"""

import ast
import os
import re
import sys

import keras
import numpy as np
import scipy.linalg
from conftest import ROOT, Kernel, vae_helpers

# The last column of README's table of hyperparameters.
README_ROWS = re.findall(r"^`(\w+)` \|.*\| `(.+)`$", (ROOT / "README.md").read_text(), re.M)
ARTICLE = {name: ast.literal_eval(value) for name, value in README_ROWS}
RUNS = {
    "this notebook": {},
    "this notebook, 10 epochs": {"epochs": 10},
    'this notebook, `likelihood = "bernoulli"`': {"likelihood": "bernoulli"},
    "the article's settings": ARTICLE,
    "the article's settings, 1 epoch": {**ARTICLE, "epochs": 1},
}
SEEDS = (0, 1, 2, 3, 4)


def train_judge(data, epochs=6):
    """Return a model, trained on shifted images: its last hidden layer [N, 128], logits [N, 10]."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Reshape([28, 28, 1])]
    layers.append(keras.layers.RandomTranslation(0.07, 0.07, fill_mode="constant"))
    for filters, strides in ((32, 1), (32, 2), (64, 1), (64, 2)):
        layers.append(keras.layers.Conv2D(filters, 3, strides, "same", activation="relu"))
        layers.append(keras.layers.BatchNormalization())
    head = [keras.layers.Flatten(), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
    judge = keras.Sequential([keras.Input([784]), *layers, *head])
    steps = epochs * -(-len(data.x_train) // 128)
    adam = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.002, steps))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    judge.compile(adam, loss, metrics=["accuracy"])
    judge.fit(data.x_train, data.y_train, batch_size=128, epochs=epochs, verbose=2)
    return keras.Model(judge.inputs, [layer.output for layer in judge.layers[-2:]])


def look(judge, images):
    """Return the judge's features [N, 128] of images [N, 784] in [0, 255] and digits [N]."""
    features, digit_logits = judge.predict(images, batch_size=500, verbose=0)
    return features.astype(np.float64), digit_logits.argmax(axis=1)


def frechet_distance(features, others):
    """Return how far Gaussians of features [N, 128] are, 0 if alike (Heusel et al., 2017)."""
    covariance, other = np.cov(features.T), np.cov(others.T)
    roots = np.sqrt(scipy.linalg.eigvals(covariance @ other).real.clip(min=0))
    moved = features.mean(axis=0) - others.mean(axis=0)
    return moved @ moved + np.trace(covariance) + np.trace(other) - 2 * roots.sum()


def measure(judge, digits, test_features, parameters):
    """Run the notebook, ask it for `digits` [N]; return its row by column and decimal places."""
    with Kernel() as kernel:
        kernel.run(last="uses", **parameters)
        history, weight, samples = kernel.fetch("history, classification_weight, samples")
        training = kernel.fetch("evaluate(data.x_train / np.float32(255), data.y_train)")
        styles = "np.random.default_rng(1).standard_normal([10_000, z_dim])"
        images = kernel.fetch(f"generate({styles}, np.eye(10)[digits])", digits=digits)
        reconstructions = kernel.fetch("generate(*infer(test_images)[::2])")
        rows = np.concatenate([samples, kernel.fetch(f"generate_all_digits({styles}[:1000])")])

    features, read = look(judge, 255 * images)
    reconstructed_features, _ = look(judge, 255 * reconstructions)
    readable = look(judge, 255 * rows.reshape(-1, 784))[1].reshape(-1, 10) == np.arange(10)
    grey = np.sum(4 * rows * (1 - rows), axis=2) / np.sum(rows, axis=2)  # 0: all black and white
    return {
        ("VAE loss", 1): history["test_vae_loss"][-1],
        ("accuracy, %", 2): 100 * history["test_accuracy"][-1],
        ("asked digit, %", 2): 100 * np.mean(read == digits),
        ("distance, generated", 1): frechet_distance(features, test_features),
        ("distance, reconstructed", 1): frechet_distance(reconstructed_features, test_features),
        ("worst row of the grid, %", 0): 10 * readable[: len(samples)].sum(axis=1).min(),
        ("rows with a digit read wrongly, %", 1): 100 * np.mean(~readable.all(axis=1)),
        ("grey in a row's greyest digit", 3): np.mean(grey.max(axis=1)),
        ("training set: VAE loss", 1): training["vae_loss"],
        ("weighted classification loss", 2): weight * training["classification_loss"],
        ("seconds an epoch", 1): np.median(history["seconds"]),
    }


def main():
    """Train the judge, run the notebook for each row and seed, and print the table."""
    path = os.environ.get("MNIST_PATH") or sys.exit("MNIST_PATH must name an mnist.npz")
    data = vae_helpers.load_mnist(path)
    judge = train_judge(data)
    test_features, read = look(judge, data.x_test)
    floor = frechet_distance(look(judge, data.x_train[:10_000])[0], test_features)
    print(f"The judge reads {np.mean(read == data.y_test):.2%} of the test images right.")
    print(f"By its features, 10,000 training images are {floor:.1f} from the test images.\n")
    for name, parameters in RUNS.items():
        runs = [{**parameters, "data_path": path, "seed": seed} for seed in SEEDS]
        seeds = [measure(judge, data.y_test, test_features, run) for run in runs]
        if parameters is RUNS["this notebook"]:  # the first row
            print(f"| median of seeds {SEEDS} (range) | {' | '.join(c for c, _ in seeds[0])} |")
            print("|---" * (1 + len(seeds[0])) + "|")
        cells = [
            f"{np.median(values):.{places}f} ({min(values):.{places}f} to {max(values):.{places}f})"
            for (_, places), *values in zip(seeds[0], *(s.values() for s in seeds), strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
