"""The notebook in JupyterLab, Notebook 7 and as HTML, in headless Chromium, as a person sees it.

Needs the `chromium` command (Debian's package of that name); without it, the tests say so and
are skipped.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import CODE_CELLS, NOTEBOOK, SMALL, notebook_with, pictures
from nbconvert import HTMLExporter
from playwright.sync_api import expect, sync_playwright

CHROMIUM = shutil.which("chromium")
OURS = re.compile(r"vae|ipywidgets|widget|Traceback", re.IGNORECASE)
FIGURES = [cell.id for cell in NOTEBOOK.cells if cell.cell_type == "code" and pictures(cell)]
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")


@pytest.fixture
def lab(small_npz, tmp_path):
    """Start JupyterLab with the notebook on small settings; yield the address of the notebook."""
    parameters = {**SMALL, "epochs": 12, "hidden_layers": [128, 64], "batch_size": 20}
    notebook_with(tmp_path, **parameters, data_path=str(small_npz))
    settings = tmp_path / ".settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # All cells stay in the page, also those that are scrolled out of sight.
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex()
    env = {**os.environ, "XLA_FLAGS": "", "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / ".settings")}
    env |= {"JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / ".workspaces")}
    env.pop("PYTEST_CURRENT_TEST")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--port={port}", f"--IdentityProvider.token={token}"]
    with open(tmp_path / ".log", "wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"{address}/lab/tree/vae2.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(30)


def cell(page, cell_id):
    """Return the cell with this id on the page."""
    return page.locator(".jp-Notebook > * .jp-Cell, .jp-Notebook > .jp-Cell").nth(
        [cell.id for cell in NOTEBOOK.cells].index(cell_id)
    )


def run_menu(page, item):
    """Choose an item of JupyterLab's Run menu."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=item, exact=True).click()


def picture(page, cell_id, nth=0):
    """Return the source of a picture that a cell shows, or None."""
    pictures = cell(page, cell_id).locator(".jp-OutputArea-output img")
    return pictures.nth(nth).get_attribute("src") if pictures.count() > nth else None


def widget_picture(page):
    """Return the source of the first picture beside the sliders."""
    return cell(page, "play").locator(".jupyter-widgets img").first.get_attribute("src")


def run_all(page):
    """Run all cells once the notebook is there and its kernel ready."""
    expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(len(NOTEBOOK.cells))
    expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")).to_be_visible()
    first_prompt = cell(page, CODE_CELLS[0]).locator(".jp-InputPrompt")
    for _ in range(5):  # a front end that has only just started may not heed its menu yet
        run_menu(page, "Run All Cells")
        with contextlib.suppress(AssertionError):
            expect(first_prompt).not_to_have_text("[ ]:", timeout=10_000)
            return
    raise AssertionError("no cell is run")


@pytest.fixture
def page():
    """Yield a page of headless Chromium; errors of its scripts that are ours fail the test."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and errors.append(said.text))
        yield page
        browser.close()
    assert not [error for error in errors if OURS.search(error)]


def test_a_person_runs_the_notebook_in_jupyterlab(lab, page):
    page.goto(lab)
    run_all(page)

    # The digit grid is seen to grow in its place.
    seen = set()
    last_prompt = cell(page, CODE_CELLS[-1]).locator(".jp-InputPrompt")
    deadline = time.monotonic() + 300
    while last_prompt.inner_text() != f"[{len(CODE_CELLS)}]:" and time.monotonic() < deadline:
        seen.add(picture(page, "train"))
        page.wait_for_timeout(100)
    expect(last_prompt).to_have_text(f"[{len(CODE_CELLS)}]:")
    assert len(seen - {None}) >= 3
    expect(cell(page, "train").locator(".jp-OutputArea-output img")).to_have_count(1)
    expect(page.locator("[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)

    # A slider is moved, another digit chosen, a new style drawn: the pictures follow.
    play = cell(page, "play")
    play.scroll_into_view_if_needed()
    expect(play.locator(".widget-slider").first).to_be_visible()
    for act in (
        lambda: play.locator(".noUi-handle").first.press("ArrowRight"),
        lambda: play.get_by_role("button", name="8", exact=True).click(),
        lambda: play.get_by_role("button", name="new style").click(),
    ):
        before = widget_picture(page)
        act()
        shown = play.locator(".jupyter-widgets img").first
        expect(shown).not_to_have_attribute("src", before)

    # A hyperparameter is changed and the cells below run again.
    results = cell(page, "train").locator(".jp-OutputArea-output").last
    expect(results).to_contain_text("epoch 12/12")
    editor = cell(page, "parameters").locator(".cm-content")
    editor.click()
    page.keyboard.press("Control+End")
    page.keyboard.type("\nepochs = 4")
    run_menu(page, "Run Selected Cell and All Below")
    expect(last_prompt).to_have_text("[*]:")
    expect(last_prompt).to_have_text(f"[{2 * len(CODE_CELLS) - 1}]:", timeout=300_000)
    expect(results).to_contain_text("epoch  4/4")
    expect(results).not_to_contain_text("/12")
    expect(page.locator("[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)
    expect(page.locator(".Toastify__toast--error")).to_have_count(0)


def test_notebook_7_shows_all_figures_and_the_sliders(lab, page):
    page.goto(lab.replace("/lab/tree/", "/notebooks/"))
    run_all(page)
    last_prompt = cell(page, CODE_CELLS[-1]).locator(".jp-InputPrompt")
    expect(last_prompt).to_have_text(f"[{len(CODE_CELLS)}]:", timeout=300_000)
    expect(page.locator("[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)
    for figure in FIGURES:
        expect(cell(page, figure).locator(".jp-RenderedImage img")).to_have_count(1)
    play = cell(page, "play")
    play.scroll_into_view_if_needed()
    expect(play.locator(".widget-slider").first).to_be_visible()
    expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")).to_be_visible()
    before = widget_picture(page)
    play.get_by_role("button", name="new style").click()
    expect(play.locator(".jupyter-widgets img").first).not_to_have_attribute("src", before)
    before = widget_picture(page)  # Notebook 7 keeps arrow keys for itself, so it is the mouse
    play.locator(".noUi-base").first.click(position={"x": 15, "y": 1}, force=True)
    expect(play.locator(".jupyter-widgets img").first).not_to_have_attribute("src", before)


def test_html_shows_all_figures_in_place_of_sliders(page, tmp_path):
    html, _ = HTMLExporter().from_notebook_node(NOTEBOOK)
    (tmp_path / "vae2.html").write_text(html)
    page.route(re.compile("^https?://"), lambda route: route.abort())  # MathJax: no network here
    page.goto((tmp_path / "vae2.html").as_uri())
    assert {"train", "play"} <= set(FIGURES)
    for figure in FIGURES:
        image = page.locator(f"[id='cell-id={figure}'] .jp-RenderedImage img")
        expect(image).to_be_visible()
        assert image.evaluate("image => image.naturalWidth") > 300
    expect(page.locator("[data-mime-type='application/vnd.jupyter.stderr']")).to_have_count(0)
