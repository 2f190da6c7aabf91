"""The annotated page and the explorer: complete, up to date, and working in a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from docs import annotate
from docs.notes import NOTES
from experiments import explorer
from helpers import run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SOURCE = annotate.SOURCE.read_text(encoding="utf-8")

# What a reader would do: choose another sample, then set the weight of abstract task 1 to 0.9.
DRIVER = """
<pre id="report"></pre>
<script>
const read = () => ({
  task: document.getElementById("about").textContent,
  state: document.getElementById("state").textContent,
  w: [...document.querySelectorAll(".weight span")].map(e => +e.textContent),
  c: [...document.querySelectorAll("#heat [data-c]")].map(e => +e.dataset.c),
  losses: [...document.querySelectorAll("#losses tr")].map(r => +r.cells[1].textContent),
});
const report = [];
const list = document.getElementById("sample");
list.value = "@SAMPLE@";
list.dispatchEvent(new Event("change"));
report.push(read());
const slider = document.getElementById("w0");
slider.value = "0.9";
slider.dispatchEvent(new Event("input"));
report.push(read());
document.getElementById("report").textContent = "REPORT" + JSON.stringify(report) + "END";
</script>
"""


def open_in_browser(page, folder):
    """Return what the driver reads from the page after choosing and after moving."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder}/profile", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = re.search(r"REPORT(.*?)END", done.stdout, re.DOTALL)
    assert report, done.stderr[-500:]
    return json.loads(html.unescape(report[1]))


def test_page_is_up_to_date():
    assert annotate.page() == annotate.PAGE.read_text(encoding="utf-8")


def test_page_needs_no_network():
    page = annotate.PAGE.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|@import|url\(', page)
    assert len(page) < 600_000


def test_find_blocks_covers_every_line_once():
    blocks = annotate.find_blocks(SOURCE)
    lines = [line for block in blocks for line in range(block.first, block.last + 1)]
    assert lines == list(range(1, len(SOURCE.splitlines()) + 1))


def test_every_block_has_a_note_or_a_docstring_and_every_note_a_block():
    blocks = annotate.find_blocks(SOURCE)
    assert {block.name for block in blocks} == NOTES.keys()
    for block in blocks:
        assert block.docstring or NOTES[block.name].text, block.name


def test_notes_name_tests_that_exist():
    names = set()
    for path in (annotate.DOCS.parent / "tests").rglob("test_*.py"):
        names.update(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    named = {note.test for note in NOTES.values() if note.test}
    assert len(named) >= 8
    assert named <= names


def test_highlight_keeps_the_text():
    lines = [html.unescape(re.sub(r"<[^>]*>", "", line)) for line in annotate.highlight(SOURCE)]
    assert lines == SOURCE.splitlines()


def require_samples(explored, number):
    """Require this number of seen samples, then as many unseen ones, each with its w."""
    kinds = [sample["kind"] for sample in explored["samples"]]
    assert kinds == ["seen"] * number + ["unseen"] * number
    for sample in explored["samples"]:
        assert sum(sample["w"]) == pytest.approx(1, abs=1e-3)
    assert len(explored["Zhat"]) == len(explored["linears"])


def test_plot_writes_the_explorer_of_a_run(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "SAMPLES", 2)
    page = tmp_path / "page.html"
    run("experiments/plot.py", "--run", "run", "--html", page, cwd=finished)
    numbers = re.search(r'id="explorer-data">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    explored = json.loads(numbers.replace("<\\/", "</"))
    require_samples(explored, 2)
    assert explored["steps"] == 8
    walk = json.loads(annotate.NUMBERS.read_text())["walk"]
    assert annotate.walk(finished / "run").keys() == walk.keys()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_explorer_in_a_browser(tmp_path):
    explored = json.loads(annotate.NUMBERS.read_text(encoding="utf-8"))
    require_samples(explored, explorer.SAMPLES)
    chosen = 25  # an unseen one
    sample = explored["samples"][chosen]
    page = annotate.PAGE.read_text(encoding="utf-8")
    driver = DRIVER.replace("@SAMPLE@", str(chosen))
    after, moved = open_in_browser(page.replace("</body>", f"{driver}</body>"), tmp_path)
    assert sample["task"] in after["task"]
    assert after["w"] == pytest.approx(sample["w"], abs=1e-3)
    assert after["losses"] == pytest.approx(list(sample["losses"].values()), abs=1e-3)
    assert after["state"].startswith("These are the router's")

    w = moved["w"]
    assert w[0] == pytest.approx(0.9)
    assert sum(w) == pytest.approx(1, abs=5e-3)
    assert moved["state"].startswith("These are not the router's")
    c = torch.tensor(w) @ torch.tensor(explored["Zhat"])
    assert moved["c"] == pytest.approx(c.flatten().tolist(), abs=3e-3)
    assert moved["c"] != after["c"]
