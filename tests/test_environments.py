"""The notebook in other environments."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, Kernel, printed
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


def test_both_models_learn_the_offline_default(tmp_path):
    env = {"KERAS_HOME": str(tmp_path / "no" / "where"), "https_proxy": "http://127.0.0.1:9"}
    with Kernel(XLA_FLAGS="", **env) as kernel:  # compile as it does for a reader
        skip = ["article-losses", "judge", "article-results"]
        kernel.run(last="better-model", skip=skip, epochs=5)
        assert "cannot be downloaded" in printed(kernel.cell("data"))
        assert kernel.fetch("data.name") == "5,000 MNIST images"
        kernel.execute("vae, history, samples = train(BetterDigitVAE)")
        article_history, history = kernel.fetch("article_history, history")
        _, _, digit_probs = kernel.fetch("vae.infer(samples[2:].reshape(-1, pixels))")
    assert article_history["test_vae_loss"][-1] < 245
    assert history["test_vae_loss"][-1] < 230
    assert history["test_accuracy"][-1] > 0.97
    assert np.mean(digit_probs.argmax(axis=1) == np.tile(np.arange(10), 3)) > 0.9
