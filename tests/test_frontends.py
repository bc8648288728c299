"""The notebook in JupyterLab, Notebook 7 and as HTML, in headless Chromium, as a person sees it.

Needs the `chromium` command (Debian's package of that name); without it, the tests say so and
are skipped.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import CODE, NOTEBOOK, SMALL, notebook_with, pictures, wait_for
from jupyter_server.serverapp import list_running_servers
from nbconvert import HTMLExporter
from playwright.sync_api import expect, sync_playwright

CHROMIUM = shutil.which("chromium")
OURS = re.compile(r"vae|ipywidgets|widget|Traceback", re.IGNORECASE)
CODE_CELLS = list(CODE)
# nbconvert's HTML shows PNG pictures, but not GIF animations.
FIGURES = [name for name, cell in CODE.items() if pictures(cell) and name != "wander"]
ERROR = "[data-mime-type='application/vnd.jupyter.error']"
IDLE = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
MINUTES = 300_000  # for what a busy machine may take long to do, in milliseconds
expect.set_options(timeout=MINUTES)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")


@pytest.fixture
def server(small_npz, tmp_path):
    """Start JupyterLab, which brings Notebook 7, beside the notebook; yield address and token."""
    parameters = {**SMALL, "epochs": 60, "hidden_layers": [128, 64], "batch_size": 20}
    notebook_with(tmp_path, **parameters, data_path=str(small_npz))
    settings = tmp_path / ".config/lab/user-settings/@jupyterlab/notebook-extension"
    settings.mkdir(parents=True)
    # All cells stay in the page, also those that are scrolled out of sight.
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    folders = {f"JUPYTER_{x}_DIR": str(tmp_path / f".{x.lower()}") for x in ("CONFIG", "RUNTIME")}
    env = {**os.environ, **folders, "XLA_FLAGS": ""}
    env.pop("PYTEST_CURRENT_TEST")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env)
    try:
        yield wait_for(lambda: next(list_running_servers(folders["JUPYTER_RUNTIME_DIR"]), None))
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def page():
    """Yield a page of headless Chromium; errors of its scripts that are ours fail the test."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-quic"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(MINUTES)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and errors.append(said.text))
        yield page
        browser.close()
    assert not [error for error in errors if OURS.search(error)]


def cell(page, cell_id):
    """Return the cell with this id on the page."""
    return page.locator(".jp-Notebook > * .jp-Cell, .jp-Notebook > .jp-Cell").nth(
        [cell.id for cell in NOTEBOOK.cells].index(cell_id)
    )


def run_menu(page, item):
    """Choose an item of the front end's Run menu."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=item, exact=True).click()


def run_all(page):
    """Run all cells once the notebook is there and its kernel ready."""
    expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(len(NOTEBOOK.cells))
    expect(page.locator(IDLE)).to_be_visible()
    first_prompt = cell(page, CODE_CELLS[0]).locator(".jp-InputPrompt")
    for _ in range(5):  # a front end that has only just started may not heed its menu yet
        run_menu(page, "Run All Cells")
        with contextlib.suppress(AssertionError):
            expect(first_prompt).not_to_have_text("[ ]:", timeout=10_000)
            return
    raise AssertionError("no cell is run")


def expect_change(image, act=lambda: None):
    """Do something and wait until an image on the page is another one."""
    before = image.get_attribute("src")
    act()
    expect(image).not_to_have_attribute("src", before)


@pytest.mark.parametrize("front_end", ["lab/tree", "notebooks"])  # JupyterLab and Notebook 7
def test_a_person_runs_the_notebook_and_plays(front_end, server, page):
    page.goto(f"{server['url']}{front_end}/vae2.ipynb?token={server['token']}")
    run_all(page)
    last_prompt = cell(page, CODE_CELLS[-1]).locator(".jp-InputPrompt")

    # The digit grid is seen to grow in its place, and all figures are there in the end.
    results = cell(page, "train-better").locator(".jp-OutputArea-output")
    for _ in range(2):
        expect_change(results.locator("img").first)
    expect(last_prompt).to_have_text(f"[{len(CODE_CELLS)}]:")
    expect(page.locator(ERROR)).to_have_count(0)
    for figure in FIGURES:
        expect(cell(page, figure).locator(".jp-RenderedImage img")).to_have_count(1)

    # A slider is moved, another digit chosen, a new style drawn: the pictures follow.
    play = cell(page, "play")
    play.scroll_into_view_if_needed()
    expect(play.locator(".widget-slider").first).to_be_visible()
    expect(page.locator(IDLE)).to_be_visible()
    image = play.locator("img.widget-image").nth(1)  # all digits; the first is the framed digit
    slider = play.locator(".noUi-base").first
    expect_change(image, lambda: slider.click(position={"x": 15, "y": 1}, force=True))
    if front_end == "lab/tree":  # Notebook 7 keeps arrow keys for itself
        expect_change(image, lambda: play.locator(".noUi-handle").first.press("ArrowRight"))
    one_digit = play.locator("img.widget-image").nth(2)
    expect_change(one_digit, play.get_by_role("button", name="8", exact=True).click)
    expect_change(image, play.get_by_role("button", name="new style").click)

    # A hyperparameter is changed and the cells below run again.
    expect(results.last).to_contain_text("epoch 60/60")
    cell(page, "parameters").locator(".cm-content").click()
    page.keyboard.press("Control+End")
    page.keyboard.type("\nepochs = 4")
    run_menu(page, "Run Selected Cell and All Below")
    expect(last_prompt).to_have_text("[*]:")
    expect(last_prompt).to_have_text(f"[{2 * len(CODE_CELLS) - 1}]:")
    expect(results.last).to_contain_text("epoch  4/4")
    expect(results.last).not_to_contain_text("/60")
    expect(page.locator(f"{ERROR}, .Toastify__toast--error")).to_have_count(0)


def test_html_shows_all_figures_in_place_of_sliders(page, tmp_path):
    html, _ = HTMLExporter().from_notebook_node(NOTEBOOK)
    (tmp_path / "vae2.html").write_text(html)
    page.route(re.compile("^https?://"), lambda route: route.abort())  # MathJax: no network here
    page.goto((tmp_path / "vae2.html").as_uri())
    assert {"train-article", "train-better", "picture"} <= set(FIGURES)
    for figure in FIGURES:
        image = page.locator(f"[id='cell-id={figure}'] .jp-RenderedImage img")
        expect(image).to_be_visible()
        assert image.evaluate("image => image.naturalWidth") > 300
    expect(page.locator("[data-mime-type='application/vnd.jupyter.stderr']")).to_have_count(0)
