"""What the tests share: small real data, and a real kernel that runs the notebook."""

import base64
import os
import pickle
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import vae_helpers  # noqa: E402

NOTEBOOK = nbformat.read(ROOT / "vae2.ipynb", as_version=4)

# Settings with which the notebook trains in seconds.
SMALL = {
    "epochs": 3,
    "batch_size": 50,
    "hidden_layers": [64],
    "z_dim": 4,
    "asked_digit_batch": 20,
    "kl_anneal_epochs": 1,
}


def cell_source(notebook, cell_id):
    """Return the source of the cell with this id."""
    (cell,) = [cell for cell in notebook.cells if cell["id"] == cell_id]
    return cell.source


def notebook_with(folder, **parameters):
    """Write the notebook with these parameters and its helper into a folder; return its path."""
    notebook = nbformat.from_dict(NOTEBOOK)
    (cell,) = [cell for cell in notebook.cells if cell.id == "parameters"]
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    cell.source = "\n".join([cell_source(NOTEBOOK, "parameters"), *lines])
    (folder / "vae_helpers.py").write_text((ROOT / "vae_helpers.py").read_text())
    nbformat.write(notebook, folder / "vae2.ipynb")
    return folder / "vae2.ipynb"


class Kernel:
    """The notebook in a kernel of its own, run cell by cell.

    Args:
        folder: the kernel's working folder; the notebook's own by default.
        env: environment variables of the kernel beside the present ones.
    """

    def __init__(self, folder=ROOT, **env):
        self.notebook = nbformat.read(ROOT / "vae2.ipynb", as_version=4)
        for cell in self.notebook.cells:
            cell.update({"outputs": []} if cell.cell_type == "code" else {})
        self.client = NotebookClient(
            self.notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        )
        self._env = env

    def __enter__(self):
        env = {**os.environ, **self._env}
        env.pop("PYTEST_CURRENT_TEST", None)  # with it, ipykernel would not show what C++ writes
        self._setup = self.client.setup_kernel(env=env)
        self._setup.__enter__()
        return self

    def __exit__(self, *error):
        return self._setup.__exit__(*error)

    def index(self, cell_id):
        """Return the position of the cell with this id."""
        return [cell["id"] for cell in self.notebook.cells].index(cell_id)

    def cell(self, cell_id):
        """Return the cell with this id."""
        return self.notebook.cells[self.index(cell_id)]

    def execute(self, source):
        """Run source in a new cell at the notebook's end and return that cell."""
        self.notebook.cells.append(nbformat.v4.new_code_cell(source))
        return self.client.execute_cell(self.notebook.cells[-1], len(self.notebook.cells) - 1)

    def run(self, first="setup", last=None, **parameters):
        """Run the cells from `first` to `last`, with parameters set after the parameters cell."""
        end = len(self.notebook.cells) if last is None else self.index(last) + 1
        for index in range(self.index(first), end):
            cell = self.notebook.cells[index]
            if cell.cell_type == "code":
                self.client.execute_cell(cell, index)
            if "parameters" in cell.metadata.get("tags", []):
                self.execute("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
        return self

    def fetch(self, expression, **names):
        """Give the kernel these names and return the value of an expression there."""
        sent = base64.b64encode(pickle.dumps(names)).decode()
        cell = self.execute(
            "import base64, pickle\n"
            f"globals().update(pickle.loads(base64.b64decode({sent!r})))\n"
            f"print(base64.b64encode(pickle.dumps(({expression}))).decode())"
        )
        return pickle.loads(base64.b64decode(printed(cell)))


def printed(cell):
    """Return what a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.fixture(scope="session")
def mnist():
    """Return the path of a real mnist.npz, which the environment variable MNIST_PATH names."""
    path = os.environ.get("MNIST_PATH")
    if not path:
        pytest.skip("MNIST_PATH names no mnist.npz")
    return path


@pytest.fixture(scope="session")
def small_arrays():
    """Return real digits in the layout of Keras' mnist.npz: four arrays by their names."""
    digits = vae_helpers.load_small_digits(copies=2)
    return {
        "x_train": digits.x_train.reshape(-1, 28, 28),
        "y_train": digits.y_train.astype(np.uint8),
        "x_test": digits.x_test.reshape(-1, 28, 28),
        "y_test": digits.y_test.astype(np.uint8),
    }


@pytest.fixture(scope="session")
def small_npz(small_arrays, tmp_path_factory):
    """Return the path of an mnist.npz of 2,994 training and 300 test images."""
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    np.savez_compressed(path, **small_arrays)
    return path
