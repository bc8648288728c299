"""Data found or refused: a clear error or the right images, called by their name."""

import functools
import gzip
import hashlib
import http.server
import itertools
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import vae_helpers

IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}

MEMORY = 256 << 20  # bytes that reading a damaged small file may take at most


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
    assert digits.name.endswith(" (not MNIST)")


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
    ("missing", lambda a: a.pop("x_test"), "x_test"),
    ("float images", lambda a: a.update(x_train=a["x_train"] / 255), "float64"),
    ("flat images", lambda a: a.update(x_test=a["x_test"].reshape(-1, 784)), "784"),
    ("no images", lambda a: a.update(x_test=a["x_test"][:0], y_test=a["y_test"][:0]), "0, 28"),
    ("scalar images", lambda a: a.update(x_test=np.uint8(3)), "uint8"),
    ("fewer labels", lambda a: a.update(y_train=a["y_train"][1:]), "labels"),
    ("float labels", lambda a: a.update(y_train=a["y_train"] + 0.5), "labels"),
    ("label 10", lambda a: a.update(y_test=a["y_test"] + 1), "labels must be .* from 0 to 9"),
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


def test_a_missing_idx_file_is_named(small_arrays, tmp_path):
    write_idx(tmp_path, small_arrays, ".gz")
    (tmp_path / (IDX_NAMES["y_train"] + ".gz")).unlink()
    with pytest.raises(ValueError, match="No such file.*train-labels"):
        vae_helpers.load_mnist(tmp_path)


@pytest.fixture(scope="module")
def few_arrays(small_arrays):
    """Return 40 training and 20 test images in the layout of Keras' mnist.npz."""
    return {name: array[: 40 if "train" in name else 20] for name, array in small_arrays.items()}


def peak_memory():
    """Return the most memory that this process has held so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def is_refused(path, arrays, named=None):
    """Tell whether a damaged copy is refused by its name; if not, it must give these arrays."""
    before, message = peak_memory(), None
    try:
        assert_same(vae_helpers.load_mnist(path), arrays)
    except ValueError as error:
        message = str(error)
    assert peak_memory() - before < MEMORY
    assert message is None or str(named or path) in message
    return message is not None


@pytest.fixture
def copy(request, few_arrays, tmp_path):
    """Write a copy of MNIST of one kind; return its path and those of its files."""
    path = tmp_path / "mnist.npz"
    if "npz" not in request.param:
        write_idx(tmp_path, few_arrays, ".gz" if "gzip" in request.param else "")
        return tmp_path, sorted(tmp_path.iterdir())
    (np.savez_compressed if "compressed" in request.param else np.savez)(path, **few_arrays)
    return path, [path]


KINDS = ["npz", "compressed npz", "gzipped idx", "idx"]


@pytest.mark.parametrize("copy", KINDS[:3], indirect=True)
def test_damaged_bytes_are_noticed_or_harmless(copy, few_arrays):
    path, files = copy
    random, refused = np.random.default_rng(0), 0
    for trial in range(300):
        file = random.choice(files)
        whole = file.read_bytes()
        # The archive's own structures, at its ends and between its entries, are likely trouble.
        headers = [i for i in range(len(whole)) if whole[i : i + 2] == b"PK"]
        near = random.choice(headers) + random.integers(140) if headers else random.integers(20)
        position = min(near if trial % 3 == 0 else random.integers(len(whole)), len(whole) - 1)
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[position : position + random.integers(1, 5)] ^= np.uint8(random.integers(1, 256))
        file.write_bytes(damaged.tobytes())
        # Not refused: damage to a time stamp or a name in a header.
        refused += is_refused(path, few_arrays, named=file)
        file.write_bytes(whole)
    assert refused > 150


@pytest.mark.parametrize("copy", KINDS, indirect=True)
def test_a_file_cut_off_anywhere_is_refused(copy, few_arrays):
    path, files = copy
    for file in files:
        whole = file.read_bytes()
        for length in np.linspace(0, len(whole) - 1, 100 // len(files) + 10).astype(int):
            file.write_bytes(whole[:length])
            assert is_refused(path, few_arrays, named=file)
        file.write_bytes(whole)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_with_a_damaged_header_or_a_byte_too_many(suffix, few_arrays, tmp_path):
    # A plain IDX file has no checksum: damage to a pixel cannot be seen, damage to the header can.
    write_idx(tmp_path, few_arrays, suffix)
    pack, unpack = (gzip.compress, gzip.decompress) if suffix else (bytes, bytes)
    for name, header_bytes in zip(IDX_NAMES.values(), (16, 8, 16, 8), strict=True):
        path = tmp_path / (name + suffix)
        whole = unpack(path.read_bytes())
        contents = [whole + b"\0", whole[:4] + b"\xff" * 4 + whole[8:], whole[3::-1] + whole[4:]]
        for position, flip in itertools.product(range(header_bytes), (1, 0x80, 0xFF)):
            contents.append(bytearray(whole))
            contents[-1][position] ^= flip
        for content in contents:
            path.write_bytes(pack(content))
            assert is_refused(tmp_path, few_arrays, named=path)
        path.write_bytes(pack(whole))


def test_gzip_that_unpacks_to_far_more_is_read_no_further(few_arrays, tmp_path):
    write_idx(tmp_path, few_arrays, ".gz")
    path = tmp_path / (IDX_NAMES["x_train"] + ".gz")
    with gzip.open(path, "ab") as file:
        for _ in range(1024):
            file.write(bytes(1 << 20))
    assert is_refused(tmp_path, few_arrays)


def test_npz_that_promises_far_more_than_it_holds(few_arrays, tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez(path, **few_arrays)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    honest, false = b"(40, 28, 28), }      ", b"(20000000, 28, 28), }"
    assert entries["x_train.npy"].count(honest) == 1
    entries["x_train.npy"] = entries["x_train.npy"].replace(honest, false)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert is_refused(path, few_arrays)


def test_other_byte_orders_of_labels_are_read_right(few_arrays, tmp_path):
    path = tmp_path / "mnist.npz"
    labels = {name: few_arrays[name].astype(">i8") for name in ("y_train", "y_test")}
    np.savez(path, **{**few_arrays, **labels})
    assert_same(vae_helpers.load_mnist(path), few_arrays)


def test_what_is_no_file(few_arrays, tmp_path):
    fifo, link, folder = tmp_path / "fifo", tmp_path / "link", tmp_path / "folder"
    text, nowhere = tmp_path / "text.npz", tmp_path / "nowhere.npz"
    text.write_text("not an archive")
    os.mkfifo(fifo)
    link.symlink_to(tmp_path / "nowhere")
    folder.mkdir()
    words = {fifo: "special", link: "no such file", folder: "No such file", nowhere: "no such file"}
    for path, word in {**words, text: "not a zip file"}.items():
        with pytest.raises(ValueError, match=f"{path}.*{word}"):
            vae_helpers.load_mnist(path)
    for path in ("", "a\0b", "x" * 5000):
        with pytest.raises(ValueError, match="not a readable"):
            vae_helpers.load_mnist(path)
    write_idx(tmp_path, few_arrays)
    (tmp_path / IDX_NAMES["x_test"]).unlink()
    os.mkfifo(tmp_path / IDX_NAMES["x_test"])
    with pytest.raises(ValueError, match="t10k-images.*No such file"):
        vae_helpers.load_mnist(tmp_path)


@pytest.fixture
def few_offline_digits(monkeypatch):
    """Make few variants of the offline digits, to be fast."""
    few = functools.partial(vae_helpers.load_offline_digits, copies=1)
    monkeypatch.setattr(vae_helpers, "load_offline_digits", few)


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
            self.server.stalled.wait(60)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.sent, server.stalled = 0, 1.0, threading.Event()
    server.daemon_threads = True
    server.stalled.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The host, the checksum and the cache are others; all else is as it is for a person.
    checksum = hashlib.sha256(small_npz.read_bytes()).hexdigest()
    assert vae_helpers.MNIST_URL.startswith("https://")
    assert len(vae_helpers.MNIST_HASH) == len("sha256:") + 64
    url = f"http://127.0.0.1:{server.server_port}/mnist.npz"
    monkeypatch.setattr(vae_helpers, "MNIST_URL", url)
    monkeypatch.setattr(vae_helpers, "MNIST_HASH", f"sha256:{checksum}")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
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


@pytest.mark.parametrize(("sent", "stalls"), [(0, False), (0.5, False), (0.5, True)])
@pytest.mark.usefixtures("few_offline_digits")
def test_failed_download_falls_back_and_says_so(
    sent, stalls, download, small_arrays, monkeypatch, capsys
):
    server, cached = download
    server.sent = sent
    if stalls:
        server.stalled.clear()
        monkeypatch.setattr(vae_helpers, "PATIENCE", 2)
    start = time.monotonic()
    digits = vae_helpers.load_mnist()
    assert time.monotonic() - start < 15  # the seconds that it may take to notice
    assert digits.name == "5,000 MNIST images"
    said = [line for line in capsys.readouterr().out.splitlines() if "No MNIST" in line]
    assert len(said) == 1
    assert "5,000 MNIST images" in said[0]
    assert not cached.exists()
    server.stalled.set()
    server.sent = 1.0
    assert_same(vae_helpers.load_mnist(), small_arrays)


def test_offline_digits_are_real_mnist_and_variants_framed_like_it():
    digits = vae_helpers.load_offline_digits(copies=3)
    assert digits.name == "5,000 MNIST images"
    assert digits.x_train.shape == (3 * 4500, 784)
    assert digits.x_test.shape == (500, 784)
    assert digits.x_train.dtype == digits.x_test.dtype == np.uint8
    assert np.bincount(digits.y_test).tolist() == [50] * 10
    assert np.bincount(digits.y_train).tolist() == [3 * 450] * 10
    whole = np.concatenate([digits.x_train[:4500], digits.x_test])
    assert len(np.unique(whole, axis=0)) == 5000
    variants = digits.x_train[4500:].reshape(-1, 28, 28).astype(float)
    ink = variants > 127
    boxes = np.maximum(ink.any(axis=1).sum(axis=1), ink.any(axis=2).sum(axis=1))
    assert np.mean((boxes >= 19) & (boxes <= 21)) > 0.99  # in a box of 20×20 pixels
    rows, columns = np.indices([28, 28])
    mass = variants.sum(axis=(1, 2))
    centres = [(variants * axis).sum(axis=(1, 2)) / mass for axis in (rows, columns)]
    assert np.abs(np.array(centres) - 14).max() < 1.5
    for first, second in zip(digits.x_train[:100], digits.x_train[4500:4600], strict=True):
        assert 0.3 < np.corrcoef(first, second)[0, 1] < 0.9999  # a variant of that image
    again = vae_helpers.load_offline_digits(copies=3)
    np.testing.assert_array_equal(digits.x_train, again.x_train)


def test_offline_digits_are_of_mnists_training_set(mnist):
    digits, all_digits = vae_helpers.load_offline_digits(copies=1), vae_helpers.load_mnist(mnist)
    known = {image.tobytes(): digit for image, digit in zip(*all_digits[:2], strict=True)}
    ours = zip(*(np.concatenate([digits[i], digits[i + 2]]) for i in (0, 1)), strict=True)
    assert all(known[image.tobytes()] == digit for image, digit in ours)
    assert not {image.tobytes() for image in all_digits.x_test} & {
        image.tobytes() for image in digits.x_train
    }


def test_mnist_is_known_by_its_images_and_not_by_its_name(mnist, tmp_path):
    digits = vae_helpers.load_mnist(mnist)
    assert digits.name == "MNIST"
    arrays = dict(np.load(mnist))
    for name in ("x_train", "y_train", "x_test", "y_test"):
        changed = {**arrays, name: arrays[name].copy()}
        changed[name].flat[-1] ^= 1
        np.savez(tmp_path / "mnist.npz", **changed)
        assert vae_helpers.load_mnist(tmp_path / "mnist.npz").name == "mnist.npz (not MNIST)"


def test_another_data_set_has_the_name_of_its_file_or_folder(few_arrays, tmp_path, monkeypatch):
    clothes = {
        name: array[:, ::-1] if name[0] == "x" else array for name, array in few_arrays.items()
    }
    folder = tmp_path / "Fashion-MNIST"
    folder.mkdir()
    write_idx(folder, clothes)
    np.savez(tmp_path / "fashion.npz", **clothes)
    assert vae_helpers.load_mnist(folder).name == "Fashion-MNIST (not MNIST)"
    assert vae_helpers.load_mnist(tmp_path / "fashion.npz").name == "fashion.npz (not MNIST)"
    monkeypatch.chdir(folder)
    assert vae_helpers.load_mnist(".").name == "Fashion-MNIST (not MNIST)"


def test_emnist_is_refused_by_name(few_arrays, tmp_path):
    write_idx(tmp_path, few_arrays)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / f"emnist-digits-{path.name.replace('t10k', 'test')}")
    with pytest.raises(ValueError, match="EMNIST's files hold transposed images"):
        vae_helpers.load_mnist(tmp_path)


def silent(monkeypatch):
    """Return a port that takes connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(vae_helpers, "_test_server", server, raising=False)
    return server.getsockname()[1]


def black_hole(monkeypatch):
    """Return a port that drops what is sent to it: its queue of connections is full."""
    server = socket.create_server(("127.0.0.1", 0), backlog=0)
    waiting = [socket.socket() for _ in range(4)]
    for client in waiting:
        client.setblocking(False)
        client.connect_ex(server.getsockname())
    monkeypatch.setattr(vae_helpers, "_test_server", (server, waiting), raising=False)
    return server.getsockname()[1]


def refused(monkeypatch):
    """Return a port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def slow_name(monkeypatch):
    """Let every look-up of a name fail after a minute, as when no name server answers."""

    def look_up(*_, **__):
        time.sleep(60)
        raise socket.gaierror("no name server answered")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return 9


def no_name(monkeypatch):
    """Use a host whose name does not resolve, by the rules of RFC 6761."""
    return None


@pytest.mark.parametrize(
    ("fault", "patience"),
    [(silent, None), (black_hole, 2), (refused, 2), (slow_name, 2), (no_name, 2)],
)
def test_no_network_is_noticed_and_said(fault, patience, monkeypatch, tmp_path, capsys):
    if patience:  # `None`: that of the notebook, which is as long for all of them
        monkeypatch.setattr(vae_helpers, "PATIENCE", patience)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    port = fault(monkeypatch)
    host = f"http://127.0.0.1:{port}" if port else "http://vae2.invalid"
    monkeypatch.setattr(vae_helpers, "MNIST_URL", f"{host}/mnist.npz")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(vae_helpers, "load_offline_digits", time.monotonic)
    start = time.monotonic()
    assert vae_helpers.load_mnist() - start < 15  # the seconds that it may take to notice
    said = [line for line in capsys.readouterr().out.splitlines() if "No MNIST" in line]
    assert len(said) == 1
    assert "5,000 MNIST images" in said[0]
    assert not (tmp_path / "datasets" / "mnist.npz").exists()


@pytest.mark.usefixtures("few_offline_digits")
def test_no_room_in_the_cache_is_said(download, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as on a full disk
    try:
        assert vae_helpers.load_mnist().name == "5,000 MNIST images"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().out
    assert not download[1].exists()


READ_CACHE = """
import os, sys
import vae_helpers
vae_helpers.load_mnist(sys.argv[2])  # with all modules, which lie where not everybody can read
os.setgid(65534), os.setuid(65534)  # nobody, who cannot write there
vae_helpers.MNIST_HASH = sys.argv[1]
print(len(vae_helpers.load_mnist().x_train))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_cache_that_cannot_be_written_is_read(small_npz):
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        folder = Path(home, "datasets")
        folder.mkdir()
        shutil.copy(small_npz, folder / "mnist.npz")
        os.chmod(folder / "mnist.npz", 0o444)
        os.chmod(folder, 0o555)
        checksum = f"sha256:{hashlib.sha256(small_npz.read_bytes()).hexdigest()}"
        env = {**os.environ, "KERAS_HOME": home, "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", READ_CACHE, checksum, small_npz]
        run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.stdout == "3000\n", run.stderr


def test_the_home_is_found_in_a_path(small_npz, monkeypatch):
    monkeypatch.setenv("HOME", str(small_npz.parent))
    assert len(vae_helpers.load_mnist("~/small.npz").x_train) == 3000


def test_readmes_recipe_packs_images_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, [30, 28, 28], np.uint8)
    for number, image in enumerate(images):
        folder = tmp_path / "my_digits" / str(number // 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:02}.png")
    readme = (ROOT / "README.md").read_text()
    (recipe,) = re.findall(r"```python\n([^`]*my_digits[^`]*)```", readme)
    exec(recipe, {})
    digits = vae_helpers.load_mnist("my_digits.npz")
    assert digits.name == "my_digits.npz (not MNIST)"
    test = np.arange(30) % 10 == 0
    np.testing.assert_array_equal(digits.x_test, images[test].reshape(3, 784))
    np.testing.assert_array_equal(digits.x_train, images[~test].reshape(27, 784))
    np.testing.assert_array_equal(digits.y_train, (np.arange(30) // 3)[~test])
