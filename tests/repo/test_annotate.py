"""The annotated page: complete, up to date, and true for the run that it shows."""

import html
import json
import re

import pytest
import torch

import data
from docs import annotate, notes, numbers
from experiments import explorer

SOURCE = annotate.SOURCE.read_text(encoding="utf-8")
PAGE = annotate.PAGE.read_text(encoding="utf-8")
EXPLORED = json.loads(annotate.NUMBERS.read_text(encoding="utf-8"))
TASKS = EXPLORED["tasks"]
SECTIONS = {section.anchor: section for section in notes.sections()}
BLOCKS = {block.name: block for section in SECTIONS.values() for block in section.blocks}
PIECES = {piece.name: piece for piece in annotate.find_pieces(SOURCE)}
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


def test_every_line_is_on_the_page_once():
    shown = re.findall(r'<span data-n="(\d+)">', PAGE)
    assert sorted(map(int, shown)) == list(range(1, len(SOURCE.splitlines()) + 1))
    lines = [html.unescape(re.sub(r"<[^>]*>", "", line)) for line in annotate.highlight(SOURCE)]
    assert lines == SOURCE.splitlines()


def test_anchors_are_unique_and_every_link_has_one():
    anchors = re.findall(r' id="([^"]+)"', PAGE)
    assert len(anchors) == len(set(anchors))
    links = set(re.findall(r'href="([^"]+)"', PAGE))
    pages = {"paper.md", "evidence.md"}
    assert links - pages <= {f"#{anchor}" for anchor in anchors}
    assert all((annotate.DOCS / page).is_file() for page in pages)
    assert "](" not in re.sub("<script.*?</script>", "", PAGE, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------- the notes


@pytest.mark.parametrize("name", CORE)
def test_a_note_of_the_core_is_about_few_lines(name):
    for lines in annotate.note_lines(PIECES[name], BLOCKS[name], SOURCE.splitlines()):
        code = [n for n in lines if n not in PIECES[name].docstring]
        code = [n for n in code if annotate.is_code(SOURCE.splitlines()[n - 1])]
        assert len(code) <= 8, BLOCKS[name].notes


def test_a_note_about_a_line_that_is_gone_is_refused():
    changed = SOURCE.replace("P = scores.softmax(dim=-1)", "P = scores.softmax(-1)").splitlines()
    name = "TaskRouter.summarise"
    with pytest.raises(ValueError, match="0 lines are 'P = scores.softmax"):
        annotate.note_lines(PIECES[name], BLOCKS[name], changed)


def test_notes_name_what_exists():
    root = annotate.DOCS.parent
    code = "".join(path.read_text() for path in [annotate.SOURCE, root / "kernels.py"])
    tests = "".join(path.read_text() for path in root.glob("tests/*/test_*.py"))
    text = notes.TEXT.read_text(encoding="utf-8")
    for name in re.findall(r"`([a-z_]\w+)", text):
        assert name in ("python", "orchmoe", "kernels") or re.search(rf"\b{name}\b", code), name
    named = [block.test for block in BLOCKS.values() if block.test]
    assert len(named) >= 15
    for name in named:
        assert f"def {name}(" in tests, name
    assert {grade for block in BLOCKS.values() for grade, _ in block.evidence} == {*notes.GRADES}


def test_mathml_of_hats_indices_and_fractions():
    found = annotate.mathml("frac(Z^hat_nk ; sqrt(D)) X^T")
    hat = '<mover accent="true"><mi>Z</mi><mo stretchy="false" class="hat">^</mo></mover>'
    root = "<msqrt><mrow><mi>D</mi></mrow></msqrt>"
    fraction = f"<mfrac><mrow><msub>{hat}<mi>nk</mi></msub></mrow><mrow>{root}</mrow></mfrac>"
    transposed = '<msup><mi>X</mi><mi mathvariant="normal">T</mi></msup>'
    inside = f"{fraction}{annotate.THIN}{transposed}"
    assert found == f'<math display="inline"><mrow>{inside}</mrow></math>'


# ------------------------------------------------------------------------------------------ the run


def test_words_of_the_abstract_tasks_fit_the_run():
    """Each seen task is named behind the words of the abstract task that it has most."""
    named = []
    for k, item in enumerate(SECTIONS["abstract-tasks"].items):
        for number in item.split(" | ")[1].split():
            task = next(task for task in TASKS if task["name"].startswith(f"task{number}_"))
            assert max(task["w"]) == task["w"][k], task["name"]
            named.append(task["name"])
    assert sorted(named) == sorted(task["name"] for task in TASKS if task["kind"] == "seen")


def test_the_task_that_is_split_most_is_named():
    seen = [task for task in TASKS if task["kind"] == "seen"]
    split = min(seen, key=lambda task: max(task["w"]))
    w = torch.tensor(split["w"])
    text = " ".join(SECTIONS["abstract-tasks"].text.split())
    largest = (w.argsort(descending=True)[:3] + 1).tolist()
    assert largest == [7, 3, 5]
    assert split["name"] == "task116_job_in_the_sentence"
    assert "task116 (job in the sentence) is split most, over the abstract tasks 7, 3 and 5" in text


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


def test_right_answers_stand_beside_those_of_the_whole_set():
    for kind in ("seen", "unseen"):
        whole = [task for task in TASKS if task["kind"] == kind]
        right = sum(task["own"]["right"] for task in whole)
        count = sum(task["count"] for task in whole)
        assert f"of all {count}: {100 * right / count:.0f} %" in PAGE


def test_numbers_are_made_from_a_run(finished, monkeypatch):
    """Each step of the walk is compared with the model while it is made."""
    monkeypatch.setattr(explorer, "LONGEST_ANSWER", 2)
    monkeypatch.setattr(numbers, "COMPARED", ("own",))
    load_sets = data.load_sets

    def few(*arguments, **options):
        sets = load_sets(*arguments, **options)
        return {name: sets[name][:25] for name in ("seen", "test")}

    monkeypatch.setattr(data, "load_sets", few)
    found = numbers.collect(finished / "run")
    assert found.keys() == EXPLORED.keys()
    assert found["walk"].keys() == EXPLORED["walk"].keys()
    require_even_spacing(found)
    assert found["tasks"][0].keys() < TASKS[0].keys()
    assert len(found["without_one"]["rise"]) == len(found["linears"])
