"""Hyperparameters are checked: a wrong one is named with its value and what is allowed."""

import ast
import symtable
import typing
from math import inf, nan

import numpy as np
import pytest
from conftest import CODE, vae_helpers

DEFAULTS = {}
exec(CODE["parameters"].source, {}, DEFAULTS)
DEFAULTS.pop("data_path")

BAD_VALUES = {
    "seed": [-1, 2**31, 1.5, None],
    "epochs": [0, 1001, 2.0, True],
    "batch_size": [0, -5, 1.5],
    "z_dim": [1, 10.0, None],
    "decoder_std": [0, -0.5, nan, 1e-9],
    "learning_rate": [0, -0.1, nan, inf, None],
    "momentum": [-0.1, 1, nan],
    "classification_weight": [-1.0, inf, True],
    "hidden_layers": [[], [0], [12.5], 512, (512,), None],
    "activation": ["gelo", "GELU", None],
    "encoder_sees_digit": [1, None],
    "decoder_skips": [1, None],
    "stop_gradient": [0, None],
    "asked_digit_weight": [-1, nan],
    "distortion": [-0.1, 5.1, None],
}
CASES = [(name, value) for name, values in BAD_VALUES.items() for value in values]


def faults(**changes):
    """Return the lines with which changes of the defaults are refused."""
    with pytest.raises(ValueError, match=".") as caught:
        vae_helpers.check_settings(**{**DEFAULTS, **changes})
    return str(caught.value).splitlines()


def test_the_defaults_are_at_most_eighteen_flat_literals_with_comments():
    cell = CODE["parameters"]
    assert "parameters" in cell.metadata["tags"]
    statements = ast.parse(cell.source).body
    assert len(statements) <= 18
    for statement in statements:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)
    for line in cell.source.splitlines():
        assert not line or line.startswith("#") or "  # " in line


def test_the_defaults_are_all_the_settings_and_are_allowed():
    assert vae_helpers.check_settings(**DEFAULTS).model_dump() == DEFAULTS
    assert set(vae_helpers.Settings.model_fields) == set(DEFAULTS) == set(BAD_VALUES)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_bad_value_is_named_with_what_is_allowed(name, value):
    (line,) = faults(**{name: value})
    assert line.startswith((f"{name} = {value!r}: Input should be", f"{name} = []: List should"))


def test_all_faults_are_named_at_once():
    values = {**DEFAULTS, "epochs": 0, "activation": "gelo", "beta": object()}
    del values["seed"]
    with pytest.raises(ValueError, match="^seed: Field required\n") as caught:
        vae_helpers.check_settings(**values)
    named = [line.split()[0] for line in str(caught.value).splitlines()]
    assert named == ["seed:", "epochs", "activation", "beta"]


def test_integers_become_floats_where_floats_are_expected():
    names = [name for name, value in DEFAULTS.items() if isinstance(value, float)]
    integers = {name: int(name != "momentum") for name in names}
    checked = vae_helpers.check_settings(**{**DEFAULTS, **integers}).model_dump()
    for name in names:
        assert repr(checked[name]) == f"{integers[name]}.0"


@pytest.mark.parametrize("value", [4, 0.5, None, "text", [1, 2], {"a": [True]}])
def test_a_hyperparameter_of_ones_own_is_taken(value):
    settings = vae_helpers.check_settings(**DEFAULTS, beta=value)
    assert settings.beta == value
    assert settings.model_dump() == {**DEFAULTS, "beta": value}


def test_a_hyperparameter_of_ones_own_cannot_have_a_name_that_the_notebook_uses():
    names = set()
    for cell_id, cell in CODE.items():
        if cell_id != "parameters":
            symbols = symtable.symtable(cell.source, cell_id, "exec").get_symbols()
            names |= {symbol.get_name() for symbol in symbols if symbol.is_assigned()}
            names |= {symbol.get_name() for symbol in symbols if symbol.is_imported()}
    assert {"time", "data", "results"} < names
    for name in [*names - {"_"}, "copy", "json"]:
        (line,) = faults(**{name: 4})
        assert line == f"['{name}']: the notebook uses these names itself; choose others"


@pytest.mark.parametrize("value", [object(), {1, 2}, np.float32(1), nan])
def test_a_hyperparameter_of_ones_own_that_json_cannot_hold_is_refused(value):
    (line,) = faults(beta=value)
    assert line.startswith(f"beta = {value!r}: ")


@pytest.mark.parametrize(
    ("name", "text"),
    [("hidden_layers", "[512]"), ("epochs", "5"), ("stop_gradient", "False")],
)
def test_a_string_in_place_of_another_type_is_refused_with_the_option_of_papermill(name, text):
    (line,) = faults(**{name: text})
    assert line.endswith(f"; this is a string (with papermill, write -y '{name}: {text}')")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("seed", 2**31, "31 bits"), ("z_dim", 1, "plane"), ("distortion", 6, "leave the image")],
)
def test_the_reason_of_a_limit_is_given(name, value, reason):
    (line,) = faults(**{name: value})
    assert reason in line.partition("(")[2]


def test_every_activation_is_one_of_keras():
    with vae_helpers.quiet_import():
        import keras
    names = typing.get_args(vae_helpers.ACTIVATIONS)
    assert DEFAULTS["activation"] in names
    for name in names:
        layer = keras.layers.Dense(4, activation=name)
        output = layer(np.linspace(-3, 3, 30, dtype=np.float32).reshape(10, 3))
        assert output.shape == (10, 4)
        assert np.isfinite(output).all()
