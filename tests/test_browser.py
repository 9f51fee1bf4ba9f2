"""JupyterLab and the offline pages in headless Chromium: what a reader clicks, moves and sees.

On Debian: apt-get install chromium chromium-driver. Elsewhere: any Chromium with its chromedriver on the path.
"""

import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import nbformat.v4 as nb
import numpy as np
import pytest
from PIL import Image

from companion.parameters import read_yaml
from companion.workbench.index import write_index

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[1]
PATIENCE = 600  # seconds until the slowest thing is there: a notebook on a busy machine
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-dev-shm-usage",
    "--window-size=1500,2600",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # there is no network

CELLS = "window.jupyterapp.shell.currentWidget.content.widgets"
RUN_ALL = """
const over = () => { window.allCellsRan = true; };
window.jupyterapp.commands.execute('notebook:run-all-cells').then(over, over);
"""
# What a reader sees in the output of one cell: every picture, and every text under one.
SEEN = """
const cell = arguments[0];
return {pictures: [...cell.querySelectorAll('.companion-picture')].map(image => image.src),
        notes: [...cell.querySelectorAll('.companion-note')].map(note => note.textContent)};
"""
# How long, in ms, until a picture of a cell has changed and is there, counted from the key that moved the slider.
ANSWER = """
const [cell, handle, key, done] = arguments;
const image = cell.querySelector('.companion-picture');
const start = performance.now();
image.addEventListener('load', () => done(performance.now() - start), {once: true});
setTimeout(() => done(60000), 60000);
handle.dispatchEvent(new KeyboardEvent('keydown', {key: key, bubbles: true}));
"""


@pytest.fixture(scope="module")
def chromium():
    """Chromium without a network, driven by selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing: pip install 'selenium>=4.25'")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium with a chromedriver; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("unhandledPromptBehavior", "accept")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.set_script_timeout(PATIENCE)
    yield chrome
    chrome.quit()


@pytest.fixture
def browser(chromium):
    """The browser on an empty page: that of an earlier test is left, and JupyterLab would go on asking its server."""
    chromium.get("about:blank")
    return chromium


def network(browser) -> tuple[list[str], list[dict]]:
    """The addresses that the page now shown has asked for since the last call, and the events of those that failed."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    page = browser.current_url.partition("#")[0]
    asked = {
        e["params"]["requestId"]: e["params"]["request"]["url"]
        for e in events
        if e["method"] == "Network.requestWillBeSent" and e["params"]["documentURL"].partition("#")[0] == page
    }
    failed = [e for e in events if e["method"] == "Network.loadingFailed" and e["params"]["requestId"] in asked]
    return list(asked.values()), failed


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on copies of the notebooks, which write beside themselves, and its folder."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("gallery", "start_here"):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        values = read_yaml(ROOT / "notebooks" / "params" / name / "smoke.yaml") | {"device": "cpu"}
        if name == "start_here":  # here its viewer counts, not its numbers
            values |= {"image_size": 32, "subjects": 2, "evaluations": 2}
        at = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
        notebook.cells.insert(at + 1, nb.new_code_cell("\n".join(f"{k} = {v!r}" for k, v in values.items())))
        nbformat.write(notebook, folder / f"{name}.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
        "--allow-root",
        "--ServerApp.root_dir=" + str(folder),
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # figures are shown, as for a reader
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            env=environment | {"OMP_NUM_THREADS": "1", "JUPYTER_PLATFORM_DIRS": "1", "COMPANION_HOME": str(folder)},
        )
    try:
        wait(lambda: answers(f"http://127.0.0.1:{port}/api"), "JupyterLab to start")
        yield f"http://127.0.0.1:{port}", folder
    finally:
        server.terminate()
        server.wait(60)


def wait(condition, what: str, patience: float = PATIENCE):
    """What `condition()` returns once it is true."""
    end = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {patience:.0f} s for {what}"
        time.sleep(0.2)
    return value


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


class Notebook:
    """A notebook open in JupyterLab, all its cells executed."""

    def __init__(self, browser, lab, name: str):
        self.browser, (address, self.folder) = browser, lab
        browser.get(f"{address}/lab/tree/{name}?reset")
        wait(
            lambda: browser.execute_script("return !!(window.jupyterapp && document.querySelector('.jp-CodeCell'))"),
            "the notebook to open",
        )
        shown = "window.jupyterapp.shell.currentWidget"  # null until it is in front
        ready = f"return {shown}?.content?.widgets?.length > 5 && {shown}.sessionContext.isReady"
        wait(lambda: browser.execute_script(ready), "the kernel")
        browser.execute_script(RUN_ALL)
        wait(lambda: browser.execute_script("return window.allCellsRan"), f"{name} to finish")
        errors = browser.execute_script(
            f"return {CELLS}.flatMap(c => c.model.outputs ? c.model.outputs.toJSON() : [])"
            ".filter(o => o.output_type == 'error').map(o => o.ename + ': ' + o.evalue)"
        )
        assert not errors, errors

    def cell(self, holding: str):
        """The code cell whose source holds a text, once it shows a widget."""
        found = self.browser.execute_script(
            f"""return {CELLS}.find(c => c.model.type == 'code' &&
            c.model.sharedModel.source.includes(arguments[0])).node""",
            holding,
        )
        wait(lambda: found.find_elements("css selector", ".jupyter-widgets"), f"the widgets of {holding}", 120)
        return found

    def seen(self, cell) -> dict:
        return self.browser.execute_script(SEEN, cell)

    def handle(self, cell, axis: str):
        """The handle of the slider with a label, scrolled into view."""
        for box in cell.find_elements("css selector", ".widget-inline-hbox"):
            label = box.find_elements("css selector", ".widget-label")
            handles = box.find_elements("css selector", ".noUi-handle")
            if label and handles and label[0].text.strip() == axis:
                self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handles[0])
                return handles[0]
        raise AssertionError(f"no slider {axis}")

    def move(self, cell, axis: str, key: str) -> tuple[dict, dict]:
        """What was seen before and after an arrow key on a slider; the picture must change."""
        before = self.settled(cell)
        self.handle(cell, axis).send_keys(key)
        wait(lambda: self.seen(cell)["pictures"] != before["pictures"], f"the pictures to follow {axis}", 120)
        return before, self.settled(cell)

    def settled(self, cell) -> dict:
        """What is seen once pictures and numbers, which come one after the other, have all come."""

        def unchanged():
            before = self.seen(cell)
            time.sleep(1)
            return self.seen(cell) == before and before

        return wait(unchanged, "the view to come to rest", 120)

    def button(self, cell, text: str):
        buttons = cell.find_elements("css selector", "button")
        found = next(b for b in buttons if b.text.strip().startswith(text) or b.get_attribute("title") == text)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        return found

    def status(self, cell) -> str:
        return " ".join(self.texts(cell, "[role=status]"))

    def rows(self, cell) -> list[str]:
        return [text for text in self.texts(cell, ".companion-name") if text]

    def texts(self, cell, selector: str) -> list[str]:
        return self.browser.execute_script(
            "return [...arguments[0].querySelectorAll(arguments[1])].map(e => e.textContent.trim())", cell, selector
        )

    def screenshot(self, name: str) -> Path:
        """A picture for people to look at; a renderer too busy for one must not fail the test."""
        from selenium.common.exceptions import WebDriverException

        path = self.folder / f"{name}.png"
        with contextlib.suppress(WebDriverException):
            self.browser.save_screenshot(str(path))
        return path


def keys():
    from selenium.webdriver.common.keys import Keys

    return Keys


def test_gallery_answers_to_sliders_play_sort_and_save(browser, lab):
    notebook = Notebook(browser, lab, "gallery.ipynb")
    Keys = keys()
    one = notebook.cell("open_first")
    before, after = notebook.move(one, "slice", Keys.ARROW_RIGHT)
    assert before["notes"] != after["notes"], "numbers follow the slice"
    before, after = notebook.move(one, "draw", Keys.ARROW_RIGHT)
    assert sum(a != b for a, b in zip(before["notes"], after["notes"], strict=True)) == 1, "only the draw changes"
    handle = notebook.handle(one, "slice")
    times = [browser.execute_async_script(ANSWER, one, handle, key) for key in ("ArrowLeft", "ArrowRight") * 3]
    print(f"a slider answers in {np.median(times):.0f} ms, from key to picture")
    assert max(times) < 60000

    before = notebook.seen(one)
    player = one.find_element("css selector", ".jupyter-widget-play, .widget-play")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", player)
    play = player.find_elements("css selector", "button")
    play[0].send_keys(Keys.SPACE)  # from the keyboard
    wait(lambda: notebook.seen(one)["notes"] != before["notes"], "the player to play", 120)
    play[0].send_keys(Keys.SPACE)
    notebook.screenshot("one_run")

    notebook.button(one, "save PNG").click()
    wait(lambda: "saved" in notebook.status(one), "the picture to be saved", 120)
    (saved,) = (notebook.folder / "runs" / "saved").glob("*.png")
    assert np.asarray(Image.open(saved)).std() > 10

    grid = notebook.cell("display(grid)")
    for axis in ("dose", "seed"):
        said = notebook.status(grid)
        notebook.move(grid, axis, Keys.ARROW_LEFT)
        wait(lambda said=said: notebook.status(grid) != said, "the run's numbers to change", 60)
    assert "psnr" in notebook.status(grid)
    notebook.screenshot("grid")

    table = notebook.cell("browse.Gallery(")
    first = notebook.rows(table)
    notebook.button(table, "run").click()
    second = sorted(first)
    assert first != second
    wait(lambda: notebook.rows(table) == second, "the sort", 60)  # rows change places one by one
    notebook.button(table, "run").click()
    wait(lambda: notebook.rows(table) == second[::-1], "the reverse order", 60)
    notebook.button(table, "open " + second[0]).click()
    wait(lambda: notebook.seen(table)["pictures"], "the run to open beneath the table", 120)
    titles = browser.execute_script("return [...document.querySelectorAll('.companion-picture')].map(i => i.title)")
    assert titles and all(titles), "every picture has a text"
    notebook.screenshot("table")


def test_start_here_ends_in_a_viewer(browser, lab):
    notebook = Notebook(browser, lab, "start_here.ipynb")
    cell = notebook.cell("view(path)")
    before, after = notebook.move(cell, "draw", keys().ARROW_RIGHT)
    assert before["notes"] != after["notes"]
    notebook.screenshot("start_here")


def test_index_and_pages_are_whole_without_a_network(browser, tmp_path):
    from companion.show.examples import write_examples

    runs = tmp_path / "runs"
    folders = write_examples(runs, accelerations=(4,), doses=(0.3,), people=(0,))
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60), np.uint8)).save(png, "PNG")
    shown = nb.new_output("display_data", {"image/png": base64.b64encode(png.getvalue()).decode()})
    text = "# A page\n\nInline $x_0$ and\n\n$$ y = \\underbrace{A x}_{\\text{measured}} + n $$"
    notebook = nb.new_notebook(cells=[nb.new_markdown_cell(text), nb.new_code_cell("x", outputs=[shown])])
    nbformat.write(notebook, folders[0] / "notebook.ipynb")
    (runs / "example" / "stopped").mkdir()
    (runs / "example" / "stopped" / "notebook.ipynb").write_text("{}")
    index = write_index(runs)
    for page, pictures, formulas in ((index, 2, 0), (folders[0] / "notebook.html", 1, 2)):
        network(browser)
        browser.get(page.as_uri())
        browser.execute_script("document.querySelectorAll('img').forEach(i => { i.loading = 'eager'; })")
        wait(lambda: browser.execute_script("return [...document.images].every(i => i.complete)"), "the pictures", 60)
        images = browser.execute_script("return [...document.images].map(i => [i.naturalWidth, i.alt])")
        assert len(images) == pictures and all(width > 0 and alt for width, alt in images)
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('math')].map(m => "
            "m.getBoundingClientRect().height * m.getBoundingClientRect().width)"
        )
        assert len(sizes) == formulas and all(size > 100 for size in sizes)
        asked, failed = network(browser)
        assert page.as_uri() in asked and all(url.startswith(("file:", "data:")) for url in asked), asked
        assert not failed
        browser.save_screenshot(str(tmp_path / f"{page.stem}.png"))
    browser.get(index.as_uri())
    names = "return [...document.querySelectorAll('#runs tbody tr')].map(r => r.cells[0].textContent)"
    first = browser.execute_script(names)
    browser.find_elements("css selector", "#runs th button")[1].send_keys(keys().ENTER)  # by state, from the keyboard
    states = browser.execute_script("return [...document.querySelectorAll('#runs tbody tr')].map(r => r.className)")
    assert states == sorted(states) and set(browser.execute_script(names)) == set(first)
    assert "there is no run.json" in browser.find_element("css selector", "section.incomplete").text
