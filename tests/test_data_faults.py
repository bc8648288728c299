"""Damaged files and lost networks: a clear error or the right data, never anything else."""

import gzip
import http.server
import os
import resource
import socket
import threading
import time
import zipfile

import keras
import numpy as np
import pytest
from keras.src.datasets import mnist as keras_mnist
from test_helpers import IDX_NAMES, assert_same, write_idx

import vae_helpers

MEMORY = 256 << 20  # bytes that reading a damaged small file may take at most


@pytest.fixture(scope="module")
def few_arrays(small_arrays):
    """Return 40 training and 20 test images in the layout of Keras' mnist.npz."""
    return {name: array[: 40 if "train" in name else 20] for name, array in small_arrays.items()}


def load(path):
    """Return the digits of a copy and None, or None and the message with which it is refused."""
    try:
        return vae_helpers.load_mnist(path), None
    except ValueError as error:
        return None, str(error)


def peak_memory():
    """Return the most memory that this process has held so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def is_refused(path, arrays, named=None):
    """Tell whether a damaged copy is refused by its name; if not, it must give these arrays."""
    before = peak_memory()
    digits, message = load(path)
    assert peak_memory() - before < MEMORY
    if message:
        assert str(named or path) in message
    else:
        assert_same(digits, arrays)
    return bool(message)


def npz_bytes(arrays, path, compressed):
    """Return the bytes of an archive of the arrays, which is written at the path."""
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path.read_bytes()


@pytest.mark.parametrize("compressed", [True, False])
def test_npz_with_damaged_bytes(compressed, few_arrays, tmp_path):
    path = tmp_path / "mnist.npz"
    whole = npz_bytes(few_arrays, path, compressed)
    random = np.random.default_rng(0)
    # The archive's own structures, at its ends and between its entries, are the likely trouble.
    headers = [i for i in range(len(whole)) if whole[i : i + 2] == b"PK"]
    refused = 0
    for trial in range(300):
        damaged = np.frombuffer(whole, np.uint8).copy()
        near = random.choice(headers) + random.integers(0, 140)
        position = near if trial % 2 else random.integers(len(whole))
        position = min(position, len(whole) - 1)
        damaged[position : position + random.integers(1, 5)] ^= random.integers(
            1, 256, dtype=np.uint8
        )
        path.write_bytes(damaged.tobytes())
        refused += is_refused(path, few_arrays)
    assert refused > 150


@pytest.mark.parametrize("compressed", [True, False])
def test_npz_cut_off_anywhere(compressed, few_arrays, tmp_path):
    path = tmp_path / "mnist.npz"
    whole = npz_bytes(few_arrays, path, compressed)
    for length in np.linspace(0, len(whole) - 1, 100).astype(int):
        path.write_bytes(whole[:length])
        assert is_refused(path, few_arrays)


def test_gzipped_idx_with_damaged_bytes(few_arrays, tmp_path):
    write_idx(tmp_path, few_arrays, ".gz")
    random = np.random.default_rng(0)
    refused = 0
    for trial in range(200):
        path = tmp_path / (IDX_NAMES[random.choice(list(IDX_NAMES))] + ".gz")
        whole = path.read_bytes()
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[random.integers(20 if trial % 2 else len(whole))] ^= random.integers(
            1, 256, dtype=np.uint8
        )
        path.write_bytes(damaged.tobytes())
        # Not refused: damage to a time stamp or a name in gzip's header.
        refused += is_refused(tmp_path, few_arrays, named=path.name)
        path.write_bytes(whole)
    assert refused > 100


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_cut_off_anywhere(suffix, few_arrays, tmp_path):
    write_idx(tmp_path, few_arrays, suffix)
    for name in IDX_NAMES.values():
        path = tmp_path / (name + suffix)
        whole = path.read_bytes()
        for length in np.linspace(0, len(whole) - 1, 30).astype(int):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=path.name):
                vae_helpers.load_mnist(tmp_path)
        path.write_bytes(whole)


def test_idx_with_a_damaged_header(few_arrays, tmp_path):
    # A plain IDX file has no checksum: damage to a pixel cannot be seen, damage to the header can.
    write_idx(tmp_path, few_arrays)
    for name, header_bytes in zip(IDX_NAMES.values(), (16, 8, 16, 8), strict=True):
        path = tmp_path / name
        whole = path.read_bytes()
        for position in range(header_bytes):
            for flip in (1, 0x80, 0xFF):
                damaged = bytearray(whole)
                damaged[position] ^= flip
                path.write_bytes(damaged)
                with pytest.raises(ValueError, match=name.split("-")[0]):
                    vae_helpers.load_mnist(tmp_path)
        path.write_bytes(whole)


def test_gzip_that_unpacks_to_far_more_is_read_no_further(few_arrays, tmp_path):
    write_idx(tmp_path, few_arrays, ".gz")
    path = tmp_path / (IDX_NAMES["x_train"] + ".gz")
    with gzip.open(path, "ab") as file:
        for _ in range(1024):
            file.write(bytes(1 << 20))
    assert is_refused(tmp_path, few_arrays)


def test_npz_that_promises_far_more_than_it_holds(few_arrays, tmp_path):
    path = tmp_path / "mnist.npz"
    npz_bytes(few_arrays, path, compressed=False)
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
    os.mkfifo(fifo)
    link.symlink_to(tmp_path / "nowhere")
    folder.mkdir()
    for path, word in ((fifo, "not a regular file"), (link, "no such file"), (folder, "holds no")):
        with pytest.raises(ValueError, match=f"{path}: .*{word}"):
            vae_helpers.load_mnist(path)
    for path in ("", "a\0b", "x" * 5000):
        with pytest.raises(ValueError, match=r"no such file|holds no|not a readable"):
            vae_helpers.load_mnist(path)
    write_idx(tmp_path, few_arrays)
    (tmp_path / IDX_NAMES["x_test"]).unlink()
    os.mkfifo(tmp_path / IDX_NAMES["x_test"])
    with pytest.raises(ValueError, match="holds no t10k-images-idx3-ubyte"):
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


def stalled(monkeypatch):
    """Return the port of a server whose answer stops half-way."""
    stop = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            if self.path != "/":
                self.wfile.write(bytes(1000))
                stop.wait(60)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


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


@pytest.mark.parametrize("fault", [silent, black_hole, refused, stalled, slow_name, no_name])
def test_no_network_is_noticed_and_said(fault, monkeypatch, tmp_path, capsys):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    port = fault(monkeypatch)
    host = f"http://127.0.0.1:{port}" if port else "http://vae2.invalid"

    def get_file(fname, origin, file_hash):
        return keras.utils.get_file(
            fname, f"{host}/{fname}", file_hash=file_hash, cache_dir=tmp_path
        )

    monkeypatch.setattr(keras_mnist, "get_file", get_file)
    monkeypatch.setattr(vae_helpers, "MNIST_HOST", host)
    monkeypatch.setattr(vae_helpers, "load_small_digits", time.monotonic)
    start = time.monotonic()
    assert vae_helpers.load_mnist() - start < 15  # the seconds that it may take to notice
    said = [line for line in capsys.readouterr().out.splitlines() if "No MNIST" in line]
    assert len(said) == 1
    assert "scikit-learn" in said[0]
    assert not (tmp_path / "datasets" / "mnist.npz").exists()


def test_no_room_in_the_cache_is_said(monkeypatch, tmp_path, capsys):
    def get_file(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keras_mnist, "get_file", get_file)
    assert vae_helpers.load_mnist().name == "scikit-learn digits"
    assert "No space left on device" in capsys.readouterr().out
