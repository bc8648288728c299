"""What only real kernels can show: messages, interrupts, deaths, the same twice."""

import asyncio
import shutil
import subprocess
import sys
import threading
import time

import nbformat
import numpy as np
import psutil
import pytest
from conftest import (
    CODE_CELLS,
    RESULT_CELLS,
    SMALL,
    Kernel,
    Notebook,
    notebook_with,
    pictures,
    printed,
)
from nbclient.exceptions import CellExecutionError, DeadKernelError
from test_reruns import assert_consistent
from test_results import keep

import vae_helpers


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


def shown(notebook):
    """Return all that cells show, but for seconds, paths and what is named anew each time."""
    return {
        cell.id: [
            printed(cell),
            *(
                [output.data.get(kind) for kind in ("image/png", "text/markdown")]
                for output in cell.outputs
                if "data" in output
                if "application/vnd.jupyter.widget-view+json" not in output.data
            ),
        ]
        for cell in notebook.cells
        if cell.id in CODE_CELLS and cell.id not in ("train", "results", "keep")
    }


TRAINED = "(history, np.asarray(samples), [w for n in networks for w in n.get_weights()])"


def assert_same(trained, expected):
    """Check that history, grid and all weights are the same, bit for bit."""
    assert {**trained[0], "seconds": 0} == {**expected[0], "seconds": 0}
    np.testing.assert_array_equal(trained[1], expected[1])
    for weight, expected_weight in zip(trained[2], expected[2], strict=True):
        np.testing.assert_array_equal(weight, expected_weight)


def test_a_kernel_trains_as_the_notebook_does_in_another_process(kernel, tiny):
    here = Notebook(pictures=False).run(last="train", **tiny)
    assert_same(here.fetch(TRAINED), kernel.fetch(TRAINED))


@pytest.mark.parametrize("seed", range(4))
def test_any_fifty_result_cells_in_any_order_show_the_same(seed, kernel):
    before, trained = shown(kernel.notebook), kernel.fetch(TRAINED)
    random = np.random.default_rng(seed)
    some = random.choice(RESULT_CELLS, 50 - len(RESULT_CELLS))
    for cell_id in random.permutation([*RESULT_CELLS, *some]):  # each of them at least once
        kernel.run(cell_id, cell_id)
    assert shown(kernel.notebook) == before
    assert_same(kernel.fetch(TRAINED), trained)


def test_all_result_cells_again_show_the_same(kernel):
    before, trained = shown(kernel.notebook), kernel.fetch(TRAINED)
    kernel.run(RESULT_CELLS[0])
    assert shown(kernel.notebook) == before
    assert_same(kernel.fetch(TRAINED), trained)


def test_kept_networks_draw_the_same_in_a_new_kernel_whose_death_leaves_no_part(kernel, tmp_path):
    folder = tmp_path / "ein Lauf ☃" / "1"
    keep(kernel, folder)
    trained_with = kernel.fetch("trained_with")
    drawn = "{}.predict([np.ones([10, {}]), np.eye(10)], verbose=0)"
    images = kernel.fetch(drawn.format("decoder", "z_dim"))
    with Kernel(KERAS_BACKEND="jax") as new:  # the cell that loads needs no other one
        new.execute(f"output_dir = {str(folder)!r}")
        new.run("load", "load")
        assert not printed(new.cell("load"))
        new.execute("import numpy as np")
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
    processes = [
        subprocess.Popen([*command, f"--output=run{n}"], cwd=folder, stderr=subprocess.PIPE)
        for n in (1, 2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    runs = [nbformat.read(folder / f"run{n}.ipynb", as_version=4) for n in (1, 2)]
    expected = shown(kernel.notebook)
    figures = {name for name, contents in expected.items() if len(contents) > 1}
    assert figures >= {"data", "losses", "infer", "generate", "handwriting", "traversals"}
    assert figures >= {"styles", "judge", "play"}
    assert shown(runs[0]) == shown(runs[1]) == expected
    grids = [pictures(cell) for run in runs for cell in run.cells if cell.id == "train"]
    assert grids == [pictures(kernel.cell("train"))] * 2
    kept = vae_helpers.load_run(folder / "läuft hier")
    kept_networks = (kept.encoder, kept.digit_classifier, kept.decoder)
    weights = [weight for network in kept_networks for weight in network.get_weights()]
    assert_same((kept.history, kept.samples, weights), kernel.fetch(TRAINED))
    assert [path.name for path in (folder / "läuft hier").iterdir()] == ["run.zip"]


# Training, which says when it is in the middle of an epoch.
STEPS_COUNTED = """
compiled_steps, calls = train_steps, []
def train_steps(*arguments):
    calls.append(arguments)
    if len(calls) == 4:  # the first one takes no step
        print("third part")
    return compiled_steps(*arguments)
"""


def clocks(kernel):
    """Return the time and how long processors have worked for the kernel, in seconds."""
    worked = sum(psutil.Process(kernel.client.km.provisioner.pid).cpu_times()[:2])
    return np.array([time.monotonic(), worked])


def interrupt_after(kernel, said, times=1):
    """Send the kernel a real interrupt request as soon as the training cell has said this.

    Returns the thread that waits for it, and a list that will hold the clocks at the request.
    """
    kernel.cell("train").outputs = []
    asked = []

    def wait_and_interrupt():
        while printed(kernel.cell("train")).count(said) < times:
            time.sleep(0.05)
        asked.append(clocks(kernel))
        asyncio.run(kernel.client.km.interrupt_kernel())

    thread = threading.Thread(target=wait_and_interrupt, daemon=True)
    thread.start()
    return thread, asked


def test_interrupt_ends_training_at_the_last_finished_epoch(kernel, tiny):
    kernel.run("parameters", "epoch", **{**tiny, "epochs": 40})
    thread, _ = interrupt_after(kernel, "\nepoch", 3)
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
    assert "Interrupted" not in printed(kernel.cell("train"))


def test_interrupt_ends_a_long_epoch_within_three_seconds(kernel, small_arrays, tmp_path):
    rows = np.arange(60_000) % 3000
    many = {**small_arrays, **{name: small_arrays[name][rows] for name in ("x_train", "y_train")}}
    np.savez(tmp_path / "many.npz", **many)
    long = {**SMALL, "hidden_layers": [2048, 2048], "data_path": str(tmp_path / "many.npz")}
    kernel.run("parameters", "epoch", **long)
    weights = "hash(tuple(w.tobytes() for network in networks for w in network.get_weights()))"
    untrained = kernel.fetch(weights)
    kernel.execute(STEPS_COUNTED)
    began = clocks(kernel)
    _, asked = interrupt_after(kernel, "third part")  # of an epoch that takes minutes
    kernel.run("train", "train")
    ended = clocks(kernel)
    seconds, worked = ended - began
    busy = max(1, seconds / worked)  # beside other work, the kernel gets less than a processor
    assert (ended - asked[0])[0] < 3 * busy
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
