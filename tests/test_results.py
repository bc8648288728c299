"""What the notebook holds and shows after Run All, section by section."""

import io
import re

import keras
import matplotlib.image
import nbformat
import numpy as np
import pytest
from conftest import CODE, NOTEBOOK, ROOT, SMALL, Notebook, full_disk, pictures, printed

import vae_helpers

WIDGET = "application/vnd.jupyter.widget-view+json"


def test_run_all_leaves_what_other_programs_rely_on(notebook, small_arrays):
    images = small_arrays["x_train"][:2500].reshape(-1, 784) / 255  # too many to take at once
    z_mean, _, digit_probs = inferred = notebook.fetch("infer(images)", images=images)
    np.testing.assert_allclose(digit_probs.sum(axis=1), 1, rtol=1e-5)
    generated = notebook.fetch("generate(z, digit_probs)", z=z_mean, digit_probs=digit_probs)
    widths = [SMALL["z_dim"], SMALL["z_dim"], 10, 784]
    assert [array.shape for array in (*inferred, generated)] == [(2500, width) for width in widths]
    some = [0, 999, 1000, 2499]
    ends = notebook.fetch("infer(images)", images=images[some])
    np.testing.assert_allclose(np.hstack(inferred)[some], np.hstack(ends), atol=1e-4)
    assert {array.dtype for array in (*inferred, *ends, generated)} == {np.dtype(np.float32)}
    assert 0 <= generated.min() <= generated.max() <= 1
    for network in notebook.fetch("encoder, decoder, digit_classifier"):
        assert isinstance(network, keras.Model)
    samples = np.asarray(notebook.fetch("samples"))
    assert samples.shape == (SMALL["epochs"], 10, 784)
    assert 0 <= samples.min() <= samples.max() <= 1
    assert len(np.unique(samples.reshape(-1, 784), axis=0)) == SMALL["epochs"] * 10
    # One hand writes all digits in its style.
    z = np.random.default_rng(0).normal(size=[3, SMALL["z_dim"]])
    images, one = notebook.fetch("generate_all_digits(z), generate(z[[2]], np.eye(10)[[7]])", z=z)
    assert images.shape == (3, 10, 784)
    np.testing.assert_allclose(images[2, 7], one[0], atol=1e-5)


def test_losses_decrease_beside_one_figure_and_a_line_for_each_epoch(notebook):
    history = notebook.fetch("history")
    for name in ("vae_loss", "classification_loss", "test_vae_loss", "test_classification_loss"):
        assert np.all(np.diff(history[name]) < 0), name
    assert {len(values) for values in history.values()} == {SMALL["epochs"]}
    assert min(history["seconds"]) > 0
    assert history["test_accuracy"][-1] > 0.8
    cell = notebook.cell("train")
    assert len(pictures(cell)) == 1
    assert {output.output_type for output in cell.outputs} == {"stream", "display_data"}  # no value
    progress = re.findall("^epoch.*", printed(cell), re.MULTILINE)
    measures = r"VAE loss \d+\.\d .*classification loss \d.* accuracy \d+\.\d+%  \d+\.\d s"
    assert [bool(re.search(measures, line)) for line in progress] == [True] * SMALL["epochs"]


def test_traversal_varies_one_dimension_a_row(notebook):
    z_dim = SMALL["z_dim"]
    dimension_kl, order = map(np.asarray, notebook.fetch("(dimension_kl, dimensions)"))
    images = notebook.fetch("traversed_images").reshape(z_dim, 11, 784)
    for row, dimension in zip(images, order, strict=True):
        z = np.outer([-2.5, 0, 2.5], np.eye(z_dim)[dimension])
        expected = notebook.fetch("generate(z, np.eye(10)[[3, 3, 3]])", z=z)
        np.testing.assert_allclose(row[[0, 5, 10]], expected, atol=1e-5)
    assert np.all(np.diff(dimension_kl[order]) <= 0)
    total = notebook.fetch("evaluate(test_images, test_digits)['kl_loss']")
    assert dimension_kl.sum() == pytest.approx(total, rel=1e-4)


def test_two_dimensions_of_z_are_shown_as_their_plane(tiny):
    flat = Notebook().run(**{**tiny, "z_dim": 2})
    images = flat.fetch("traversed_images").reshape(11, 11, 784)
    corners = np.array([[-2.5, 2.5], [2.5, 2.5], [-2.5, -2.5], [0, 0]])  # z[1] grows upwards
    expected = flat.fetch("generate(z, np.eye(10)[[3] * 4])", z=corners)
    np.testing.assert_allclose(images[[0, 0, 10, 5], [0, 10, 0, 5]], expected, atol=1e-5)
    assert len(pictures(flat.cell("traversals"))) == 1


def test_the_probe_finds_what_there_is_to_find(notebook, monkeypatch):
    # The same probe on a z that is the digit itself, and on one that knows nothing of it.
    assert 0 < notebook.fetch("probe_accuracy") < 1
    digits, probe_digits = notebook.fetch("test_digits, data.y_train[:10_000]")
    assert notebook.fetch("blind_accuracy") == np.bincount(digits).max() / 300
    random, names = np.random.default_rng(0), vars(notebook.module)
    accuracies = "(probe_accuracy, trees_accuracy)"
    monkeypatch.setitem(names, "infer", lambda _: [np.eye(10)[probe_digits]])
    monkeypatch.setitem(names, "test_z_mean", np.eye(10)[digits])
    assert notebook.run("styles", "styles").fetch(accuracies) == (1, 1)
    monkeypatch.setitem(names, "infer", lambda images: [random.normal(size=[len(images), 4])])
    monkeypatch.setitem(names, "test_z_mean", random.normal(size=[300, 4]))
    assert max(notebook.run("styles", "styles").fetch(accuracies)) < 0.25
    monkeypatch.undo()
    notebook.run("styles", "styles")


def test_the_judge_is_counted_right_and_the_images_shown_are_read_least_surely(notebook):
    names = "judge_accuracy, asked_digit_accuracy, asked_digits, judged"
    accuracy, asked, asked_digits, (read, read_asked) = notebook.fetch(names)
    assert accuracy == np.mean(read == notebook.fetch("test_digits")) > 0.8
    assert np.bincount(asked_digits).tolist() == [1000] * 10
    assert asked == np.mean(asked_digits == read_asked)
    images = "generate(asked_styles[:20], np.eye(10)[asked_digits[:20]])"
    judged = notebook.fetch(f"judge.predict(255 * {images}).argmax(axis=1)")
    np.testing.assert_array_equal(judged, read_asked[:20])
    unsure, sureness = notebook.fetch("unsure, test_digit_probs.max(axis=1)")
    np.testing.assert_array_equal(sureness[unsure], np.sort(sureness)[:10])
    assert ["image/png" in o.data for o in notebook.cell("infer").outputs if "data" in o] == [True]


def test_the_closing_numbers_are_of_this_run(notebook):
    shown = notebook.fetch("measures")
    test = notebook.fetch("evaluate(test_images, test_digits)")
    assert shown["gaussian_vae_loss"] == notebook.fetch("results['vae_loss']") == test["vae_loss"]
    grey = notebook.fetch("evaluate(test_images, test_digits, bernoulli_loss)['vae_loss']")
    assert shown["bernoulli_vae_loss"] == grey
    assert shown["accuracy"] == test["accuracy"]
    assert shown["asked_digit_accuracy"] == notebook.fetch("np.mean(judged[1] == asked_digits)")
    assert shown["seconds"] == sum(notebook.fetch("history['seconds']"))
    *_, output = notebook.cell("results").outputs
    assert all(f"<th>{name}</th>" in output.data["text/html"] for name in shown)


# Settings and, of each published figure, whether this run's stands beside it then.
TEST, TRAINING = "VAE loss, σ = 0.5", "VAE loss, σ = 0.5, training set, while training"
GREY, ERRORS = "VAE loss, grey, + log 10", "errors of the digit classifier, %"
COMPARED = [
    ({}, [TRAINING, TEST, GREY, ERRORS, ERRORS]),
    ({"likelihood": "bernoulli"}, [TEST, GREY, ERRORS, ERRORS]),
    ({"decoder_std": 0.2}, [GREY, ERRORS, ERRORS]),
    ({"stop_gradient": False}, [TRAINING, TEST, ERRORS, ERRORS]),
]


@pytest.mark.parametrize(("changed", "compared"), COMPARED)
def test_only_figures_of_the_same_kind_are_compared(changed, compared, notebook, monkeypatch):
    data = notebook.fetch("data")._replace(name="MNIST")  # as if the small images were MNIST's
    for name, value in {**changed, "data": data}.items():
        monkeypatch.setitem(vars(notebook.module), name, value)
    *_, output = notebook.run("published", "published").cell("published").outputs
    assert "<table" in output.data["text/html"]
    rows = notebook.fetch("table.values.tolist()")
    assert [row[0] for row in rows] == compared
    sources = notebook.cell("results-text").source
    for _, ours, published, source, ahead in rows:
        assert ahead == ("yes" if ours < published else "NO")
        assert str(source).removeprefix("the article's") != source or f"[{source}" in sources
    monkeypatch.undo()
    notebook.run("published", "published")  # other data stand beside none
    assert "not for small.npz (not MNIST)" in printed(notebook.cell("published"))


def test_widgets_redraw_the_digits(notebook):
    def shown(name):
        return matplotlib.image.imread(io.BytesIO(notebook.fetch(f"bytes({name}.value)")))[..., 0]

    def expected():
        values = notebook.fetch("[slider.value for slider in sliders]")
        z = np.dot([values], np.eye(SMALL["z_dim"])[used])
        return 1 - notebook.fetch("generate_all_digits(z)", z=z)[0].reshape(10, 28, 28)

    used, dimensions, dimension_kl = notebook.fetch("used, dimensions, dimension_kl")
    assert used == [j for j in dimensions if dimension_kl[j] > 0.1]
    before = shown("all_digits")
    assert before.shape == (28, 280)
    np.testing.assert_allclose(before[:, :28], expected()[0], atol=0.01)
    notebook.execute("sliders[0].value = 1.7")
    after = shown("all_digits")
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(after[:, -28:], expected()[9], atol=0.01)
    notebook.execute("digit_choice.value = 8")
    np.testing.assert_allclose(shown("one_digit"), expected()[8], atol=0.01)
    notebook.execute("new_style.click()")
    assert notebook.fetch("sliders[0].value") != 1.7
    np.testing.assert_allclose(shown("one_digit"), expected()[8], atol=0.01)
    figure, widget = notebook.cell("play").outputs
    assert figure.data["image/png"]
    assert WIDGET in widget.data


def keep(notebook, folder):
    """Run the cell that keeps the run in this folder."""
    notebook.execute(f"output_dir = {str(folder)!r}")
    notebook.run("keep", "keep")


def test_what_is_kept_is_whole_and_what_was_trained_with_and_nothing_by_default(notebook, tmp_path):
    trained_with = notebook.fetch("hyperparameters")
    # A later change of the cell of hyperparameters decides only where it is kept.
    changed = {"z_dim": 20, "epochs": 7, "seed": 9, "likelihood": "bernoulli"}
    notebook.run("parameters", "check", **trained_with | changed)
    keep(notebook, tmp_path)
    kept = vae_helpers.load_run(tmp_path)
    notebook.run("parameters", "check", **SMALL, data_path=trained_with["data_path"])
    notebook.run("keep", "load")
    assert printed(notebook.cell("keep")) == "output_dir is None: nothing is kept\n"
    assert kept.hyperparameters == trained_with
    assert (kept.history, kept.results) == notebook.fetch("(history, results)")
    np.testing.assert_array_equal(kept.samples, notebook.fetch("samples"))
    for name in ("encoder", "digit_classifier", "decoder"):
        weights = notebook.fetch(f"{name}.get_weights()")
        np.testing.assert_equal(getattr(kept, name).get_weights(), weights)


def test_a_full_disk_harms_no_earlier_run_and_a_damaged_file_is_named(notebook, tmp_path):
    keep(notebook, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    with full_disk(10_000), pytest.raises(OSError, match="output_dir = .* cannot be written"):
        keep(notebook, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {path: whole}
    keep(notebook, tmp_path)  # what was trained is still in memory
    assert len(vae_helpers.load_run(tmp_path).samples) == SMALL["epochs"]
    for share in (0, 0.5, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=f"{path.name}: not a "):
            vae_helpers.load_run(tmp_path)


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null", "a\0b", "x" * 300])
def test_a_folder_that_cannot_be_is_named(folder, notebook):
    with pytest.raises(OSError, match="output_dir = .* cannot be written"):
        keep(notebook, folder)


def test_committed_outputs_are_of_one_clean_run_on_mnist_and_its_grid_is_in_the_readme():
    assert [cell.execution_count for cell in CODE.values()] == [*range(1, len(CODE) + 1)]
    assert NOTEBOOK.metadata.kernelspec.name == "python3"
    outputs = [output for cell in CODE.values() for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"(?<![\w.:])/(home|root|tmp|usr|work|Users)/", nbformat.writes(NOTEBOOK))
    assert "widgets" not in NOTEBOOK.metadata
    assert not [output for output in outputs if WIDGET in output.get("data", {})]
    # Figures are shown at half of their pixels, crisp on any screen.
    shown = [o.metadata["image/png"]["width"] for o in outputs if "image/png" in o.get("data", {})]
    figures = [picture for cell in CODE.values() for picture in pictures(cell)]
    assert shown == [matplotlib.image.imread(io.BytesIO(f)).shape[1] // 2 for f in figures]
    assert len(pictures(CODE["play"])) == 1
    assert printed(CODE["data"]).startswith("MNIST: 60,000 training and 10,000 test images")
    assert len(re.findall(r"^epoch", printed(CODE["train"]), re.MULTILINE)) == 20
    assert CODE["published"].outputs[0].data["text/html"].count("<tr>") == 5
    assert pictures(CODE["train"]) == [(ROOT / ".github" / "digit-grid.png").read_bytes()]
    assert ".github/digit-grid.png" in (ROOT / "README.md").read_text()


def test_the_notebook_is_small_enough_to_read():
    assert (ROOT / "vae2.ipynb").stat().st_size <= 1.4e6
    for name, cell in CODE.items():
        assert len(cell.source.splitlines()) <= 30, name
        for picture in pictures(cell):
            assert len(picture) <= (220e3 if name == "train" else 150e3), name
    lines = {name: re.findall(r".*\S.*", cell.source) for name, cell in CODE.items()}
    core = list(CODE)[: list(CODE).index("train") + 1]
    assert len(core) <= 12
    core_lines = [line for name in core for line in lines[name]]
    assert len(core_lines) <= 180
    assert sum(line.startswith("def ") for line in core_lines) <= 10
    assert len(NOTEBOOK.cells) <= 60
    assert sum(map(len, lines.values())) <= 350


def test_the_home_is_found_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = vae_helpers.save_run("~/runs", [], np.arange(3), results={"vae_loss": 1.5})
    assert path == tmp_path / "runs" / "run.zip"
    assert vae_helpers.load_run("~/runs").results == {"vae_loss": 1.5}


def test_a_layer_of_ones_own_is_named_and_loaded(tmp_path):
    class Doubled(keras.layers.Layer):
        def call(self, inputs):
            return 2 * inputs

    network = keras.Sequential([keras.Input([3]), Doubled()], name="decoder")
    vae_helpers.save_run(tmp_path, [network], np.zeros(1))
    with pytest.raises(ValueError, match=r"run.zip: decoder.keras.*custom_objects(.|\n)*Doubled"):
        vae_helpers.load_run(tmp_path)
    kept = vae_helpers.load_run(tmp_path, custom_objects={"Doubled": Doubled})
    np.testing.assert_array_equal(kept.decoder(np.ones([1, 3])), [[2, 2, 2]])
