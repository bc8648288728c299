"""What the tests share: the notebook in a real kernel, and small sets of real digits."""

import base64
import contextlib
import copy
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
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import vae_helpers  # noqa: E402

NOTEBOOK = nbformat.read(ROOT / "vae2.ipynb", as_version=4)
CODE = {cell.id: cell for cell in NOTEBOOK.cells if cell.cell_type == "code"}

# Settings with which the notebook trains in seconds.
SMALL = {"epochs": 2, "batch_size": 50, "hidden_layers": [64], "z_dim": 4, "learning_rate": 0.01}


def pytest_configure():
    """Let XLA compile quickly, since the small programs of the tests run only for a moment."""
    quick = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
    os.environ.update(XLA_FLAGS=quick, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that both processes end at about the same time."""
    slowest = ["test_notebook", "test_frontends", "test_compare"]
    ranks = {name: rank for rank, name in enumerate(slowest)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def assignments(parameters):
    """Return source that assigns these parameters."""
    return "\n".join(f"{name} = {value!r}" for name, value in parameters.items())


class Kernel:
    """A copy of the notebook in a kernel of its own, which starts in a folder."""

    def __init__(self, folder=ROOT, **env):
        self.notebook = copy.deepcopy(NOTEBOOK)
        for cell in self.notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = []
        self.client = NotebookClient(self.notebook, timeout=600)
        env = {**os.environ, **env}
        env.pop("PYTEST_CURRENT_TEST", None)  # with it, ipykernel shows no output of C++
        self._setup = self.client.setup_kernel(cwd=str(folder), env=env)

    def __enter__(self):
        self._setup.__enter__()
        return self

    def __exit__(self, *error):
        return self._setup.__exit__(*error)

    def cell(self, cell_id):
        """Return the cell with this id."""
        return next(cell for cell in self.notebook.cells if cell["id"] == cell_id)

    def run(self, first="setup", last=None, skip=(), **parameters):
        """Run the cells from `first` to `last`; set parameters after the parameters cell."""
        cell_ids = list(CODE)
        start = cell_ids.index(first)
        stop = cell_ids.index(last) + 1 if last else len(cell_ids)
        for cell_id in cell_ids[start:stop]:
            if cell_id not in skip:
                cell = self.cell(cell_id)
                self.client.execute_cell(cell, self.notebook.cells.index(cell))
                if cell_id == "parameters":
                    self.execute(assignments(parameters))
        return self

    def execute(self, source):
        """Run source in a cell at the end of the notebook, and remove it; return that cell."""
        self.notebook.cells.append(new_code_cell(source))
        try:
            self.client.execute_cell(self.notebook.cells[-1], len(self.notebook.cells) - 1)
        finally:
            cell = self.notebook.cells.pop()
        return cell

    def fetch(self, expression):
        """Return the value of an expression in the kernel."""
        cell = self.execute(f"import pickle\nprint(pickle.dumps(({expression})).hex())")
        return pickle.loads(bytes.fromhex(printed(cell)))


def notebook_with(folder, **parameters):
    """Write the notebook with these parameters and its helper into a folder; return its path.

    The copy has no outputs.
    """
    notebook = copy.deepcopy(NOTEBOOK)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
        if cell.id == "parameters":
            cell.source += f"\n{assignments(parameters)}"
    path = Path(folder, "vae2.ipynb")
    nbformat.write(notebook, path)
    shutil.copy(ROOT / "vae_helpers.py", folder)
    return path


def printed(cell):
    """Return what a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    """Return the bytes of the PNG pictures that a cell shows."""
    found = []
    for output in cell.outputs:
        content = output.get("data", {}).get("image/png")
        if content:
            found.append(base64.b64decode(content))
    return found


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


def wait_for(condition, seconds=60):
    """Return the value of a condition as soon as it is true."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError("what the test waits for did not happen")
        time.sleep(0.05)


@contextlib.contextmanager
def full_disk(size):
    """Let no file grow beyond `size` bytes: writing fails in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def run_cells(cell_ids, **parameters):
    """Run cells of the notebook in this process, without figures; return their namespace."""
    shell = InteractiveShell.instance()
    module = types.ModuleType("notebook")
    shell.user_module = module
    shell.user_ns = vars(module)
    shell.init_user_ns()
    for cell_id in cell_ids:
        with capture_output():
            shell.run_cell(CODE[cell_id].source).raise_error()
            if cell_id == "parameters":
                shell.run_cell(assignments(parameters)).raise_error()
    return module
