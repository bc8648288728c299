"""Saving a run and loading it again, with tiny networks."""

import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, full_disk
from test_compare import SETTINGS

import vae_helpers

with vae_helpers.quiet_import():
    import keras

HISTORY = {"vae_loss": [3.0, 2.5]}
RESULTS = {"vae_loss": 2.5, "accuracy": 0.5}
SAMPLES = np.random.default_rng(0).random([2, 10, 784], np.float32)


def tiny_vae(z_dim=2):
    """Return networks that were never trained, with their settings."""
    networks = {}
    for name, size in (("encoder", 784), ("digit_classifier", 784), ("decoder", z_dim)):
        layers = [keras.Input([size]), keras.layers.Dense(784, "sigmoid")]
        networks[name] = keras.Sequential(layers, name=name)
    return SimpleNamespace(**networks, settings=SETTINGS)


@pytest.fixture
def saved(tmp_path):
    """Save a run; return its model and the path of its file."""
    vae = tiny_vae()
    return vae, vae_helpers.save_run(tmp_path / "mine", vae, HISTORY, SAMPLES, RESULTS)


def test_a_loaded_run_gives_the_same_images(saved):
    vae, path = saved
    run = vae_helpers.load_run(path.parent)
    z = np.ones([3, 2], np.float32)
    np.testing.assert_array_equal(run.decoder(z), vae.decoder(z))
    images = np.ones([3, 784], np.float32)
    np.testing.assert_array_equal(run.encoder(images), vae.encoder(images))
    np.testing.assert_array_equal(run.digit_classifier(images), vae.digit_classifier(images))
    np.testing.assert_array_equal(run.samples, SAMPLES)
    assert (run.settings, run.history, run.results) == (dict(SETTINGS), HISTORY, RESULTS)


def test_results_may_be_numpy_values_and_the_file_may_hold_more(tmp_path):
    results = {"mean": np.float32(0.5), "counts": np.arange(3)}
    path = vae_helpers.save_run(tmp_path, tiny_vae(), HISTORY, SAMPLES, results)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/._encoder.keras", "")
        archive.writestr("notes.txt", "a good run")
    assert vae_helpers.load_run(tmp_path).results == {"mean": 0.5, "counts": [0, 1, 2]}


def test_a_file_of_another_program_and_an_unknown_layer_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
        archive.writestr("results.json", "{}")
    with pytest.raises(ValueError, match="run.zip: cannot be loaded: .*encoder.keras"):
        vae_helpers.load_run(tmp_path)

    class MyLayer(keras.layers.Layer):
        """A layer that is not registered."""

    vae = tiny_vae()
    vae.encoder = keras.Sequential([keras.Input([784]), MyLayer()], name="encoder")
    vae_helpers.save_run(tmp_path, vae, HISTORY, SAMPLES, RESULTS)
    with pytest.raises(ValueError, match="(?s)run.zip: cannot be loaded: .*class 'MyLayer'"):
        vae_helpers.load_run(tmp_path)


@pytest.mark.parametrize("size", [1_000, 100_000, 3_000_000])
def test_a_full_disk_leaves_the_earlier_file(saved, tmp_path, size):
    _, path = saved
    before = path.read_bytes()
    for folder in (path.parent, tmp_path / "new"):
        with full_disk(size), pytest.raises(OSError, match=f"{folder.name}.*cannot be written"):
            vae_helpers.save_run(folder, tiny_vae(3), HISTORY, SAMPLES, RESULTS)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["run.zip"]
    assert not list((tmp_path / "new").iterdir())


def test_a_folder_that_cannot_be_written_and_a_damaged_file_are_named(saved, tmp_path):
    vae, path = saved
    for folder in (path, path / "inside", "\0"):  # a file is no folder
        with pytest.raises(OSError, match="output_dir = .* cannot be written .*choose another"):
            vae_helpers.save_run(folder, vae, HISTORY, SAMPLES, RESULTS)
    with pytest.raises(ValueError, match="nowhere/run.zip: .*No such file"):
        vae_helpers.load_run(tmp_path / "nowhere")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    for damaged in (content, content[:-100], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="mine/run.zip: cannot be loaded: .*[a-z]"):
            vae_helpers.load_run(path.parent)


def test_a_full_temporary_folder_is_the_reason_why_a_run_cannot_be_loaded(saved):
    _, path = saved
    with full_disk(100_000), pytest.raises(ValueError, match="cannot be loaded: .*File too large"):
        vae_helpers.load_run(path.parent)


def test_warnings_that_are_errors_do_not_keep_a_run_from_being_saved(tmp_path):
    code = (
        "import test_saving, vae_helpers\n"
        "vae = test_saving.tiny_vae()\n"
        "arguments = test_saving.HISTORY, test_saving.SAMPLES, test_saving.RESULTS\n"
        "import warnings; warnings.simplefilter('error')\n"
        f"vae_helpers.save_run({str(tmp_path)!r}, vae, *arguments)\n"
        f"vae_helpers.load_run({str(tmp_path)!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", check=True)
