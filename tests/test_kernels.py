"""What only real kernels can show: messages, interrupts, deaths, the same twice, whole runs."""

import asyncio
import shutil
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool

import nbformat
import numpy as np
import psutil
import pytest
from conftest import RESULT_CELLS, Kernel, Notebook, notebook_with, pictures, printed, trained
from nbclient.exceptions import CellExecutionError, DeadKernelError
from test_reruns import assert_consistent
from test_results import keep

import vae_helpers


@pytest.fixture(scope="module")
def kernel(tiny):
    """Yield a kernel that has run the whole notebook."""
    with Kernel() as kernel:
        yield kernel.run(**tiny)


def test_every_output_is_clean_but_python_warnings_and_later_errors_are_shown(kernel):
    outputs = [output for cell in kernel.notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "Python" in printed(kernel.execute("import os, warnings\nwarnings.warn('Python')"))
    assert "from C++" in printed(kernel.execute("_ = os.write(2, b'from C++')\ntime.sleep(1)"))


def shown(notebook):
    """Return all that cells show, but for seconds, paths and what is named anew each time."""
    outputs = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.id not in ("train", "results", "keep"):
            texts = [o.data.get("text/markdown") for o in cell.outputs if "data" in o]
            outputs[cell.id] = printed(cell), pictures(cell), texts
    return outputs


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_result_cells_run_again_in_any_order_show_the_same(seed, kernel):
    before, again = (shown(kernel.notebook), trained(kernel)), RESULT_CELLS
    if seed is not None:  # fifty in a random order, each at least once
        random = np.random.default_rng(seed)
        some = random.choice(RESULT_CELLS, 50 - len(RESULT_CELLS))
        again = random.permutation([*RESULT_CELLS, *some])
    for cell_id in again:
        kernel.run(cell_id, cell_id)
    assert (shown(kernel.notebook), trained(kernel)) == before


def test_kept_networks_draw_the_same_in_a_new_kernel_whose_death_leaves_no_part(kernel, tmp_path):
    folder = tmp_path / "ein Lauf ☃" / "1"
    keep(kernel, folder)
    drawn = "{}.predict([np.ones([10, {}]), np.eye(10)], verbose=0)"
    trained_with, images = kernel.fetch("trained_with, " + drawn.format("decoder", "z_dim"))
    with Kernel(KERAS_BACKEND="jax") as new:  # the cell that loads needs no other one
        new.execute(f"import numpy as np\noutput_dir = {str(folder)!r}")
        new.run("load", "load")
        assert not printed(new.cell("load"))
        kept = new.fetch(drawn.format("kept.decoder", "kept.hyperparameters['z_dim']"))
        np.testing.assert_array_equal(kept, images)
        assert new.fetch("kept.hyperparameters") == trained_with
        again = tmp_path / "2"
        new.execute("import os\nos.replace = lambda *paths: os._exit(9)")
        with pytest.raises(DeadKernelError):
            new.execute(f"vae_helpers.save_run({str(again)!r}, [kept.decoder], kept.samples)")
    assert not [path for path in again.iterdir() if not path.name.startswith(".")]


def test_two_kernels_at_once_in_a_folder_with_an_odd_name_show_the_same(kernel, tiny, tmp_path):
    folder = tmp_path / "Übung 1: Ziffern ☃"
    folder.mkdir()
    data_path = shutil.copy(tiny["data_path"], folder)
    path = notebook_with(folder, **{**tiny, "data_path": data_path}, output_dir="läuft hier")
    command = [sys.executable, "-m", "jupyter", "execute", path.name]
    processes = [subprocess.Popen([*command, f"--output=run{n}"], cwd=folder) for n in (1, 2)]
    assert [process.wait(600) for process in processes] == [0, 0]
    runs = [nbformat.read(folder / f"run{n}.ipynb", as_version=4) for n in (1, 2)]
    figures = "data losses infer generate handwriting traversals styles judge play"
    assert all(pictures(kernel.cell(name)) for name in figures.split())
    assert shown(runs[0]) == shown(runs[1]) == shown(kernel.notebook)
    grids = [pictures(cell) for run in runs for cell in run.cells if cell.id == "train"]
    assert grids == [pictures(kernel.cell("train"))] * 2
    kept, loaded = vae_helpers.load_run(folder / "läuft hier"), Notebook()
    networks = [kept.encoder, kept.digit_classifier, kept.decoder]
    loaded.fetch("0", history=kept.history, samples=kept.samples, networks=networks)
    in_this_process = Notebook(pictures=False).run(last="train", **tiny)
    assert trained(loaded) == trained(kernel) == trained(in_this_process)
    assert [path.name for path in (folder / "läuft hier").iterdir()] == ["run.zip"]


def interrupt_training(kernel, said, times):
    """Interrupt training once it has said this so many times; return for how long it goes on."""
    process = psutil.Process(kernel.client.km.provisioner.pid)
    kernel.cell("train").outputs = []

    def clocks():
        return np.array([time.monotonic(), sum(process.cpu_times()[:2])])

    def wait_and_interrupt():
        while printed(kernel.cell("train")).count(said) < times:
            time.sleep(0.05)
        asked = clocks()
        asyncio.run(kernel.client.km.interrupt_kernel())
        return asked

    with ThreadPool(1) as pool:
        asked = pool.apply_async(wait_and_interrupt)
        began = clocks()
        kernel.run("train", "train")
        ended = clocks()
        seconds, worked = ended - began
        # Beside other work, it gets less than a processor: in seconds of one of its own.
        return (ended - asked.get(10))[0] / max(1, seconds / worked)


def test_interrupt_ends_training_at_the_last_finished_epoch(kernel, tiny):
    kernel.run("parameters", "epoch", **{**tiny, "epochs": 40})
    interrupt_training(kernel, "\nepoch", 3)
    finished = len(kernel.fetch("samples"))
    assert 3 <= finished < 40
    assert_consistent(kernel, finished)
    # The kernel's own handling of interrupts is back, and the next run starts afresh.
    assert kernel.fetch("__import__('signal').getsignal(2).__name__") == "default_int_handler"
    kernel.execute("epochs = 2")
    kernel.run("train", "train")
    assert [len(values) for values in kernel.fetch("list(history.values())")] == [2] * 8
    assert "Interrupted" not in printed(kernel.cell("train"))


def test_interrupt_ends_a_long_epoch_within_three_seconds(kernel, tiny, small_arrays, tmp_path):
    many = {n: a.repeat(20, axis=0) if "train" in n else a for n, a in small_arrays.items()}
    np.savez(tmp_path / "many.npz", **many)
    long = {"hidden_layers": [2048, 2048], "data_path": str(tmp_path / "many.npz")}
    kernel.run("parameters", "epoch", **{**tiny, **long})
    weights = "hash(tuple(w.tobytes() for network in networks for w in network.get_weights()))"
    untrained = kernel.fetch(weights)
    kernel.execute("train_steps = lambda *x, steps=train_steps: print('a part') or steps(*x)")
    # In the third part of an epoch that takes minutes; before all parts, no step is taken.
    assert interrupt_training(kernel, "a part", 4) < 3
    said = printed(kernel.cell("train"))
    assert "Interrupted. Back to the last finished epoch" in said
    assert "epoch  1/" not in said
    # Some steps were taken, and they are undone.
    assert kernel.fetch("int(optimizer.iterations)") > 0
    assert kernel.fetch(weights) == untrained


def test_a_missing_helper_is_said_in_one_sentence(tmp_path):
    with Kernel(tmp_path) as kernel, pytest.raises(CellExecutionError) as error:
        kernel.run(last="setup")
    assert "stands beside the notebook: the kernel must start there" in str(error.value)


def test_offline_without_a_home_the_default_draws_readable_digits_from_epoch_3():
    # No cached copy, no place for one, and nothing answers where the download goes.
    nowhere = {"HOME": "/nonexistent", "KERAS_HOME": "/nonexistent/keras"}
    with Kernel(XLA_FLAGS="", https_proxy="http://127.0.0.1:9", **nowhere) as kernel:
        kernel.run(epochs=7)
        assert "No MNIST" in printed(kernel.cell("data"))
        assert kernel.fetch("data.name") == "5,000 MNIST images"
        assert kernel.fetch("history['test_accuracy'][-1]") > 0.97
        logits = kernel.fetch("judge.predict(255 * samples[2:].reshape(-1, pixels), verbose=0)")
    assert np.mean(logits.argmax(axis=1) == np.tile(np.arange(10), 5)) >= 0.98


def test_short_run_on_real_mnist(mnist):
    with Kernel(XLA_FLAGS="") as kernel:
        kernel.run(data_path=mnist, epochs=2)
        history = kernel.fetch("history")
    assert history["test_vae_loss"][-1] < 235
    assert history["test_accuracy"][-1] > 0.96
    assert np.diff(history["vae_loss"]) < 0
