"""The notebook in real kernels: names, reruns, interrupts, memory, and its committed outputs."""

import asyncio
import io
import re
import time
from multiprocessing.pool import ThreadPool

import nbformat
import numpy as np
import psutil
import pytest
from conftest import CODE, NOTEBOOK, ROOT, SMALL, Kernel, pictures, printed
from nbclient.exceptions import CellExecutionError
from PIL import Image, ImageSequence

CELL_IDS = list(CODE)
FIGURES = [cell_id for cell_id, cell in CODE.items() if pictures(cell)]
RESULT_CELLS = CELL_IDS[CELL_IDS.index("both-grids") :]
TRAINED = """(
    {k: v for k, v in history.items() if k != "seconds"},
    __import__('zlib').crc32(samples.tobytes()),
    [__import__('zlib').crc32(weight.numpy().tobytes()) for weight in vae.trainable_weights],
)"""


@pytest.fixture(scope="module")
def kernel(small_npz):
    """Yield a kernel that has run the whole notebook with small settings."""
    with Kernel() as kernel:
        yield kernel.run(data_path=str(small_npz), **SMALL)


def test_the_names_that_other_programs_rely_on(kernel):
    shapes = kernel.fetch(
        "[[a.shape for a in m.infer(test_images[:5])]"
        " + [m.generate(np.zeros([3, z_dim]), np.eye(10)[:3]).shape, s.shape, sorted(h)]"
        " for m, s, h in [(vae, samples, history),"
        " (article_vae, article_samples, article_history)]]"
    )
    for found in shapes:
        z_dim = SMALL["z_dim"]
        assert found[:3] == [(5, z_dim), (5, z_dim), (5, 10)]
        assert found[3:5] == [(3, 784), (SMALL["epochs"], 10, 784)]
        names = ["vae_loss", "classification_loss", "seconds", "test_vae_loss", "test_accuracy"]
        assert set(names) <= set(found[5])
    assert kernel.fetch("np.array_equal(infer(test_images)[2], vae.infer(test_images)[2])")
    assert kernel.fetch("generate(np.zeros([1, z_dim]), np.eye(10)[:1]).dtype.name") == "float32"
    assert kernel.fetch("[vae.encoder, vae.digit_classifier, vae.decoder] == "
                        "[encoder, digit_classifier, decoder]")  # fmt: skip
    assert kernel.fetch("[len(v) for v in history.values()]") == [SMALL["epochs"]] * 8


def test_every_cell_runs_without_error_output_and_every_figure_is_drawn(kernel):
    for cell_id in CELL_IDS:
        for output in kernel.cell(cell_id).outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output
    assert len(FIGURES) >= 10
    for cell_id in FIGURES:
        assert pictures(kernel.cell(cell_id)), cell_id


def shown(kernel):
    """Return what the result cells print and draw."""
    return {
        name: (printed(kernel.cell(name)), pictures(kernel.cell(name))) for name in RESULT_CELLS
    }


def test_result_cells_show_the_same_when_they_run_again_in_any_order(kernel):
    before = shown(kernel)
    for cell_id in np.random.default_rng(0).permutation(RESULT_CELLS):
        kernel.run(cell_id, cell_id)
    assert shown(kernel) == before


def test_the_same_settings_give_the_same_bits_in_a_new_kernel(kernel, small_npz):
    with Kernel() as other:
        skip = ["train-article", "article-losses", "judge", "article-results"]
        other.run(last="better-model", skip=skip, data_path=str(small_npz), **SMALL)
        other.execute("vae, history, samples = train(BetterDigitVAE)")
        assert other.fetch(TRAINED) == kernel.fetch(TRAINED)


def test_each_training_uses_and_records_the_current_values(kernel):
    first = kernel.fetch(TRAINED)
    density = printed(kernel.cell("density"))
    kernel.execute("decoder_std = 0.3\nseed = 5\nepochs = 3\nlearning_rate = 0.02")
    kernel.run("density", "density")
    assert printed(kernel.cell("density")) == density
    kernel.run("train-better", "train-better")
    recorded = kernel.fetch("vae.settings.model_dump()")
    assert (recorded["decoder_std"], recorded["seed"]) == (0.3, 5)
    assert (recorded["epochs"], recorded["learning_rate"]) == (3, 0.02)
    assert kernel.fetch("len(samples)") == 3
    kernel.execute(f"decoder_std = 0.5\nseed = 0\nepochs = {SMALL['epochs']}")
    kernel.execute(f"learning_rate = {SMALL['learning_rate']}")
    kernel.run("train-better", "train-better")
    # The earlier values give the earlier model again, bit for bit.
    assert kernel.fetch(TRAINED) == first


@pytest.mark.parametrize(
    "source", ["beta: float = 4.0", "beta, gamma = 4.0, 1", "%%time\nbeta = 4.0"]
)
def test_a_hyperparameter_of_ones_own_is_recorded_once_it_is_declared(kernel, source):
    kernel.execute(source)
    assert "beta" not in kernel.fetch("current_settings().model_dump()")
    declaration = CODE["settings"].source.replace("seed=seed,", "seed=seed, beta=beta,")
    kernel.execute(declaration)
    assert kernel.fetch("current_settings().beta") == 4.0
    kernel.run("settings", "settings")


def test_bad_settings_stop_before_anything_is_built(kernel):
    kernel.execute("epochs = 0\nz_dim = 'ten'")
    with pytest.raises(CellExecutionError, match="(?s)epochs = 0: .*z_dim = 'ten'"):
        kernel.run("train-better", "train-better")
    kernel.execute(f"epochs = 1\nz_dim = {SMALL['z_dim']}\nbatch_size = 3001")
    with pytest.raises(CellExecutionError, match="batch_size = 3001: at most 3000"):
        kernel.run("train-better", "train-better")
    kernel.execute(f"batch_size = {SMALL['batch_size']}\nepochs = {SMALL['epochs']}")


def test_a_saved_run_loads_to_the_same_images_in_a_new_kernel(kernel, tmp_path):
    cell = kernel.cell("save")
    source = cell.source
    cell.source = source.replace("output_dir = None", f"output_dir = {str(tmp_path)!r}")
    kernel.run("save", "save")
    cell.source = source
    drawn = "{}([np.ones([10, {}]), np.eye(10)]).numpy()"
    images = kernel.fetch(drawn.format("decoder", "z_dim"))
    settings, results = kernel.fetch("vae.settings.model_dump(), results")
    with Kernel() as other:
        load = other.cell("load")
        load.source = load.source.replace("load_dir = None", f"load_dir = {str(tmp_path)!r}")
        other.run("load", "load")
        other.execute("import numpy as np")
        loaded_images = other.fetch(drawn.format("loaded.decoder", "loaded.settings['z_dim']"))
        np.testing.assert_array_equal(loaded_images, images)
        assert other.fetch("loaded.settings, loaded.results") == (settings, results)


def interrupt_when(kernel, cell_id, condition):
    """Run a cell, and interrupt the kernel when a condition on the cell holds."""
    kernel.cell(cell_id).outputs = []

    def wait_and_interrupt():
        while not condition(kernel.cell(cell_id)):
            time.sleep(0.05)
        asyncio.run(kernel.client.km.interrupt_kernel())

    with ThreadPool(1) as pool:
        interrupting = pool.apply_async(wait_and_interrupt)
        kernel.run(cell_id, cell_id)
        interrupting.get(10)


def test_an_interrupt_ends_training_after_the_epoch_and_the_cells_below_work(kernel):
    kernel.execute("epochs = 60")
    interrupt_when(kernel, "train-better", lambda cell: printed(cell).count("\nepoch") >= 2)
    finished = kernel.fetch("len(samples)")
    assert 2 <= finished < 60
    assert f"Interrupted: training ended after epoch {finished}." in printed(
        kernel.cell("train-better")
    )
    kernel.run("both-grids")
    # The empty grid is shown before anything is compiled.
    interrupt_when(kernel, "train-better", lambda cell: pictures(cell))
    assert kernel.fetch("len(samples)") < 60
    kernel.execute(f"epochs = {SMALL['epochs']}")


def test_a_loss_that_is_not_finite_ends_training_with_one_sentence(kernel):
    kernel.execute("learning_rate = 1e9")
    kernel.run("train-better", "play")
    text = printed(kernel.cell("train-better"))
    assert text.count("is not finite: lower the learning rate") == 1
    assert np.isfinite(kernel.fetch("generate(np.zeros([1, z_dim]), np.eye(10)[:1])")).all()
    kernel.execute("""
def hidden_stack(x, widths, activation):
    return keras.layers.BatchNormalization()(keras.layers.Dense(widths[0], activation)(x))
""")
    kernel.run("train-better", "train-better")
    assert np.isfinite(kernel.fetch("infer(test_images)[0]")).all()
    kernel.run("better-encoder", "better-encoder")
    kernel.execute(f"learning_rate = {SMALL['learning_rate']}")


@pytest.fixture
def few_npz(small_arrays, tmp_path):
    """Return the path of an npz of four images in each set, with chosen labels."""
    few = {name: array[:4] for name, array in small_arrays.items()}
    few["y_train"] = few["y_test"] = np.array([0, 1, 1, 2])
    np.savez(tmp_path / "few.npz", **few)
    return tmp_path / "few.npz"


def test_reruns_with_other_data_work_and_do_not_fill_the_memory(kernel, few_npz, small_npz):
    process = psutil.Process(kernel.client.km.provisioner.pid)

    def memory():
        kernel.execute("vae_helpers.release_memory()")  # as the next training does
        return process.memory_info().rss / 2**20  # MiB

    before = memory()
    kernel.run("parameters", data_path=str(few_npz), **{**SMALL, "batch_size": 4, "z_dim": 2})
    assert pictures(kernel.cell("plane"))
    kernel.run("parameters", data_path=str(small_npz), **SMALL)
    assert (memory() - before) / 2 < 100


def test_both_models_learn_the_offline_default(tmp_path):
    env = {"KERAS_HOME": str(tmp_path / "no" / "where"), "https_proxy": "http://127.0.0.1:9"}
    with Kernel(XLA_FLAGS="", **env) as kernel:  # compile as it does for a reader
        skip = ["article-losses", "judge", "article-results"]
        kernel.run(last="better-model", skip=skip, epochs=8)
        assert "cannot be downloaded" in printed(kernel.cell("data"))
        assert kernel.fetch("data.name") == "5,000 MNIST images"
        kernel.execute("vae, history, samples = train(BetterDigitVAE)")
        article_history, history = kernel.fetch("article_history, history")
        _, _, digit_probs = kernel.fetch("vae.infer(samples[-3:].reshape(-1, pixels))")
    assert article_history["test_vae_loss"][-1] < 245
    assert history["test_vae_loss"][-1] < 230
    assert history["test_accuracy"][-1] > 0.97
    assert np.mean(digit_probs.argmax(axis=1) == np.tile(np.arange(10), 3)) > 0.9


def test_the_committed_notebook_is_one_clean_run_on_mnist():
    nbformat.validate(NOTEBOOK)
    assert [cell.execution_count for cell in CODE.values()] == [*range(1, len(CODE) + 1)]
    assert NOTEBOOK.metadata.kernelspec.name == "python3"
    outputs = [output for cell in CODE.values() for output in cell.outputs]
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    assert not re.search(r"(?<![\w.:])/(home|root|tmp|usr|work|Users)/", nbformat.writes(NOTEBOOK))
    assert printed(CODE["data"]).startswith("MNIST: 60,000 training images, 10,000 test images")
    for cell_id in ("train-article", "train-better"):
        assert len(re.findall(r"^epoch", printed(CODE[cell_id]), re.MULTILINE)) == 20
    assert (ROOT / "vae2.ipynb").stat().st_size < 1.5e6


def test_the_committed_results_are_good():
    table = CODE["both-results"].outputs[0].data["text/plain"]
    article_row, better_row = table.splitlines()[-2:]
    assert article_row.startswith("the article's model")
    vae_loss, accuracy, _, _ = map(float, article_row.split()[-4:])
    assert vae_loss <= 222.5
    assert accuracy >= 0.968
    assert better_row.startswith("the better model")
    vae_loss, accuracy, conditional_accuracy, _ = map(float, better_row.split()[-4:])
    assert vae_loss <= 210.6
    assert accuracy >= 0.99
    assert conditional_accuracy >= 0.995


def test_the_animation_of_the_readme_is_that_of_the_notebook():
    (png,) = pictures(CODE["wander"])
    path = ROOT / ".github" / "styles.gif"
    assert path.stat().st_size <= 400_000
    frames = [np.array(frame.convert("L")) for frame in ImageSequence.Iterator(Image.open(path))]
    shown = Image.open(io.BytesIO(png))
    shown_frames = [np.array(frame.convert("L")) for frame in ImageSequence.Iterator(shown)]
    np.testing.assert_array_equal(frames, shown_frames)
    assert ".github/styles.gif" in (ROOT / "README.md").read_text()
