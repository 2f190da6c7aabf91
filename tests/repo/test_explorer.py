"""The explorer, on the annotated page and served, in a browser and without one."""

import json
import re
import socket
import threading
from contextlib import contextmanager
from http.client import HTTPConnection
from unittest import mock

import pytest
import torch

import eval as evaluation
from browsing import click, enter, set_window, text
from experiments.explorer import explorer
from helpers import (
    ROOT,
    interrupted,
    links,
    refused,
    run,
    seeded_generator,
    spied,
    stir,
    text_of,
    write_rows,
)
from support.program import UserError
from tasks import DataConfig

PROGRAM = "experiments/explorer/explorer.py"
NUMBERS = ROOT / "docs/explorer.json"


def skills(browser):
    """Return c of all Linears, N rows of 2 S numbers: with the shown w, and with the router's."""
    cells = browser.execute_script(
        "return [...document.querySelectorAll('#all-skill-rows td')].map(c => +c.textContent)"
    )
    return torch.tensor(cells)


# ------------------------------------------------------------------------------- the annotated page


def test_a_pressed_row_shows_its_answer_w_and_c(annotated):
    explored = json.loads(text_of(NUMBERS))
    sample = explored["samples"][100]
    enter(annotated, "sample", 100)
    assert text(annotated, "#input") == sample["input"].strip()
    current = "#answer-rows .current"
    assert sample["results"][0][0] in text(annotated, current)
    assert f"{sample['results'][0][1]:.2f}" in text(annotated, current)
    assert not annotated.find_elements("css selector", "#skill-rows .up, #skill-rows .down")

    click(annotated, '[data-row="3"]')
    assert "abstract task 3 alone" in text(annotated, current)
    assert sample["results"][5 + 2][0] in text(annotated, current)
    values = [value.text for value in annotated.find_elements("css selector", "#weights output")]
    assert values == ["1.00" if k == 2 else "0.00" for k in range(len(sample["w"]))]

    Zhat = torch.tensor(explored["Zhat"])
    N, K, S = Zhat.shape
    c = skills(annotated).view(N, 2, S)
    own = torch.tensor(sample["w"]) @ Zhat
    # The page rounds w and c.
    torch.testing.assert_close(c[:, 0], Zhat[:, 2], atol=0.006, rtol=0)
    torch.testing.assert_close(c[:, 1], own, atol=0.006, rtol=0)
    for coloured in ("#all-skill-rows .up", "#all-skill-rows .down"):
        assert annotated.find_elements("css selector", coloured)


def test_every_row_of_the_annotated_page_has_an_answer_and_nothing_else_is_offered(annotated):
    rows = annotated.find_elements("css selector", "#answer-rows [data-row]")
    assert len(rows) == 13
    for name in [row.get_attribute("data-row") for row in rows]:
        click(annotated, f'[data-row="{name}"]')
        pressed = f'[data-row="{name}"][aria-pressed="true"]'
        assert annotated.find_elements("css selector", pressed), name
        assert len(annotated.find_elements("css selector", "#answer-rows .current td")) == 3
    assert not annotated.find_elements("css selector", "#explorer input")
    for hidden in ("ask", "keep", "reference", "back"):
        assert not annotated.find_element("id", hidden).is_displayed(), hidden


# --------------------------------------------------------------------------------- the served page


@contextmanager
def serving(loaded):
    """Yield a server of a run."""
    with explorer.Server(loaded, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(finished):
    """Return a server of a T5 whose answers depend on w."""
    loaded = explorer.load(finished / "run")
    stir(loaded.adapters, seeded_generator())
    for skills in loaded.adapters.skills.values():
        skills.B.data *= 10
    with mock.patch.object(DataConfig, "max_new_tokens", 8), serving(loaded) as server:
        yield server


def request(server, method="POST", path="/", body=None, **headers):
    """Return the status and the body of an answer."""
    here = f"127.0.0.1:{server.server_port}"
    known = {"Host": here, "Origin": f"http://{here}"} if method == "POST" else {"Host": here}
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    content = body
    if body is not None and not isinstance(body, bytes):
        content = json.dumps(body).encode()
    connection.request(method, path, content, {**known, **headers})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


QUESTION = {"prompt": "Definition: Say yes.", "references": ["yes"], "w": None}


def reply_to(server, **question):
    """Return the reply to QUESTION with these fields changed."""
    return json.loads(request(server, body=QUESTION | question)[1])


def test_the_server_answers_with_the_given_w(server):
    own = reply_to(server)
    assert sum(own["w"]) == pytest.approx(1, abs=1e-3)
    # The answer is right if it is any of the references.
    answer = own["result"][0]
    again = reply_to(server, w=own["w"], references=["yes", answer])
    assert (again["result"][0], again["result"][2]) == (answer, True)
    off = reply_to(server, w=[0.0] * 8)
    assert off["result"][1] != pytest.approx(own["result"][1], abs=1e-3)


def test_texts_that_are_too_long_lose_their_ends(server):
    """As in training and in eval.py."""
    found = reply_to(server, prompt="a b " * 2000, references=["a b " * 2000])
    assert found["result"][1] > 0
    for name in ("prompt", "right answer"):
        assert f"The {name} is too long and loses its end." in found["warning"]


def test_the_server_refuses_other_hosts_and_paths(server):
    assert request(server, "GET")[0] == 200
    for code, changes in [
        (403, {"Host": "example.org"}),
        (403, {"Origin": "http://example.org"}),
        (404, {"path": "/etc/passwd"}),
    ]:
        for method in ("GET", "POST"):
            status, answer = request(server, method, **changes)
            assert status == code, changes
            assert json.loads(answer)["error"]  # the page shows it
    assert server.server_address[0] == "127.0.0.1"


WRONG = [
    (b"{", "request: "),
    (b"[" * 50_000, "request: "),
    (b"{}", "request: "),
    ({"prompt": " \n"}, "prompt: it is empty"),
]


@pytest.mark.parametrize("wrong, message", WRONG)
def test_a_wrong_request_gets_one_line(wrong, message, server, capsys):
    if isinstance(wrong, dict):
        wrong = QUESTION | wrong
    status, answer = request(server, body=wrong)
    error = json.loads(answer)["error"]
    assert status == 400 and re.match(message, error) and "\n" not in error
    assert capsys.readouterr().err == ""


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60, 0.05).until(lambda _: condition())


def answered(browser, name):
    """Return the cells of a row: answer, loss, difference. Before the answer there is one cell."""
    script = """const cells = document.querySelectorAll(arguments[0]);
        return [...cells].map((cell) => cell.textContent);"""
    return browser.execute_script(script, f'#answer-rows [data-name="{name}"] td')


def wait_for_answer(browser, name):
    wait(browser, lambda: len(answered(browser, name)) == 3)


@pytest.fixture
def served(server, browser):
    """Return a browser that shows the page of the server, and its first answers."""
    set_window(browser, 1280)
    browser.get(f"http://127.0.0.1:{server.server_port}")
    wait_for_answer(browser, "own")
    wait_for_answer(browser, "uniform")
    return browser


def type_prompt(browser, prompt, reference=""):
    enter(browser, "prompt", prompt)
    enter(browser, "reference", reference)
    click(browser, "#ask")


def test_a_typed_prompt_gets_an_answer_that_changes_with_w(served):
    with spied(explorer, "reply") as reply:
        type_prompt(served, "<!-- <script> Say yes.", " yes\n")
        wait(served, lambda: text(served, "#references") == "yes")
        wait_for_answer(served, "own")
    assert json.loads(reply.call_args_list[0].args[1])["references"] == [" yes\n"]
    click(served, "#keep")
    enter(served, "w1", 0.9)
    wait_for_answer(served, "now")
    kept, now = (answered(served, name)[1] for name in ("kept", "now"))
    assert float(now) != pytest.approx(float(kept), abs=1e-2)
    assert float(text(served, "#value1")) == pytest.approx(0.9, abs=0.01)


def test_an_answer_with_a_w_that_has_moved_on_is_not_shown(served):
    asked = []
    may_answer = [threading.Event(), threading.Event()]

    def reply(_, body):
        w = json.loads(body)["w"]
        asked.append(w)
        may_answer[len(asked) - 1].wait(30)
        return {"w": w, "result": [f"{w[0]:.1f}", None, None], "warning": ""}

    with mock.patch.object(explorer, "reply", reply):
        enter(served, "w0", 0.9)
        wait(served, lambda: len(asked) == 1)
        enter(served, "w0", 0.2)  # while the model answers
        may_answer[0].set()
        wait(served, lambda: len(asked) == 2)
        assert answered(served, "now") == ["asking …"]
        may_answer[1].set()
        wait_for_answer(served, "now")
    assert answered(served, "now")[0] == "0.2"
    assert text(served, "#shown").endswith(" The answer: 0.2")
    served.execute_script("document.getElementById('w0').dispatchEvent(new Event('input'))")
    assert "The answer" not in text(served, "#shown")


def test_a_pressed_row_gets_an_answer_although_the_router_gives_the_same_w(served):
    only_third = [float(k == 2) for k in range(8)]

    def reply(_, body):
        w = json.loads(body)["w"] or only_third
        return {"w": w, "result": ["yes", None, None], "warning": ""}

    with mock.patch.object(explorer, "reply", reply):
        type_prompt(served, "Say yes.")
        wait_for_answer(served, "own")
        click(served, '[data-row="3"]')
        wait_for_answer(served, "3")


def test_a_row_whose_question_failed_can_be_pressed_again(served):
    def refuse(*_):
        raise UserError("w: it is refused")

    with mock.patch.object(explorer, "reply", refuse):
        click(served, '[data-row="3"]')
        wait(served, lambda: "it is refused" in text(served, "#status"))
    assert answered(served, "3") == ["press the row to ask"]
    click(served, '[data-row="3"]')
    wait_for_answer(served, "3")


def test_a_typed_prompt_has_no_task_no_reference_and_no_verdict(served):
    assert text(served, "#verdict").startswith("With the router")
    type_prompt(served, "Say yes.")
    wait(served, lambda: text(served, "#input") == "Say yes.")
    wait_for_answer(served, "own")
    wait_for_answer(served, "uniform")
    assert text(served, "#references") == "(none given)"
    assert text(served, "#about") == "Your own prompt belongs to no task."
    assert text(served, "#verdict") == ""
    assert answered(served, "own")[1:] == ["", ""]
    assert not served.find_elements("css selector", "#answer-rows .good, #answer-rows .bad")
    assert not served.find_elements("css selector", '[data-row="other"]')


def test_an_input_that_looks_like_html_leaves_the_page_whole(server, browser, tmp_path):
    explored = explorer.collect(server.loaded)
    nasty = "<!-- <script></script><b>"
    explored["samples"][0]["input"] = nasty
    assert "<!--" not in explorer.section(explored)
    path = tmp_path / "page.html"  # without a server
    path.write_text(explorer.page(explored), encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.find_element("id", "input").text == nasty


def test_ctrl_c_ends_the_server_and_bad_flags_are_one_line(finished):
    with interrupted(explorer.Server, "serve_forever", 1, error=KeyboardInterrupt):
        run(f"{PROGRAM} --run run --port 0", cwd=finished, code=130)
    refused("--port 70000", f"{PROGRAM} --run run --port 70000", cwd=finished)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = f"--port {port}: Address already in use; give another one"
        refused(taken, f"{PROGRAM} --run run --port {port}", cwd=finished)
    refused("give --run", PROGRAM)


def test_a_task_has_the_mean_w_of_all_its_samples(server):
    loaded = server.loaded
    explored = explorer.collect(loaded)
    samples = [sample for sample in explored["samples"] if sample["task"] == 0]
    examples = [e for e in loaded.sets["seen"] if e.task == explored["tasks"][0]["name"]]
    w = evaluation.router_weights(loaded.base, loaded.adapters, examples).mean(dim=0)
    of_shown = torch.tensor([sample["w"] for sample in samples]).mean(dim=0)
    assert len(samples) == 3 < len(examples) == explored["tasks"][0]["count"]
    assert not torch.allclose(of_shown, w, atol=1e-3)
    torch.testing.assert_close(torch.tensor(explored["tasks"][0]["w"]), w, atol=1e-4, rtol=0)


# ------------------------------------------------------------------- the sample that is shown first


def test_the_page_opens_where_the_loss_rises_most_with_equal_weights(server):
    loaded = server.loaded
    explored = explorer.collect(loaded)
    rises = {}
    for number, sample in enumerate(explored["samples"]):
        if explored["tasks"][sample["task"]]["kind"] == "seen":
            example = [loaded.sets["seen"][sample["row"]]]
            losses = []
            for w in (sample["w"], [1 / 8] * 8):
                [loss] = evaluation.measure(
                    loaded.base, loaded.adapters, example, w=torch.tensor([w])
                )
                losses.append(loss.nats / loss.tokens)
            rises[number] = losses[1] - losses[0]
    explorer.choose_first(explored, loaded)
    assert explored["tried"] == len(rises)
    assert explored["first"] == max(rises, key=rises.get)


# ---------------------------------------------------------------------------------- rows of JSONL


def rows_of(count, instructions, **more):
    """Return rows of JSONL whose instructions take turns."""
    rows = []
    for number in range(count):
        instruction = instructions[number % len(instructions)]
        rows.append({"instruction": instruction, "input": f"{number}", "output": "+", **more})
    return rows


@pytest.fixture(scope="module")
def own_server(tmp_path_factory):
    """Return a server of rows that name no task, and of --test, where some rows name one."""
    home = links(tmp_path_factory.mktemp("own"))
    write_rows(home / "own.jsonl", rows_of(100, ["Say plus.", "Add <one>."]))
    unseen = rows_of(6, ["Say minus."]) + rows_of(4, ["Say minus twice."], task="task_a")
    write_rows(home / "unseen.jsonl", unseen)
    flags = "--device cpu --steps 1 --eval-every 1 --batch-size 4 --eval-instances 2"
    run(f"train.py {flags} --data own.jsonl --test unseen.jsonl --out run", cwd=home)
    with serving(explorer.load(home / "run")) as server:
        yield server


@pytest.fixture
def own_page(own_server, browser):
    set_window(browser, 1280)
    browser.get(f"http://127.0.0.1:{own_server.server_port}")
    wait_for_answer(browser, "uniform")
    return browser


def test_all_rows_can_be_chosen_and_show_their_instructions(own_server):
    explored = explorer.collect(own_server.loaded)
    seen = own_server.loaded.sets["seen"]
    assert [task["name"] for task in explored["tasks"]] == ["", "", "task_a"]
    assert [task["count"] for task in explored["tasks"]] == [len(seen), 6, 4]
    assert len(explored["samples"]) == len(seen) + 6 + 4
    assert re.fullmatch("(Say plus|Add <one>).\n\n[0-9]+", explored["samples"][0]["input"])
    assert explored["samples"][-5]["input"] == "Say minus.\n\n5"
    assert explored["samples"][-5]["other_task"] == ""
    assert explored["samples"][-5]["other_input"] == "Say minus.\n\n0"


def test_nothing_is_claimed_about_tasks_that_rows_do_not_name(own_page):
    count = len(own_page.find_elements("css selector", "#sample option")) - 1  # "your own prompt"
    for number in (0, count - 5):
        enter(own_page, "sample", number)
        about = text(own_page, "#about")
        assert about.startswith(
            ("A row that did not train in this run.", "A row of the test file.")
        )
        assert "task" not in about
        script = "return document.querySelector('[data-row=other]').textContent"
        assert re.match("another row: (Say|Add) ", own_page.execute_script(script))
    page = own_page.find_element("tag name", "main").get_attribute("textContent")
    assert "most in -" not in page and "-: " not in page
    enter(own_page, "sample", count - 1)
    assert text(own_page, "#sample option:checked").startswith("task a: Say minus twice. / ")


def ask(loaded, answer, **question):
    """Return the reply to a question, if the model answers with this text."""
    with mock.patch.object(evaluation, "predict", lambda *_inputs, **_options: [answer]):
        return explorer.reply(loaded, json.dumps(QUESTION | question).encode())


def test_right_follows_the_rules_of_the_data_and_the_page_names_them(server, own_server, own_page):
    for asked, is_right in ((server, True), (own_server, False)):
        assert ask(asked.loaded, "C", references=["C++"])["result"][2] is is_right
    assert "punctuation counts" in text(own_page, "#rules")
    own_page.get(f"http://127.0.0.1:{server.server_port}")
    assert "official rules ignore case, white space and punctuation" in text(own_page, "#rules")


def test_characters_that_the_tokenizer_loses_are_said(own_server, own_page):
    loaded = own_server.loaded
    lost = "has characters that the tokenizer does not know"
    assert ask(loaded, "yes")["warning"] == ""
    warning = ask(loaded, "yes", references=["\u2603"])["warning"]
    assert warning.startswith(f"The right answer {lost}")
    type_prompt(own_page, "Say \u2603.")
    wait(own_page, lambda: f"The prompt {lost}" in text(own_page, "#status"))
