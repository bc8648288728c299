"""Comparing settings: real workers, real kernels, and what becomes of them when they are killed."""

import contextlib
import json
import os
import re
import resource
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
import pandas
import psutil
import pytest
from conftest import NOTEBOOK, ROOT, Kernel, cell_source, pictures, printed
from dask.system import CPU_COUNT

import vae_helpers

BIN = Path(sys.executable).parent
NOTHING = vae_helpers.Digits(
    np.zeros([20, 784], np.uint8),
    np.zeros(20, np.int32),
    np.zeros([10, 784], np.uint8),
    np.zeros(10, np.int32),
    "no digits",
)
# A notebook in which hyperparameters say what happens instead of training.
STAND_IN = {
    "parameters": "z_dim = 0",
    "injected": "z_dim = 5",
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
with np.load(data_path) as arrays:
    images = len(arrays["x_train"])
done = epochs - (learning_rate > 1)
samples = np.full([done, 10, 784], seed / 10, np.float32)
np.save("samples.npy", samples)
results = {"vae_loss": 200.0 + seed, "accuracy": 0.9, "asked_digit_accuracy": 0.8, "seconds": 1.0}
shares = ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")
results |= {name: os.environ[name] for name in shares}
results |= {"images": images, "versions": {"stand-in": int(z_dim == 4)}}
simple = (int, float, str, bool, list, type(None))
trained_with = {name: x for name, x in globals().items() if isinstance(x, simple)}
pathlib.Path(output_dir).mkdir()
with zipfile.ZipFile(pathlib.Path(output_dir, "run.zip"), "w") as archive:
    archive.write("samples.npy")
    archive.writestr("results.json", json.dumps(results))
    archive.writestr("hyperparameters.json", json.dumps(trained_with, default=str))
    archive.writestr("decoder.keras", os.urandom(1_000_000))
""",
    "compare": "raise RuntimeError('this cell is not run'); vae_helpers.run_settings(...)",
}
# What a person's kernel does; it lives on afterwards, as that kernel would.
DRIVER = """
if __name__ == "__main__":  # which is not so in a worker
    import json, sys, time
    import numpy as np
    import vae_helpers
    names, compare = map(json.loads, sys.argv[1:3])
    images, digits = np.zeros([20, 784], np.uint8), np.zeros(20, np.int32)
    data = vae_helpers.Digits(images, digits, images[:10], digits[:10], "no digits")
    runs = vae_helpers.run_settings(compare, names, data, "kept", notebook="stand-in.ipynb")
    print("returned", len(runs), flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def names():
    """Return the notebook's hyperparameters, for one epoch."""
    values = {}
    exec(cell_source(NOTEBOOK, "parameters"), values)
    return {name: values[name] for name in vae_helpers.Hyperparameters.model_fields} | {
        "epochs": 1,
        "batch_size": 10,
        "likelihoods": ["gaussian", "bernoulli"],
    }


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder beside a stand-in notebook that marks each of its kernels."""
    cells = [nbformat.v4.new_code_cell(source, id=name) for name, source in STAND_IN.items()]
    cells[0].metadata.tags, cells[1].metadata.tags = ["parameters"], ["injected-parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "stand-in.ipynb")
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("MARKS", str(tmp_path / "marks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(compare, names, **options):
    """Run the stand-in notebook with each combination and return the seeds of those kept."""
    options = {"notebook": "stand-in.ipynb", **options}
    runs = vae_helpers.run_settings(compare, names, NOTHING, "kept", **options)
    return list(runs["seed"]) if len(runs) else []


def marks(seed=""):
    """Return the process numbers of each kernel that began with this seed, and of its worker."""
    return [tuple(map(int, path.name.split("-"))) for path in Path("marks").glob(f"{seed}*-*-*")]


def wait_for(condition, seconds=300):
    """Return a condition's value as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return value


def is_over(pid):
    """Tell whether a process has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@contextlib.contextmanager
def driver(names, compare):
    """Run a comparison in a process of its own, whose group it leads, as a Jupyter kernel does."""
    process = subprocess.Popen(
        [sys.executable, "driver.py", json.dumps(names), json.dumps(compare)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def cluster(tmp_path_factory, here):
    """Start a scheduler and two workers of one thread, each in an empty folder of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    worker = ["worker", address, "--nthreads=1", "--no-dashboard"]
    processes = [
        subprocess.Popen(
            [BIN / "dask", *command],
            cwd=tmp_path_factory.mktemp("w"),
            env=env,
            stderr=-3,
            stdout=-3,
        )
        for command in (["scheduler", f"--host={address}", "--no-dashboard"], worker, worker)
    ]
    yield address, processes
    for process in processes:  # the workers' own processes end with them
        process.kill()
        process.wait()


def test_settings_are_refused_by_name_before_anything_runs(here, names):
    for compare, words in [
        ({"z_dim": [2, 10], "seed": [0, -1]}, "seed = -1: Input should be greater than or equal"),
        ({"batch_size": [20, 21]}, "batch_size = 21: Input should be less than or equal to 20"),
        ({"z_dims": [2]}, "z_dims: no hyperparameter to compare"),
        ({"data_path": ["a", "b"]}, "data_path: no hyperparameter to compare"),
        ([{"seed": [0]}, {"learning_rate": ["fast"]}], "learning_rate = 'fast': Input should be"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(compare, names)
    with pytest.raises(TypeError, match="'z_dim' needs to be a list"):
        run({"z_dim": 10}, names)
    assert not Path("kept").exists()


def test_a_killed_worker_a_killed_kernel_and_a_bad_setting(here, names, capfd):
    compare = [{"seed": [1, 2]}, {"seed": [0], "z_dim": [13, 4]}]
    with driver({**names, "decoder_std": 4.0}, compare) as process:
        ((_, kernel, _),) = wait_for(lambda: marks(1))
        os.kill(kernel, signal.SIGKILL)
        ((_, orphan, worker),) = wait_for(lambda: marks(2))
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: is_over(orphan), 10)
        said = "".join(iter(process.stdout.readline, "returned 3\n"))
        assert "seed = 0, z_dim = 13 failed: ValueError: z_dim brings bad luck" in said
        assert "3 of 4 runs" in said
    assert len(marks(1)) == len(marks(2)) == 2
    before = len(marks())
    assert run(compare[0], {**names, "decoder_std": 4.0}) == [1, 2]
    assert len(marks()) == before


def test_a_killed_driver_goes_on_from_what_it_had(here, names, monkeypatch):
    names = {**names, "decoder_std": 4.0}
    compare = {"seed": [0, 1, 2]}
    with driver(names, compare) as process:
        wait_for(lambda: list(Path("kept").glob("[!.]*/run.zip")) and len(marks()) > 1)
        process.kill()
        # A kernel that marks itself after its worker's death has process 1 for a parent.
        wait_for(lambda: all(is_over(pid) for _, *pids in marks() for pid in {*pids} - {1}), 10)
    kept = {path: path.stat().st_mtime_ns for path in Path("kept").glob("[!.]*")}
    assert len(kept) < 3
    assert run(compare, names) == [0, 1, 2]
    assert len(marks(0)) == 1
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    before, home = marks(), {"folder": "~/kept", "notebook": "~/stand-in.ipynb"}
    monkeypatch.setenv("HOME", str(here))
    assert len(vae_helpers.run_settings(compare, names, NOTHING, **home)) == 3
    assert marks() == before


def test_an_interrupt_keeps_what_is_done_and_leaves_no_process(here, names):
    with driver({**names, "decoder_std": 500.0}, {"seed": [0, 1, 2]}) as process:
        wait_for(lambda: list(Path("kept").glob("[!.]*/run.zip")) and len(marks()) > 2)
        processes = psutil.Process(process.pid).children(recursive=True)
        # Python's own resource tracker ends with the process that started a first child.
        ours = [child for child in processes if "resource_tracker" not in str(child.cmdline())]
        assert len(ours) >= 4  # workers and kernels
        os.killpg(process.pid, signal.SIGINT)
        wait_for(lambda: all(is_over(child.pid) for child in ours), 10)
        assert process.poll() is None
        said = "".join(iter(process.stdout.readline, "returned 1\n"))
        assert "Interrupted. What is done is kept" in said
        assert "1 of 3 runs kept" in said
        assert not list(Path("kept").glob(".*"))


def test_workers_by_hand_a_full_disk_and_a_lost_scheduler(here, names, cluster, monkeypatch, capfd):
    address, (scheduler, *_) = cluster
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="File too large: kept keeps what is done"):
            run({"seed": [0, 1]}, names, scheduler=address)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(Path("kept").iterdir())  # nor any half of a run
    assert run({"seed": [0]}, names, scheduler=address) == [0]
    scheduler_is_killed = threading.Timer(
        0, lambda: wait_for(lambda: marks(2)) and scheduler.kill()
    )
    scheduler_is_killed.start()
    with pytest.raises(OSError, match="the scheduler is gone: kept keeps what is done"):
        run({"seed": [1, 2]}, {**names, "decoder_std": 50.0}, scheduler=address)
    assert len(list(Path("kept").iterdir())) == 1
    wait_for(lambda: all(is_over(kernel) for _, kernel, _ in marks(2)), 10)
    monkeypatch.setitem(dask.config.config["distributed"]["comm"]["timeouts"], "connect", "2s")
    with pytest.raises(OSError, match="Timed out .* to connect"):
        run({"seed": [0, 1]}, names, scheduler=address)


def test_a_kernel_that_hangs_is_ended_and_what_went_wrong_is_reported(here, names, capsys):
    compare = [
        {"seed": [1], "epochs": [2]},
        {"seed": [0], "learning_rate": [5.0]},
        {"seed": [0], "z_dim": [14]},
    ]
    assert run(compare, {**names, "decoder_std": 50.0}, patience=-297) == []
    said = capsys.readouterr().out
    assert "epochs = 2, seed = 1 failed: it took too long" in said
    assert "rate = 5.0, seed = 0 failed: AssertionError: its loss did not stay finite" in said
    assert "seed = 0, z_dim = 14 failed: AssertionError: a cell set {'batch_size': 1}" in said
    assert "0 of 3 runs kept" in said
    ((_, kernel, _),) = marks(1)
    assert is_over(kernel)


BETA = """
classification_loss = tf.nn.sparse_softmax_cross_entropy_with_logits
def kl_loss(z_mean, z_log_var):
    return beta * tf.reduce_sum(tf.square(z_mean) + tf.exp(z_log_var) - z_log_var - 1, axis=1) / 2
"""


def test_a_copy_with_a_name_of_ones_own_gives_the_same_bits_elsewhere(
    here, names, tiny, cluster, monkeypatch, capsys
):
    cells = nbformat.from_dict(NOTEBOOK).cells
    for cell in cells:  # without ids, as some editors leave them
        cell.source += {"parameters": "\nbeta = 4.0", "loss": BETA}.get(cell.pop("id"), "")
    copy = {"cells": cells, "metadata": NOTEBOOK.metadata, "nbformat": 4, "nbformat_minor": 4}
    Path("vae2-Copy1.ipynb").write_text(json.dumps(copy))
    monkeypatch.setenv("JPY_SESSION_NAME", str(here / "vae2-Copy1.ipynb"))
    own = {**names, **tiny, "beta": 4.0, "In": ["data_path = None\nseed = 0\nbeta = 4.0"]}
    data = vae_helpers.load_mnist(tiny["data_path"])
    (local, other), (remote,) = (
        vae_helpers.run_settings({"beta": values}, own, data, *place).to_dict("records")
        for *place, values in [("local", None, [0.1, 9.0]), ("remote", cluster[0], [0.1])]
    )
    assert "vae2-Copy1.ipynb" in capsys.readouterr().out
    assert local["change"] == remote["change"] == {"beta": 0.1}
    assert local["data"] == data.name
    assert local["data_digest"] == data.digest
    for results in (local, remote, other):
        assert results.pop("seconds") > 0
        kept = vae_helpers.load_run(results["folder"])  # whole, as a folder of `output_dir`
        chosen = own.keys() & results.keys() - {"data_path", "output_dir"}
        assert chosen > {"beta", "z_dim"}
        assert all(kept.hyperparameters[name] == results[name] for name in chosen)
        np.testing.assert_array_equal(kept.samples[-1], results["digits"])
    np.testing.assert_array_equal(local["digits"], remote["digits"])
    assert local["vae_loss"] == remote["vae_loss"] != other["vae_loss"]
    path = Path("remote", local["folder"].name)
    assert path == remote["folder"]
    executed = nbformat.read(path / "vae2.ipynb", as_version=4)  # with all its figures
    assert sum(len(pictures(cell)) for cell in executed.cells) >= 9


def test_a_notebook_that_cannot_be_compared_is_named(here, names):
    with pytest.raises(ValueError, match="nowhere.ipynb: no notebook .*`notebook`"):
        run({"seed": [0]}, names, notebook="nowhere.ipynb")
    for name, fault in (("compare", "run_settings"), ("parameters", "tagged parameters")):
        cells = [nbformat.v4.new_code_cell(x, id=n) for n, x in STAND_IN.items() if n != name]
        if name == "compare":
            cells[0].metadata.tags = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), "other.ipynb")
        with pytest.raises(ValueError, match=f"other.ipynb: .*{fault}"):
            run({"seed": [0]}, names, notebook="other.ipynb")


def test_the_cell_shows_a_figure_and_a_table(here, names, monkeypatch):
    Path("stand-in.ipynb").rename("vae2.ipynb")
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    with Kernel(here) as kernel:
        kernel.execute(
            "import vae_helpers\nfrom IPython.display import display\n"
            "from matplotlib_inline.backend_inline import set_matplotlib_formats\n"
            "set_matplotlib_formats('retina')"
        )
        kernel.fetch("globals().update(names)", names=names)
        kernel.fetch("globals().update(data=vae_helpers.Digits(*digits))", digits=tuple(NOTHING))
        kernel.run("compare", "compare")
        assert printed(kernel.cell("compare")) == "compare is {}: nothing to compare\n"
        cell = kernel.cell("compare")
        empty = "compare = {}"
        cell.source = cell.source.replace(empty, "compare = {'z_dim': [3, 4], 'seed': [0, 2]}")
        kernel.run("compare", "compare")
        said = printed(cell)
        figure, table = [o for o in cell.outputs if "data" in o]
        summary = "vae_helpers.summarize_runs(runs)[1].to_dict()"
        shown, measured = kernel.fetch(f"({summary}, runs.to_dict('records'))")
    workers = min(4, CPU_COUNT)
    for results in measured:  # each has its share of the cores
        assert results["TF_NUM_INTRAOP_THREADS"] == str(CPU_COUNT // workers)
        assert results["OMP_NUM_THREADS"] == str(CPU_COUNT // workers)
        assert results["images"] == 20
    assert "Runs of vae2.ipynb" in said
    assert re.search("running: .*z_dim = 3", said)
    assert "not all with the same versions:\n{'stand-in': 0}\n{'stand-in': 1}\n" in said
    assert said.endswith("4 of 4 runs kept, beside 0 of other settings, data or code\n")
    assert "image/png" in figure.data
    assert "<table" in table.data["text/html"]
    for z_dim in "34":
        vae_losses = [shown["vae_loss", measure][z_dim] for measure in ("mean", "min", "max")]
        assert vae_losses == [201, 200, 202]
        assert shown["accuracy", "mean"][z_dim] == 0.9


def test_runs_are_labelled_by_what_was_changed():
    digits, rest = np.zeros([10, 784]), {"accuracy": 1, "asked_digit_accuracy": 1, "seconds": 1}
    rest |= {"data": "no digits", "digits": digits}
    changes = [{}, {"z_dim": 3, "batch_size": 9}]
    settings = [{"z_dim": 2, "batch_size": 10}, changes[1]]
    rows = [
        {**rest, **own, "change": change, "vae_loss": loss}
        for own, change, loss in zip(settings, changes, (2.0, 1.0), strict=True)
    ]
    figure, table = vae_helpers.summarize_runs(pandas.DataFrame(rows))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["z_dim = 3, batch_size = 9", "nothing changed"]
    assert len(table) == 2
