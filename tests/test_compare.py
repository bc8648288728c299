"""Comparing settings: real workers, real kernels, and what becomes of them when they are killed."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import nbformat
import numpy as np
import psutil
import pytest
from conftest import CODE, NOTEBOOK, ROOT, Kernel, full_disk, pictures, printed, wait_for
from dask.system import CPU_COUNT

import vae_helpers

BLACK, ZEROS = np.zeros([20, 784], np.uint8), np.zeros(20, np.int32)
NOTHING = vae_helpers.Digits(BLACK, ZEROS, BLACK[:10], ZEROS[:10], "no digits")
# The hyperparameters of the real notebook, for one epoch.
exec(CODE["parameters"].source, {}, NAMES := {"likelihoods": ["gaussian", "bernoulli"]})
NAMES |= {"epochs": 1, "batch_size": 10}
# A notebook in which hyperparameters say what happens instead of training; its cells by their tags.
STAND_IN = {
    "parameters": "z_dim = 0",
    "injected-parameters": "z_dim = 5",
    "train": """
import json, os, pathlib, time, zipfile
import numpy as np
pathlib.Path(os.environ["MARKS"], f"{seed}-{os.getpid()}-{os.getppid()}").touch()
time.sleep(0 if seed == 0 else decoder_std)
if z_dim == 13:
    raise ValueError("z_dim brings bad luck")
if z_dim == 14:
    batch_size = 1
""",
    "keep": """
samples = np.full([epochs - (learning_rate > 1), 10, 784], seed / 10, np.float32)
results = {"vae_loss": 200.0 + seed - z_dim, "accuracy": 0.9}
results |= {"asked_digit_accuracy": 0.8, "seconds": 1.0}
results |= {name: os.environ[name] for name in ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")}
results |= {"images": len(np.load(data_path)["x_train"]), "versions": {"stand-in": int(z_dim == 4)}}
trained_with = dict(globals())
np.save("samples.npy", samples)
pathlib.Path(output_dir).mkdir()
with zipfile.ZipFile(pathlib.Path(output_dir, "run.zip"), "w") as archive:
    archive.write("samples.npy")
    archive.writestr("results.json", json.dumps(results))
    archive.writestr("decoder.keras", os.urandom(1_000_000))
""",
    "compare": "raise RuntimeError('this cell is not run'); vae_helpers.run_settings(...)",
}


def write_stand_in(name, tags):
    """Write a notebook of the stand-in's cells with these tags."""
    cells = [nbformat.v4.new_code_cell(STAND_IN[tag], metadata={"tags": [tag]}) for tag in tags]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), name)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Work in an empty folder beside a stand-in notebook that marks each of its kernels."""
    monkeypatch.chdir(tmp_path)
    write_stand_in("stand-in.ipynb", tags=STAND_IN)
    Path("marks").mkdir()
    monkeypatch.setenv("MARKS", str(tmp_path / "marks"))


def run(compare, seconds=0.5, folder="kept", notebook="stand-in.ipynb", **options):
    """Run the stand-in, for `seconds` unless of seed 0, and return the seeds of the runs kept."""
    names = {**NAMES, "decoder_std": seconds}
    runs = vae_helpers.run_settings(compare, names, NOTHING, folder, notebook=notebook, **options)
    return list(runs.get("seed", []))


def marks(seed=""):
    """Return the process numbers of each kernel that began with this seed, and of its worker."""
    return [tuple(map(int, path.name.split("-")[1:])) for path in Path("marks").glob(f"{seed}*")]


def is_over(pid):
    """Tell whether a process has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def drive(compare, seconds):
    """Compare as in a Jupyter kernel, which leads a group of processes and lives on afterwards."""
    os.setsid()
    with open("said", "w", buffering=1) as said, contextlib.redirect_stdout(said):
        print("returned", run(compare, seconds))
    time.sleep(60)


@contextlib.contextmanager
def driver(compare, seconds):
    """Run a comparison in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=drive, args=(compare, seconds))
    process.start()
    try:
        yield process
    finally:  # its workers and their kernels end with it
        process.kill()
        process.join()


def said_until(last):
    """Return what the driver has said as soon as this is among it."""
    return wait_for(lambda: last in (said := Path("said").read_text()) and said)


@pytest.fixture
def cluster(tmp_path_factory):
    """Start a scheduler and two workers of one thread, each in an empty folder of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    worker = ["worker", address, "--nthreads=1"]
    processes = []
    for arguments in (["scheduler", f"--host={address}"], worker, worker):
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        processes.append(subprocess.Popen(command, cwd=tmp_path_factory.mktemp("w")))
    yield address, processes[0]
    for process in processes:  # the workers' own processes end with them
        process.kill()
        process.wait()


def test_what_cannot_be_compared_is_named_before_anything_runs():
    for compare, words in [
        ({"z_dim": [2, 10], "seed": [0, -1]}, "seed = -1: Input should be greater than or equal"),
        ({"batch_size": [20, 21]}, "batch_size = 21: Input should be less than or equal to 20"),
        ({"z_dims": [2]}, "z_dims: no hyperparameter to compare"),
        ({"data_path": ["a", "b"]}, "data_path: no hyperparameter to compare"),
        ([{"seed": [0]}, {"learning_rate": ["fast"]}], "learning_rate = 'fast': Input should be"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(compare)
    with pytest.raises(TypeError, match="'z_dim' needs to be a list"):
        run({"z_dim": 10})
    with pytest.raises(ValueError, match="nowhere.ipynb: no notebook .*`notebook`"):
        run({"seed": [0]}, notebook="nowhere.ipynb")
    for missing, fault in (("compare", "run_settings"), ("parameters", "tagged parameters")):
        write_stand_in("other.ipynb", tags=[tag for tag in STAND_IN if tag != missing])
        with pytest.raises(ValueError, match=f"other.ipynb: .*{fault}"):
            run({"seed": [0]}, notebook="other.ipynb")
    assert not Path("kept").exists()


def test_a_killed_worker_a_killed_kernel_and_a_bad_setting():
    compare = [{"seed": [1, 2]}, {"seed": [0], "z_dim": [13, 4]}]
    with driver(compare, seconds=4):
        ((kernel, _),) = wait_for(lambda: marks(1))
        os.kill(kernel, signal.SIGKILL)
        ((orphan, worker),) = wait_for(lambda: marks(2))
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: is_over(orphan), 10)
        said = said_until("returned [1, 2, 0]")
    assert "seed = 0, z_dim = 13 failed: ValueError: z_dim brings bad luck" in said
    assert "3 of 4 runs" in said
    assert len(marks(1)) == len(marks(2)) == 2
    before = marks()
    assert run(compare[0], seconds=4) == [1, 2]
    assert marks() == before


def test_a_killed_driver_goes_on_from_what_it_had(tmp_path, monkeypatch):
    compare = {"seed": [0, 1, 2]}
    with driver(compare, seconds=4) as process:
        wait_for(lambda: list(Path("kept").glob("[!.]*/run.zip")) and len(marks()) > 1)
        process.kill()
        # A kernel that marks itself after its worker's death has process 1 for a parent.
        wait_for(lambda: all(is_over(pid) for pids in marks() for pid in {*pids} - {1}), 10)
    kept = {path: path.stat().st_mtime_ns for path in Path("kept").glob("[!.]*")}
    assert len(kept) < 3
    assert run(compare, seconds=4) == [0, 1, 2]
    assert len(marks(0)) == 1
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    before = marks()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(compare, 4, folder="~/kept", notebook="~/stand-in.ipynb") == [0, 1, 2]
    assert marks() == before


def test_an_interrupt_keeps_what_is_done_and_leaves_no_process():
    with driver({"seed": [0, 1, 2]}, seconds=500) as process:
        wait_for(lambda: list(Path("kept").glob("[!.]*/run.zip")) and len(marks()) > 2)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4  # workers and kernels
        os.killpg(process.pid, signal.SIGINT)
        wait_for(lambda: all(is_over(child.pid) for child in children), 10)
        assert process.is_alive()
        said = said_until("returned [0]")
        assert "Interrupted. What is done is kept" in said
        assert "1 of 3 runs kept" in said
        assert not list(Path("kept").glob(".*"))


def test_workers_by_hand_a_full_disk_and_a_lost_scheduler(cluster, monkeypatch):
    address, scheduler = cluster
    full = "File too large: kept keeps what is done"
    with full_disk(500_000), pytest.raises(OSError, match=full):
        run({"seed": [0, 1]}, scheduler=address)
    assert not list(Path("kept").iterdir())  # nor any half of a run
    assert run({"seed": [0]}, scheduler=address) == [0]
    threading.Thread(target=lambda: wait_for(lambda: marks(2)) and scheduler.kill()).start()
    with pytest.raises(OSError, match="the scheduler is gone: kept keeps what is done"):
        run({"seed": [1, 2]}, seconds=50, scheduler=address)
    assert len(list(Path("kept").iterdir())) == 1
    wait_for(lambda: all(is_over(kernel) for kernel, _ in marks(2)), 10)
    monkeypatch.setitem(dask.config.config["distributed"]["comm"]["timeouts"], "connect", "2s")
    with pytest.raises(OSError, match="Timed out .* to connect"):
        run({"seed": [0, 1]}, scheduler=address)


def test_a_kernel_that_hangs_is_ended_and_what_went_wrong_is_reported(capsys):
    compare = [{"seed": [1], "epochs": [2]}, {"learning_rate": [5.0]}, {"z_dim": [14]}]
    assert run(compare, seconds=50, patience=-297) == []
    said = capsys.readouterr().out
    assert "epochs = 2, seed = 1 failed: it took too long" in said
    assert "learning_rate = 5.0 failed: AssertionError: its loss did not stay finite" in said
    assert "z_dim = 14 failed: AssertionError: a cell set {'batch_size': 1}" in said
    assert "0 of 3 runs kept" in said
    ((kernel, _),) = marks(1)
    assert is_over(kernel)


BETA = """
classification_loss = tf.nn.sparse_softmax_cross_entropy_with_logits
def kl_loss(z_mean, z_log_var):
    return beta * tf.reduce_sum(tf.square(z_mean) + tf.exp(z_log_var) - z_log_var - 1, axis=1) / 2
"""


def test_a_copy_with_a_name_of_ones_own_gives_the_same_bits_elsewhere(
    tiny, tmp_path, cluster, monkeypatch, capsys
):
    cells = nbformat.from_dict(NOTEBOOK).cells
    for cell in cells:  # without ids, as some editors leave them
        cell.source += {"parameters": "\nbeta = 4.0", "loss": BETA}.get(cell.pop("id"), "")
    copy = {"cells": cells, "metadata": NOTEBOOK.metadata, "nbformat": 4, "nbformat_minor": 4}
    Path("vae2-Copy1.ipynb").write_text(json.dumps(copy))
    monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "vae2-Copy1.ipynb"))
    own = {**NAMES, **tiny, "beta": 4.0, "In": ["data_path = None\nseed = 0\nbeta = 4.0"]}
    data = vae_helpers.load_mnist(tiny["data_path"])
    (local, other), (remote,) = (
        vae_helpers.run_settings({"beta": values}, own, data, *place).to_dict("records")
        for *place, values in [("local", None, [0.1, 9.0]), ("remote", cluster[0], [0.1])]
    )
    assert "vae2-Copy1.ipynb" in capsys.readouterr().out
    assert local["change"] == remote["change"] == {"beta": 0.1}
    assert (local["data"], local["data_digest"]) == (data.name, data.digest)
    for results in (local, remote, other):
        assert results.pop("seconds") > 0
        kept = vae_helpers.load_run(results["folder"])  # whole, as a folder of `output_dir`
        chosen = own.keys() & results.keys() - {"data_path", "output_dir"}
        assert chosen > {"beta", "z_dim"}
        assert all(kept.hyperparameters[name] == results[name] for name in chosen)
        np.testing.assert_array_equal(kept.samples[-1], results["digits"])
    np.testing.assert_array_equal(local["digits"], remote["digits"])
    assert local["vae_loss"] == remote["vae_loss"] != other["vae_loss"]
    assert remote["folder"] == Path("remote", local["folder"].name)
    executed = nbformat.read(remote["folder"] / "vae2.ipynb", as_version=4)  # with all its figures
    assert sum(len(pictures(cell)) for cell in executed.cells) >= 9


def test_the_cell_shows_a_figure_and_a_table(tmp_path, monkeypatch):
    Path("stand-in.ipynb").rename("vae2.ipynb")
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    with Kernel(tmp_path, PYTHONPATH=str(ROOT)) as kernel:
        kernel.run(last="check", epochs=1, batch_size=10)
        kernel.fetch("data.name", data=NOTHING)
        kernel.run("compare")
        cell = kernel.cell("compare")
        assert printed(cell) == "compare is {}: nothing to compare\n"
        compare = "[{}, {'batch_size': [9], 'z_dim': [3, 4], 'seed': [0, 2]}]"
        cell.source = cell.source.replace("{}", compare, 1)
        kernel.run("compare")
        figure, table = [output for output in cell.outputs if "data" in output]
        runs = kernel.fetch("runs")
    assert "Runs of vae2.ipynb" in printed(cell)
    assert re.search("running: .*z_dim = 3", printed(cell))
    assert "not all with the same versions:\n{'stand-in': 0}\n{'stand-in': 1}\n" in printed(cell)
    assert printed(cell).endswith("5 of 5 runs kept, beside 0 of other settings, data or code\n")
    assert "image/png" in figure.data
    assert "<table" in table.data["text/html"]
    share = str(CPU_COUNT // min(5, CPU_COUNT))  # of the cores for each worker
    measured = runs[["TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS", "images"]]
    assert measured.to_numpy().tolist() == [[share, share, 20]] * 5
    figure, table = vae_helpers.summarize_runs(runs)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    changes = [f"batch_size = 9, seed = {seed}, z_dim = {z}" for seed in (0, 2) for z in (4, 3)]
    assert labels == ["nothing changed", *changes]  # the least loss first
    assert table.index.to_list() == [("10", "10"), ("9", "4"), ("9", "3")]
    assert table["vae_loss"].values.tolist() == [[190, 190, 190], [197, 196, 198], [198, 197, 199]]
    assert table["accuracy", "mean"].to_list() == [0.9] * 3
