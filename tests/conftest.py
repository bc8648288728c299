"""What the tests share: small real data, and the notebook run here or in a real kernel."""

import base64
import gc
import os
import pickle
import sys
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import vae_helpers  # noqa: E402

NOTEBOOK = nbformat.read(ROOT / "vae2.ipynb", as_version=4)
CODE_CELLS = [cell.id for cell in NOTEBOOK.cells if cell.cell_type == "code"]
RESULT_CELLS = CODE_CELLS[CODE_CELLS.index("train") + 1 :]

# Settings with which the notebook trains in seconds.
SMALL = {"epochs": 3, "batch_size": 50, "hidden_layers": [64], "z_dim": 4, "learning_rate": 0.01}
TINY = {**SMALL, "epochs": 2, "hidden_layers": [32], "batch_size": 60}

# The basics first, so that a broken one is known at once; real kernels and browsers last.
ORDER = [
    "settings", "figures", "losses", "data", "handwriting", "results", "reruns", "kernels",
    "compare", "whole_runs", "frontends",
]  # fmt: skip


def pytest_configure():
    """Let tests compile quickly, and two processes of them share two cores."""
    # Most of the time would go into optimizing programs that then run for a blink. The tests of
    # whole runs and of front ends take this back: there, XLA compiles as it does for a user.
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    os.environ.update(XLA_FLAGS=quick, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


def pytest_collection_modifyitems(items):
    """Run the files of tests in the order of ORDER."""
    names = [f"test_{name}" for name in ORDER]
    items.sort(key=lambda item: names.index(item.module.__name__))


def cell_source(notebook, cell_id):
    """Return the source of the cell with this id."""
    (cell,) = [cell for cell in notebook.cells if cell["id"] == cell_id]
    return cell.source


def notebook_with(folder, **parameters):
    """Write the notebook with these parameters and its helper into a folder; return its path."""
    notebook = nbformat.from_dict(NOTEBOOK)
    for cell in notebook.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    (cell,) = [cell for cell in notebook.cells if cell.id == "parameters"]
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    cell.source = "\n".join([cell_source(NOTEBOOK, "parameters"), *lines])
    (folder / "vae_helpers.py").write_text((ROOT / "vae_helpers.py").read_text())
    nbformat.write(notebook, folder / "vae2.ipynb")
    return folder / "vae2.ipynb"


class Runner:
    """The notebook, run cell by cell: what `Kernel` and `Notebook` have in common."""

    def __init__(self):
        self.notebook = nbformat.read(ROOT / "vae2.ipynb", as_version=4)
        for cell in self.notebook.cells:
            cell.update({"outputs": []} if cell.cell_type == "code" else {})

    def index(self, cell_id):
        """Return the position of the cell with this id."""
        return [cell["id"] for cell in self.notebook.cells].index(cell_id)

    def cell(self, cell_id):
        """Return the cell with this id."""
        return self.notebook.cells[self.index(cell_id)]

    def execute(self, source):
        """Run source in a new cell at the notebook's end and return that cell."""
        self.notebook.cells.append(nbformat.v4.new_code_cell(source))
        return self.execute_cell(self.notebook.cells[-1], len(self.notebook.cells) - 1)

    def run(self, first="setup", last=None, **parameters):
        """Run the cells from `first` to `last`, with parameters set after the parameters cell."""
        end = self.index(CODE_CELLS[-1] if last is None else last) + 1
        for index in range(self.index(first), end):
            cell = self.notebook.cells[index]
            if cell.cell_type == "code":
                self.execute_cell(cell, index)
            if "parameters" in cell.metadata.get("tags", []):
                self.execute("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
        return self


class Notebook(Runner):
    """The notebook in this process, which has TensorFlow already, in a namespace of its own.

    Args:
        pictures: whether the figures that cells show are made into pictures.
    """

    def __init__(self, *, pictures=True):
        super().__init__()
        self.module = types.ModuleType("__main__")
        self._pictures = pictures
        gc.collect()
        gc.freeze()  # `report_epoch` collects anew: only what this notebook adds, to be fast

    def execute_cell(self, cell, _):
        """Run a cell, keep its outputs and return it."""
        shell = InteractiveShell.instance()
        if shell.user_module is not self.module:
            shell.user_module, shell.user_ns = self.module, vars(self.module)
            shell.init_user_ns()
        shell.display_formatter.formatters["image/png"].enabled = self._pictures
        with capture_output() as captured:
            result = shell.run_cell(cell.source, store_history=True)
        cell.outputs = []
        for name in ("stdout", "stderr"):
            if text := getattr(captured, name):
                cell.outputs.append(nbformat.v4.new_output("stream", name=name, text=text))
        for output in captured.outputs:
            if output.update:
                cell.outputs.pop()
            cell.outputs.append(nbformat.v4.new_output("display_data", output.data))
        result.raise_error()
        if result.result is not None:
            data, _ = shell.display_formatter.format(result.result)
            cell.outputs.append(nbformat.v4.new_output("execute_result", data))
        return cell

    def fetch(self, expression, **names):
        """Give the notebook these names and return the value of an expression there."""
        vars(self.module).update(names)
        return eval(expression, vars(self.module))


class Kernel(Runner):
    """The notebook in a kernel of its own.

    Args:
        folder: the kernel's working folder; the notebook's own by default.
        env: environment variables of the kernel beside the present ones.
    """

    def __init__(self, folder=ROOT, **env):
        super().__init__()
        self.client = NotebookClient(
            self.notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        )
        self.execute_cell = self.client.execute_cell
        self._env = env

    def __enter__(self):
        env = {**os.environ, **self._env}
        env.pop("PYTEST_CURRENT_TEST", None)  # with it, ipykernel would not show what C++ writes
        self._setup = self.client.setup_kernel(env=env)
        self._setup.__enter__()
        return self

    def __exit__(self, *error):
        return self._setup.__exit__(*error)

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


def pictures(cell):
    """Return the bytes of the PNG pictures that a cell shows."""
    shown = [output.get("data", {}).get("image/png") for output in cell.outputs]
    return [base64.b64decode(p) if isinstance(p, str) else p for p in shown if p]


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
    """Return settings for runs whose size is not the point: TINY, on 600 and 100 images."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    sizes = {"train": 600, "test": 100}
    tiny_arrays = {name: a[: sizes[name.split("_")[1]]] for name, a in small_arrays.items()}
    np.savez_compressed(path, **tiny_arrays)
    return {**TINY, "data_path": str(path)}


@pytest.fixture(scope="session")
def notebook(small_npz):
    """Return the notebook, run as a whole on small settings and small data."""
    return Notebook().run(data_path=str(small_npz), **SMALL)
