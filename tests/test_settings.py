"""Bad settings are named before anything is built, and nothing worse comes of them."""

import ast
import contextlib
import re
from math import inf, nan

import keras
import numpy as np
import pytest
from conftest import CODE, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from quality import ARTICLE

import vae_helpers

DEFAULTS = {}
exec(CODE["parameters"].source, {}, DEFAULTS)
LIKELIHOODS = {"likelihoods": ["gaussian", "bernoulli"]}

# Values that are refused, by name.
BAD = {
    "data_path": [0, "", ["mnist.npz"], True], "output_dir": [0, "", True],
    "seed": [-1, 2**31, 1.5, None, "0"], "epochs": [0, -1, 1001, 2.0, None, True, "20", inf],
    "batch_size": [0, -5, 1.5, nan, "many"], "z_dim": [0, 1, -3, 10.0, None],
    "hidden_layers": [[], [0], [512, -1], [12.5], 512, "5", None, [True], [[5]]],
    "activation": ["gelo", "", None, "GELU", 0, "get", "threshold", "glu"],
    "encoder_sees_digit": [1, "yes", None], "decoder_skips": [1, "yes", None],
    "stop_gradient": [0, "no"], "cosine_decay": [1, None], "likelihood": ["normal", None, ""],
    "decoder_std": [0, -0.5, nan, inf, "0.5", None, 1e-9], "distortion": [-0.1, 5.1, nan, None],
    "classification_weight": [-1.0, nan, inf, None], "asked_digit_weight": [-1, nan, inf],
    "optimizer_name": ["sdg", "SGD", "", None, 1], "momentum": [-0.1, 1, 1.5, nan, None],
    "learning_rate": [0, -0.1, nan, inf, "fast", None], "clip_norm": [0, -5, nan, inf, "5"],
}  # fmt: skip
CASES = [(name, value) for name, values in BAD.items() for value in values]


def refusal(name, value):
    """Return the lines with which a value is refused, none if it is taken."""
    try:
        checked = vae_helpers.check_hyperparameters({**DEFAULTS, **LIKELIHOODS, name: value})
    except ValueError as error:
        return str(error).splitlines()
    assert checked[name] == value
    return []


def test_the_defaults_are_flat_literals_with_comments_and_are_taken_checked_and_in_readme():
    (cell,) = [cell for cell in CODE.values() if "parameters" in cell.metadata.get("tags", [])]
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign)
        assert statement.targets[0].id.islower()
        ast.literal_eval(statement.value)
    assert all("  # " in line for line in cell.source.splitlines() if line and line[0] != "#")
    checked = vae_helpers.check_hyperparameters({**DEFAULTS, **LIKELIHOODS, "another": 1})
    assert checked == DEFAULTS
    assert set(BAD) == set(DEFAULTS)
    assert len(CASES) >= 40
    rows = re.findall(r"^`(\w+)` \|.*?\| `(.+?)` \|", (ROOT / "README.md").read_text(), re.M)
    assert {name: ast.literal_eval(default) for name, default in rows} == DEFAULTS
    of_the_article = vae_helpers.check_hyperparameters({**DEFAULTS, **ARTICLE})
    assert of_the_article["hidden_layers"] == [128]  # so `quality.py` finds them there


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_bad_value_is_named_with_what_is_allowed(name, value):
    (line,) = refusal(name, value)
    where, _, rest = line.partition(" = ")
    assert where.split("[")[0] == name
    value = value if where == name else value[int(where.split("[")[1][:-1])]
    assert rest.startswith(f"{value!r:.80}: ")
    assert re.search("Input should be|List should have|String should have", rest)


def test_no_limit_without_a_reason():
    large = {"epochs": 1000, "hidden_layers": [100_000] * 30, "z_dim": 784, "batch_size": 10**6}
    assert not any(refusal(*setting) for setting in large.items())
    for name, value, reason in [
        ("epochs", 1001, "each is a row of one figure"),
        ("seed", 2**31, "it seeds generators of 32 bits"),
        ("distortion", 6.0, "digits leave the image beyond"),
    ]:
        (line,) = refusal(name, value)
        assert line.endswith(f" ({reason})")


def test_all_that_is_wrong_is_named_at_once():
    names = {**DEFAULTS, **LIKELIHOODS, "epochs": 0, "z_dim": "ten"}
    del names["seed"]
    with pytest.raises(ValueError, match=r"seed: Field required\nepochs = 0: .*\nz_dim = 'ten'"):
        vae_helpers.check_hyperparameters(names)


def test_a_whole_number_is_a_real_one_where_one_is_meant():
    whole = {n: int(n != "momentum") for n, value in DEFAULTS.items() if type(value) is float}
    assert len(whole) == 7
    checked = vae_helpers.check_hyperparameters({**DEFAULTS, **whole})
    assert {name: repr(checked[name]) for name in whole} == {n: f"{w}.0" for n, w in whole.items()}


def test_a_name_that_a_person_adds_is_checked_and_travels_with_the_rest():
    cells = ["import os", "data_path = None\nseed = 0\nbeta = 4.0", "%magic", "gamma = 2"]
    names = {**DEFAULTS, "In": cells, "beta": 4.0, "gamma": 2}
    assert vae_helpers.check_hyperparameters(names) == {**DEFAULTS, "beta": 4.0}
    with pytest.raises(ValueError, match="^beta.* = "):
        vae_helpers.check_hyperparameters({**names, "beta": object()})


@pytest.mark.parametrize(
    ("setter", "other"), [("set_dtype_policy", "mixed_bfloat16"), ("set_floatx", "float64")]
)
def test_another_precision_of_keras_is_said_in_one_line(setter, other):
    change = getattr(keras.config, setter)
    change(other)
    try:
        message = rf"^Keras must compute in float32.*{setter}\('float32'\)"
        with pytest.raises(ValueError, match=rf"{message}.*\Z"):  # in one line
            vae_helpers.check_hyperparameters(DEFAULTS)
    finally:
        change("float32")


def test_a_minibatch_fits_into_the_training_set_and_a_likelihood_is_in_the_notebooks_table():
    names = {**DEFAULTS, "batch_size": 601, "likelihood": "laplace", "likelihoods": {"laplace": 0}}
    taken = vae_helpers.check_hyperparameters(names, image_count=601)
    assert (taken["batch_size"], taken["likelihood"]) == (601, "laplace")
    both = r"^batch_size = 601: .* 600 \(the number of training im.*\n.* 'gaussian' or 'bernoulli'"
    with pytest.raises(ValueError, match=both):
        vae_helpers.check_hyperparameters({**names, **LIKELIHOODS}, image_count=600)


def usable(kind, keeps_width=lambda found: True):
    """Return the names, in lower case, that a module of Keras knows and that can be used here."""
    names, module = set(), getattr(keras, kind)
    for name in map(str.lower, dir(module)):
        with contextlib.suppress(Exception):  # what is neither fails in many ways
            names |= {name} if keeps_width(module.get(name)) else set()
    return names


def test_any_activation_that_keras_knows_and_can_use_is_taken():
    taken = {name for name in dir(keras.activations) if not refusal("activation", name)}
    assert taken == usable("activations", lambda found: found(np.ones([1, 2])).shape == (1, 2))
    assert {"relu", "gelu", "silu", "sigmoid", "tanh", "softmax", "hard_silu", "celu"} <= taken
    for name in taken:
        assert keras.layers.Dense(4, activation=name)(keras.Input([3])).shape == (None, 4)


def test_any_optimizer_that_keras_knows_and_can_use_is_taken():
    taken = usable("optimizers")
    assert {"sgd", "adam", "adamw", "rmsprop", "lion", "muon"} <= taken
    names = map(str.lower, dir(keras.optimizers))
    assert taken == {name for name in names if not refusal("optimizer_name", name)}
    decay = keras.optimizers.schedules.CosineDecay(0.01, 10)
    for name in taken:
        weight = keras.Variable(np.ones([2, 3], np.float32))
        optimizer = type(keras.optimizers.get(name))(decay)
        optimizer.apply([keras.ops.ones([2, 3])], [weight])
        assert np.all(weight.numpy() < 1)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(sorted(DEFAULTS)), ANYTHING)
def test_anything_is_taken_or_refused_by_name(name, value):
    if lines := refusal(name, value):
        assert all(line.startswith(name) for line in lines)
    elif value is None:  # what is taken is of the default's kind, or None where that is allowed
        assert name in ("data_path", "output_dir", "clip_norm")
    elif isinstance(DEFAULTS[name], float):
        assert type(value) in (int, float)
        assert 0 <= value < inf
    else:
        assert DEFAULTS[name] is None or type(value) is type(DEFAULTS[name])


def test_no_private_interface_of_another_package_is_used():
    # One of ipywidgets 8, which the ipywidgets 7 of Google Colab lacks, stopped Run All there.
    sources = [(ROOT / "vae_helpers.py").read_text()]
    sources += [cell.source for cell in CODE.values()]
    private = set(re.findall(r"\b(?!self\b)\w+\.(_[a-z]\w*)", "\n".join(sources)))
    assert private <= {"_asdict", "_replace", "_fields"}  # public ones of named tuples
