"""The notebook in JupyterLab, in Notebook 7 and as HTML, as a person sees it in Chromium.

Needs the `chromium` command (Debian's package of that name); without it, the tests are skipped.
"""

import ast
import base64
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CODE, NOTEBOOK, notebook_with, pictures, wait_for
from jupyter_client import BlockingKernelClient
from jupyter_server.serverapp import list_running_servers
from nbconvert import HTMLExporter
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import vae_helpers

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")

FIGURES = [cell_id for cell_id, cell in CODE.items() if pictures(cell)]
EPOCHS = 5
PARAMETERS = {"epochs": EPOCHS, "batch_size": 60, "hidden_layers": [128]}
ERRORS = "[data-mime-type='application/vnd.jupyter.error']"
WARNINGS = "[data-mime-type='application/vnd.jupyter.stderr']"
NOTICES = ".Toastify__toast--error"
IDLE = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
OURS = re.compile(r"vae|widget|Traceback", re.IGNORECASE)  # not the front ends' own messages
TIMEOUT = 300_000  # in milliseconds, for a busy machine
expect.set_options(timeout=TIMEOUT)

# Strokes of the mouse on the pad, from (0, 0) in its upper left corner to (1, 1).
ANGLES = np.linspace(0, 2 * np.pi, 25)
STROKES = {
    7: [(0.3, 0.15), (0.7, 0.15), (0.45, 0.9)],
    0: [(0.5 + 0.22 * np.sin(angle), 0.5 - 0.37 * np.cos(angle)) for angle in ANGLES],
    1: [(0.55, 0.15), (0.47, 0.85)],
}


@pytest.fixture(scope="module")
def digits_path(tmp_path_factory):
    """Return the path of an npz with enough real digits to learn how people draw them."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    digits = vae_helpers.load_offline_digits(copies=3)
    np.savez(
        path,
        x_train=digits.x_train.reshape(-1, 28, 28),
        y_train=digits.y_train,
        x_test=digits.x_test.reshape(-1, 28, 28),
        y_test=digits.y_test,
    )
    return path


@pytest.fixture
def server(digits_path, tmp_path):
    """Start JupyterLab, which includes Notebook 7, in the notebook's folder; yield its record."""
    notebook_with(tmp_path, **PARAMETERS, data_path=str(digits_path))
    env = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(tmp_path / ".config"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / ".runtime"),
    }
    env.pop("PYTEST_CURRENT_TEST")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env)
    try:
        yield wait_for(lambda: next(list_running_servers(env["JUPYTER_RUNTIME_DIR"]), None))
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def page():
    """Yield a page of headless Chromium. Script errors that concern the notebook fail the test."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-quic"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(TIMEOUT)
        messages = []
        page.on("pageerror", lambda error: messages.append(("error", str(error))))
        page.on("console", lambda message: messages.append((message.type, message.text)))
        yield page
        browser.close()
    assert not [text for kind, text in messages if kind == "error" and OURS.search(text)]


@contextlib.contextmanager
def connected_kernel(runtime_dir):
    """Yield a function that evaluates an expression in the only kernel of a server."""
    (path,) = Path(runtime_dir).glob("kernel-*.json")
    client = BlockingKernelClient(connection_file=str(path))
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def fetch(expression):
        content = client.execute_interactive(
            "", store_history=False, user_expressions={"value": expression}
        )["content"]
        return ast.literal_eval(content["user_expressions"]["value"]["data"]["text/plain"])

    try:
        yield fetch
    finally:
        client.stop_channels()


def find_cell(page, cell_id):
    """Return the cell with this id on the page."""
    index = [cell.id for cell in NOTEBOOK.cells].index(cell_id)
    return page.locator(".jp-Notebook .jp-Cell").nth(index)


def open_notebook(page, server, front_end):
    """Open the notebook in a front end, and wait until its kernel is idle."""
    page.goto(f"{server['url']}{front_end}/vae2.ipynb?token={server['token']}")
    expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(len(NOTEBOOK.cells))
    expect(page.locator(IDLE)).to_be_visible()


def choose_from_run_menu(page, cell_id, item):
    """Choose an item of the front end's Run menu until this cell runs."""
    prompt = find_cell(page, cell_id).locator(".jp-InputPrompt")
    old_text = prompt.text_content()
    for _ in range(5):  # the menu of a front end that has only just started may do nothing
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name=item, exact=True).click()
        with contextlib.suppress(AssertionError):
            expect(prompt).not_to_have_text(old_text, timeout=10_000)
            return
    raise AssertionError("no cell runs")


def watch_training(cell):
    """Assert that a training cell shows a single grid, which gets fuller after each epoch."""
    cell.scroll_into_view_if_needed()
    outputs = cell.locator(".jp-OutputArea-output")
    grids = []

    def last_epoch_is_printed():
        sources = outputs.locator("img").evaluate_all("images => images.map(image => image.src)")
        assert len(sources) <= 1
        for source in sources:
            if source not in grids:
                grids.append(source)
        return f"epoch  {EPOCHS}/{EPOCHS}" in cell.text_content()

    wait_for(last_epoch_is_printed, TIMEOUT / 1000)
    brightness = []
    for source in grids:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
        brightness.append(np.mean(picture.convert("L")))
    assert len(grids) >= 3
    assert brightness == sorted(brightness, reverse=True)


def draw(page, play, digit):
    """Clear the pad and draw a digit on it with the mouse."""
    play.get_by_title("Clear").click()
    canvas = play.locator("canvas")
    canvas.scroll_into_view_if_needed()
    area = canvas.bounding_box()
    points = [
        (area["x"] + x * area["width"], area["y"] + y * area["height"]) for x, y in STROKES[digit]
    ]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=5)
    page.mouse.up()


def read_bars(play):
    """Return the probabilities that the bars show."""
    bars = play.locator(".progress-bar")
    widths = bars.evaluate_all("bars => bars.map(bar => bar.style.width)")
    return [float(width.removesuffix("%")) / 100 for width in widths]


def read_sliders(play):
    """Return the values that the sliders show."""
    readouts = play.locator(".widget-readout").all_inner_texts()
    return [float(readout.replace("−", "-")) for readout in readouts]


def assert_reading(page, play, fetch, digit):
    """Assert that a drawn digit is classified, and that the sliders move to its style."""
    draw(page, play, digit)
    wait_for(lambda: read_bars(play)[digit] > 0.5)
    framed = "vae_helpers.frame_digit(panel.pad.get_pil())[None]"
    style = fetch(f"infer({framed})[0][0][list(panel.sliders)].tolist()")
    assert np.abs(style).max() > 0.2
    # The sliders move in steps of 0.1.
    wait_for(lambda: np.allclose(read_sliders(play), np.clip(style, -4, 4), rtol=0, atol=0.051))
    wait_for(lambda: fetch("panel.digit.value") == digit)


def read_image(image):
    """Return the content of an image on the page."""
    return image.evaluate("image => fetch(image.src).then(response => response.text())")


def read_settled(image):
    """Return the content of an image on the page once it stays the same for a while."""

    def is_settled():
        content = read_image(image)
        image.page.wait_for_timeout(300)
        return read_image(image) == content

    wait_for(is_settled)
    return read_image(image)


def assert_changes(images, act):
    """Do something, and assert that each of these images then shows another picture."""
    old_contents = [read_settled(image) for image in images]
    act()
    for image, old in zip(images, old_contents, strict=True):
        wait_for(lambda image=image, old=old: read_image(image) != old)


def watch_animation(image, frames=5):
    """Assert that an image goes on changing."""
    seen = set()

    def enough_frames_were_seen():
        seen.add(read_image(image))
        return len(seen) >= frames

    wait_for(enough_frames_were_seen)


def drag_first_slider(page, play):
    """Drag the handle of the first slider to the right."""
    handle = play.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    area = handle.bounding_box()
    x = area["x"] + area["width"] / 2
    y = area["y"] + area["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=4)
    page.mouse.up()


def assert_fits(play):
    """Assert that the panel fits the window and that no part of it is cut off."""
    panel = play.locator(".jp-OutputArea-output:has(canvas)")
    assert panel.bounding_box()["height"] < 850
    parts = panel.locator(".widget-box, .paint-toolbar").or_(panel)
    cut_off = "parts => parts.filter(part => part.scrollWidth > part.clientWidth).length"
    assert parts.evaluate_all(cut_off) == 0


def assert_all_is_shown(page, figures, count):
    """Assert that the last cell has this execution count, and that figures and no error appear."""
    last_prompt = find_cell(page, list(CODE)[-1]).locator(".jp-InputPrompt")
    expect(last_prompt).to_have_text(f"[{count}]:")
    expect(page.locator(f"{ERRORS}, {WARNINGS}, {NOTICES}")).to_have_count(0)
    for cell_id in figures:
        expect(find_cell(page, cell_id).locator(".jp-RenderedImage img")).to_have_count(1)


def assert_one_can_play(page, fetch):
    """Draw digits, move sliders and press buttons, and assert that the panel follows."""
    play = find_cell(page, "play")
    expect(play.locator(".progress")).to_have_count(10)
    play.locator(".jp-OutputArea").scroll_into_view_if_needed()
    assert_fits(play)
    bar_labels = play.locator(".widget-hprogress .widget-label")
    expect(bar_labels).to_have_text([str(digit) for digit in range(10)])
    expect(play.locator(".widget-slider")).to_have_count(fetch("len(used_dimensions)"))
    _, all_digits, one_digit = play.locator("img.widget-image").all()

    for digit in STROKES:
        assert_reading(page, play, fetch, digit)
    play.get_by_title("Clear").click()
    wait_for(lambda: read_bars(play) == [0] * 10)

    assert_changes([all_digits, one_digit], lambda: drag_first_slider(page, play))
    eight = play.get_by_role("button", name="8", exact=True)
    assert_changes([one_digit], eight.click)
    new_style = play.get_by_role("button", name="new style")
    assert_changes([all_digits, one_digit], new_style.click)
    play_button = play.locator(".widget-play button").first
    assert_changes([all_digits, one_digit], play_button.click)
    watch_animation(all_digits)
    play_button.click()
    read_settled(all_digits)


def test_the_notebook_runs_in_jupyterlab_and_again_in_notebook_7_and_one_can_play(
    server, page, tmp_path
):
    open_notebook(page, server, "lab/tree")
    choose_from_run_menu(page, "setup", "Run All Cells")
    watch_training(find_cell(page, "train-article"))
    watch_training(find_cell(page, "train-better"))
    assert_all_is_shown(page, FIGURES, len(CODE))
    with connected_kernel(tmp_path / ".runtime") as fetch:
        assert_one_can_play(page, fetch)

        # Notebook 7 opens the same notebook with the same kernel.
        page.on("dialog", lambda dialog: dialog.accept())  # leave JupyterLab without saving
        open_notebook(page, server, "notebooks")
        find_cell(page, "parameters").locator(".cm-content").click()
        page.keyboard.press("Control+End")
        page.keyboard.type("\nz_dim = 2")
        page.keyboard.press("Shift+Enter")
        find_cell(page, "train-better").locator(".cm-content").click()
        choose_from_run_menu(page, "train-better", "Run Selected Cell and All Below")
        watch_training(find_cell(page, "train-better"))
        cells_below = list(CODE)[list(CODE).index("train-better") :]
        figures_below = [cell_id for cell_id in FIGURES if cell_id in cells_below]
        assert_all_is_shown(page, [*figures_below, "plane"], len(CODE) + 1 + len(cells_below))
        assert fetch("len(used_dimensions)") == 2
        assert_one_can_play(page, fetch)


def test_html_shows_all_figures(page, tmp_path):
    html, _ = HTMLExporter().from_notebook_node(NOTEBOOK)
    path = tmp_path / "vae2.html"
    path.write_text(html)
    page.route(re.compile("^https?://"), lambda route: route.abort())  # MathJax needs a network
    page.goto(path.as_uri())
    assert {"train-article", "train-better", "picture"} <= set(FIGURES)
    for cell_id in FIGURES:
        image = page.locator(f"[id='cell-id={cell_id}'] .jp-RenderedImage img")
        expect(image).to_be_visible()
        assert image.evaluate("image => image.naturalWidth") >= 280
    expect(page.locator(WARNINGS)).to_have_count(0)
