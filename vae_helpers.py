"""What stands beside the model of vae2.ipynb, in the order in which the notebook uses it.

Settings are checked, data found, training watched over, figures drawn, pictures made to play with,
runs kept. Importing this module changes no setting, draws nothing and downloads nothing.
"""

import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import signal
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pydantic
from matplotlib import colormaps, rcParams
from matplotlib.figure import Figure
from matplotlib.image import imsave
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from sklearn.model_selection import train_test_split

SIDE = 28  # pixels along one side of an image
PIXELS = SIDE * SIDE
DIGITS = 10  # classes

# Kernel


@contextlib.contextmanager
def quiet_start():
    """Discard what C and C++ code writes to file descriptor 2 while TensorFlow is imported.

    Whatever its log level is, it complains of missing GPU drivers
    (https://github.com/tensorflow/tensorflow/issues/100442). In a Jupyter kernel, warnings and
    errors of Python take another way and are still shown, as is all that comes later.
    """
    os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="1")
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
        import tensorflow as tf

        tf.config.list_logical_devices()  # looks for devices now, and complains now
    finally:
        os.dup2(saved, 2)
        os.close(saved)


# Settings

PathText = Annotated[str, pydantic.Field(min_length=1)]
Units = Annotated[int, pydantic.Field(ge=1)]
NotNegative = Annotated[float, pydantic.Field(ge=0)]
Positive = Annotated[float, pydantic.Field(gt=0)]


def allowed(why, **limits):
    """Return a field with limits and the reason for them, which an error will give."""
    return pydantic.Field(description=why, **limits)


class Hyperparameters(pydantic.BaseModel):
    """What each hyperparameter of the notebook may be; README says what it changes."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, frozen=True)

    data_path: PathText | None
    output_dir: PathText | None
    seed: int = allowed("it seeds generators of 32 bits", ge=0, lt=2**31)
    epochs: int = allowed("each is a row of one figure", ge=1, le=1000)
    batch_size: int = pydantic.Field(ge=1)
    hidden_layers: list[Units] = pydantic.Field(min_length=1)
    activation: str
    z_dim: int = allowed("styles are drawn in a plane", ge=2)
    likelihood: str
    decoder_std: float = allowed("its square divides 32-bit numbers", ge=0.001, le=1000)
    classification_weight: NotNegative
    optimizer_name: str
    learning_rate: Positive
    momentum: float = allowed("steps would grow without end at 1", ge=0, lt=1)
    cosine_decay: bool
    clip_norm: Positive | None
    mean_image_bias: bool
    decoder_skips: bool
    stop_gradient: bool
    asked_digit_weight: NotNegative
    asked_digit_batch: int = pydantic.Field(ge=1)
    distortion: float = allowed("digits leave the image beyond", ge=0, le=5)

    @pydantic.field_validator("activation")
    @classmethod
    def _known_to_keras(cls, name):
        import keras

        try:
            keras.activations.get(name)(np.ones([1, 2], np.float32))
        except Exception as error:  # each activation fails in its own way
            raise ValueError(
                "Input should be the name of a Keras activation that needs no arguments"
            ) from error
        return name

    @pydantic.field_validator("likelihood", "optimizer_name")
    @classmethod
    def _in_table(cls, name, info):
        table = info.context[info.field_name]
        if name not in table:
            raise ValueError(f"Input should be {' or '.join(map(repr, table))}")
        return name


def check_hyperparameters(names):
    """Check the hyperparameters among some names, such as a notebook's `globals()`.

    Args:
        names: a dict that holds every field of `Hyperparameters`, and the table `likelihoods` of
            those that there are; the rest of it is ignored.

    Returns:
        `Hyperparameters`, a copy that cannot be changed.

    Raises:
        ValueError: a line for each hyperparameter that is missing or wrong, with its name, its
            value, what is allowed and, where a limit is not plain, why.
    """
    tables = {"likelihood": names["likelihoods"], "optimizer_name": ("sgd", "adam")}
    try:
        return Hyperparameters.model_validate(names, context=tables)
    except pydantic.ValidationError as error:
        lines = []
        for fault in error.errors():
            name, *indices = fault["loc"]
            where = name + "".join(f"[{index}]" for index in indices)
            value = "" if fault["type"] == "missing" else f" = {fault['input']!r:.80}"
            message = fault["msg"].removeprefix("Value error, ")
            reason = Hyperparameters.model_fields[name].description
            lines.append(f"{where}{value}: {message}{f' ({reason})' if reason else ''}")
        raise ValueError("\n".join(lines)) from None


def check_batch_size(batch_size, image_count):
    """Raise ValueError if a minibatch takes more images than the training set has."""
    if batch_size > image_count:
        raise ValueError(
            f"batch_size = {batch_size}: Input should be less than or equal to {image_count}, "
            "the number of training images"
        )


# Data

MAX_IMAGES = 300_000  # in one file
MNIST_HOST = "https://storage.googleapis.com"  # from which Keras downloads it
PATIENCE = 10  # seconds in which that host has to answer
MNIST_DIGESTS = (  # SHA-256 of the bytes of MNIST's training and test images
    "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
)


class Digits(NamedTuple):
    """Handwritten digits, split for training and testing.

    Attributes:
        x_train: uint8 [N, 784], grey values from 0 (paper) to 255 (ink).
        y_train: int32 [N], the digit in each image, 0 to 9.
        x_test: uint8 [M, 784], as `x_train`.
        y_test: int32 [M], as `y_train`.
        name: the data set, to stand beside whatever is made from it.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    name: str

    @property
    def digest(self):
        """SHA-256 of the training images' bytes, in hexadecimal."""
        return hashlib.sha256(self.x_train).hexdigest()

    @property
    def is_mnist(self):
        """Whether these are all of MNIST's images, by their content."""
        return (self.digest, hashlib.sha256(self.x_test).hexdigest()) == MNIST_DIGESTS


def load_mnist(path=None):
    """Load MNIST from a local copy or by download; offline, fewer digits stand in for it.

    Args:
        path: a Keras `mnist.npz`, or a folder of the four IDX files, gzipped or not. `None`
            takes Keras' own download, which stays in its cache and is checked against a
            checksum; where that cannot be had, one printed line says so and the digits are
            those of `load_offline_digits`.

    Returns:
        `Digits`; the original MNIST has 60,000 images for training and 10,000 for testing. They
        are named MNIST if the training images are MNIST's, by their content; other data sets
        in the same formats by their file or folder.

    Raises:
        ValueError: `path` is no readable copy of such a data set. The message names the file and
            what is wrong with it; a path that was asked for never gives other data.

    Source:
        Yann LeCun, Corinna Cortes and Christopher J. C. Burges, "The MNIST database of
        handwritten digits", 1998; CC BY-SA 3.0.
    """
    if path is not None:
        path = Path(path)
        try:
            path.stat()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no such file or folder: {error}") from error
        arrays = _read_idx_folder(path) if path.is_dir() else _read_npz(path)
        return _named(Digits(*arrays, name=path.resolve().name))
    try:
        train, test = _download()
    except Exception as error:  # Keras raises a bare Exception when a download fails
        print(
            f"No MNIST: it is not in Keras' cache and cannot be downloaded ({error}). "
            "Training on OFFLINE instead."
        )
        return load_small_digits()
    return _named(Digits(*_check(*train, "Keras"), *_check(*test, "Keras"), name="mnist.npz"))


def _named(digits):
    """Call digits MNIST or not, by their content; their name so far is that of a file."""
    is_mnist = digits.digest == MNIST_DIGESTS[0]
    return digits._replace(name="MNIST" if is_mnist else f"{digits.name} (not MNIST)")


def _download():
    """Return Keras' MNIST, from its cache or its host; an exception if the host does not answer.

    Keras waits without end for a host that is silent, and so does the look-up of its name. So the
    download has a thread of its own, given up unless the host has answered in time.
    """
    import keras  # here, so that the notebook decides when TensorFlow starts

    outcome, answered = [], threading.Event()

    def load():
        try:
            outcome.append(keras.datasets.mnist.load_data())
        except Exception as error:
            outcome.append(error)

    def knock():
        with contextlib.suppress(OSError):
            with contextlib.suppress(urllib.error.HTTPError):  # an answer as well
                urllib.request.urlopen(MNIST_HOST, timeout=PATIENCE).close()
            answered.set()

    loader = threading.Thread(target=load, daemon=True)
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # for an answer that breaks off half-way
    try:
        loader.start()
        loader.join(1)  # long enough to read the cache
        if loader.is_alive():
            threading.Thread(target=knock, daemon=True).start()
            loader.join(PATIENCE)
        if loader.is_alive() and not answered.is_set():
            raise TimeoutError(f"no answer from {MNIST_HOST} within {PATIENCE} seconds")
        loader.join()
    finally:
        socket.setdefaulttimeout(previous_timeout)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def load_small_digits(copies=20, seed=0):
    """Load scikit-learn's handwritten digits, enlarged and multiplied to stand in for MNIST.

    The 8×8 images fill a centred 20×20 box of a 28×28 image, as MNIST's do. Each image of the
    training part comes in several copies, each turned by up to 12 degrees, shifted by up to
    2 pixels and scaled by up to 12 %; the test part is left as it is.

    Args:
        copies: how many variants to make of each training image.
        seed: of the split into two parts and of the variants.

    Returns:
        `Digits` with 1,497 · `copies` training and 300 test images.

    Source:
        E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
        Learning Repository, 1998, as shipped inside scikit-learn.
    """
    images, digits = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.astype(np.int32), test_size=300, stratify=digits, random_state=seed
    )
    x_train, y_train = np.repeat(x_train, copies, axis=0), np.repeat(y_train, copies)
    random, n = np.random.default_rng(seed), len(x_train)
    angle = random.uniform(-0.2, 0.2, n)
    shift = random.uniform(-2, 2, (2, n))
    scale = random.uniform(0.88, 1.12, n)
    still = np.zeros(len(x_test))
    return Digits(
        _enlarge(x_train, angle, shift, scale),
        y_train,
        _enlarge(x_test, still, (still, still), still + 1),
        y_test,
        name="scikit-learn digits",
    )


def _enlarge(images, angle, shift, scale):
    """Place 8×8 images in the 20×20 box of uint8 [N, 784] images, turned, shifted and scaled."""
    import keras

    margin = (SIDE - 8) // 2
    canvas = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    # For each target pixel (column, row), where the source pixel is, relative to the centre.
    cos, sin = np.cos(angle) * 8 / 20 / scale, np.sin(angle) * 8 / 20 / scale
    centre = (SIDE - 1) / 2
    x, y = centre + shift[0], centre + shift[1]
    zero = np.zeros_like(angle)
    transforms = np.stack(
        [cos, -sin, centre - cos * x + sin * y, sin, cos, centre - sin * x - cos * y, zero, zero],
        axis=1,
    )
    enlarged = keras.ops.image.affine_transform(
        canvas[..., None], transforms.astype(np.float32), fill_mode="constant"
    )
    return np.rint(255 * np.asarray(enlarged)).astype(np.uint8).reshape(-1, SIDE * SIDE)


def _read_npz(path):
    """Read the four arrays of a Keras `mnist.npz`; ValueError for anything else."""
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            if missing := [name for name in names if f"{name}.npy" not in sizes]:
                raise ValueError(f"it holds no {', '.join(missing)}")
            if max(sizes.values()) > MAX_IMAGES * SIDE * SIDE:
                raise ValueError(f"it unpacks to more than {MAX_IMAGES:,} images")
        with np.load(path, allow_pickle=False) as arrays:
            x_train, y_train, x_test, y_test = (arrays[name] for name in names)
    except Exception as error:  # damaged bytes make zipfile and NumPy fail in many ways
        raise ValueError(f"{path}: not a readable mnist.npz: {error}") from error
    return (*_check(x_train, y_train, path), *_check(x_test, y_test, path))


def _read_idx_folder(folder):
    """Read the four IDX files of a folder; ValueError names the one that is missing or bad."""
    if any(folder.glob("emnist-*")):
        raise ValueError(
            f"{folder}: EMNIST's files hold transposed images; swap their axes in an mnist.npz"
        )
    arrays = []
    for part in ("train", "t10k"):
        images = _read_idx(folder, f"{part}-images?idx3-ubyte", 3)
        labels = _read_idx(folder, f"{part}-labels?idx1-ubyte", 1)
        arrays += _check(images, labels, folder / f"{part}-*")
    return arrays


def _read_idx(folder, pattern, dimensions):
    """Read one IDX file of bytes, gzipped or not, into an array of so many dimensions."""
    paths = sorted([*folder.glob(pattern), *folder.glob(f"{pattern}.gz")])
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: it holds no {pattern.replace('?', '-')} (or .gz)")
    magic = 0x0800 + dimensions  # 08: unsigned bytes
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions:
                raise ValueError("its header is cut off")
            found_magic, *shape = np.frombuffer(header, ">u4").tolist()
            if found_magic != magic:
                raise ValueError(f"its magic number is {found_magic}, not {magic}")
            if shape[0] > MAX_IMAGES or shape[1:] != [SIDE, SIDE][: dimensions - 1]:
                raise ValueError(
                    f"its header promises {shape[0]} items of shape {shape[1:]}; allowed are up "
                    f"to {MAX_IMAGES:,}, images of [{SIDE}, {SIDE}]"
                )
            size = math.prod(shape)
            content = file.read(size + 1)
            if len(content) != size:
                fault = "is cut off" if len(content) < size else "goes on"
                raise ValueError(f"it {fault} where its header promises {size:,} bytes")
    except Exception as error:  # damaged bytes make gzip fail in many ways
        raise ValueError(f"{path}: not a readable IDX file: {error}") from error
    return np.frombuffer(content, np.uint8).reshape(shape)


def _check(images, digits, where):
    """Return images as uint8 [N, 784] and digits as int32 [N]; ValueError if they are of no use."""
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE) or len(images) == 0:
        raise ValueError(
            f"{where}: images must be uint8 [N, {SIDE}, {SIDE}], the size that this notebook is "
            f"for, not {images.dtype} {list(images.shape)}"
        )
    if digits.dtype.kind not in "iu" or digits.shape != images.shape[:1]:
        raise ValueError(
            f"{where}: {len(images)} images need as many integer labels, "
            f"not {digits.dtype} {list(digits.shape)}"
        )
    if digits.min() < 0 or digits.max() >= DIGITS:
        raise ValueError(
            f"{where}: labels must be 0 to {DIGITS - 1}, the classes that this notebook is for, "
            f"not {digits.min()} to {digits.max()}"
        )
    return images.reshape(len(images), PIXELS), digits.astype(np.int32)


# Training


class Snapshot:
    """Values of all variables of networks or optimizers, to go back to.

    Args:
        owners: objects with `variables`, such as Keras models: weights, statistics of batch
            normalization, states of random generators, momenta.
    """

    def __init__(self, owners):
        self._variables = [variable for owner in owners for variable in owner.variables]
        self.take()

    def take(self):
        """Keep the present values in place of those before."""
        self._values = [variable.numpy() for variable in self._variables]

    def restore(self):
        """Put the kept values back."""
        for variable, value in zip(self._variables, self._values, strict=True):
            variable.assign(value)


class Training:
    """A `with` block in which training may end early, always at the last finished epoch.

    An interrupt of the kernel (Jupyter's button, Ctrl-C) ends it before the next part of an epoch,
    a loss that is not finite at the epoch's end. Either goes back to the networks of the last
    finished epoch, and is said instead of raised.

    Args:
        networks: Keras models.
        epochs: how many there shall be.
    """

    def __init__(self, networks, epochs):
        self._last_finished = Snapshot(networks)
        self._finished, self._epochs, self._interrupted = 0, epochs, False

    def __enter__(self):
        self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def _interrupt(self, *_):
        self._interrupted = True
        print("Interrupted: back to the last finished epoch.")

    def parts(self, steps, seconds=0.5):
        """Yield an epoch in parts of about so many seconds, so that an interrupt need not wait.

        Yields:
            The first step of each part and the first after it, int32 tensors. Of 0 steps there is
            one part, without any.

        Raises:
            KeyboardInterrupt: the kernel was interrupted since training began.
        """
        import tensorflow as tf

        first, size = 0, 4
        while first < max(1, steps):
            if self._interrupted:
                raise KeyboardInterrupt
            last, start = min(first + size, steps), time.perf_counter()
            yield tf.constant(first), tf.constant(last)
            in_time = size * seconds / (time.perf_counter() - start)
            first, size = max(1, last), max(1, min(4 * size, int(in_time)))

    def finish_epoch(self, losses):
        """Take the networks as they are for those of a finished epoch.

        Raises:
            FloatingPointError: a value of the dict `losses` is not finite.
        """
        if not np.isfinite(list(losses.values())).all():
            epoch = self._finished + 1
            lower = "lower learning_rate or clip_norm."
            raise FloatingPointError(f"The loss of epoch {epoch} is not finite: {lower}")
        self._last_finished.take()
        self._finished += 1

    def __exit__(self, kind, error, _):
        signal.signal(signal.SIGINT, self._handler)
        if kind not in (KeyboardInterrupt, FloatingPointError):
            return False
        self._last_finished.restore()
        print(*error.args, f"Stopped after {self._finished} of {self._epochs} epochs.")
        print("Run this cell again to start afresh.")
        return True


def in_batches(function, *arrays, size=1000):
    """Apply a function to rows of arrays, so many at a time to save memory.

    Args:
        function: takes as many tensors [n, …], returns a tensor [n, …] or a tuple of them.
        arrays: of the same length N; those of floating-point numbers become float32.
        size: how many rows at a time.

    Returns:
        A NumPy array [N, …], or a tuple of them.
    """
    import tensorflow as tf

    arrays = [np.asarray(array) for array in arrays]
    arrays = [a.astype(np.float32, copy=False) if a.dtype.kind == "f" else a for a in arrays]
    batches = ([a[i : i + size] for a in arrays] for i in range(0, max(map(len, arrays)), size))
    results = [function(*map(tf.constant, batch)) for batch in batches]
    if isinstance(results[0], tuple):
        return tuple(map(np.concatenate, zip(*results, strict=True)))
    return np.concatenate(results)


WARP = 6  # numbers that make an affine map of the plane


def distort(images, strength, warp):
    """Move the pixels of all images by the same affine map of the plane.

    First the pixels of each row move along the row, then those of each column along the column.
    With linear interpolation, each of the two is a product with a small matrix for every row or
    column, whose entries say from which pixels a new pixel is mixed.

    Args:
        images: float tensor [N, 784].
        strength: by which `warp` is multiplied; at 0, nothing is done.
        warp: float tensor [6], how far they are turned, sheared, made wider and taller (1: by
            0.2, 0.2, 0.12, 0.12) and shifted to the right and down (1: by 2 pixels).

    Returns:
        A tensor [N, 784].
    """
    import tensorflow as tf

    if not strength:
        return images
    limits = strength * np.array([0.2, 0.2, 0.12, 0.12, 2.0, 2.0], np.float32)
    turn, shear, wider, taller, right, down = tf.unstack(limits * warp)
    position = tf.range(SIDE, dtype=tf.float32) - (SIDE - 1) / 2  # in pixels from the centre
    x, y = position[None, :], position[:, None]
    source_x = (1 + wider) * x + (shear - turn) * y + right  # [row, new x]
    source_y = (1 + taller) * y + turn * x + down  # [new y, column]
    # Weight of each old pixel in a new one, falling to zero one pixel away:
    row_weights = tf.nn.relu(1 - abs(source_x[:, None] - position[:, None]))  # [row, old x, new x]
    column_weights = tf.nn.relu(1 - abs(source_y - position[:, None, None]))  # [old y, new y, col]
    moved = tf.einsum("nyu,yux->nyx", tf.reshape(images, [-1, SIDE, SIDE]), row_weights)
    moved = tf.einsum("nvx,vyx->nyx", moved, column_weights)
    return tf.reshape(moved, [-1, PIXELS])


def clip(gradients, longest):
    """Shorten what is longer than `longest` of each unit's gradient (of its weights, its bias)."""
    import tensorflow as tf

    if longest is None:
        return gradients
    return [tf.clip_by_norm(gradient, longest, axes=0) for gradient in gradients]


# Figures

# 0 is white paper, 1 is black ink, in 64 shades: hardly fewer to the eye, far fewer bytes to a file.
INK = {"cmap": colormaps["gray_r"].resampled(64), "vmin": 0, "vmax": 1}


def _tile(images):
    """Lay images [rows, columns, 784] side by side: [rows · 28, columns · 28]."""
    rows, columns = images.shape[:2]
    tiled = images.reshape(rows, columns, SIDE, SIDE).swapaxes(1, 2)
    return tiled.reshape(rows * SIDE, columns * SIDE)


def plot_digit_grid(images, *, row_labels=None, column_labels=range(DIGITS), title=None, ax=None):
    """Draw images as one tiled picture, ink dark on white.

    Args:
        images: [rows, columns, 784], grey values in [0, 1] from paper to ink.
        row_labels: one label for each row, or `None`.
        column_labels: one label for each column; by default the digits.
        title: of the axes, or `None`.
        ax: matplotlib Axes to draw in; `None` makes a figure of fitting size.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: `images` is not of that shape, or a list of labels not as long as its side.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 3 or images.shape[2] != PIXELS:
        raise ValueError(f"images must be [rows, columns, {PIXELS}], not {list(images.shape)}")
    rows, columns = images.shape[:2]
    if ax is None:
        # Each pixel of an image is a whole number of the figure's, so that all are alike; a
        # notebook's inline figures have twice the dots per inch that matplotlib says.
        scale = max(1, min(3, 2000 // (SIDE * max(rows, columns))))
        width, height = (scale * SIDE * n / (2 * rcParams["figure.dpi"]) for n in (columns, rows))
        all_width, all_height = width + 3, height + 1.5  # of which a notebook shows what is drawn
        frame = [1.5 / all_width, 0.75 / all_height, width / all_width, height / all_height]
        ax = Figure(figsize=(all_width, all_height)).add_axes(frame)
    ax.imshow(_tile(images), interpolation="nearest", **INK)
    ax.set_xticks(np.arange(columns) * SIDE + SIDE / 2 - 0.5, list(column_labels))
    ax.set_yticks(np.arange(rows) * SIDE + SIDE / 2 - 0.5, row_labels or [""] * rows)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize="medium")
    return ax.figure


def plot_samples(samples, epochs, name):
    """Draw the rows of the digit grid that there are, with room for those to come.

    Args:
        samples: [finished epochs, 10, 784], grey values in [0, 1].
        epochs: how many rows there will be.
        name: of the data set.

    Returns:
        The matplotlib Figure.
    """
    to_come = np.zeros([epochs - len(samples), DIGITS, PIXELS], np.float32)
    return plot_digit_grid(
        np.concatenate([samples, to_come]),
        row_labels=[f"epoch {epoch}" for epoch in range(1, epochs + 1)],
        title=f"Digits generated after each epoch of training on {name}",
    )


def plot_losses(history, *, title=None):
    """Draw both losses per epoch, of the training set and of the test set.

    Args:
        history: a dict of lists with one number per epoch, in nats per image: `vae_loss`,
            `classification_loss` and the same two with `test_` before.
        title: of the figure, or `None`.

    Returns:
        The matplotlib Figure.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), ("vae_loss", "classification_loss"), strict=True):
        epochs = np.arange(1, len(history[name]) + 1)
        ax.plot(epochs, history[name], "o-", markersize=4, label="training set")
        ax.plot(epochs, history[f"test_{name}"], "s--", markersize=4, label="test set")
        ax.set_title(name.replace("_", " ").replace("vae", "VAE"))
        ax.set_xlabel("epoch")
        ax.set_ylabel("nats per image")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(title)
    return figure


def plot_styles(z_mean, digits, *, title=None):
    """Draw styles as digits in the plane of their first two principal components.

    Args:
        z_mean: [N, z_dim], the mean of each image's style.
        digits: integers [N], 0 to 9; each style is drawn as its digit, in the digit's colour.
        title: of the figure, or `None`.

    Returns:
        The matplotlib Figure.
    """
    pca = PCA(2, random_state=0)
    x, y = pca.fit_transform(z_mean).T
    shares = pca.explained_variance_ratio_
    figure = Figure(figsize=(6, 5.2), layout="constrained")
    ax = figure.subplots()
    for digit in range(10):
        shown = np.asarray(digits) == digit
        style = {"s": 22, "linewidths": 0, "color": f"C{digit}", "alpha": 0.7}
        ax.scatter(x[shown], y[shown], marker=f"${digit}$", **style)
    ax.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    ax.set_ylabel(f"second principal component ({shares[1]:.0%})")
    ax.set_aspect("equal")
    ax.set_title(title, fontsize="medium")
    return figure


def plot_confusions(pairs, *, title=None):
    """Draw confusion matrices side by side, in per cent of each row.

    Args:
        pairs: a dict from the title of each matrix to the name of its rows, the digit [N] of each
            case by which it counts in a row, and the same two of its columns.
        title: of the figure, or `None`.

    Returns:
        The matplotlib Figure.
    """
    figure = Figure(figsize=(4.4 * len(pairs), 4.7), layout="constrained")
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for ax, (name, (row_name, rows, column_name, columns)) in zip(axes, pairs.items(), strict=True):
        counts = confusion_matrix(rows, columns, labels=range(DIGITS))
        percent = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        display = ConfusionMatrixDisplay(percent)
        display.plot(ax=ax, cmap="Blues", colorbar=False, values_format=".1f", text_kw={"size": 7})
        for text, value in zip(display.text_.ravel(), percent.ravel(), strict=True):
            text.set_visible(value > 0)
        ax.set(xlabel=f"digit {column_name}", ylabel=f"digit {row_name}")
        same = np.mean(np.equal(rows, columns))
        ax.set_title(f"{name}: {same:.2%} the same", fontsize="medium")
    figure.suptitle(title)
    return figure


# Playing


def digits_png(images):
    """Return images [rows, columns, 784] in [0, 1], side by side, as the bytes of a PNG file."""
    file = io.BytesIO()
    imsave(file, _tile(images), format="png", **INK)
    return file.getvalue()


# Keeping a run


class Run(NamedTuple):
    """What `save_run` keeps of a run: three Keras models, settings and results.

    Attributes:
        encoder: images [N, 784] to z_mean and z_log_var [N, z_dim].
        digit_classifier: images [N, 784] to digit logits [N, 10].
        decoder: z [N, z_dim] and digit_probs [N, 10] to images [N, 784].
        hyperparameters: a dict.
        history: a dict of lists, one number per epoch.
        samples: float32 [epochs, 10, 784], the rows of the digit grid.
        results: a dict of what was measured at the end, the data set and the versions.
    """

    encoder: object
    digit_classifier: object
    decoder: object
    hyperparameters: dict
    history: dict
    samples: np.ndarray
    results: dict


def save_run(folder, run):
    """Keep a run in a folder: three `.keras` files, three JSON files and an NPZ file.

    All are first written in a folder beside them and then moved into place, so that each is
    whole or absent whenever this is cut short, and those of two runs are never mixed.

    Args:
        folder: where to write; made if absent. The files of an earlier run in it are replaced.
        run: a `Run`.

    Returns:
        The list of the files' paths.

    Raises:
        OSError: the folder cannot be written; the message names it and the reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as unfinished:
            for name, value in run._asdict().items():
                path = Path(unfinished) / _file_name(name)
                if path.suffix == ".keras":
                    value.save(path)
                elif path.suffix == ".json":
                    path.write_text(json.dumps(value, indent=1))
                else:
                    np.savez_compressed(path, **{name: value})
            paths = [folder / _file_name(name) for name in Run._fields]
            for path in paths:  # first all of the earlier run go, then all of this one come
                path.unlink(missing_ok=True)
            for path in paths:
                os.replace(Path(unfinished) / path.name, path)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        raise OSError(
            f"output_dir = {str(folder)!r} cannot be written ({error}). What was trained is still "
            "in memory: choose another folder and run this cell again."
        ) from error
    return paths


def load_run(folder):
    """Load what `save_run` kept in a folder.

    Returns:
        `Run`.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    import keras

    values = {}
    for name in Run._fields:
        path = Path(folder) / _file_name(name)
        try:
            if path.suffix == ".keras":
                values[name] = keras.saving.load_model(path, compile=False)
            elif path.suffix == ".json":
                values[name] = json.loads(path.read_text())
            else:
                with np.load(path, allow_pickle=False) as arrays:
                    values[name] = arrays[name]
        except Exception as error:  # Keras and NumPy have many of their own for a damaged file
            raise ValueError(f"{path}: not a whole file of a kept run: {error}") from error
    return Run(**values)


def _file_name(name):
    """Return the name of the file that keeps this part of a `Run`."""
    suffixes = dict.fromkeys(("hyperparameters", "history", "results"), ".json")
    return name + {**suffixes, "samples": ".npz"}.get(name, ".keras")
