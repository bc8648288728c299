"""What stands beside the model of vae2.ipynb: checks, data, pictures and files.

`check_hyperparameters` refuses bad settings, `load_mnist` finds the images, the `plot_` functions
turn arrays into matplotlib figures, `save_run` and `load_run` keep what was trained.
Importing this module changes no setting, draws nothing and downloads nothing.
"""

import contextlib
import ctypes
import gc
import gzip
import io
import json
import math
import os
import signal
import socket
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pydantic
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.image import imsave
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import train_test_split

SIDE = 28  # pixels along one side of an image
MAX_IMAGES = 300_000  # in one file: room for MNIST's largest relative, EMNIST digits
MNIST_HOST = "https://storage.googleapis.com"  # from which Keras downloads it
PATIENCE = 10  # seconds in which that host has to answer


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


def release_memory():
    """Return memory that is free, but still held, to the system; where glibc is, nothing else."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def until_interrupted(items):
    """Yield items until the kernel is interrupted; the work on the present one is finished first.

    Meanwhile an interrupt (Jupyter's button, Ctrl-C) raises no KeyboardInterrupt, so that a loop
    over these items never stops half-way through one.
    """
    interrupted = threading.Event()
    previous_handler = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        for item in items:
            if interrupted.is_set():
                return
            yield item
    finally:
        signal.signal(signal.SIGINT, previous_handler)


PathText = Annotated[str, pydantic.Field(min_length=1)]
Units = Annotated[int, pydantic.Field(ge=1, le=10_000)]
NotNegative = Annotated[float, pydantic.Field(ge=0)]
Positive = Annotated[float, pydantic.Field(gt=0)]


class Hyperparameters(pydantic.BaseModel):
    """What each hyperparameter of the notebook may be; README says what it changes."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, frozen=True)

    data_path: PathText | None
    output_dir: PathText | None
    seed: int = pydantic.Field(ge=0, lt=2**30)
    epochs: int = pydantic.Field(ge=1, le=500)
    batch_size: int = pydantic.Field(ge=1)
    hidden_layers: list[Units] = pydantic.Field(min_length=1, max_length=20)
    activation: Literal[
        "elu", "gelu", "leaky_relu", "mish", "relu", "selu", "sigmoid", "silu", "softplus", "tanh"
    ]
    decoder_skips: bool
    z_dim: int = pydantic.Field(ge=2, le=100)
    likelihood: Literal["gaussian", "bernoulli"]
    decoder_std: float = pydantic.Field(ge=0.01, le=100)
    classification_weight: NotNegative
    stop_gradient: bool
    kl_weight_start: NotNegative
    kl_anneal_epochs: int = pydantic.Field(ge=0)
    asked_digit_weight: NotNegative
    asked_digit_batch: int = pydantic.Field(ge=1, le=100_000)
    distortion: float = pydantic.Field(ge=0, le=5)
    optimizer_name: Literal["sgd", "adam"]
    learning_rate: Positive
    cosine_decay: bool
    momentum: float = pydantic.Field(ge=0, lt=1)
    clip_norm: Positive | None


def check_hyperparameters(names):
    """Check the hyperparameters among some names, such as a notebook's `globals()`.

    Args:
        names: a dict that holds every field of `Hyperparameters`; the rest of it is ignored.

    Returns:
        `Hyperparameters`, a copy that cannot be changed.

    Raises:
        ValueError: a line for each hyperparameter that is missing or wrong, with its name, its
            value and what is allowed.
    """
    try:
        return Hyperparameters.model_validate(names)
    except pydantic.ValidationError as error:
        lines = []
        for fault in error.errors():
            name, *indices = fault["loc"]
            where = name + "".join(f"[{index}]" for index in indices)
            value = "" if fault["type"] == "missing" else f" = {fault['input']!r:.80}"
            lines.append(f"{where}{value}: {fault['msg']}")
        raise ValueError("\n".join(lines)) from None


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
        try:
            path.stat()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no such file or folder: {error}") from error
        arrays = _read_idx_folder(path) if path.is_dir() else _read_npz(path)
        return Digits(*arrays, name="MNIST")
    try:
        train, test = _download()
    except Exception as error:  # Keras raises a bare Exception when a download fails
        print(
            f"No MNIST: it is not in Keras' cache and cannot be downloaded ({error}). "
            "Training on scikit-learn's 1,797 small digits instead."
        )
        return load_small_digits()
    return Digits(*_check(*train, "Keras' MNIST"), *_check(*test, "Keras' MNIST"), name="MNIST")


def _download():
    """Return Keras' MNIST, from its cache or its host; an exception if the host does not answer.

    Keras waits without end for a host that is silent, and so does the look-up of its name. So the
    download has a thread of its own, given up unless the host has answered in time.
    """
    import keras  # here, so that the notebook decides when TensorFlow starts

    results, errors, answered = [], [], threading.Event()

    def load():
        try:
            results.append(keras.datasets.mnist.load_data())
        except Exception as error:
            errors.append(error)

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
    if errors:
        raise errors[0]
    return results[0]


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
    except Exception as error:
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


INK = {"cmap": "gray_r", "vmin": 0, "vmax": 1}  # 0 is white paper, 1 is black ink


def _tile(images):
    """Lay images [rows, columns, 784] side by side: [rows · 28, columns · 28]."""
    rows, columns = images.shape[:2]
    tiled = images.reshape(rows, columns, SIDE, SIDE).swapaxes(1, 2)
    return tiled.reshape(rows * SIDE, columns * SIDE)


def digits_png(images):
    """Return images [rows, columns, 784] in [0, 1], side by side, as the bytes of a PNG file."""
    file = io.BytesIO()
    imsave(file, _tile(images), format="png", **INK)
    return file.getvalue()


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
        side = min(0.5, 30 / max(rows, columns))  # of an image, in inches
        size = (0.9 + side * columns, 0.7 + side * rows)
        ax = Figure(figsize=size, layout="constrained").subplots()
    ax.imshow(_tile(images), **INK)
    ax.set_xticks(np.arange(columns) * SIDE + SIDE / 2 - 0.5, list(column_labels))
    ax.set_yticks(np.arange(rows) * SIDE + SIDE / 2 - 0.5, row_labels or [""] * rows)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize="medium")
    return ax.figure


def update_digit_grid(figure, images):
    """Replace the images in a figure of `plot_digit_grid` by others as many; return it."""
    figure.axes[0].images[0].set_data(_tile(images))
    return figure


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


def plot_confusions(matrices, *, row_name, column_name, title=None):
    """Draw confusion matrices side by side, in per cent of each row.

    Args:
        matrices: a dict from the title of each matrix to its counts [10, 10].
        row_name: what the rows are.
        column_name: what the columns are.
        title: of the figure, or `None`.

    Returns:
        The matplotlib Figure.
    """
    figure = Figure(figsize=(4.7 * len(matrices), 5.2), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for ax, (name, counts) in zip(axes, matrices.items(), strict=True):
        counts = np.asarray(counts)
        percent = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        display = ConfusionMatrixDisplay(percent)
        display.plot(ax=ax, cmap="Blues", colorbar=False, values_format=".1f", text_kw={"size": 7})
        ax.set(xlabel=column_name, ylabel=row_name)
        ax.set_title(name, fontsize="medium")
    figure.suptitle(title)
    return figure


def show_widget(widget, instead):
    """Display an ipywidgets widget; where widgets are not shown, a figure in its place.

    Both are one output in two formats, of which a front end takes the richest that it can show.
    """
    data, metadata = get_ipython().display_formatter.format(instead)
    display({**data, **widget._repr_mimebundle_()}, metadata=metadata, raw=True)


class Run(NamedTuple):
    """What `save_run` keeps of a run: three Keras models, settings and results.

    Attributes:
        encoder: images [N, 784] to z_mean and z_log_var [N, z_dim].
        digit_classifier: images [N, 784] to digit logits [N, 10].
        decoder: z [N, z_dim] and digit_probs [N, 10] to images [N, 784].
        hyperparameters: a dict.
        history: a dict of lists, one number per epoch.
        samples: float32 [epochs, 10, 784], the rows of the digit grid.
    """

    encoder: object
    digit_classifier: object
    decoder: object
    hyperparameters: dict
    history: dict
    samples: np.ndarray


def save_run(folder, run):
    """Keep a run in a folder: three `.keras` files, two JSON files and an NPZ file.

    All six are first written in a folder beside them and then moved into place, so that each is
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
    suffixes = {"hyperparameters": ".json", "history": ".json", "samples": ".npz"}
    return name + suffixes.get(name, ".keras")
