"""MNIST and other data are loaded, named and checked; without a network there is a substitute."""

import functools
import gzip
import hashlib
import http.server
import re
import shutil
import threading

import numpy as np
import pytest
from conftest import ROOT, vae_helpers
from PIL import Image
from scipy import ndimage

IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
README = (ROOT / "README.md").read_text()
GZIPPED = ["gzipped IDX", "gzipped IDX without the name"]


def write_copy(kind, arrays, folder):
    """Write arrays in one of the formats of MNIST into a folder; return the path to load."""
    path = folder / "digits.npz"
    if kind == "npz":
        np.savez(path, **arrays)
        return path
    if kind == "compressed npz":
        np.savez_compressed(path, **arrays)
        return path
    path = folder / "digits"
    path.mkdir()
    for key, array in arrays.items():
        header = np.array([0x0800 + array.ndim, *array.shape], ">u4")
        content = header.tobytes() + array.tobytes()
        name = IDX_NAMES[key]
        if kind == "IDX with dots":
            (path / name).mkdir()  # as archives for Windows have it
            name = name.replace("-idx", ".idx")
        if kind == "gzipped IDX":
            name += ".gz"
        if kind.startswith("gzipped IDX"):
            content = gzip.compress(content)
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope="module")
def few_arrays(small_arrays):
    """Return 40 training and 20 test images in the layout of Keras' mnist.npz."""
    return {key: array[: 40 if "train" in key else 20] for key, array in small_arrays.items()}


def assert_holds(digits, arrays):
    """Check that the digits are these arrays, with flat images and labels of 32 bits."""
    for key, array in arrays.items():
        expected = array.reshape(-1, 784) if key.startswith("x") else array.astype(np.int32)
        np.testing.assert_array_equal(getattr(digits, key), expected, key, strict=True)


@pytest.mark.parametrize("kind", ["npz", "compressed npz", "IDX", "IDX with dots", *GZIPPED])
def test_all_kinds_of_copies_load_alike_and_are_named_after_the_file(
    kind, small_arrays, tmp_path, capsys
):
    path = write_copy(kind, small_arrays, tmp_path)
    for given in (path, str(path)):
        digits = vae_helpers.load_mnist(given)
        assert_holds(digits, small_arrays)
        assert digits.name == f"{path.name} (not MNIST)"
    assert capsys.readouterr().out == ""


class Bomb:
    """An object that makes the test fail if it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def cut_off(content):
    return content[: len(content) // 2]


def flip_a_byte(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def rename_to_emnist(folder):
    for file in list(folder.iterdir()):
        file.rename(folder / f"emnist-digits-{file.name.replace('t10k', 'test')}")


# Arrays of an npz, how each is changed, and the reason that is given.
BAD_ARRAYS = [
    ("x_train", lambda images: images.astype(np.int64), r"x_train is int64 \[40, 28, 28\]"),
    ("x_train", lambda images: images / 255, "x_train is float64"),
    ("x_test", lambda images: images.reshape(20, 784), r"x_test is uint8 \[20, 784\]"),
    ("x_test", lambda images: images // 128, "x_test has values up to 1"),  # binarized
    ("x_train", lambda images: images // 16, "x_train has values up to 15"),
    ("x_train", lambda images: images[:0], r"x_train is uint8 \[0, 28, 28\].*N at least 1"),
    ("y_train", lambda labels: labels[:, None], r"y_train is uint8 \[40, 1\]"),
    ("y_test", lambda labels: np.full_like(labels, 10), "y_test has labels outside 0 to 9"),
    ("y_train", lambda labels: labels[1:], r"labels differ.*\[40, 39, 20, 20\]"),
    ("y_test", lambda labels: np.array([Bomb()]), "Object arrays cannot be loaded"),
]
# Kinds of copies, how the file (of test images) is damaged, and the reason that is given.
BAD_FILES = [
    ("npz", lambda file: file.unlink(), "there is no such file"),
    ("npz", lambda file: file.write_bytes(b"These are my digits."), "npz file"),
    ("npz", lambda file: file.write_bytes(b"label,pixel0,pixel1\n5,0,0\n"), "npz file"),
    ("npz", lambda file: np.save(file.open("wb"), np.zeros([5, 28, 28])), "npz file"),
    ("npz", lambda file: np.savez(file, images=np.zeros(5)), r"lacks \['x_test', .*'images'"),
    ("npz", lambda file: file.write_bytes(cut_off(file.read_bytes())), "complete npz file"),
    ("compressed npz", lambda file: file.write_bytes(flip_a_byte(file.read_bytes())), "x_train"),
    (
        "IDX",
        lambda file: file.unlink(),
        "four IDX files are needed; .*t10k-images.*among .'t10k-labels",
    ),
    ("IDX", lambda file: shutil.rmtree(file.parent) or file.parent.mkdir(), "four IDX files"),
    ("IDX", lambda file: rename_to_emnist(file.parent), "EMNIST's files hold transposed images"),
    ("IDX", lambda file: file.write_bytes(cut_off(file.read_bytes())), "images-.* is damaged"),
    ("IDX", lambda file: file.write_bytes(file.read_bytes()[:10]), "images-.* is damaged"),
    (
        "IDX",
        lambda file: file.write_bytes(b"\0\0\x0d" + file.read_bytes()[3:]),
        "images-.* damaged",
    ),
    ("gzipped IDX", lambda file: file.write_bytes(cut_off(file.read_bytes())), "t10k-images-idx3"),
    ("gzipped IDX", lambda file: file.write_bytes(flip_a_byte(file.read_bytes())), "t10k-images"),
]


def refusal(path):
    """Return the reason for which data are refused, after the name of their file."""
    with pytest.raises(ValueError, match="cannot be read as a copy of MNIST") as caught:
        vae_helpers.load_mnist(path)
    file, _, reason = str(caught.value).partition(": cannot be read as a copy of MNIST: ")
    assert file == str(path)
    return reason


@pytest.mark.parametrize(("key", "change", "word"), BAD_ARRAYS)
def test_bad_arrays_are_refused_by_name(key, change, word, few_arrays, tmp_path):
    changed = {**few_arrays, key: change(few_arrays[key])}
    assert re.search(word, refusal(write_copy("npz", changed, tmp_path)))


@pytest.mark.parametrize(("kind", "damage", "word"), BAD_FILES)
def test_bad_files_are_refused_by_name(kind, damage, word, few_arrays, tmp_path):
    path = write_copy(kind, few_arrays, tmp_path)
    damage(path if path.is_file() else next(path.glob("t10k-images*")))
    assert re.search(word, refusal(path))


@pytest.mark.parametrize("path", [0, True, ["mnist.npz"]])
def test_a_data_path_that_is_no_path_is_refused(path):
    with pytest.raises(ValueError, match=r"^data_path = .*: must be None or the path"):
        vae_helpers.load_mnist(path)


def test_the_script_of_the_readme_makes_shuffled_data(small_arrays, tmp_path, monkeypatch):
    for digit in range(10):
        folder = tmp_path / "my_digits" / str(digit)
        folder.mkdir(parents=True)
        images = small_arrays["x_test"][small_arrays["y_test"] == digit][:10]
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number}.png")
    (script,) = re.findall(r"```python\n(from pathlib.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    digits = vae_helpers.load_mnist("my_digits.npz")
    assert np.bincount(np.concatenate([digits.y_train, digits.y_test])).tolist() == [10] * 10
    assert len(np.unique(digits.y_train[:20])) > 5
    assert digits.x_train.max() == 255


def test_inverted_images_are_loaded_and_mentioned_once(few_arrays, tmp_path, capsys):
    inverted = {key: 255 - few_arrays[key] for key in ("x_train", "x_test")}
    path = write_copy("npz", {**few_arrays, **inverted}, tmp_path)
    assert_holds(vae_helpers.load_mnist(path), {**few_arrays, **inverted})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("digits.npz: the images look inverted")


def test_only_the_exact_images_are_called_mnist(mnist, tmp_path):
    digits = vae_helpers.load_mnist(mnist)
    assert digits.name == "MNIST"
    assert [len(array) for array in digits[:4]] == [60_000, 60_000, 10_000, 10_000]
    assert digits.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    with np.load(mnist) as archive:
        arrays = dict(archive)
    arrays["x_train"][0, 0, 0] = 1
    assert vae_helpers.load_mnist(write_copy("npz", arrays, tmp_path)).name != "MNIST"


def test_offline_digits_are_training_images_of_mnist(mnist):
    digits = vae_helpers.load_mnist(mnist)
    offline = vae_helpers.load_offline_digits(copies=1)
    label_by_image = {}
    for image, label in zip(digits.x_train, digits.y_train, strict=True):
        label_by_image[image.tobytes()] = label
    images = np.concatenate([offline.x_train, offline.x_test])
    labels = np.concatenate([offline.y_train, offline.y_test])
    assert len(np.unique(images, axis=0)) == 5000
    assert [label_by_image[image.tobytes()] for image in images] == labels.tolist()
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in digits.x_test}


def test_distorted_copies_of_offline_digits_are_framed_as_mnist():
    digits = vae_helpers.load_offline_digits(copies=2)
    assert digits.name == "5,000 MNIST images"
    assert (digits.x_train.shape, digits.x_test.shape) == ((9000, 784), (500, 784))
    assert np.bincount(digits.y_train).tolist() == [900] * 10
    for original, copy in zip(digits.x_train[:200], digits.x_train[4500:4700], strict=True):
        assert 0.3 < np.corrcoef(original, copy)[0, 1] < 0.9999
        ink = copy.reshape(28, 28)
        np.testing.assert_allclose(ndimage.center_of_mass(ink), [14, 14], atol=1.5)
        assert 18 <= np.ptp(np.argwhere(ink > 127), axis=0).max() + 1 <= 22


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a request as its server's `behavior` says."""

    def do_GET(self):  # noqa: D102
        self.server.requests += 1
        content = self.server.content
        if self.server.behavior == "silent":
            self.server.ended.wait()
            return
        self.send_response(404 if self.server.behavior == "not found" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.behavior == "cut off":
            content = cut_off(content)
        self.wfile.write(content)


@pytest.fixture
def server(small_npz, tmp_path, monkeypatch):
    """Serve a small npz at loopback in place of MNIST, with an empty cache in `tmp_path`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content = small_npz.read_bytes()
        server.behavior = "good"
        server.requests = 0
        server.ended = threading.Event()
        digest = hashlib.sha256(server.content).hexdigest()
        url = f"http://127.0.0.1:{server.server_port}/mnist.npz"
        monkeypatch.setattr(vae_helpers, "MNIST_HASH", f"sha256:{digest}")
        monkeypatch.setattr(vae_helpers, "MNIST_URL", url)
        monkeypatch.setenv("KERAS_HOME", str(tmp_path))
        monkeypatch.setenv("no_proxy", "*")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


def test_a_download_is_checked_and_cached(server, small_arrays, tmp_path):
    cached = tmp_path / "datasets" / "mnist.npz"
    for _ in range(2):
        assert_holds(vae_helpers.load_mnist(), small_arrays)
    assert server.requests == 1
    cached.write_bytes(flip_a_byte(server.content))
    assert_holds(vae_helpers.load_mnist(), small_arrays)
    assert server.requests == 2
    assert cached.read_bytes() == server.content


@pytest.mark.parametrize(
    ("behavior", "word"),
    [
        ("not found", "404"),
        ("cut off", "IncompleteRead"),
        ("silent", "[Tt]ime"),
    ],
)
def test_a_failed_download_falls_back_to_offline_digits(
    behavior, word, server, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(vae_helpers, "DOWNLOAD_TIMEOUT", 1)
    without_copies = functools.partial(vae_helpers.load_offline_digits, copies=1)  # to be fast
    monkeypatch.setattr(vae_helpers, "load_offline_digits", without_copies)
    server.behavior = behavior
    assert vae_helpers.load_mnist().name == "5,000 MNIST images"
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(f"cannot be downloaded.*{word}.*5,000 MNIST images", line)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_random_subset_represents_sorted_data():
    labels = np.repeat(np.arange(10), 100)
    images = np.arange(1000)[:, None] * np.ones(784)
    chosen, chosen_labels = vae_helpers.random_subset(200, images, labels, seed=0)
    assert np.bincount(chosen_labels).min() >= 8
    assert len(np.unique(chosen[:, 0])) == 200
    np.testing.assert_array_equal(chosen[:, 0] // 100, chosen_labels)
    again, _ = vae_helpers.random_subset(200, images, labels, seed=0)
    other, _ = vae_helpers.random_subset(200, images, labels, seed=1)
    np.testing.assert_array_equal(again, chosen)
    assert not np.array_equal(other, chosen)
    everything, _ = vae_helpers.random_subset(5000, images, labels, seed=0)
    assert sorted(everything[:, 0]) == list(range(1000))
