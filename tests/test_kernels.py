"""What only real kernels can show: messages, interrupts, deaths, the same twice."""

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
import time

import nbformat
import numpy as np
import pytest
from conftest import (
    CODE_CELLS,
    RESULT_CELLS,
    SMALL,
    TINY,
    Kernel,
    Notebook,
    notebook_with,
    pictures,
    printed,
)
from nbclient.exceptions import CellExecutionError, DeadKernelError
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from test_reruns import assert_consistent
from test_results import KEEP, keep


@pytest.fixture(scope="module")
def kernel(tiny):
    """Yield a kernel that has run the whole notebook."""
    with Kernel() as kernel:
        yield kernel.run(**tiny)


def test_every_output_is_clean(kernel):
    for cell in kernel.notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


def test_python_warnings_and_later_errors_are_shown(kernel):
    cell = kernel.execute("import os, warnings\nwarnings.warn('Python', stacklevel=1)")
    assert "Python" in printed(cell)
    cell = kernel.execute("_ = os.write(2, b'from C++')\ntime.sleep(1)")
    assert "from C++" in printed(cell)


def shown(kernel, cell_ids=CODE_CELLS):
    """Return all that cells show, but for what is measured in seconds or named anew each time."""
    return [
        (
            cell_id,
            output.get("text") or [output.data.get(m) for m in ("image/png", "text/markdown")],
        )
        for cell_id in cell_ids
        if cell_id not in ("train", "measures")
        for output in kernel.cell(cell_id).outputs
        if "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
    ]


def test_two_runs_show_the_same_and_so_does_the_notebook_in_another_process(kernel, tiny):
    digests = "(history, np.asarray(samples), [w for n in networks for w in n.get_weights()])"
    first = kernel.fetch(f"({digests.replace('history', 'dict(history)')})")
    with Kernel() as again:
        again.run(**tiny)
        assert len(shown(again)) > 10
        assert shown(again) == shown(kernel)
        second = again.fetch(f"({digests.replace('history', 'dict(history)')})")
    here = Notebook().run(last="train", **tiny)
    third = here.fetch(digests)
    for history, samples, weights in (second, third):
        assert {**history, "seconds": 0} == {**first[0], "seconds": 0}
        np.testing.assert_array_equal(samples, first[1])
        for weight, expected in zip(weights, first[2], strict=True):
            np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("seed", range(4))
def test_any_fifty_result_cells_in_any_order_show_the_same(seed, kernel):
    before = dict(shown(kernel))
    for cell_id in np.random.default_rng(seed).choice(RESULT_CELLS, 50):
        kernel.run(cell_id, cell_id)
    assert dict(shown(kernel)) == before
    kernel.run(RESULT_CELLS[0])
    assert dict(shown(kernel)) == before


def test_offline_default_ends_in_a_readable_grid(tmp_path):
    # No cached copy, and nothing answers where the download goes.
    offline = {"KERAS_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    with Kernel(**offline) as kernel:
        kernel.run()
        assert "No MNIST" in printed(kernel.cell("data"))
        assert kernel.fetch("data.name") == "5,000 MNIST images"
        assert kernel.fetch("history['test_accuracy'][-1]") > 0.97
        samples = np.asarray(kernel.fetch("samples"))
        images, digits = kernel.fetch("(data.x_train[:9000], data.y_train[:9000])")
    judge = make_pipeline(PCA(50, random_state=0), SVC(C=10)).fit(images / 255, digits)
    read = judge.predict(samples[-5:].reshape(-1, 784))
    assert np.mean(read == np.tile(np.arange(10), 5)) >= 0.98


def test_short_run_on_real_mnist(mnist):
    with Kernel() as kernel:
        kernel.run(data_path=mnist, epochs=2)
        history = kernel.fetch("history")
    assert history["test_vae_loss"][-1] < 235
    assert history["test_accuracy"][-1] > 0.96
    assert np.diff(history["vae_loss"]) < 0


def test_kept_networks_draw_the_same_in_a_new_kernel(kernel, tmp_path):
    folder = tmp_path / "ein Lauf ☃" / "1"
    keep(kernel, folder)
    assert {path.stem for path in folder.iterdir()} == KEEP
    history = json.loads((folder / "history.json").read_text())
    assert history == kernel.fetch("dict(history)")
    settings = json.loads((folder / "hyperparameters.json").read_text())
    assert settings["hidden_layers"] == TINY["hidden_layers"]
    kernel.run("load", "load")
    images = kernel.fetch("generate(kept_z, np.eye(10))")
    samples = kernel.fetch("samples")
    with Kernel() as new:
        new.execute(f"output_dir = {str(folder)!r}")
        new.run("load", "load")
        np.testing.assert_array_equal(new.fetch("kept_images"), images)
        np.testing.assert_array_equal(new.fetch("kept.samples"), samples)
        assert "image/png" in new.cell("load").outputs[-1].data


def test_a_kernel_that_dies_leaves_no_part_of_a_file(tiny, tmp_path):
    with Kernel() as kernel:
        kernel.run(**tiny)
        kernel.execute("import os\nos.replace = lambda *paths: os._exit(9)")
        with pytest.raises(DeadKernelError):
            keep(kernel, tmp_path)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".unfinished-")]


def interrupt_after(kernel, epochs):
    """Send the kernel a real interrupt request once it has printed so many epochs."""

    def wait_and_interrupt():
        while printed(kernel.cell("train")).count("\nepoch") < epochs:
            time.sleep(0.05)
        asyncio.run(kernel.client.km.interrupt_kernel())

    thread = threading.Thread(target=wait_and_interrupt, daemon=True)
    thread.start()
    return thread


def test_interrupt_ends_training_at_the_last_finished_epoch(tiny):
    with Kernel() as kernel:
        kernel.run(last="epoch", **{**tiny, "epochs": 40})
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


def test_interrupt_ends_a_long_epoch_within_three_seconds(small_arrays, tmp_path):
    rows = np.arange(60_000) % 3000
    many = {**small_arrays, **{name: small_arrays[name][rows] for name in ("x_train", "y_train")}}
    np.savez(tmp_path / "many.npz", **many)
    long = {**SMALL, "hidden_layers": [2048, 2048], "data_path": str(tmp_path / "many.npz")}
    with Kernel() as kernel:
        kernel.run(last="epoch", **long)
        asked = []

        def wait_and_interrupt():
            while "compiled in" not in printed(kernel.cell("train")):
                time.sleep(0.05)
            time.sleep(3)  # an epoch takes minutes
            asked.append(time.monotonic())
            asyncio.run(kernel.client.km.interrupt_kernel())

        thread = threading.Thread(target=wait_and_interrupt, daemon=True)
        thread.start()
        kernel.run("train", "train")
        assert time.monotonic() - asked[0] < 3
        said = printed(kernel.cell("train"))
        assert "Interrupted: back to the last finished epoch.\nStopped after 0 of 3" in said
        # Some steps were taken, and they are undone.
        assert kernel.fetch("int(optimizer.iterations)") > 0
        same = "all(np.array_equal(v, w) for v, w in zip(*untrained_networks.__dict__.values()))"
        assert kernel.fetch(same)


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
        (picture,) = pictures(train)
        digests.append(hashlib.sha256(picture).digest())
    assert digests[0] == digests[1]
    kept = sorted(path.name for path in (folder / "läuft hier").iterdir())
    networks = ["decoder.keras", "digit_classifier.keras", "encoder.keras"]
    texts = ["history.json", "hyperparameters.json", "results.json"]
    assert kept == [*networks, *texts, "samples.npz"]


def test_a_missing_helper_is_said_in_one_sentence(tmp_path):
    with Kernel(tmp_path) as kernel, pytest.raises(CellExecutionError) as error:
        kernel.run(last="setup")
    assert "put vae_helpers.py, from this notebook's repository, into its folder" in str(
        error.value
    )


def test_no_home_directory(tiny):
    nowhere = "/nonexistent"
    env = {"HOME": nowhere, "KERAS_HOME": f"{nowhere}/keras", "https_proxy": "http://127.0.0.1:9"}
    with Kernel(**env) as kernel:
        kernel.run(last="data", **TINY)
        assert kernel.fetch("data.name") == "5,000 MNIST images"
        kernel.run(first="parameters", **tiny)
        assert len(kernel.fetch("samples")) == TINY["epochs"]
