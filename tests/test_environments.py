"""The notebook in other environments."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, Kernel
from nbclient.exceptions import CellExecutionError


def test_a_helper_that_is_not_found_is_named_with_the_remedy(tmp_path):
    refused = pytest.raises(CellExecutionError, match="vae_helpers.py is not found: start the")
    with Kernel(tmp_path) as kernel, refused:
        kernel.run(last="setup")


@pytest.mark.parametrize(
    ("flags", "message"),
    [("", r"$"), ("--nonsense=1", "(?s).*Unknown flag in XLA_FLAGS: --nonsense=1")],
)
def test_the_import_is_quiet_but_a_fatal_error_can_be_seen(flags, message, tmp_path):
    code = """
import vae_helpers
with vae_helpers.quiet_import():
    import tensorflow as tf
    import keras
tf.function(tf.square, jit_compile=True)(tf.constant(2.0))
assert keras.config.floatx() == "float32"
assert keras.config.image_data_format() == "channels_last"
"""
    own_defaults = {"floatx": "float64", "image_data_format": "channels_first"}
    (tmp_path / "keras.json").write_text(json.dumps(own_defaults))
    command = [sys.executable, "-c", code]
    env = {**os.environ, "XLA_FLAGS": flags, "KERAS_HOME": str(tmp_path)}
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert re.match(message, process.stderr)
    assert (process.returncode == 0) == (flags == "")
