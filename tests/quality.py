"""Measure the models of the notebook for the tables of README: python tests/quality.py [NAME ...].

The environment variable MNIST_PATH names the real mnist.npz. Each row of the tables is a run of
the notebook in a kernel of its own, for one or more seeds; NAMEs choose rows. An independent judge,
a convolutional network that is trained here on real images only, classifies ten thousand generated
images. Its last hidden layer gives the features for the Fréchet distance (Heusel et al., "GANs
trained by a two time-scale update rule converge to a local Nash equilibrium", 2017).
"""

import os
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import scipy.linalg
from conftest import Kernel, vae_helpers

FIVE_SEEDS = [0, 1, 2, 3, 4]
RUNS = {
    "full": ({}, FIVE_SEEDS),
    "10 epochs": ({"epochs": 10}, FIVE_SEEDS),
    "one hidden layer of 128 sigmoid units": (
        {"hidden_layers": [128], "activation": "sigmoid"},
        [0],
    ),
    "encoder_sees_digit = False": ({"encoder_sees_digit": False}, [0]),
    "decoder_skips = False": ({"decoder_skips": False}, [0]),
    "asked_digit_weight = 0": ({"asked_digit_weight": 0.0}, [0]),
    "asked_digit_weight = 40": ({"asked_digit_weight": 40.0}, [0]),
    "distortion = 0": ({"distortion": 0.0}, [0]),
    "stop_gradient = False": ({"stop_gradient": False}, [0]),
    "stop_gradient = False, asked_digit_weight = 40": (
        {"stop_gradient": False, "asked_digit_weight": 40.0},
        [0],
    ),
}


def train_judge(data, epochs=6):
    """Return a Keras model: bytes [N, 784] → its last hidden layer [N, 128] and logits [N, 10]."""
    keras.utils.set_random_seed(1)
    judge = keras.Sequential([keras.Input([784])])
    judge.add(keras.layers.Rescaling(1 / 255))
    judge.add(keras.layers.Reshape([28, 28, 1]))
    judge.add(keras.layers.RandomTranslation(0.07, 0.07, fill_mode="constant"))
    for filters, strides in [(32, 1), (32, 2), (64, 1), (64, 2)]:
        judge.add(keras.layers.Conv2D(filters, 3, strides, "same", activation="relu"))
        judge.add(keras.layers.BatchNormalization())
    judge.add(keras.layers.Flatten())
    judge.add(keras.layers.Dense(128, "relu"))
    judge.add(keras.layers.Dense(10))
    steps = epochs * -(-len(data.x_train) // 128)
    judge.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.002, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    judge.fit(data.x_train, data.y_train, batch_size=128, epochs=epochs, verbose=2)
    return keras.Model(judge.inputs, [judge.layers[-2].output, judge.layers[-1].output])


def features_and_digits(judge, images):
    """Return the judge's features [N, 128] and digits [N] for images [N, 784] in [0, 255]."""
    features, digit_logits = judge.predict(images, batch_size=500, verbose=0)
    return features.astype(np.float64), digit_logits.argmax(axis=1)


def frechet_distance(features, other_features):
    """Return the Fréchet distance of Gaussians fitted to features [N, 128]; 0 if they are equal."""
    covariance = np.cov(features.T)
    other_covariance = np.cov(other_features.T)
    eigenvalues = scipy.linalg.eigvals(covariance @ other_covariance)
    trace_of_root = np.sqrt(eigenvalues.real.clip(min=0)).sum()
    mean_difference = features.mean(axis=0) - other_features.mean(axis=0)
    traces = np.trace(covariance) + np.trace(other_covariance)
    return mean_difference @ mean_difference + traces - 2 * trace_of_root


# Run in the notebook's kernel: what is measured of a model, in a file.
EXPORT = """
def export(vae, history, samples):
    z = np.random.default_rng(1).standard_normal([10_000, vae.settings.z_dim])
    z_mean, _, digit_probs = vae.infer(test_images)
    training_losses = evaluate(vae, data.x_train / np.float32(255), data.y_train)
    np.savez(
        {path!r},
        samples=samples,
        generated=vae.generate(z, np.eye(10)[np.arange(10_000) % 10]),
        reconstructed=vae.generate(z_mean, digit_probs),
        training_vae_loss=training_losses["vae_loss"],
        **history,
    )

export({model})
"""
BETTER = "vae, history, samples"
ARTICLE = "article_vae, article_history, article_samples"


def measure(kernel, model, judge, test_features):
    """Return the figures of a trained model in a kernel, a dict."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "export.npz"))
        kernel.execute(EXPORT.format(model=model, path=path))
        with np.load(path) as file:
            exported = dict(file)
    features, digits = features_and_digits(judge, 255 * exported["generated"])
    reconstructed_features, _ = features_and_digits(judge, 255 * exported["reconstructed"])
    _, sample_digits = features_and_digits(judge, 255 * exported["samples"].reshape(-1, 784))
    correct_per_row = (sample_digits.reshape(-1, 10) == np.arange(10)).sum(axis=1)
    return {
        "VAE loss": exported["test_vae_loss"][-1],
        "accuracy, %": 100 * exported["test_accuracy"][-1],
        "requested digit, %": 100 * np.mean(digits == np.arange(10_000) % 10),
        "Fréchet, generated": frechet_distance(features, test_features),
        "Fréchet, reconstructed": frechet_distance(reconstructed_features, test_features),
        "worst row, %": 10 * correct_per_row.min(),
        "last row, %": 10 * correct_per_row[-1],
        "training set: VAE loss": float(exported["training_vae_loss"]),
        "seconds": exported["seconds"].sum(),
    }


def summarize(rows):
    """Return the median of each figure, with the range where there are several runs."""
    table = pd.DataFrame(rows)
    texts = {}
    for name in table:
        values = table[name]
        texts[name] = f"{values.median():.2f}"
        if len(values) > 1:
            texts[name] += f" ({values.min():.2f} to {values.max():.2f})"
    return texts


def main():
    """Train the judge, run the notebook for each row and seed, and print the table."""
    path = os.environ.get("MNIST_PATH") or sys.exit("MNIST_PATH must name an mnist.npz")
    names = sys.argv[1:] or RUNS
    data = vae_helpers.load_mnist(path)
    judge = train_judge(data)
    test_features, digits = features_and_digits(judge, data.x_test)
    training_features, _ = features_and_digits(judge, data.x_train[:10_000])
    floor = frechet_distance(training_features, test_features)
    print(
        f"{data.name}: the judge classifies {np.mean(digits == data.y_test):.2%} of the test set."
    )
    print(f"The Fréchet distance of 10,000 training images from the test set is {floor:.1f}.")
    table = {}
    for name in names:
        settings, seeds = RUNS[name]
        rows = []
        article_rows = []
        for seed in seeds:
            with Kernel() as kernel:
                with_article = name == "full"
                skip = ["article-losses", "article-results"]
                if not with_article:
                    skip.append("train-article")
                kernel.run(last="train-better", skip=skip, data_path=path, seed=seed, **settings)
                if with_article:
                    article_rows.append(measure(kernel, ARTICLE, judge, test_features))
                rows.append(measure(kernel, BETTER, judge, test_features))
                print(name, seed, rows[-1], *article_rows[-1:], flush=True)
        table[name] = summarize(rows)
        if article_rows:
            table["the article's model"] = summarize(article_rows)
    print(pd.DataFrame(table).T.to_string())


if __name__ == "__main__":
    main()
