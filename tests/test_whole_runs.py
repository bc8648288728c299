"""Whole runs with the default networks, on MNIST and on what takes its place."""

import numpy as np
from conftest import Kernel, printed


def test_offline_without_a_home_the_default_draws_readable_digits_from_epoch_3():
    # No cached copy, no place for one, and nothing answers where the download goes.
    nowhere = "/nonexistent"
    env = {
        "XLA_FLAGS": "",
        "HOME": nowhere,
        "KERAS_HOME": f"{nowhere}/keras",
        "https_proxy": "http://127.0.0.1:9",
    }
    with Kernel(**env) as kernel:
        kernel.run(epochs=7)
        assert "No MNIST" in printed(kernel.cell("data"))
        assert kernel.fetch("data.name") == "5,000 MNIST images"
        assert kernel.fetch("history['test_accuracy'][-1]") > 0.97
        images = "255 * samples[2:].reshape(-1, pixels)"
        read = kernel.fetch(f"judge.predict({images}, verbose=0).argmax(axis=1)")
    assert np.mean(read == np.tile(np.arange(10), 5)) >= 0.98


def test_short_run_on_real_mnist(mnist):
    with Kernel(XLA_FLAGS="") as kernel:
        kernel.run(data_path=mnist, epochs=2)
        history = kernel.fetch("history")
    assert history["test_vae_loss"][-1] < 235
    assert history["test_accuracy"][-1] > 0.96
    assert np.diff(history["vae_loss"]) < 0
