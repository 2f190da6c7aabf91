"""The annotated page and the explorer: complete, up to date, and working in a browser."""

import ast
import json
import re
import shutil
import subprocess

import pytest

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
const report = [read()];
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
    """Return what the driver reads from the page at its start, after choosing, after moving."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder}/profile", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = re.search(r"REPORT(.*?)END", done.stdout, re.DOTALL)
    assert report, done.stderr[-500:]
    return json.loads(report[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.fixture(scope="module")
def explored():
    return json.loads(annotate.NUMBERS.read_text(encoding="utf-8"))


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


def test_every_block_has_a_note_and_every_note_a_block():
    assert {block.name for block in annotate.find_blocks(SOURCE)} == NOTES.keys()


def test_every_block_says_something():
    for block in annotate.find_blocks(SOURCE):
        assert block.docstring or NOTES[block.name].text, block.name


def test_notes_name_tests_that_exist():
    names = set()
    for path in (annotate.DOCS.parent / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    named = {note.test for note in NOTES.values() if note.test}
    assert len(named) >= 8 and named <= names


def test_highlight_keeps_the_text():
    for line, marked in zip(SOURCE.splitlines(), annotate.highlight(SOURCE), strict=True):
        plain = re.sub(r"<[^>]*>", "", marked)
        for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#x27;", "'")):
            plain = plain.replace(entity, sign)
        assert plain.replace("&amp;", "&") == line


def test_mathml_of_an_equation():
    found = annotate.mathml("X^hat = sqrt(D) B_s")
    assert "<msqrt><mrow><mi>D</mi></mrow></msqrt>" in found
    assert "<mover accent='true'><mi>X</mi>" in found and "<msub><mi>B</mi>" in found


def test_explored_samples_are_seen_and_unseen_and_routed(explored):
    kinds = [sample["kind"] for sample in explored["samples"]]
    assert kinds.count("seen") == kinds.count("unseen") == explorer.SAMPLES
    for sample in explored["samples"]:
        assert sum(sample["w"]) == pytest.approx(1, abs=1e-3)
        assert set(sample["losses"]) == {"own", "mean", "other", "uniform"}
    for rows in explored["Zhat"]:
        assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in rows)


def test_plot_writes_the_explorer_of_a_run(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "SAMPLES", 2)
    page = tmp_path / "page.html"
    said = run("experiments/plot.py", "--run", "run", "--html", page, cwd=finished)
    assert f"written: {page}" in said
    text = page.read_text(encoding="utf-8")
    numbers = re.search(r'id="explorer-data">(.*?)</script>', text, re.DOTALL)[1]
    explored = json.loads(numbers.replace("<\\/", "</"))
    assert [sample["kind"] for sample in explored["samples"]] == ["seen"] * 2 + ["unseen"] * 2
    assert explored["steps"] == 8 and len(explored["Zhat"]) == len(explored["linears"])


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_explorer_in_a_browser(explored, tmp_path):
    chosen = 25  # an unseen one
    page = annotate.PAGE.read_text(encoding="utf-8")
    driver = DRIVER.replace("@SAMPLE@", str(chosen))
    start, after, moved = open_in_browser(page.replace("</body>", f"{driver}</body>"), tmp_path)

    sample = explored["samples"][chosen]
    assert explored["samples"][0]["task"] in start["task"] and sample["task"] in after["task"]
    assert after["w"] == pytest.approx(sample["w"], abs=1e-3)
    assert after["losses"] == pytest.approx(list(sample["losses"].values()), abs=1e-3)
    assert after["state"].startswith("These are the router's")

    assert moved["w"][0] == pytest.approx(0.9) and sum(moved["w"]) == pytest.approx(1, abs=5e-3)
    assert moved["state"].startswith("These are not the router's")
    expected = []
    for rows in explored["Zhat"]:  # c = w Zhat, in Python
        for s in range(len(rows[0])):
            expected.append(sum(w * row[s] for w, row in zip(moved["w"], rows, strict=True)))
    assert moved["c"] == pytest.approx(expected, abs=3e-3) and moved["c"] != after["c"]
