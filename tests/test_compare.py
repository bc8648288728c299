"""Comparing settings: real workers and real kernels, and what happens when they are killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import papermill
import psutil
import pytest
from conftest import ROOT, SMALL, Kernel, full_disk, printed, wait_for

import vae_helpers

BLACK = np.zeros([20, 784], np.uint8)
ZEROS = np.zeros(20, np.int32)
DATA = vae_helpers.Digits(BLACK, ZEROS, BLACK[:10], ZEROS[:10], "no digits")
SETTINGS = vae_helpers.check_settings(
    **SMALL,
    seed=0,
    decoder_std=0.5,
    momentum=0.5,
    classification_weight=1.0,
    activation="relu",
    encoder_sees_digit=True,
    decoder_skips=True,
    stop_gradient=True,
    asked_digit_weight=0.0,
    distortion=0.0,
    clip=None,
    pause=0.0,
)

# The cells of a notebook that takes the place of vae2.ipynb: instead of training a model, it leaves
# a mark of its process, waits, and makes up samples. Hyperparameters say what goes wrong.
PARAMETERS = "data_path = None\n" + "\n".join(f"{key} = {value!r}" for key, value in SETTINGS)
TRAIN = f"""
import os, pathlib, random, time
from types import SimpleNamespace
import numpy as np
import vae_helpers
pathlib.Path(os.environ["MARKS"], f"{{seed}}-{{os.getpid()}}-{{os.getppid()}}").touch()
if z_dim == 13:
    raise ValueError("z_dim brings bad luck")
if z_dim == 14:
    batch_size = 1
time.sleep(pause)
def make_network(name):
    content = random.randbytes(300_000)
    return SimpleNamespace(name=name, save=lambda path: path.write_bytes(content))
names = {list(dict(SETTINGS))}
settings = vae_helpers.check_settings(**{{name: globals()[name] for name in names}})
encoder, digit_classifier, decoder = map(make_network, ["encoder", "digit_classifier", "decoder"])
vae = SimpleNamespace(
    settings=settings, encoder=encoder, digit_classifier=digit_classifier, decoder=decoder
)
finished = epochs - (learning_rate > 1)
images = np.load(data_path)["x_train"]
samples = np.random.default_rng([seed, z_dim]).random([finished, 10, 784], np.float32)
history = {{"seconds": [0.5] * finished}}
results = {{"vae_loss": float(samples.sum()), "accuracy": 0.9, "conditional_accuracy": 0.8}}
results["images"] = list(images.shape)
pathlib.Path("written.txt").write_text("by a run")
"""
COMPARE = "raise RuntimeError('no compared run executes this cell'); vae_helpers.compare_settings()"


def write_notebook(path, *sources, **metadata):
    """Write a notebook of code cells, as an editor does that knows no cell ids."""
    cells = []
    for source in sources:
        tags = ["parameters"] if source.startswith("data_path = ") else []
        cell = {"cell_type": "code", "source": source.splitlines(keepends=True), "outputs": []}
        cells.append({**cell, "metadata": {"tags": tags}, "execution_count": None})
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    Path(path).write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def _beside_a_notebook(tmp_path, monkeypatch):
    """Work in a folder beside a notebook that marks each of its processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    write_notebook("vae2.ipynb", PARAMETERS, TRAIN, COMPARE)
    Path("marks").mkdir()
    monkeypatch.setenv("MARKS", str(tmp_path / "marks"))


def compare(varied, folder="saved", pause=0.0, **options):
    """Compare settings of the notebook in the current folder."""
    settings = vae_helpers.check_settings(**{**SETTINGS.model_dump(), "pause": pause})
    return vae_helpers.compare_settings(varied, settings, DATA, folder, **options)


def marks(seed=""):
    """Return the process numbers of the kernels that began with this seed, and of their workers."""
    pairs = []
    for path in Path("marks").glob(f"{seed}-*" if seed != "" else "*"):
        _, kernel, worker = path.name.split("-")
        pairs.append((int(kernel), int(worker)))
    return pairs


def is_over(pid):
    """Tell whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def cluster(tmp_path_factory):
    """Start a scheduler and two workers of one thread, each in an empty folder of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    worker = ["worker", address, "--nthreads=1"]
    processes = []
    for arguments in (["scheduler", f"--host={address}"], worker, worker):
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        processes.append(subprocess.Popen(command, cwd=tmp_path_factory.mktemp("worker")))
    yield address, processes[0]
    for process in processes:  # the workers' own processes end with them
        process.kill()
        process.wait()


def kill_worker(seed):
    """Kill the worker that runs the settings with this seed, as soon as it does."""
    ((kernel, worker),) = wait_for(lambda: marks(seed))
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: is_over(kernel), 10)


def kill_kernel(seed):
    """Kill the kernel that runs the settings with this seed, as soon as it does."""
    ((kernel, _),) = wait_for(lambda: marks(seed))
    os.kill(kernel, signal.SIGKILL)


def in_thread(function, *arguments):
    """Start a function in a thread, and return the thread."""
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    return thread


def test_settings_and_notebooks_that_cannot_be_used_are_named_before_anything_runs():
    for varied, words in [
        ({"z_dim": [4, 1]}, "z_dim = 1: Input should be greater than or equal to 2"),
        ({"z_dims": [2]}, "'z_dims'.*: not among the hyperparameters"),
        ([{"seed": [0]}, {"learning_rate": ["fast"]}], "learning_rate = 'fast': Input should be"),
    ]:
        with pytest.raises(ValueError, match=words):
            compare(varied)
    write_notebook("one.ipynb", PARAMETERS, TRAIN)
    write_notebook("two.ipynb", PARAMETERS, PARAMETERS, COMPARE)
    Path("three.ipynb").write_text("{}")
    for name, words in [
        ("one.ipynb", "one.ipynb has no cell that calls compare_settings"),
        ("two.ipynb", "two.ipynb has 2 cells tagged parameters"),
        ("three.ipynb", "three.ipynb cannot be read as a notebook"),
        ("four.ipynb", "four.ipynb cannot be read as a notebook.*No such file"),
    ]:
        with pytest.raises(ValueError, match=words):
            compare({"seed": [0]}, notebook=name)
    assert not Path("saved").exists()


def test_four_settings_here_and_on_a_cluster_with_a_killed_worker_each(cluster, monkeypatch):
    address, scheduler = cluster
    varied = [{"clip": [None, 0.2]}, {"seed": [1, 2]}]
    tables = []
    for folder, place in (("here", None), ("there", address)):
        monkeypatch.setenv("MARKS", str(Path("marks").resolve()))
        killing = [in_thread(kill_worker, 1), in_thread(kill_kernel, 2)]
        tables.append(compare(varied, folder, pause=0.5, scheduler=place))
        for thread in killing:
            thread.join()
        assert min(len(marks(1)), len(marks(2))) >= 2  # a retry may be lost to the other kill
        for mark in Path("marks").iterdir():
            mark.unlink()
    here, there = tables
    assert here["settings"].to_list() == [{"clip": None}, {"clip": 0.2}, {"seed": 1}, {"seed": 2}]
    assert here["vae_loss"].nunique() == 3  # the stand-in makes nothing of `clip`
    assert here["images"].to_list() == [[20, 28, 28]] * 4
    columns = ["settings", "vae_loss", "accuracy", "conditional_accuracy", "seconds"]
    assert here[columns].equals(there[columns])
    for ours, theirs in zip(here["digits"], there["digits"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sorted(os.listdir("here")) == sorted(os.listdir("there"))
    for folder in there["folder"]:
        assert sorted(os.listdir(folder)) == ["run.zip", "vae2.ipynb"]

    figure, table = vae_helpers.summarize_runs(here)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sorted(labels) == ["clip = 0.2", "clip = None", "seed = 1", "seed = 2"]
    assert set(table.index) == {"clip = None", "clip = 0.2", "no change"}
    seeds = here["vae_loss"][2:]
    expected = np.round([seeds.mean(), seeds.min(), seeds.max()], 4)
    np.testing.assert_array_equal(table.loc["no change", "vae_loss"], expected)

    with full_disk(500_000), pytest.raises(OSError, match="File too large"):
        compare({"seed": [3]}, "there", scheduler=address)
    assert sorted(os.listdir("here")) == sorted(os.listdir("there"))  # nor half of a run
    killing = in_thread(lambda: wait_for(lambda: marks(4)) and scheduler.kill())
    with pytest.raises(OSError, match="the Dask scheduler is gone; run this cell again"):
        compare({"seed": [4]}, "there", pause=50.0, scheduler=address)
    killing.join()


def test_failing_runs_are_reported_once(monkeypatch, capsys):
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:1")
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    runs = compare([{"z_dim": [13, 14]}, {"learning_rate": [5.0]}])
    lines = capsys.readouterr().out.splitlines()
    assert len(runs) == 0
    assert len(marks()) == 3
    assert sorted(lines[1:-1]) == [
        "learning_rate = 5.0: failed: ValueError: training ended early: its loss was not finite",
        "z_dim = 13: failed: ValueError: z_dim brings bad luck",
        "z_dim = 14: failed: ValueError: a cell of the notebook changed the settings to "
        "{'batch_size': 1}",
    ]
    assert lines[-1] == "None of 3 runs are saved in saved."


def test_an_interrupt_keeps_what_is_done_and_leaves_no_process(tmp_path):
    Path("driver.py").write_text(
        "import test_compare\n"
        "varied = [{'pause': [0.0]}, {'seed': [1, 2]}]\n"
        "compare = lambda: test_compare.compare(varied, pause=60.0)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(tmp_path)])
    with Kernel(tmp_path, PYTHONPATH=path) as kernel:
        pid = kernel.fetch("__import__('os').getpid()")
        kernel.execute("import driver")

        def interrupt_when(condition):
            wait_for(condition)
            children = psutil.Process(pid).children(recursive=True)
            # Python keeps its resource tracker until it exits itself.
            children = [
                child for child in children if "resource_tracker" not in str(child.cmdline())
            ]
            assert children
            os.killpg(pid, signal.SIGINT)  # as Jupyter does
            return children

        with ThreadPoolExecutor() as pool:
            for condition, saved in (
                (lambda: psutil.Process(pid).children()[1:], "None"),  # early
                (lambda: os.listdir("saved")[1:] and marks(1), "1"),
            ):
                interrupting = pool.submit(interrupt_when, condition)
                cell = kernel.execute("len(driver.compare())")
                for child in interrupting.result():
                    wait_for(lambda pid=child.pid: is_over(pid), 10)
                assert [output for output in cell.outputs if output.get("name") == "stderr"] == []
                assert "Interrupted: run this cell again for the other runs." in printed(cell)
                assert printed(cell).endswith(f"{saved} of 3 runs are saved in saved.\n")
    assert not list(Path("saved").glob(".*"))


def test_a_copy_with_files_of_its_own(monkeypatch, tmp_path, capsys):
    Path("shapes.py").write_text("import sizes\nwidth = sizes.width")
    Path("sizes.py").write_text("width = 7")
    Path("pictures").mkdir()
    Path("pictures", "seven.png").write_bytes(b"a seven")
    Path("small.npz").touch()
    Path("written.txt").write_text("by its owner")
    own = """
import json, shapes
assert open("pictures/seven.png", "rb").read() == b"a seven"
if shapes.width != 7: raise ValueError(shapes.width)
"""
    parameters = PARAMETERS.replace("data_path = None", "data_path = 'small.npz'")
    write_notebook("copy of mine.ipynb", parameters, own, TRAIN, COMPARE)
    papermill.execute_notebook(
        "copy of mine.ipynb",
        "injected.ipynb",
        {"z_dim": 9, "seed": 7},
        prepare_only=True,
        kernel_name="python3",
        language="python",
    )
    monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "injected.ipynb"))
    with pytest.raises(
        ValueError,
        match=r"injected.ipynb uses \['pictures', 'shapes.py', 'sizes.py', 'written.txt'\]",
    ):
        compare({"z_dim": [3]}, scheduler="tcp://127.0.0.1:1")
    runs = compare([{"z_dim": [3]}, {"z_dim": [3], "seed": [0]}])  # the same settings twice
    assert len(runs) == 2
    assert len(marks()) == 1
    loaded = np.load(runs["folder"][0] / "run.zip")
    assert json.loads(loaded["settings.json"]) == {**SETTINGS.model_dump(), "z_dim": 3}
    assert Path("written.txt").read_text() == "by its owner"

    # The same code with other metadata, under another name: nothing runs again.
    started = marks()
    write_notebook(
        "copy of mine.ipynb", parameters, own, TRAIN, COMPARE, jupytext={"formats": "py"}
    )
    again = compare({"z_dim": [3]}, notebook="copy of mine.ipynb")
    assert again["folder"][0] == runs["folder"][0] == runs["folder"][1]
    assert marks() == started
    Path("sizes.py").write_text("width = 8")
    assert len(compare({"z_dim": [3]})) == 0
    assert "z_dim = 3: failed: ValueError: 8" in capsys.readouterr().out
