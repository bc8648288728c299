"""The notebook in a real JupyterLab in headless Chromium, used as a person would.

Needs the `chromium` command (Debian's package of that name); without it, the test says so and
is skipped.
"""

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
from conftest import NOTEBOOK, SMALL, notebook_with
from playwright.sync_api import expect, sync_playwright

CHROMIUM = shutil.which("chromium")
OURS = re.compile(r"vae|ipywidgets|widget|Traceback", re.IGNORECASE)


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
    env = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / ".settings")}
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


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_a_person_runs_the_notebook_in_jupyterlab(lab):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and errors.append(said.text))
        page.goto(lab)
        expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(len(NOTEBOOK.cells))
        expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")).to_be_visible()
        run_menu(page, "Run All Cells")

        # The digit grid is seen to grow in its place.
        seen = set()
        last_prompt = cell(page, "results").locator(".jp-InputPrompt")
        code_cells = [c.id for c in NOTEBOOK.cells if c.cell_type == "code"]
        deadline = time.monotonic() + 300
        while last_prompt.inner_text() != f"[{len(code_cells)}]:" and time.monotonic() < deadline:
            seen.add(picture(page, "train"))
            page.wait_for_timeout(100)
        expect(last_prompt).to_have_text(f"[{len(code_cells)}]:")
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
            before = picture(page, "play")
            act()
            shown = play.locator(".jp-OutputArea-output img").first
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
        expect(last_prompt).to_have_text(f"[{2 * len(code_cells) - 1}]:", timeout=300_000)
        expect(results).to_contain_text("epoch  4/4")
        expect(results).not_to_contain_text("/12")
        expect(page.locator("[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)
        expect(page.locator(".Toastify__toast--error")).to_have_count(0)
        assert not [error for error in errors if OURS.search(error)]
        browser.close()
