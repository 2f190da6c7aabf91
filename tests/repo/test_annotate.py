"""The annotated page: complete, up to date, and true for the run that it shows."""

import html
import importlib
import json
import re

import pytest

import data
from docs import numbers
from support.program import UserError
from tasks import DataConfig

for package in ("markdown_it", "latex2mathml", "pygments"):
    pytest.importorskip(package)
annotate = importlib.import_module("docs.annotate")
tables = importlib.import_module("docs.tables")

SOURCE = annotate.SOURCE.read_text(encoding="utf-8")
PAGE = annotate.PAGE.read_text(encoding="utf-8")
EXPLORED = json.loads(annotate.NUMBERS.read_text(encoding="utf-8"))
TASKS = EXPLORED["tasks"]
TEXT = annotate.TEXT.read_text(encoding="utf-8")
SECTIONS = annotate.read_sections()
BLOCKS = {block.piece: block for section in SECTIONS for block in section.blocks}
PIECES = {piece.name: piece for piece in annotate.find_pieces(SOURCE)}
EMPTY = dict.fromkeys(re.findall(r"\{\{(\w+)\}\}", TEXT), "")  # values for the texts


# --------------------------------------------------------------------------------------- the page


def test_page_is_up_to_date():
    assert annotate.page() == PAGE


def test_page_is_small_and_makes_no_request():
    assert not re.findall(r" src=|<link|@import|url\((?!#)", PAGE)
    assert len(PAGE.encode()) < 400_000


def test_every_line_is_on_the_page_once_in_the_order_of_the_file():
    shown = []
    for before, code in re.findall(r'--before:(\d+)">(.*?)</pre>', PAGE, re.DOTALL):
        shown += range(int(before) + 1, int(before) + 1 + code.count("<span>"))
    assert shown == list(range(1, len(SOURCE.splitlines()) + 1))
    lines = [html.unescape(re.sub(r"<[^>]*>", "", line)) for line in annotate.highlight(SOURCE)]
    assert lines == SOURCE.splitlines()


def test_anchors_are_unique_and_every_link_has_one():
    anchors = re.findall(r' id="([^"]+)"', PAGE)
    assert len(anchors) == len(set(anchors))
    links = set(re.findall(r'href="([^"]+)"', PAGE))
    pages = {"paper.md", "evidence.md", "use.md", "data.md", "../examples/minimal.py"}
    site = {"https://arxiv.org/abs/2401.10559"}
    assert links - pages - site <= {f"#{anchor}" for anchor in anchors}
    assert all((annotate.DOCS / page).is_file() for page in pages)
    assert not re.findall(r"<m\w+>\\\w+", PAGE)  # commands that latex2mathml does not know
    assert "](" not in re.sub("<script.*?</script>", "", PAGE, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------- the notes


def test_a_note_about_a_line_that_is_gone_is_refused():
    changed = SOURCE.replace("P = scores.softmax(dim=-1)", "P = scores.softmax(-1)").splitlines()
    name = "TaskRouter.summarise"
    with pytest.raises(UserError, match="0 lines of TaskRouter.summarise begin 'P = scores.soft"):
        annotate.note_lines(PIECES[name], BLOCKS[name].notes, changed)


def test_a_block_about_a_piece_that_is_gone_or_elsewhere_is_refused():
    renamed = SOURCE.replace("def masked_mean(", "def mean_of_tokens(")
    with pytest.raises(UserError, match="masked_mean is not in orchmoe.py, or not in this order"):
        annotate.sections_html(SECTIONS[-9:], renamed, EMPTY)
    with pytest.raises(UserError, match="TaskRouter is not in orchmoe.py, or not in this order"):
        annotate.sections_html([SECTIONS[-1], SECTIONS[-7]], SOURCE, EMPTY)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{{no_such}}", r"{{no_such}} is not the name"),
        ("$x^2^3$", "\\$x.*; mend this LaTeX"),
    ],
)
def test_a_mistake_in_the_text_is_one_line(text, message):
    with pytest.raises(UserError, match=f"annotated.md: {message}"):
        annotate.markdown(text, {})


def test_notes_name_what_exists():
    root = annotate.DOCS.parent
    code = "".join(
        (root / name).read_text() for name in ("orchmoe.py", "kernels.py", "tasks.py", "data.py")
    )
    tests = "".join(path.read_text() for path in root.glob("tests/*/test_*.py"))
    text = re.sub(r"```python.*?```", "", TEXT, flags=re.DOTALL)
    named = re.findall(r"^- \*\*tested\*\* by `(\w+)`$", text, re.MULTILINE)
    assert named
    for name in named:
        assert f"def {name}(" in tests, name
    for name in re.findall(r"`([a-z_]\w+)", text):
        exists = name in ("python", "kernels", *named) or re.search(rf"\b{name}\b", code)
        assert exists, name


# ------------------------------------------------------------------------------------------ the run


def test_words_of_the_abstract_tasks_fit_the_run():
    """Each seen task is named behind the words of the abstract task that it has most."""
    assert tables.outdated_words(EXPLORED) == []


def test_words_that_do_not_fit_the_run_are_named(monkeypatch):
    words, known = tables.WORDS[0]
    monkeypatch.setattr(tables, "WORDS", ((words, known + " 999"), *tables.WORDS[1:]))
    [line] = tables.outdated_words(EXPLORED)
    assert "abstract task 1" in line and "999" not in line


def test_the_page_shows_the_verdict_and_the_differences_from_a_lora():
    """The verdict is the first paragraph of the evidence, and the differences its first table."""
    evidence = (annotate.DOCS / "evidence.md").read_text(encoding="utf-8")
    assert evidence.split("\n\n")[1].startswith("**")
    head = re.search(r"^\|.*", evidence, re.MULTILINE)[0]
    assert "OrchMoE minus a LoRA of equal size" in head


def test_what_rounds_to_zero_has_no_sign():
    shown = [tables.signed(value, 2) for value in (-0.004, 0.004, -0.005001, 0.1, -1.234)]
    assert shown == ["0.00", "0.00", "\u22120.01", "+0.10", "\u22121.23"]
    assert numbers.decimals([-0.0004, 0.0004, -0.1]) == ["0.000", "0.000", "-0.100"]
    visible = re.sub("<script.*?</script>", "", PAGE, flags=re.DOTALL)
    assert not re.search(r"[-+\u2212]0\.0+(?!\d)", visible)


def test_a_token_that_looks_like_html_is_shown():
    words = EXPLORED["walk"]["token_losses"][0]
    assert words[-2] == "</s>"
    assert "&lt;/s&gt;</th>" in tables.table([words]) and "&lt;/s&gt;</th>" in PAGE


def test_the_page_says_which_run_it_shows():
    assert re.fullmatch("[0-9a-f]{16}", EXPLORED["hash"])
    assert PAGE.count(EXPLORED["hash"]) == 1


def test_what_the_texts_claim_about_the_run_holds():
    """Change the texts if a new run says something else."""
    text = " ".join(TEXT.split())
    sharp = [task for task in TASKS if sum(sorted(task["w"])[-2:]) > 0.7]
    assert len(sharp) > len(TASKS) / 2
    assert "Most tasks have one or two large weights." in text

    first = EXPLORED["samples"][EXPLORED["first"]]["w"]
    assert max(first) > 0.5 and sorted(first)[-2] < 0.2
    assert "and little on the others." in text
    *_, second, largest = sorted(float(value) for value in EXPLORED["walk"]["c"][-1][1:])
    assert largest > second + 0.05  # so that the sentence names one skill
    assert "has the most weight for this prompt." in text

    seen, unseen = (
        tables.average([task for task in TASKS if task["kind"] == kind], "")
        for kind in ("seen", "unseen")
    )
    for other in ("mean", "uniform", "other"):
        assert tables.gap(seen, other) > tables.gap(unseen, other)
        for kind in (seen, unseen):
            assert tables.gap(kind, other) < tables.gap(kind, "off") / 2
    assert "Another w costs more on seen tasks than on unseen ones." in text
    assert "model keeps most of its gain over the frozen base" in text


def test_the_first_sample_is_one_where_routing_matters():
    own, mean, uniform = EXPLORED["samples"][EXPLORED["first"]]["results"][:3]
    assert [own[2], mean[2], uniform[2]] == [True, False, False]
    assert uniform[1] > own[1] + 0.5


def test_numbers_are_made_from_a_run(finished, monkeypatch):
    """Each step of the walk is compared with the model while it is made."""
    monkeypatch.setattr(DataConfig, "max_new_tokens", 2)
    monkeypatch.setattr(numbers, "COMPARED", ("own",))
    load_sets = data.load_sets

    def few(*arguments, **options):
        sets = load_sets(*arguments, **options)
        del sets["seen"][7:]
        del sets["test"][7:]
        return sets

    monkeypatch.setattr(data, "load_sets", few)
    found = numbers.collect(finished / "run")
    assert found.keys() == EXPLORED.keys()
    assert found["hash"] != EXPLORED["hash"]
    # A run of eight steps is near its start, if this is the right start, and not at it.
    assert 0 < found["distance"]["seen"] < 0.01
    assert found["walk"].keys() == EXPLORED["walk"].keys()
    starts = {"seen": 0, "unseen": 0}
    for number, task in enumerate(found["tasks"]):  # three samples of each, evenly spaced
        rows = [sample["row"] for sample in found["samples"] if sample["task"] == number]
        first = starts[task["kind"]]
        starts[task["kind"]] += task["count"]
        assert rows == [first + i * task["count"] // 3 for i in range(3)], task["name"]
    assert found["tasks"][0].keys() < TASKS[0].keys()
    assert len(found["without_one"]["rise"]) == len(found["linears"])
