"""The annotated page: complete, up to date, and true for the run that it shows."""

import html
import importlib
import json
import re

import pytest
import torch

import data
from docs import numbers
from helpers import refusal, text_of
from support.program import UserError
from tasks import DataConfig

for package in ("markdown_it", "latex2mathml", "pygments"):
    pytest.importorskip(package)
annotate = importlib.import_module("docs.annotate")
tables = importlib.import_module("docs.tables")

SOURCE = text_of(annotate.SOURCE)
PAGE = text_of(annotate.PAGE)
EXPLORED = json.loads(text_of(annotate.NUMBERS))
TASKS = EXPLORED["tasks"]
TEXT = text_of(annotate.TEXT)
SECTIONS = annotate.read_sections()
BLOCKS = {block.piece: block for section in SECTIONS for block in section.blocks}
PIECES = {piece.name: piece for piece in annotate.find_pieces(SOURCE)}


# --------------------------------------------------------------------------------------- the page


def test_page_is_up_to_date():
    assert annotate.page() == PAGE


def test_page_is_small_and_makes_no_request():
    assert not re.findall(r" src=|<link|@import|url\((?!#)", PAGE)
    assert len(PAGE.encode()) < 1_200_000


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
    links = set(re.findall(r'href="([^"]+)"', PAGE)) - {"https://arxiv.org/abs/2401.10559"}
    for link in links:
        page, _, anchor = link.partition("#")
        assert (annotate.DOCS / page).is_file() if page else anchor in anchors
    assert not re.findall(r"<m\w+>\\\w+", PAGE)  # commands that latex2mathml does not know
    assert "](" not in re.sub("<script.*?</script>", "", PAGE, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------- the notes


def test_a_note_about_a_line_that_is_gone_is_refused():
    changed = SOURCE.replace("P = scores.softmax(dim=-1)", "P = scores.softmax(-1)").splitlines()
    name = "TaskRouter.summarise"
    with refusal("0 lines of TaskRouter.summarise begin 'P = scores.soft", UserError):
        annotate.note_lines(PIECES[name], BLOCKS[name].notes, changed)


# ------------------------------------------------------------------------------------------ the run


def test_words_of_the_abstract_tasks_fit_the_run():
    """WORDS names each seen task under its largest abstract task."""
    assert tables.outdated_words(EXPLORED) == []


def test_what_the_texts_claim_about_the_run_holds():
    """Change the texts if a new run says something else."""
    text = " ".join(TEXT.split())
    sharp = [task for task in TASKS if sum(sorted(task["w"])[-2:]) > 0.7]
    assert len(sharp) > len(TASKS) / 2
    assert "Most tasks have one or two large weights." in text

    start, *_, end = EXPLORED["training"]["trained"]
    start_w, end_w = (torch.tensor(stop["w"]) for stop in (start, end))  # (T,K), in per cent
    seen = [task["name"] for task in TASKS if task["kind"] == "seen"]
    lists = [i for i, name in enumerate(seen) if 101 <= int(name[4:7]) <= 110]
    assert len(lists) == 10 and start_w[lists, 2].min() > 75
    assert start_w[:, 0].max() < 10 and end_w[lists, 0].float().mean() > 25
    assert (start_w.argmax(dim=1) == end_w.argmax(dim=1)).float().mean() > 0.7
    changes = torch.tensor(end["Zhat"]) - torch.tensor(start["Zhat"])
    assert changes.abs().max() < 0.1
    assert "moves a part of their weight to abstract task 1, which was nearly empty." in text
    assert "no entry in this Linear changes by more than 0.1." in text

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
    assert "Replacing w raises the loss more on seen tasks than on unseen ones." in text
    assert "model keeps most of its gain over the frozen base" in text


def test_the_first_sample_is_one_where_routing_matters():
    own, mean, uniform = EXPLORED["samples"][EXPLORED["first"]]["results"][:3]
    assert [own[2], mean[2], uniform[2]] == [True, False, False]
    assert uniform[1] > own[1] + 0.5


def test_numbers_are_made_from_a_run(finished, monkeypatch):
    """Each step of the walk is compared with the model while it is made."""
    monkeypatch.setattr(DataConfig, "max_new_tokens", 2)
    monkeypatch.setattr(numbers, "COMPARED", ("own",))
    monkeypatch.setattr(numbers, "STOPS", 2)
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
    for stops in found["training"].values():
        assert [stop["step"] for stop in stops] == [0, 4, 8]
        assert stops[0]["w"] == found["training"]["trained"][0]["w"]
    trained, frozen = (found["training"][twin][-1] for twin in numbers.TWINS)
    assert trained["distance"] == found["distance"]["seen"] > frozen["distance"] == 0
    assert found["walk"].keys() == EXPLORED["walk"].keys()
    assert found["tasks"][0].keys() < TASKS[0].keys()
    assert len(found["without_one"]["rise"]) == len(found["linears"])
