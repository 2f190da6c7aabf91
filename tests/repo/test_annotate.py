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
# The method: few lines for each note.
CORE = (
    "TaskRouter.__init__",
    "TaskRouter.summarise",
    "TaskRouter.forward",
    "TaskRouter.fit",
    "masked_mean",
    "OrchMoE.__init__",
    "OrchMoE.allocation_weights",
    "OrchMoE.route",
    "mix_skills",
    "SkillLinear.forward",
)


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


def test_the_path_comes_before_the_code_and_has_at_most_3000_words():
    path, code = PAGE.split('<section class="part" id="the-code">')
    anchors = re.findall(r'<section class="step" id="([\w-]+)">', path)
    assert anchors == ["idea", "abstract-tasks", "explore", "where", "evidence"]
    assert "--before:" not in path.split("</style>")[1] and "--before:" in code
    visible = path[path.index("<main>") :]
    for hidden in ("script", "svg", "select"):
        visible = re.sub(rf"<{hidden}\b.*?</{hidden}>", " ", visible, flags=re.DOTALL)
    # What is folded does not count, and numbers in tables are no words.
    visible = re.sub(r"<details.*?<summary", "<summary", visible, flags=re.DOTALL)
    visible = re.sub(r"</summary>.*?</details>", " ", visible, flags=re.DOTALL)
    words = re.findall(r"[^\W\d_]{2,}", html.unescape(re.sub(r"<[^>]*>", " ", visible)))
    assert 1500 < len(words) <= 3000


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


@pytest.mark.parametrize("name", CORE)
def test_a_note_of_the_core_is_about_few_lines(name):
    for lines in annotate.note_lines(PIECES[name], BLOCKS[name].notes, SOURCE.splitlines()):
        code = [n for n in lines if n not in PIECES[name].docstring]
        code = [n for n in code if annotate.is_code(SOURCE.splitlines()[n - 1])]
        assert len(code) <= 8, BLOCKS[name].notes


def test_engineering_in_the_method_is_folded():
    words = ("padding", "if noise is", "gumbel", '"token"', "factors", "beams", "quantised")
    folded = []
    for name in (*CORE, "SkillLinear.skill_c", "new_skills"):
        for note in BLOCKS[name].notes:
            if any(word in note.line.lower() for word in words):
                engineering = re.match(r"\s*\*Engineering: (.*)\.\*", note.text)
                assert engineering, note.line
                folded.append(engineering[1])
    assert {"padding", "noise", "the token router", "beams"} <= set(folded)
    assert PAGE.count('<details class="fold"><summary>Engineering: ') >= len(folded)


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
    assert len(named) >= 15
    for name in named:
        assert f"def {name}(" in tests, name
    for name in re.findall(r"`([a-z_]\w+)", text):
        exists = name in ("python", "kernels", *named) or re.search(rf"\b{name}\b", code)
        assert exists, name
    labels = {"stated", "secondary", "inferred", "chosen", "tested"}
    assert set(re.findall(r"^- \*\*(.*?)\*\*", text, re.MULTILINE)) == labels


# ------------------------------------------------------------------------------------------ the run


def test_words_of_the_abstract_tasks_fit_the_run():
    """Each seen task is named behind the words of the abstract task that it has most."""
    assert tables.outdated_words(EXPLORED) == []


def test_words_that_do_not_fit_the_run_are_named(monkeypatch):
    words, known = tables.WORDS[0]
    monkeypatch.setattr(tables, "WORDS", ((words, known + " 999"), *tables.WORDS[1:]))
    [line] = tables.outdated_words(EXPLORED)
    assert "abstract task 1" in line and "999" not in line


def test_w_before_training_is_that_of_the_clusters_and_training_moves_it():
    """The distance of w from its start is that of the log of the run, on other samples."""
    for task in TASKS:
        assert sum(task["start_w"]) == pytest.approx(1, abs=1e-3)
        assert task["start_w"] != task["w"]
    assert 0 < EXPLORED["distance"]["seen"] < 2


def test_the_verdict_and_its_numbers_are_those_of_the_evidence():
    evidence = (annotate.DOCS / "evidence.md").read_text(encoding="utf-8")
    section = PAGE.split('<section class="step" id="evidence">')[1].split("</section>")[0]
    section = html.unescape(re.sub(r"<[^>]*>", "", section)).replace("\u00a0", " ")
    assert evidence.split("\n\n")[1].startswith("**")
    verdict = evidence.split("\n\n")[1].replace("**", "")
    assert verdict in section
    rows = re.search(r"(^\|.*\n)+", evidence, re.MULTILINE)[0].splitlines()
    assert "OrchMoE minus a LoRA of equal size" in rows[0] and len(rows) >= 5
    for row in (rows[0], *rows[2:]):
        for cell in row.strip("|").split("|"):
            assert cell.strip() in section, cell


def test_no_interval_breaks_at_the_end_of_a_line():
    assert tables.unbroken("-0.03 [-0.04, -0.01] and [a b]") == (
        "-0.03 [-0.04,\u00a0-0.01] and [a b]"
    )


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


def require_even_spacing(explored):
    """Require three samples of each task, evenly spaced over the rows of the task."""
    starts = {"seen": 0, "unseen": 0}
    for number, task in enumerate(explored["tasks"]):
        rows = [sample["row"] for sample in explored["samples"] if sample["task"] == number]
        first = starts[task["kind"]]
        starts[task["kind"]] += task["count"]
        assert rows == [first + i * task["count"] // 3 for i in range(3)], task["name"]


def test_samples_are_evenly_spaced_over_each_task():
    assert len(TASKS) == 40
    require_even_spacing(EXPLORED)


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
    require_even_spacing(found)
    assert found["tasks"][0].keys() < TASKS[0].keys()
    assert len(found["without_one"]["rise"]) == len(found["linears"])
