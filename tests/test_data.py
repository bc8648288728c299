"""Data found or refused: a clear error or the right images, called by their name."""

import contextlib
import gzip
import hashlib
import http.server
import itertools
import os
import re
import resource
import socket
import tempfile
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, full_disk, vae_helpers
from PIL import Image
from scipy import ndimage

IDX_NAMES = {"x_train": "train-images-idx3-ubyte", "y_train": "train-labels-idx1-ubyte"}
IDX_NAMES |= {"x_test": "t10k-images-idx3-ubyte", "y_test": "t10k-labels-idx1-ubyte"}
KINDS = ["npz", "compressed npz", "gzipped idx", "idx"]
URL = "http://127.0.0.1:{}/mnist.npz"  # by its port


def write_copy(kind, arrays, folder):
    """Write the arrays as a copy of MNIST, of one of KINDS, into a folder; return its path."""
    folder.mkdir(exist_ok=True)
    if "npz" in kind:
        path = folder / "mnist.npz"
        (np.savez_compressed if "compressed" in kind else np.savez)(path, **arrays)
        return path
    write, suffix = (gzip.open, ".gz") if "gzipped" in kind else (open, "")
    for name, array in arrays.items():
        header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
        with write(folder / (IDX_NAMES[name] + suffix), "wb") as file:
            file.write(header + array.astype(np.uint8).tobytes())
    return folder


@pytest.fixture(scope="module")
def few_arrays(small_arrays):
    """Return 40 training and 20 test images in the layout of Keras' mnist.npz."""
    return {name: array[: 40 if "train" in name else 20] for name, array in small_arrays.items()}


def assert_loads(path, arrays, name="mnist.npz"):
    """Check that these arrays are loaded from a path, under this name."""
    digits = vae_helpers.load_mnist(path)
    for found, key in zip(digits[:4], IDX_NAMES, strict=True):
        expected = arrays[key].reshape(-1, 784) if "x" in key else arrays[key].astype(np.int32)
        np.testing.assert_array_equal(found, expected, key, strict=True)
    assert digits.name == f"{name} (not MNIST)"


@pytest.mark.parametrize(("kind", "labels"), [*((kind, "u1") for kind in KINDS), ("npz", ">i8")])
def test_copies_of_every_kind_and_byte_order_are_alike(kind, labels, small_arrays, tmp_path):
    typed = {name: small_arrays[name].astype(labels) for name in ("y_train", "y_test")}
    path = write_copy(kind, small_arrays | typed, tmp_path)
    assert_loads(path, small_arrays, path.name)
    if kind == "gzipped idx":  # the other name that is in use, and a path that is no Path
        (path / "t10k-images-idx3-ubyte.gz").rename(path / "t10k-images.idx3-ubyte.gz")
        assert_loads(str(path), small_arrays, path.name)


ZEROS = np.zeros(300 << 20, np.uint8)  # they take no memory before they are written
BOMB = type("Bomb", (), {"__reduce__": lambda _: (pytest.fail, ("unpickled",))})()  # fails a test
# Changes to the arrays of a good archive, each with a name and a word of the error.
BAD_NPZ = [
    ("missing", lambda a: a.pop("x_test"), "x_test"),
    ("float images", lambda a: a.update(x_train=a["x_train"] / 255), "float64"),
    ("flat images", lambda a: a.update(x_test=a["x_test"].reshape(-1, 784)), "784"),
    ("no images", lambda a: a.update(x_test=a["x_test"][:0], y_test=a["y_test"][:0]), "0, 28"),
    ("scalar images", lambda a: a.update(x_test=np.uint8(3)), "uint8"),
    ("300 MiB", lambda a: a.update(x_train=ZEROS), "unpacks to more than 300,000 images"),
    ("fewer labels", lambda a: a.update(y_train=a["y_train"][1:]), "labels"),
    ("float labels", lambda a: a.update(y_train=a["y_train"] + 0.5), "labels"),
    ("label 10", lambda a: a.update(y_test=a["y_test"] + 1), "labels must be .* from 0 to 9"),
    ("label −1", lambda a: a.update(y_test=a["y_test"].astype(int) - 1), "labels must be"),
    ("pickled", lambda a: a.update(y_test=np.array([BOMB])), "pickle"),
]


@pytest.mark.parametrize(("_", "change", "word"), BAD_NPZ)
def test_bad_npz_is_named(_, change, word, few_arrays, tmp_path):
    arrays = dict(few_arrays)
    change(arrays)
    path = write_copy("compressed npz", arrays, tmp_path)
    with pytest.raises(ValueError, match=f"{path}: .*{word}"):
        vae_helpers.load_mnist(path)


def refuses(path, file, content, arrays):
    """Tell whether such content of a copy's file is refused by its name; else it is harmless."""
    whole, before = file.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file.write_bytes(content)
    try:
        assert_loads(path, arrays, path.name)
        return False
    except ValueError as error:
        if str(file) not in str(error):
            raise
        return True
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_damaged_bytes_are_noticed_or_harmless(kind, few_arrays, tmp_path):
    path, files = write_copy(kind, few_arrays, tmp_path), sorted(tmp_path.iterdir())
    random, refused = np.random.default_rng(0), 0
    for trial in range(300):
        file = random.choice(files)
        damaged = np.fromfile(file, np.uint8)
        # The archive's own structures, at its ends and between its entries, are likely trouble.
        headers = [match.start() for match in re.finditer(b"PK", damaged)]
        near = random.choice(headers) + random.integers(140) if headers else random.integers(20)
        position = min(near if trial % 3 == 0 else random.integers(damaged.size), damaged.size - 1)
        damaged[position : position + random.integers(1, 5)] ^= np.uint8(random.integers(1, 256))
        # Not refused: damage to a time stamp or a name in a header.
        refused += refuses(path, file, damaged, few_arrays)
    assert refused > 150


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_off_anywhere_is_refused(kind, few_arrays, tmp_path):
    path, files = write_copy(kind, few_arrays, tmp_path), sorted(tmp_path.iterdir())
    for file in files:
        whole = file.read_bytes()
        lengths = np.linspace(0, len(whole) - 1, 100 // len(files) + 10).astype(int)
        assert all(refuses(path, file, whole[:length], few_arrays) for length in lengths)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_an_idx_file_with_a_bad_header_too_long_missing_or_a_pipe(kind, few_arrays, tmp_path):
    # A plain IDX file has no checksum: damage to a pixel cannot be seen, damage to the header can.
    folder, files = write_copy(kind, few_arrays, tmp_path), sorted(tmp_path.iterdir())
    for file in files:
        pack, unpack = (gzip.compress, gzip.decompress) if file.suffix else (bytes, bytes)
        whole = unpack(file.read_bytes())
        contents = [whole + b"\0", whole[:4] + b"\xff" * 4 + whole[8:], whole[3::-1] + whole[4:]]
        flips = itertools.product(range(16 if "images" in file.name else 8), (1, 0x80, 0xFF))
        contents += [whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :] for i, flip in flips]
        assert all(refuses(folder, file, pack(content), few_arrays) for content in contents)
        away = file.rename(folder / "away")
        name = file.name.partition("-idx")[0]
        with pytest.raises(ValueError, match=f"{name}.*No such file.*{name}"):
            vae_helpers.load_mnist(folder)
        os.mkfifo(file)
        with pytest.raises(ValueError, match=f"{name}.*No such file.*{name}"):
            vae_helpers.load_mnist(folder)
        away.replace(file)


def test_what_unpacks_to_or_promises_far_more_is_read_no_further(few_arrays, tmp_path):
    path = write_copy("gzipped idx", few_arrays, tmp_path) / (IDX_NAMES["x_train"] + ".gz")
    gibibyte_more = path.read_bytes() + 1024 * gzip.compress(bytes(1 << 20))
    assert refuses(tmp_path, path, gibibyte_more, few_arrays)
    path = write_copy("npz", {n: few_arrays[n] for n in IDX_NAMES if n != "x_train"}, tmp_path)
    promise = {"descr": "|u1", "fortran_order": False, "shape": (20_000_000, 28, 28)}
    with zipfile.ZipFile(path, "a") as archive, archive.open("x_train.npy", "w") as entry:
        np.lib.format.write_array_header_1_0(entry, promise)
        entry.write(few_arrays["x_train"].tobytes())
    assert refuses(path, path, path.read_bytes(), few_arrays)


def test_what_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.symlink("nowhere", "link")
    os.mkdir("folder")
    Path("text.npz").write_text("not an archive")
    words = {"fifo": "special", "folder": "No such file", "text.npz": "not a zip file", "": ""}
    words |= {"link": "no such file", "nowhere.npz": "no such file", "a\0b": "", "x" * 5000: ""}
    for path, word in words.items():
        with pytest.raises(ValueError, match=f"{path}.*: not a readable copy.*{word}"):
            vae_helpers.load_mnist(path)


def test_other_data_have_their_files_name_but_emnist_is_refused(few_arrays, tmp_path, monkeypatch):
    folder = write_copy("idx", few_arrays, tmp_path / "Fashion-MNIST")
    archive = write_copy("npz", few_arrays, tmp_path).rename(tmp_path / "fashion.npz")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (folder, ".", archive, "~/fashion.npz"):
        assert_loads(path, few_arrays, "fashion.npz" if "npz" in str(path) else "Fashion-MNIST")
    for path in list(folder.iterdir()):
        path.rename(folder / f"emnist-digits-{path.name.replace('t10k', 'test')}")
    with pytest.raises(ValueError, match="EMNIST's files hold transposed images"):
        vae_helpers.load_mnist(folder)


def test_mnist_is_known_by_its_images_and_offline_digits_are_of_it(mnist, tmp_path):
    digits = vae_helpers.load_mnist(mnist)
    assert digits.name == "MNIST"
    assert [len(array) for array in digits[:4]] == [60_000, 60_000, 10_000, 10_000]
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(digits.y_test).tolist() == counts
    assert digits.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    for name in IDX_NAMES:
        arrays = dict(np.load(mnist))
        arrays[name].flat[-1] ^= 1
        path = write_copy("npz", arrays, tmp_path)
        assert vae_helpers.load_mnist(path).name == "mnist.npz (not MNIST)"
    known = {image.tobytes(): digit for image, digit in zip(*digits[:2], strict=True)}
    offline_digits = vae_helpers.load_offline_digits(copies=1)
    images, labels = (np.concatenate(offline_digits[i:4:2]) for i in (0, 1))
    assert [known[image.tobytes()] for image in images] == labels.tolist()
    assert known.keys().isdisjoint(image.tobytes() for image in digits.x_test)


def test_offline_digits_are_real_mnist_and_variants_framed_like_it():
    digits = vae_helpers.load_offline_digits(copies=3)
    assert digits.name == "5,000 MNIST images"
    assert (digits.x_train.shape, digits.x_test.shape) == ((3 * 4500, 784), (500, 784))
    assert digits.x_train.dtype == digits.x_test.dtype == np.uint8
    assert [np.bincount(labels).tolist() for labels in digits[1:4:2]] == [[3 * 450] * 10, [50] * 10]
    assert len(np.unique(np.vstack([digits.x_train[:4500], digits.x_test]), axis=0)) == 5000
    variants = digits.x_train[4500:].reshape(-1, 28, 28)
    ink = variants > 127
    boxes = np.maximum(ink.any(axis=1).sum(axis=1), ink.any(axis=2).sum(axis=1))
    assert np.mean((boxes >= 19) & (boxes <= 21)) > 0.99  # in a box of 20×20 pixels
    centres = [ndimage.center_of_mass(variant) for variant in variants]
    np.testing.assert_array_less(np.abs(np.subtract(centres, 14)), 1.5)
    for first, second in zip(digits.x_train[:100], digits.x_train[4500:4600], strict=True):
        assert 0.3 < np.corrcoef(first, second)[0, 1] < 0.9999  # a variant of that image
    np.testing.assert_array_equal(digits.x_train, vae_helpers.load_offline_digits(copies=3).x_train)


@pytest.fixture
def download(small_npz, tmp_path, monkeypatch):
    """Serve a file at loopback in place of Keras' host; return the server and the cached path."""
    content = small_npz.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += self.path == "/mnist.npz"
            self.send_response(200 if self.server.sent else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: int(len(content) * self.server.sent)])
            time.sleep(self.server.stall)

    # The host, the checksum and the cache are others; all else is as it is for a person.
    assert vae_helpers.MNIST_URL.startswith("https://")
    assert len(vae_helpers.MNIST_HASH) == len("sha256:") + 64
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(vae_helpers, "MNIST_HASH", f"sha256:{hashlib.sha256(content).hexdigest()}")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.sent, server.stall = 0, 1, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(vae_helpers, "MNIST_URL", URL.format(server.server_port))
        yield server, tmp_path / "datasets" / "mnist.npz"
        server.shutdown()


def test_download_is_checked_and_cached(download, small_arrays):
    server, cached = download
    for downloads in (1, 2):
        for _ in range(2):
            assert_loads(None, small_arrays)
        assert server.requests == downloads
        cached.write_bytes(cached.read_bytes()[:-1])  # no longer what the checksum says


@pytest.mark.parametrize(
    ("fault", "patience", "word"),
    [
        ("not found", None, "404"),
        ("cut off", None, "IncompleteRead"),
        ("stalled", 2, "TimeoutError"),
        ("silent", None, "TimeoutError"),
        ("black hole", 2, "TimeoutError"),
        ("refused", 2, "Error"),
        ("slow name", 2, "TimeoutError"),
        ("no name", 2, "Error"),  # another one where no name server can be asked
        ("no room", None, "File too large"),
    ],
)
def test_failed_download_is_noticed_and_said(
    fault, patience, word, download, small_arrays, monkeypatch, capsys
):
    server, cached = download
    monkeypatch.setattr(vae_helpers, "PATIENCE", patience or vae_helpers.PATIENCE)
    without_variants = partial(vae_helpers.load_offline_digits, copies=1)  # to be fast
    monkeypatch.setattr(vae_helpers, "load_offline_digits", without_variants)
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        other = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        if fault in ("silent", "black hole", "refused"):  # a host that never answers
            patch.setattr(vae_helpers, "MNIST_URL", URL.format(other.getsockname()[1]))
        match fault:
            case "not found":
                patch.setattr(server, "sent", 0)
            case "cut off" | "stalled":
                patch.setattr(server, "sent", 0.5)
                patch.setattr(server, "stall", 60 if fault == "stalled" else 0)
            case "black hole":  # it drops what is sent to it: its queue of connections is full
                for _ in range(4):
                    client = stack.enter_context(socket.socket())
                    client.setblocking(False)
                    client.connect_ex(other.getsockname())
            case "refused":  # nobody listens there any longer
                other.close()
            case "slow name":  # as when no name server answers
                patch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(60))
            case "no name":  # it does not resolve, by the rules of RFC 6761
                patch.setattr(vae_helpers, "MNIST_URL", "http://vae2.invalid/mnist.npz")
            case "no room":
                stack.enter_context(full_disk(10_000))
        start = time.monotonic()
        assert vae_helpers.load_mnist().name == "5,000 MNIST images"
        assert time.monotonic() - start < 15  # the seconds that it may take to notice
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "No MNIST" in line]
    assert re.search(f"{word}.*5,000 MNIST images", said)
    assert not cached.exists()
    assert_loads(None, small_arrays)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_cache_that_cannot_be_written_is_read(download, small_arrays, monkeypatch):
    with tempfile.TemporaryDirectory() as home:  # everybody can get there, unlike to tmp_path
        monkeypatch.setenv("KERAS_HOME", home)
        monkeypatch.setenv("HOME", "/nonexistent")
        assert_loads(None, small_arrays)
        for name, mode in (("", 0o755), ("datasets", 0o555), ("datasets/mnist.npz", 0o444)):
            os.chmod(f"{home}/{name}", mode)
        os.setresuid(65534, 65534, 0)  # nobody, who may become root again
        try:
            assert not os.access(f"{home}/datasets", os.W_OK)
            assert_loads(None, small_arrays)
        finally:
            os.setresuid(0, 0, 0)
    assert download[0].requests == 1


def test_readmes_recipe_packs_images_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, [30, 28, 28], np.uint8)
    for number, image in enumerate(images):
        path = Path("my_digits", str(number // 3), f"{number:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (recipe,) = re.findall(r"```python\n([^`]*my_digits[^`]*)```", (ROOT / "README.md").read_text())
    exec(recipe, {})
    test, labels = np.arange(30) % 10 == 0, np.arange(30) // 3
    expected = images[~test], labels[~test], images[test], labels[test]
    assert_loads("my_digits.npz", dict(zip(IDX_NAMES, expected, strict=True)), "my_digits.npz")
