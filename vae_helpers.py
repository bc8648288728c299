"""Data and pictures for vae2.ipynb: what stands beside the model, not the model itself.

`load_mnist` finds the images; the `plot_` functions turn arrays into matplotlib figures.
Importing this module changes no setting, draws nothing and downloads nothing.
"""

import contextlib
import gzip
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIDE = 28  # pixels along one side of an image
MAX_IMAGES = 300_000  # in one file: room for MNIST's largest relative, EMNIST digits


@contextlib.contextmanager
def native_stderr_hidden():
    """Discard what C and C++ code writes to file descriptor 2 while the context lasts.

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


def load_mnist(path=None):
    """Load MNIST from a local copy or by download; offline, smaller digits stand in for it.

    Args:
        path: a Keras `mnist.npz`, or a folder of the four IDX files, gzipped or not. `None`
            takes Keras' own download, which stays in its cache and is checked against a
            checksum; where that cannot be had, one printed line says so and the digits are
            those of `load_small_digits`.

    Returns:
        `Digits`; the original MNIST has 60,000 images for training and 10,000 for testing.

    Raises:
        ValueError: `path` is no readable copy of MNIST. The message names the file and what is
            wrong with it; a path that was asked for never gives other data.

    Source:
        Yann LeCun, Corinna Cortes and Christopher J. C. Burges, "The MNIST database of
        handwritten digits", 1998; CC BY-SA 3.0.
    """
    if path is not None:
        path = Path(path)
        arrays = _read_idx_folder(path) if path.is_dir() else _read_npz(path)
        return Digits(*arrays, name="MNIST")
    import keras  # here, so that the notebook decides when TensorFlow starts

    try:
        train, test = keras.datasets.mnist.load_data()
    except Exception as error:  # Keras raises a bare Exception when a download fails
        print(
            f"No MNIST: it is not in Keras' cache and cannot be downloaded ({error}). "
            "Training on scikit-learn's 1,797 small digits instead."
        )
        return load_small_digits()
    return Digits(*_check(*train, "Keras' MNIST"), *_check(*test, "Keras' MNIST"), name="MNIST")


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
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
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
    except (ValueError, OSError, EOFError, MemoryError, NotImplementedError, RuntimeError,
            zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        raise ValueError(f"{path}: not a readable mnist.npz: {error}") from error
    return (*_check(x_train, y_train, path), *_check(x_test, y_test, path))


def _read_idx_folder(folder):
    """Read the four IDX files of a folder; ValueError names the one that is missing or bad."""
    arrays = []
    for part in ("train", "t10k"):
        images = _read_idx(folder, f"{part}-images?idx3-ubyte", (SIDE, SIDE))
        labels = _read_idx(folder, f"{part}-labels?idx1-ubyte", ())
        arrays += _check(images, labels, folder / f"{part}-*")
    return arrays


def _read_idx(folder, pattern, item_shape):
    """Read one IDX file of bytes, gzipped or not, whose items have the given shape."""
    paths = sorted([*folder.glob(pattern), *folder.glob(f"{pattern}.gz")])
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ValueError(f"{folder}: it holds no {pattern.replace('?', '-')} (or .gz)")
    path = paths[0]
    magic = 0x0800 + 1 + len(item_shape)  # 08: unsigned bytes; then the number of dimensions
    header_bytes = 4 * (2 + len(item_shape))
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.read(header_bytes)
            if len(header) < header_bytes:
                raise ValueError("its header is cut off")
            found_magic, count, *shape = np.frombuffer(header, ">u4").tolist()
            if found_magic != magic:
                raise ValueError(f"its magic number is {found_magic}, not {magic}")
            if tuple(shape) != item_shape or count > MAX_IMAGES:
                raise ValueError(
                    f"its header promises {count} items of shape {tuple(shape)}; allowed are up to "
                    f"{MAX_IMAGES:,} of shape {item_shape}"
                )
            size = count * math.prod(item_shape)
            content = file.read(size + 1)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable IDX file: {error}") from error
    if len(content) != size:
        fault = "is cut off" if len(content) < size else "goes on"
        raise ValueError(f"{path}: the file {fault} where its header promises {size:,} bytes")
    return np.frombuffer(content, np.uint8).reshape(count, *item_shape)


def _check(images, digits, where):
    """Return images as uint8 [N, 784] and digits as int32 [N]; ValueError if they are not MNIST."""
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE) or len(images) == 0:
        raise ValueError(
            f"{where}: images must be uint8 [N, 28, 28], not {images.dtype} {list(images.shape)}"
        )
    if digits.dtype.kind not in "iu" or digits.shape != images.shape[:1]:
        raise ValueError(
            f"{where}: {len(images)} images need as many integer labels, "
            f"not {digits.dtype} {list(digits.shape)}"
        )
    if digits.min() < 0 or digits.max() > 9:
        raise ValueError(f"{where}: labels must be 0 to 9, not {digits.min()} to {digits.max()}")
    return images.reshape(len(images), SIDE * SIDE), digits.astype(np.int32)


def plot_digit_grid(images, *, row_labels=None, column_labels=range(10), title=None, ax=None):
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
    if images.ndim != 3 or images.shape[2] != SIDE * SIDE:
        raise ValueError(f"images must be [rows, columns, 784], not {list(images.shape)}")
    rows, columns = images.shape[:2]
    if ax is None:
        size = (0.9 + 0.5 * columns, 0.7 + 0.5 * rows)  # in inches
        ax = Figure(figsize=size, layout="constrained").subplots()
    tiled = images.reshape(rows, columns, SIDE, SIDE).swapaxes(1, 2)
    tiled = tiled.reshape(rows * SIDE, columns * SIDE)
    ax.imshow(tiled, cmap="gray_r", vmin=0, vmax=1)
    ax.set_xticks(np.arange(columns) * SIDE + SIDE / 2 - 0.5, list(column_labels))
    ax.set_yticks(np.arange(rows) * SIDE + SIDE / 2 - 0.5, row_labels or [""] * rows)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize="medium")
    return ax.figure


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
