"""Interrupts, divergence, cells out of order, the same result twice: all in real kernels."""

import asyncio
import base64
import hashlib
import subprocess
import sys
import threading
import time

import nbformat
import numpy as np
import pytest
from conftest import NOTEBOOK, SMALL, Kernel, notebook_with, printed

TINY = {**SMALL, "epochs": 2, "hidden_layers": [32], "batch_size": 200}
# Other values than those of TINY, each of which must change the result.
OTHER = {
    "seed": 5,
    "epochs": 3,
    "batch_size": 150,
    "hidden_layers": [16, 16],
    "activation": "tanh",
    "decoder_skips": False,
    "z_dim": 3,
    "likelihood": "bernoulli",
    "decoder_std": 0.3,
    "classification_weight": 3.0,
    "stop_gradient": False,
    "kl_weight_start": 3.0,
    "kl_anneal_epochs": 2,
    "asked_digit_weight": 0.0,
    "asked_digit_batch": 30,
    "distortion": 0.0,
    "optimizer_name": "adam",
    "learning_rate": 0.01,
    "cosine_decay": False,
    "momentum": 0.5,
    "clip_norm": 2.0,
}
RESULT = """
hashlib.sha256(
    repr([{**history, "seconds": 0}, np.asarray(samples).tobytes()]
    + [weight.numpy().tobytes() for weight in weights]).encode()
).hexdigest()
"""


def result(kernel):
    """Return a digest of the losses, the digit grid and all weights that a kernel holds."""
    assert min(map(len, kernel.fetch("dict(history)").values())) == len(kernel.fetch("samples"))
    kernel.execute("import hashlib")
    return kernel.fetch(RESULT.strip())


def code_cells():
    """Return the ids of all code cells."""
    return [cell.id for cell in NOTEBOOK.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def base(small_npz):
    """Yield a kernel that has run the whole notebook, and its result."""
    with Kernel() as kernel:
        kernel.run(**TINY, data_path=str(small_npz))
        yield kernel, result(kernel)


def test_any_cell_run_again_and_then_the_rest(base, small_npz):
    kernel, first = base
    parameters = {**TINY, "data_path": str(small_npz)}
    for cell_id in code_cells():
        kernel.run(first=cell_id, **parameters)
        assert result(kernel) == first, cell_id
        assert len(kernel.fetch("samples")) == TINY["epochs"]


@pytest.mark.parametrize("name", OTHER)
def test_a_changed_hyperparameter_gives_what_a_restart_gives(name, base, small_npz):
    kernel, first = base
    parameters = {**TINY, "data_path": str(small_npz), name: OTHER[name]}
    kernel.run("parameters", "train", **parameters)
    changed = result(kernel)
    assert changed != first
    with Kernel() as restarted:
        restarted.run(last="train", **parameters)
        assert result(restarted) == changed


def outputs(kernel):
    """Return all that the cells show, but for what is measured in seconds."""
    return [
        output.get("data", {}).get("image/png") or printed_line
        for cell in kernel.notebook.cells
        if cell.get("id") in code_cells() and cell.id not in ("train", "results", "play")
        for output in cell.outputs
        for printed_line in [output.get("text")]
    ]


def test_two_runs_show_the_same(small_npz):
    shown = []
    for _ in range(2):
        with Kernel() as kernel:
            kernel.run(**TINY, data_path=str(small_npz))
            shown.append((result(kernel), outputs(kernel)))
    assert shown[0] == shown[1]
    assert len(shown[0][1]) > 10


def interrupt_after(kernel, epochs):
    """Send the kernel a real interrupt request once it has printed so many epochs."""

    def wait_and_interrupt():
        while printed(kernel.cell("train")).count("\nepoch") < epochs:
            time.sleep(0.05)
        asyncio.run(kernel.client.km.interrupt_kernel())

    thread = threading.Thread(target=wait_and_interrupt, daemon=True)
    thread.start()
    return thread


def assert_consistent(kernel, finished):
    """Check that history, grid and networks are of the same finished epochs, and figures work."""
    history = kernel.fetch("dict(history)")
    assert {len(values) for values in history.values()} <= {finished}
    samples = kernel.fetch("samples")
    assert samples.shape == (finished, 10, 784)
    assert np.isfinite(samples).all()
    if finished:
        last = kernel.fetch("generate_all_digits(styles[[len(samples) - 1]])")
        np.testing.assert_array_equal(last[0], samples[-1])
        test_loss = kernel.fetch("evaluate(test_images, test_digits)['test_vae_loss']")
        assert test_loss == history["test_vae_loss"][-1]
    said = printed(kernel.cell("train"))
    assert f"Stopped after {finished} of" in said
    assert "start afresh" in said
    kernel.run(first="losses")
    assert np.isfinite(kernel.fetch("generate(np.zeros([1, z_dim]), np.eye(10)[:1])")).all()


def test_interrupt_ends_training_at_an_epochs_end(small_npz):
    with Kernel() as kernel:
        kernel.run(last="run-epoch", **{**TINY, "epochs": 40}, data_path=str(small_npz))
        thread = interrupt_after(kernel, 3)
        kernel.run("train", "train")
        thread.join()
        finished = len(kernel.fetch("samples"))
        assert 3 <= finished < 40
        assert_consistent(kernel, finished)
        # The kernel's own handling of interrupts is back, and the next run starts afresh.
        assert kernel.fetch("__import__('signal').getsignal(2).__name__") == "default_int_handler"
        kernel.execute("epochs = 2")
        kernel.run("train", "train")
        assert [len(values) for values in kernel.fetch("list(history.values())")] == [2] * 8
        assert "Stopped" not in printed(kernel.cell("train"))


def test_divergence_stops_at_the_last_good_epoch(small_npz):
    with Kernel() as kernel:
        kernel.run(last="train", **{**TINY, "learning_rate": 1e9}, data_path=str(small_npz))
        assert "The loss of epoch 1 is not finite: lower learning_rate" in printed(
            kernel.cell("train")
        )
        assert_consistent(kernel, 0)
        # A network that breaks in the third epoch.
        kernel.run("parameters", "run-epoch", **{**TINY, "epochs": 5}, data_path=str(small_npz))
        kernel.execute(
            "healthy_epoch = run_epoch\n"
            "def run_epoch():\n"
            "    if len(samples) == 2:\n"
            "        weights[0].assign(weights[0] * np.inf)\n"
            "    return healthy_epoch()"
        )
        kernel.run("train", "train")
        assert "The loss of epoch 3 is not finite" in printed(kernel.cell("train"))
        assert_consistent(kernel, 2)


def test_two_kernels_at_once_in_a_folder_with_an_odd_name(small_arrays, tmp_path):
    folder = tmp_path / "Übung 1: Ziffern ☃"
    folder.mkdir()
    data_path = folder / "ein mnist.npz"
    np.savez_compressed(data_path, **small_arrays)
    path = notebook_with(folder, **TINY, data_path=str(data_path), output_dir="läuft hier")
    command = [sys.executable, "-m", "jupyter", "execute", path.name]
    processes = [
        subprocess.Popen([*command, f"--output=run{n}"], cwd=folder, stderr=subprocess.PIPE)
        for n in (1, 2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    digests = []
    for n in (1, 2):
        cells = nbformat.read(folder / f"run{n}.ipynb", as_version=4).cells
        (train,) = [cell for cell in cells if cell.id == "train"]
        (picture,) = [o.data["image/png"] for o in train.outputs if "data" in o]
        digests.append(hashlib.sha256(base64.b64decode(picture)).digest())
    assert digests[0] == digests[1]
    kept = sorted(path.name for path in (folder / "läuft hier").iterdir())
    networks = ["decoder.keras", "digit_classifier.keras", "encoder.keras"]
    assert kept == [*networks, "history.json", "hyperparameters.json", "samples.npz"]


def test_no_home_directory(small_npz):
    nowhere = "/nonexistent"
    env = {"HOME": nowhere, "KERAS_HOME": f"{nowhere}/keras", "https_proxy": "http://127.0.0.1:9"}
    with Kernel(**env) as kernel:
        kernel.run(last="data", **TINY)
        assert kernel.fetch("data.name") == "scikit-learn digits"
        kernel.run(first="parameters", **TINY, data_path=str(small_npz))
        assert len(kernel.fetch("samples")) == TINY["epochs"]
