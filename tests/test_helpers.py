"""The helper module: data found, bad data named, pictures drawn."""

import gzip
import hashlib
import http.server
import threading
import zipfile

import keras
import numpy as np
import pytest
from keras.src.datasets import mnist as keras_mnist

import vae_helpers

KERAS_HOST = vae_helpers.MNIST_HOST
IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def write_idx(folder, arrays, suffix=""):
    """Write the arrays as the four IDX files, gzipped where the suffix is .gz."""
    for name, array in arrays.items():
        header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
        with (gzip.open if suffix else open)(folder / (IDX_NAMES[name] + suffix), "wb") as file:
            file.write(header + array.astype(np.uint8).tobytes())
    return folder


def assert_same(digits, arrays):
    """Check that loaded digits hold these arrays."""
    np.testing.assert_array_equal(digits.x_train, arrays["x_train"].reshape(-1, 784))
    np.testing.assert_array_equal(digits.x_test, arrays["x_test"].reshape(-1, 784))
    np.testing.assert_array_equal(digits.y_train, arrays["y_train"])
    np.testing.assert_array_equal(digits.y_test, arrays["y_test"])
    assert [a.dtype for a in digits[:4]] == [np.uint8, np.int32, np.uint8, np.int32]
    assert digits.name == "MNIST"


def test_npz_and_idx_hold_the_same(small_arrays, small_npz, tmp_path):
    assert_same(vae_helpers.load_mnist(small_npz), small_arrays)
    assert_same(vae_helpers.load_mnist(write_idx(tmp_path, small_arrays)), small_arrays)


def test_idx_gzipped_and_with_a_dot(small_arrays, tmp_path):
    write_idx(tmp_path, small_arrays, ".gz")
    plain = tmp_path / "t10k-images-idx3-ubyte.gz"
    plain.rename(tmp_path / "t10k-images.idx3-ubyte.gz")
    assert_same(vae_helpers.load_mnist(str(tmp_path)), small_arrays)


def test_real_mnist(mnist):
    digits = vae_helpers.load_mnist(mnist)
    assert [len(array) for array in digits[:4]] == [60_000, 60_000, 10_000, 10_000]
    assert np.bincount(digits.y_test).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert digits.y_train[:5].tolist() == [5, 0, 4, 1, 9]


class Bomb:
    """What must never be unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


# Changes to the arrays of a good archive, each with a name and a word of the error.
BAD_NPZ = [
    ("missing", lambda a: a.pop("x_test"), "holds no x_test"),
    ("float images", lambda a: a.update(x_train=a["x_train"] / 255), "float64"),
    ("flat images", lambda a: a.update(x_test=a["x_test"].reshape(-1, 784)), "784"),
    ("no images", lambda a: a.update(x_test=a["x_test"][:0], y_test=a["y_test"][:0]), "0, 28"),
    ("scalar images", lambda a: a.update(x_test=np.uint8(3)), "uint8"),
    ("fewer labels", lambda a: a.update(y_train=a["y_train"][1:]), "labels"),
    ("float labels", lambda a: a.update(y_train=a["y_train"] + 0.5), "labels"),
    ("label 10", lambda a: a.update(y_test=a["y_test"] + 1), "labels must be 0 to 9"),
    ("label −1", lambda a: a.update(y_test=a["y_test"].astype(int) - 1), "labels must be"),
    ("pickled", lambda a: a.update(y_test=np.array([Bomb()])), "pickle"),
]


@pytest.mark.parametrize(("_", "change", "word"), BAD_NPZ)
def test_bad_npz_is_named(_, change, word, small_arrays, tmp_path):
    arrays = dict(small_arrays)
    change(arrays)
    path = tmp_path / "mnist.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=word) as error:
        vae_helpers.load_mnist(path)
    assert str(path) in str(error.value)


def test_unreadable_paths_are_named(small_npz, tmp_path):
    whole = small_npz.read_bytes()
    middle = len(whole) // 2
    contents = {
        "empty": b"",
        "text": b"not an archive",
        "truncated": whole[:middle],
        "corrupt": whole[:middle] + bytes(64) + whole[middle + 64 :],
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.npz: not a readable mnist.npz"):
            vae_helpers.load_mnist(path)
    with pytest.raises(ValueError, match=r"nowhere.npz: no such file"):
        vae_helpers.load_mnist(tmp_path / "nowhere.npz")


def test_archive_that_unpacks_to_far_more_is_refused_unread(small_arrays, tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez(path, **{name: array for name, array in small_arrays.items() if name != "x_train"})
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x_train.npy", "w") as entry,
    ):
        for _ in range(300):
            entry.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="unpacks to more than 300,000 images"):
        vae_helpers.load_mnist(path)


# Changes to the bytes of the test images' IDX file, each with a word of the error.
BAD_IDX = [
    (lambda b: (0x0801).to_bytes(4, "big") + b[4:], "magic number is 2049, not 2051"),
    (lambda b: (0x0803).to_bytes(4, "little") + b[4:], "magic number"),
    (lambda b: b[:-1], "is cut off"),
    (lambda b: b[:10], "header is cut off"),
    (lambda b: b"", "header is cut off"),
    (lambda b: b + b"\0", "goes on"),
    (lambda b: b[:8] + (27).to_bytes(4, "big") + b[12:], "27, 28"),
    (lambda b: b[:4] + b"\xff" * 4 + b[8:], "4294967295 items"),
]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("change", "word"), BAD_IDX)
def test_bad_idx_is_named(change, word, suffix, small_arrays, tmp_path):
    write_idx(tmp_path, small_arrays, suffix)
    path = tmp_path / (IDX_NAMES["x_test"] + suffix)
    opened = gzip.open if suffix else open
    with opened(path, "rb") as file:
        content = change(file.read())
    with opened(path, "wb") as file:
        file.write(content)
    with pytest.raises(ValueError, match=word) as error:
        vae_helpers.load_mnist(tmp_path)
    assert str(path) in str(error.value)


def test_truncated_gzip_and_missing_idx_are_named(small_arrays, tmp_path):
    write_idx(tmp_path, small_arrays, ".gz")
    path = tmp_path / (IDX_NAMES["y_train"] + ".gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz: not a readable IDX file"):
        vae_helpers.load_mnist(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="holds no train-labels-idx1-ubyte"):
        vae_helpers.load_mnist(tmp_path)


@pytest.fixture
def download(small_npz, tmp_path, monkeypatch):
    """Serve a file at loopback in place of Keras' host; return the server and the cached path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += self.path == "/mnist.npz"
            content = small_npz.read_bytes()
            self.send_response(200 if self.server.sent else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: int(len(content) * self.server.sent)])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.sent = 0, 1.0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Keras' own code downloads and checks; only the host, the checksum and the cache are others.
    checksum = hashlib.sha256(small_npz.read_bytes()).hexdigest()

    def get_file(fname, origin, file_hash):
        assert origin.startswith(KERAS_HOST)
        assert len(file_hash) == 64
        return keras.utils.get_file(
            fname,
            f"http://127.0.0.1:{server.server_port}/{fname}",
            file_hash=checksum,
            cache_dir=tmp_path,
        )

    monkeypatch.setattr(keras_mnist, "get_file", get_file)
    monkeypatch.setattr(vae_helpers, "MNIST_HOST", f"http://127.0.0.1:{server.server_port}")
    yield server, tmp_path / "datasets" / "mnist.npz"
    server.shutdown()
    server.server_close()


def test_download_is_checked_and_cached(download, small_arrays):
    server, cached = download
    assert_same(vae_helpers.load_mnist(), small_arrays)
    assert_same(vae_helpers.load_mnist(), small_arrays)
    assert server.requests == 1
    cached.write_bytes(cached.read_bytes()[:-1])  # no longer what the checksum says
    assert_same(vae_helpers.load_mnist(), small_arrays)
    assert server.requests == 2


@pytest.mark.parametrize("sent", [0, 0.5])
def test_failed_download_falls_back_and_says_so(sent, download, small_arrays, capsys):
    server, cached = download
    server.sent = sent
    digits = vae_helpers.load_mnist()
    assert digits.name == "scikit-learn digits"
    said = [line for line in capsys.readouterr().out.splitlines() if "No MNIST" in line]
    assert len(said) == 1
    assert "small digits" in said[0]
    assert not cached.exists()
    server.sent = 1.0
    assert_same(vae_helpers.load_mnist(), small_arrays)


def test_small_digits_have_the_framing_of_mnist():
    digits = vae_helpers.load_small_digits(copies=3)
    assert digits.x_train.shape == (3 * 1497, 784)
    assert digits.x_test.shape == (300, 784)
    assert digits.x_train.dtype == digits.x_test.dtype == np.uint8
    assert set(digits.y_test) == set(range(10))
    test_images = digits.x_test.reshape(-1, 28, 28).astype(float)
    margin = np.ones([28, 28], bool)
    margin[3:25, 3:25] = False  # the 20×20 box, and the pixel over which interpolation fades
    assert test_images[:, margin].max() == 0
    assert test_images.max() > 250
    # A block of the original 8×8 image is 2.5 pixels wide, its value at the block's centre.
    from sklearn.datasets import load_digits

    originals = load_digits().images * 255 / 16
    means = {round(image.mean() * (20 / 28) ** 2) for image in originals}
    assert all(any(abs(image.mean() - mean) < 3 for mean in means) for image in test_images)
    variants = digits.x_train[:3]
    assert len(np.unique(variants, axis=0)) == 3
    again = vae_helpers.load_small_digits(copies=3)
    np.testing.assert_array_equal(digits.x_train, again.x_train)


def test_digit_grid_tiles_the_images():
    images = np.linspace(0, 1, 2 * 3 * 784).reshape(2, 3, 784)
    figure = vae_helpers.plot_digit_grid(
        images, row_labels=["one", "two"], column_labels="abc", title="Grid"
    )
    (ax,) = figure.axes
    tiled = ax.images[0].get_array()
    assert tiled.shape == (56, 84)
    np.testing.assert_allclose(tiled[28:, 56:], images[1, 2].reshape(28, 28), rtol=1e-6)
    assert ax.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    assert ax.get_title() == "Grid"
    assert vae_helpers.plot_digit_grid(images[:1], column_labels="abc", ax=ax) is figure


def test_digit_grid_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"rows, columns, 784"):
        vae_helpers.plot_digit_grid(np.zeros([10, 784]))
    with pytest.raises(ValueError, match="label"):
        vae_helpers.plot_digit_grid(np.zeros([2, 10, 784]), row_labels=["one"])


def test_losses_are_drawn_for_both_sets():
    history = {"vae_loss": [3, 2], "test_vae_loss": [4, 3]}
    history |= {"classification_loss": [1, 0.5], "test_classification_loss": [2, 1]}
    figure = vae_helpers.plot_losses(history, title="Losses")
    for ax, name in zip(figure.axes, ("vae_loss", "classification_loss"), strict=True):
        assert [line.get_ydata().tolist() for line in ax.lines] == [
            history[name],
            history[f"test_{name}"],
        ]
        assert len(ax.get_legend().get_texts()) == 2
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "nats per image")
