"""Bad settings are named before anything is built, and nothing worse comes of them."""

import ast
import math
import re

import pytest
from conftest import NOTEBOOK, ROOT, SMALL, Kernel, cell_source
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient.exceptions import CellExecutionError

import vae_helpers

DEFAULTS = {}
exec(cell_source(NOTEBOOK, "parameters"), DEFAULTS)
del DEFAULTS["__builtins__"]

INF, NAN = math.inf, math.nan
BAD = {
    "data_path": [0, "", ["mnist.npz"], True],
    "output_dir": [0, "", True],
    "seed": [-1, 2**30, 1.5, None, "0"],
    "epochs": [0, -1, 501, 2.0, None, True, "20", INF],
    "batch_size": [0, -5, 1.5, NAN, "many"],
    "hidden_layers": [[], [0], [512, -1], [10_001], [12.5], 512, "5", None, [True], [[5]]],
    "activation": ["gelo", "", None, "GELU", 0],
    "decoder_skips": [1, "yes", None],
    "z_dim": [0, 1, -3, 101, 10.0, None],
    "likelihood": ["normal", None, ""],
    "decoder_std": [0, -0.5, NAN, INF, "0.5", None, 1e-9],
    "classification_weight": [-1.0, NAN, INF, None],
    "stop_gradient": [0, "no"],
    "kl_weight_start": [-0.1, NAN, INF, "1"],
    "kl_anneal_epochs": [-1, 0.5, NAN, INF],
    "asked_digit_weight": [-1, NAN, INF],
    "asked_digit_batch": [0, -1, 2.5, 100_001],
    "distortion": [-0.1, 5.1, NAN, None],
    "optimizer_name": ["sdg", "SGD", "", None, 1],
    "learning_rate": [0, -0.1, NAN, INF, "fast", None],
    "cosine_decay": [1, None],
    "momentum": [-0.1, 1, 1.5, NAN, None],
    "clip_norm": [0, -5, NAN, INF, "5"],
}  # fmt: skip
CASES = [(name, value) for name, values in BAD.items() for value in values]
ALLOWED = ("Input should be", "List should have", "String should have")


def refusal(name, value):
    """Return the lines with which a value is refused, none if it is taken."""
    try:
        checked = vae_helpers.check_hyperparameters({**DEFAULTS, name: value})
    except ValueError as error:
        return str(error).splitlines()
    assert getattr(checked, name) == value
    return []


def test_the_defaults_are_taken_and_all_are_checked():
    checked = vae_helpers.check_hyperparameters({**DEFAULTS, "another": 1})
    assert checked.model_dump() == DEFAULTS
    assert set(BAD) == set(DEFAULTS)
    assert len(CASES) >= 40


def test_readme_lists_all_with_their_defaults():
    rows = re.findall(r"^\| `(\w+)` \|.*?\| `(.+?)` \|", (ROOT / "README.md").read_text(), re.M)
    assert {name: ast.literal_eval(default) for name, default in rows} == DEFAULTS


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_bad_value_is_named_with_what_is_allowed(name, value):
    (line,) = refusal(name, value)
    where, _, rest = line.partition(" = ")
    assert where.split("[")[0] == name
    value = value if where == name else value[int(where.split("[")[1][:-1])]
    assert rest.startswith(f"{value!r:.80}: ")
    assert any(words in rest for words in ALLOWED)


def test_all_that_is_wrong_is_named_at_once():
    names = {**DEFAULTS, "epochs": 0, "z_dim": "ten"}
    del names["seed"]
    with pytest.raises(ValueError, match=r"seed: Field required\nepochs = 0: .*\nz_dim = 'ten'"):
        vae_helpers.check_hyperparameters(names)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(sorted(DEFAULTS)), ANYTHING)
def test_anything_is_taken_or_refused_by_name(name, value):
    lines = refusal(name, value)
    assert all(line.startswith(name) for line in lines)
    if not lines:  # then it is of the default's kind, or None where that is allowed
        if value is None:
            assert name in ("data_path", "output_dir", "clip_norm")
        elif isinstance(DEFAULTS[name], float):
            assert type(value) in (int, float)
            assert 0 <= value < INF
        else:
            assert DEFAULTS[name] is None or type(value) is type(DEFAULTS[name])


@pytest.mark.parametrize(
    ("parameters", "cell_id", "message"),
    [
        ({"optimizer_name": "sdg"}, "check", "optimizer_name = 'sdg': Input should be 'sgd' or"),
        ({"batch_size": 10_000}, "data", "batch_size = 10000: Input should be at most 2994"),
        ({"data_path": "nowhere.npz"}, "data", "nowhere.npz: no such file"),
    ],
)
def test_the_notebook_stops_before_it_builds(parameters, cell_id, message, small_npz):
    with Kernel() as kernel:
        with pytest.raises(CellExecutionError, match="ValueError") as error:
            kernel.run(**{**SMALL, "data_path": str(small_npz), **parameters})
        assert message in str(error.value)
        assert kernel.cell(cell_id).outputs[-1].output_type == "error"
        assert not kernel.fetch("'encoder' in globals()")


# Values at the edges of what is allowed.
EXTREMES = [
    {
        "hidden_layers": [1],
        "z_dim": 2,
        "batch_size": 2994,
        "epochs": 1,
        "asked_digit_batch": 1,
        "momentum": 0.0,
        "kl_weight_start": 0,
        "kl_anneal_epochs": 0,
        "distortion": 5,
        "decoder_std": 0.01,
        "learning_rate": 1e-300,
        "classification_weight": 0,
        "clip_norm": 1e-6,
        "seed": 2**30 - 1,
    },
    {
        "hidden_layers": [30] * 20,
        "activation": "selu",
        "z_dim": 100,
        "epochs": 1,
        "likelihood": "bernoulli",
        "kl_weight_start": 1000,
        "optimizer_name": "adam",
        "learning_rate": 0.001,
        "decoder_std": 100,
    },
]


@pytest.mark.parametrize("parameters", EXTREMES)
def test_the_notebook_runs_at_the_edges(parameters, small_npz):
    with Kernel() as kernel:
        kernel.run(**{**SMALL, "data_path": str(small_npz), **parameters})
        assert len(kernel.fetch("dict(history)['vae_loss']")) == 1
