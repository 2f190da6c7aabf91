"""The explorer, on the annotated page and served, in a browser and without one."""

import json
import re
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, RemoteDisconnected
from unittest import mock
from urllib.request import urlopen

import pytest
import torch

import checkpoint
from docs import annotate
from experiments import explorer
from helpers import (
    LLAMA_SIZES,
    SHORT,
    interrupted,
    links,
    run,
    seeded_generator,
    sentences,
    stir,
    write_pieces,
)
from llama import Llama, LlamaConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a browser that selenium drives."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver (Debian: chromium-driver) are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def annotated(browser):
    browser.get(annotate.PAGE.as_uri())
    yield browser
    assert not browser.get_log("browser")


def click(browser, selector):
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def text(browser, selector):
    return browser.find_element("css selector", selector).text


def slide(browser, k, value):
    """Move a slider, as a hand does."""
    script = """const slider = document.getElementById("w" + arguments[0]);
        slider.value = arguments[1];
        slider.dispatchEvent(new Event("input"));
        slider.dispatchEvent(new Event("change"));"""
    browser.execute_script(script, k, value)


def skills(browser):
    """Return c (N,2,S): with the sliders, and with the router's w."""
    cells = browser.execute_script(
        "return [...document.querySelectorAll('#skill-rows .cell')].map(c => +c.textContent)"
    )
    return torch.tensor(cells)


# ------------------------------------------------------------------------------- the annotated page


def test_contents_stay_in_view_and_lead_to_anchors(annotated):
    click(annotated, '#contents a[href="#mix"]')
    place = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
    assert abs(annotated.execute_script(place, "#mix")) < 60
    assert annotated.execute_script(place, "#contents") == 0
    assert annotated.execute_script("return location.hash") == "#mix"


def test_stored_answers_appear_at_stored_weights(annotated):
    explored = json.loads(annotate.NUMBERS.read_text(encoding="utf-8"))
    chosen = 100
    sample = explored["samples"][chosen]
    script = """const list = document.getElementById("sample");
        list.value = arguments[0];
        list.dispatchEvent(new Event("change"));"""
    annotated.execute_script(script, chosen)
    current = "#answer-rows .current"
    assert sample["results"][0][0] in text(annotated, current)
    assert f"{sample['results'][0][1]:.3f}" in text(annotated, current)

    K, S = len(sample["w"]), len(explored["Zhat"][0][0])
    slide(annotated, 2, 0.4)
    assert "not stored" in text(annotated, current)
    w = torch.tensor(sample["w"])
    w = w * 0.6 / (1 - w[2])
    w[2] = 0.4
    c = skills(annotated).view(-1, 2, S)
    torch.testing.assert_close(c[:, 0], w @ torch.tensor(explored["Zhat"]), atol=0.006, rtol=0)
    slide(annotated, 2, 1)
    assert "only w\u2083" in text(annotated, current)
    assert sample["results"][5 + 2][0] in text(annotated, current)
    assert len(annotated.find_elements("css selector", "#weights input")) == K


def test_a_press_in_the_heat_map_lists_samples_and_one_can_be_tried(annotated):
    annotated.execute_script("document.querySelector('[data-task=\"3\"]').click()")
    assert len(annotated.find_elements("css selector", "tr.sample")) >= 12
    click(annotated, "tr.sample [data-sample]")
    prompt = annotated.find_element("id", "sample").get_attribute("value")
    assert prompt == "9"  # three samples of each task


def test_the_page_is_dark_at_night_and_fits_a_phone(annotated):
    def look(scheme, width):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        annotated.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        annotated.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        return annotated.execute_script(
            "return [getComputedStyle(document.body).backgroundColor,"
            "document.documentElement.scrollWidth]"
        )

    assert look("light", 1280)[0] == "rgb(255, 255, 255)"
    colour, width = look("dark", 390)
    assert colour == "rgb(20, 24, 30)"
    assert width <= 390


# --------------------------------------------------------------------------------- the served page


@pytest.fixture(scope="module", params=["t5", "decoder"])
def server(request, finished, tmp_path_factory):
    """Return a server of a run whose answers depend on w."""
    folder = finished / "run"
    if request.param == "decoder":
        home = links(tmp_path_factory.mktemp("decoder"))
        torch.manual_seed(0)
        base = Llama(LlamaConfig.from_hf(DECODER)).float()
        write_pieces(home / "llama", sentences(500))
        checkpoint.save(base, home / "llama")
        run("train.py", *SHORT, "--model", "llama", "--out", "run", cwd=home)
        folder = home / "run"
    loaded = explorer.load(folder)
    stir(loaded.adapters, seeded_generator())
    for linear in loaded.adapters.linears.values():
        linear.skill_B.data *= 10
    with explorer.Server(loaded, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


DECODER = LLAMA_SIZES | {
    "model_type": "llama",
    "vocab_size": 400,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}


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


QUESTION = {"prompt": "Definition: Say yes.", "reference": "yes", "w": None}


def test_the_server_answers_with_the_given_w(server):
    own = json.loads(request(server, body=QUESTION)[1])
    assert sum(own["w"]) == pytest.approx(1, abs=1e-3)
    again = json.loads(request(server, body=QUESTION | {"w": own["w"]})[1])
    assert again["result"][0] == own["result"][0]
    off = json.loads(request(server, body=QUESTION | {"w": [0.0] * 8})[1])
    assert off["result"][1] != pytest.approx(own["result"][1], abs=1e-3)


def test_the_server_refuses_others(server):
    assert request(server, "GET")[0] == 200
    for code, changes in [
        (403, {"Host": "example.org"}),
        (403, {"Origin": "http://example.org"}),
        (404, {"path": "/etc/passwd"}),
        (413, {"Content-Length": str(10**9)}),
        (413, {"Content-Length": "-1"}),
        (413, {"Content-Length": "1" * 5000}),  # Python refuses to convert it
    ]:
        for method in ("GET", "POST"):
            status, answer = request(server, method, **changes)
            assert status == code, changes
            assert json.loads(answer)["error"]  # the page shows it
    assert server.server_address[0] == "127.0.0.1"


WRONG = [
    (b"{", "request: "),
    (b"[" * 50_000, "request: "),
    ([1], "request: "),
    ({"prompt": 3}, "request: "),
    ({"prompt": " \n"}, "prompt: it is empty"),
    ({"prompt": "a b " * 2000}, "prompt: .* tokens; give 1 to 64"),
    ({"reference": "a b " * 2000}, "reference: .* tokens; give 1 to 128"),
    ({"w": 1.0}, "w: .*give 8 finite numbers"),
    ({"w": "1"}, "w: .*give 8 finite numbers"),
    ({"w": [1.0]}, "w: .*give 8 finite numbers"),
    ({"w": [float("nan")] * 8}, "w: .*give 8 finite numbers"),
    ({"w": [10**400] + [0] * 7}, "w: .*give 8 finite numbers"),
    ({"w": [[[1.0]]] * 8}, "w: .*give 8 finite numbers"),
]


@pytest.mark.parametrize("wrong, message", WRONG)
def test_a_wrong_request_gets_one_line(wrong, message, server, capsys):
    if isinstance(wrong, dict):
        wrong = QUESTION | wrong
    status, answer = request(server, body=wrong)
    error = json.loads(answer)["error"]
    assert status == 400 and re.match(message, error) and "\n" not in error
    assert capsys.readouterr().err == ""


def test_silent_clients_do_not_hold_the_others(server):
    idle = [socket.create_connection(server.server_address) for _ in range(3)]
    with urlopen(f"http://127.0.0.1:{server.server_port}", timeout=5) as answer:
        assert answer.status == 200
    for connection in idle:
        connection.close()


def test_questions_that_come_together_are_answered_one_at_a_time(server):
    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(lambda _: request(server, body=QUESTION), range(8)))
    assert len(answers) == 1
    [(status, _)] = answers
    assert status == 200


@pytest.mark.parametrize(
    "error, traceback", [(BrokenPipeError, False), (TimeoutError, False), (KeyError, True)]
)
def test_a_client_that_leaves_is_no_bug(error, traceback, server, monkeypatch, capsys):
    monkeypatch.setattr(explorer.Handler, "send", mock.Mock(side_effect=error))
    with pytest.raises(RemoteDisconnected):  # the thread of the connection has ended
        request(server, body=QUESTION)
    assert ("Traceback" in capsys.readouterr().err) == traceback


def test_browsers_leave_out_port_80(server, monkeypatch):
    monkeypatch.setattr(server, "hosts", explorer.hosts_at(80))
    for host in ("127.0.0.1", "localhost", "127.0.0.1:80"):
        assert request(server, "GET", Host=host)[0] == 200
    assert "127.0.0.1" not in explorer.hosts_at(8000)


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda _: condition())


def test_a_typed_prompt_gets_an_answer_that_changes_with_w(server, browser):
    browser.get(f"http://127.0.0.1:{server.server_port}")
    browser.find_element("id", "prompt").clear()
    browser.find_element("id", "prompt").send_keys("<!-- <script> Say yes.")
    click(browser, "#ask")
    row = '#answer-rows [data-name="{}"] td:nth-child(3)'
    wait(browser, lambda: browser.find_elements("css selector", row.format("off")))
    click(browser, "#keep")
    slide(browser, 1, 0.9)
    wait(browser, lambda: browser.find_elements("css selector", row.format("now")))
    kept, now = (text(browser, row.format(name)) for name in ("kept", "now"))
    assert float(now) != pytest.approx(float(kept), abs=1e-3)


def test_an_answer_that_looks_like_html_leaves_the_page_whole(server, browser, tmp_path):
    explored = explorer.collect(server.loaded)
    nasty = "<!-- <script></script><b>"
    explored["samples"][0]["tail"] = nasty
    section = explorer.section(explored)
    assert "<!--" not in section
    path = tmp_path / "page.html"
    path.write_text(explorer.page(explored), encoding="utf-8")
    browser.get(path.as_uri())
    assert nasty in browser.find_element("id", "prompt").get_attribute("value")


def test_ctrl_c_ends_the_server_and_bad_flags_are_one_line(finished):
    with interrupted(explorer.Server, "serve_forever", 1, error=KeyboardInterrupt):
        run("experiments/explorer.py", "--run", "run", "--port", 0, cwd=finished, code=130)
    error = run("experiments/explorer.py", "--run", "run", "--port", 70000, cwd=finished, code=2)
    assert "--port 70000" in error
    assert "give --run" in run("experiments/explorer.py", cwd=finished, code=2)
