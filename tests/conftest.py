"""What the tests share: small real data, and the notebook run here or in a real kernel."""

import base64
import contextlib
import copy
import gc
import os
import pickle
import resource
import shutil
import sys
import time
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient
from nbconvert.preprocessors import ClearOutputPreprocessor
from nbformat.v4 import new_code_cell, new_output

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import vae_helpers  # noqa: E402

NOTEBOOK = nbformat.read(ROOT / "vae2.ipynb", as_version=4)
CODE = {cell.id: cell for cell in NOTEBOOK.cells if cell.cell_type == "code"}
CODE_CELLS = [*CODE]
RESULT_CELLS = CODE_CELLS[CODE_CELLS.index("train") + 1 :]

# Settings with which the notebook trains in seconds.
SMALL = {"epochs": 3, "batch_size": 50, "hidden_layers": [64], "z_dim": 4, "learning_rate": 0.01}


def pytest_configure():
    """Let tests compile quickly, and two processes of them share two cores."""
    # Most of the time would go into optimizing programs that then run for a blink. The tests of
    # whole runs and of front ends take this back: there, XLA compiles as it does for a user.
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    os.environ.update(XLA_FLAGS=quick, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


def pytest_collection_modifyitems(items):
    """Run the basics first, so that a broken one is known at once; kernels and browsers last."""
    order = "settings figures losses data handwriting results reruns kernels compare frontends"
    items.sort(key=lambda item: order.split().index(item.path.stem.split("_")[1]))


def assignments(parameters):
    """Return the source of a cell that assigns these parameters."""
    return "\n".join(f"{name} = {value!r}" for name, value in parameters.items())


class Notebook:
    """The notebook, run cell by cell in this process, which has TensorFlow already.

    It has a namespace of its own; figures that cells show are made into pictures if asked for.
    """

    def __init__(self, *, pictures=True):
        self.notebook = copy.deepcopy(NOTEBOOK)
        ClearOutputPreprocessor().preprocess(self.notebook, {})
        self.module = types.ModuleType("__main__")
        self._pictures = pictures
        gc.collect()
        gc.freeze()  # `report_epoch` collects anew: only what this notebook adds, to be fast

    def cell(self, cell_id):
        """Return the cell with this id."""
        (cell,) = [cell for cell in self.notebook.cells if cell["id"] == cell_id]
        return cell

    def execute(self, source):
        """Run source in a cell that is at the notebook's end for as long; return that cell."""
        self.notebook.cells.append(new_code_cell(source))
        self.execute_cell(self.notebook.cells[-1], len(self.notebook.cells) - 1)
        return self.notebook.cells.pop()

    def run(self, first="setup", last=CODE_CELLS[-1], **parameters):
        """Run the cells from `first` to `last`, with parameters set after the parameters cell."""
        for cell_id in CODE_CELLS[CODE_CELLS.index(first) : CODE_CELLS.index(last) + 1]:
            cell = self.cell(cell_id)
            self.execute_cell(cell, self.notebook.cells.index(cell))
            if cell_id == "parameters":
                self.execute(assignments(parameters))
        return self

    def execute_cell(self, cell, _):
        """Run a cell, keep its outputs and return it."""
        shell = InteractiveShell.instance()
        if shell.user_module is not self.module:
            shell.user_module, shell.user_ns = self.module, vars(self.module)
            shell.init_user_ns()
        shell.display_formatter.formatters["image/png"].enabled = self._pictures
        with capture_output() as captured:
            result = shell.run_cell(cell.source, store_history=True)
        streams = {"stdout": captured.stdout, "stderr": captured.stderr}
        cell.outputs = [new_output("stream", name=n, text=x) for n, x in streams.items() if x]
        for output in captured.outputs:
            if output.update:
                cell.outputs.pop()
            cell.outputs.append(new_output("display_data", output.data))
        result.raise_error()
        if result.result is not None:
            data, _ = shell.display_formatter.format(result.result)
            cell.outputs.append(new_output("execute_result", data))
        return cell

    def fetch(self, expression, **names):
        """Give the notebook these names and return the value of an expression there."""
        vars(self.module).update(names)
        return eval(expression, vars(self.module))


class Kernel(Notebook):
    """The notebook in a kernel of its own, started in a folder with `env` beside our variables."""

    def __init__(self, folder=ROOT, **env):
        super().__init__()
        self.client = NotebookClient(self.notebook, timeout=600)
        self.execute_cell = self.client.execute_cell
        env = {**os.environ, **env}
        env.pop("PYTEST_CURRENT_TEST", None)  # with it, ipykernel would not show what C++ writes
        self._setup = self.client.setup_kernel(cwd=str(folder), env=env)

    def __enter__(self):
        self._setup.__enter__()
        return self

    def __exit__(self, *error):
        return self._setup.__exit__(*error)

    def fetch(self, expression, **names):
        """Give the kernel these names and return the value of an expression there."""
        source = f"import pickle\nglobals().update(pickle.loads({pickle.dumps(names)!r}))\n"
        cell = self.execute(f"{source}print(pickle.dumps(({expression})).hex())")
        return pickle.loads(bytes.fromhex(printed(cell)))


def notebook_with(folder, **parameters):
    """Write the notebook with these parameters and its helper into a folder; return its path."""
    written, path = Notebook(), folder / "vae2.ipynb"
    written.cell("parameters").source += f"\n{assignments(parameters)}"
    nbformat.write(written.notebook, path)
    shutil.copy(ROOT / "vae_helpers.py", folder)
    return path


def trained(notebook):
    """Return what training leaves, its arrays as hashes: equal if it is the same bit for bit."""
    weights = "[weight for network in networks for weight in network.get_weights()]"
    history, samples, weights = notebook.fetch(f"(history, samples, {weights})")
    assert {len(values) for values in history.values()} == {len(samples)}
    arrays = [(array.shape, hash(array.tobytes())) for array in (samples, *weights)]
    return {**history, "seconds": None, "arrays": arrays}


def printed(cell):
    """Return what a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    """Return the bytes of the PNG pictures that a cell shows."""
    shown = [output.get("data", {}).get("image/png") for output in cell.outputs]
    return [base64.b64decode(p) if isinstance(p, str) else p for p in shown if p]


def wait_for(condition, seconds=300):
    """Return a condition's value as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def full_disk(size):
    """Let no file grow beyond so many bytes: writing fails in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def mnist():
    """Return the path of a real mnist.npz, which the environment variable MNIST_PATH names."""
    return os.environ.get("MNIST_PATH") or pytest.skip("MNIST_PATH names no mnist.npz")


@pytest.fixture(scope="session")
def small_arrays():
    """Return real digits in the layout of Keras' mnist.npz: four arrays by their names."""
    digits = vae_helpers.load_offline_digits(copies=1)
    return {
        "x_train": digits.x_train[:3000].reshape(-1, 28, 28),
        "y_train": digits.y_train[:3000].astype(np.uint8),
        "x_test": digits.x_test[:300].reshape(-1, 28, 28),
        "y_test": digits.y_test[:300].astype(np.uint8),
    }


@pytest.fixture(scope="session")
def small_npz(small_arrays, tmp_path_factory):
    """Return the path of a small npz of digits, in the layout of Keras' mnist.npz."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez_compressed(path, **small_arrays)
    return path


@pytest.fixture(scope="session")
def tiny(small_arrays, tmp_path_factory):
    """Return settings for runs whose size is not the point, on 600 and 100 images."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    few = {name: a[: 600 if "train" in name else 100] for name, a in small_arrays.items()}
    np.savez_compressed(path, **few)
    fewer = {"epochs": 2, "hidden_layers": [32], "batch_size": 60}
    return {**SMALL, **fewer, "data_path": str(path)}


@pytest.fixture(scope="session")
def notebook(small_npz):
    """Return the notebook, run as a whole on small settings and small data."""
    return Notebook().run(data_path=str(small_npz), **SMALL)
