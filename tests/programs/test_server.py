"""integrations/server.py: OpenAI's client, batches, error objects, a stand-in for llama-server."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import pytest
import torch

import eval as evaluation
import run_folder
import train
from helpers import (
    CPU,
    PYTHONPATH,
    ROOT,
    refused,
    run,
    seeded_generator,
    stir,
    write_rows,
)
from integrations import serve, server
from support import program
from support.program import read_json, write_json
from tasks import DataConfig

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

QUESTIONS = [f"Say {i} in words." for i in range(30)]


def make_home(folder, base, method):
    """Write `base`, `run`, whose answers depend on w, and `served`. Return the folder."""
    (folder / "base").symlink_to(base)
    rows = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(60)]
    data = write_rows(folder / "rows.jsonl", rows)
    options = {"steps": 1, "eval_instances": 2, "method": method}
    settings = train.Settings(data=str(data), model=str(base), **options)
    train.train(settings, CPU, train.LaunchConfig(out=str(folder / "run")))
    _, adapters, _ = run_folder.load(CPU, run_dir=folder / "run")
    stir(adapters, seeded_generator())
    run_folder.read_run(folder / "run").save_best(adapters)
    run("integrations/export.py --run run --out served", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("t5"), ROOT / "tiny", "orchmoe")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, decoder_dir):
    return make_home(tmp_path_factory.mktemp("decoder"), decoder_dir, "orchmoe")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("lora"), ROOT / "tiny", "lora")


@pytest.fixture(params=["t5", "decoder", "lora"])
def home(request):
    return request.getfixturevalue(request.param)


class Served:
    """A server in a thread of this process, and a client for it."""

    def __init__(self, folder, url=None):
        self.router = serve.Router(folder / "served", folder / "base")
        texts = serve.load_tokenizer(self.router, folder / "base")
        if url:
            self.model = server.LlamaServer(self.router, url)
        else:
            own = serve.MixtureModel(self.router, texts, folder / "base")
            self.model = server.Batches(own)
        api = server.Api("served", texts, self.model, self.router.max_new_tokens)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        config = uvicorn.Config(server.application(api), log_level="critical")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.listener],))
        self.client = openai.OpenAI(
            base_url=self.address, api_key="none", max_retries=0, timeout=60
        )

    def complete(self, prompt, **options):
        options = {"model": "served", "max_tokens": 9} | options
        reply = self.client.completions.create(prompt=prompt, **options)
        return reply.choices[0]

    def chat(self, *messages, **options):
        """Answer messages, each a (role, text). Return the reply."""
        listed = [{"role": role, "content": text} for role, text in messages]
        options = {"model": "served", "max_tokens": 9} | options
        return self.client.chat.completions.create(messages=listed, **options)

    def post(self, content, path="completions"):
        """Return the status and the error object of a request that is refused."""
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"{self.address}/{path}", content.encode(), timeout=60)
        return refusal.value.code, json.loads(refusal.value.read())["error"]


@contextmanager
def serving(folder, url=None):
    served = Served(folder, url)
    served.thread.start()
    try:
        yield served
    finally:
        served.uvicorn.should_exit = True
        served.thread.join(60)


@contextmanager
def held_back(batches, prompts):
    """Hold the first batch back until `begin` is called, or the block ends.

    Yield the sizes of the batches, and `begin`, which waits until so many prompts have arrived.
    """
    sizes = []
    may_begin = threading.Event()
    answer = batches.model.answer

    def answer_later(*batch):
        sizes.append(len(batch[0]))
        may_begin.wait()
        return answer(*batch)

    def begin():
        patience = time.monotonic() + 60
        while sum(sizes) + len(batches.waiting) < prompts:
            assert time.monotonic() < patience
            time.sleep(0.01)
        may_begin.set()

    with mock.patch.object(batches.model, "answer", answer_later):
        try:
            yield sizes, begin
        finally:
            may_begin.set()


def answers_of_eval(folder, flag, texts):
    """Return what `eval.py --ask` or `--prompt` answers, one text after the other."""
    model = run_folder.load(CPU, run_dir=folder / "run")
    saved = run_folder.read_run(folder / "run")
    answers = []
    for text in texts:
        config = evaluation.EvalConfig(run="run", max_new_tokens=9, **{flag: text})
        with mock.patch.object(program, "print_line") as said:
            evaluation.answer(model, config, saved.settings.part(DataConfig), saved)
        answers.append(said.call_args_list[0].args[0].removeprefix("answer: "))
    return ["" if answer == "(empty)" else answer for answer in answers]


def test_thirty_requests_at_once_get_the_answers_of_eval(home):
    expected = answers_of_eval(home, "ask", QUESTIONS)
    assert len(set(expected)) > 10
    with serving(home) as served, ThreadPoolExecutor(30) as pool:
        with held_back(served.model, 30) as (sizes, begin):
            replies = [pool.submit(served.chat, ("user", text)) for text in QUESTIONS]
            begin()
            replies = [reply.result() for reply in replies]
    assert sum(sizes) == 30 and len(sizes) == 2
    assert [reply.choices[0].message.content for reply in replies] == expected


def test_serve_answers_by_a_plain_lora_too(lora):
    pytest.importorskip("peft")
    expected = answers_of_eval(lora, "ask", QUESTIONS[:3])
    said = run(
        "integrations/serve.py --served served --base base --max-tokens 9 --ask",
        *QUESTIONS[:3],
        cwd=lora,
    )
    lines = [f"{text} -> {answer}\n" for text, answer in zip(QUESTIONS, expected, strict=False)]
    assert said == "".join(lines)


def test_an_answer_shows_w_unless_there_is_a_single_lora(home):
    with serving(home) as served:
        choice = served.complete("Say 1 in words.\n\n")
        ids = served.model.model.texts.encode("Say 1 in words.\n\n")
        if served.router.router is None:
            assert not hasattr(choice, "w")
        else:
            assert choice.w == pytest.approx(served.router(torch.tensor(ids)).tolist(), abs=1e-4)


def test_completions_of_whole_prompts_end_where_they_should(decoder):
    prompts = ["Say 1", "What is", "One two three"]
    expected = answers_of_eval(decoder, "prompt", prompts)
    with serving(decoder) as served:
        choices = [served.complete(prompt) for prompt in prompts]
        assert [choice.text for choice in choices] == expected
        whole = served.chat(("user", QUESTIONS[0]), max_tokens=None)
        part = served.chat(("user", QUESTIONS[0]), max_tokens=None, max_completion_tokens=2)
        assert served.client.models.list().data[0].id == "served"
    assert part.choices[0].finish_reason == "length"
    assert part.usage.completion_tokens == 2
    text = whole.choices[0].message.content
    assert text.startswith(part.choices[0].message.content)
    ids = served.model.model.texts.encode(f"{QUESTIONS[0]}\n\n")
    assert whole.usage.prompt_tokens == len(ids)
    assert whole.usage.total_tokens == len(ids) + whole.usage.completion_tokens


def test_prompts_of_one_batch_have_their_own_longest_answers(decoder):
    lengths = (9, 1, 7, 3)
    with serving(decoder) as served, ThreadPoolExecutor(4) as pool:
        alone = [served.complete("Say 1", max_tokens=most) for most in lengths]
        with held_back(served.model, 4) as (sizes, begin):
            choices = [pool.submit(served.complete, "Say 1", max_tokens=most) for most in lengths]
            begin()
            choices = [choice.result() for choice in choices]
    assert max(sizes) > 1
    assert [choice.text for choice in choices] == [choice.text for choice in alone]
    assert len({choice.text for choice in alone}) == 4


def body(**fields):
    return json.dumps({"model": "served", "prompt": "Say 1."} | fields)


def messages(*contents, role="user"):
    return [{"role": role, "content": content} for content in contents]


MISTAKES = {  # by what is wrong: path, content, status, code, beginning of the message
    "no JSON": ("completions", "{", 400, None, "body: JSONDecodeError"),
    "deep JSON": ("completions", "[" * 100_000, 400, None, "body: RecursionError"),
    "no object": ("completions", "[]", 400, None, "body: it is no JSON object"),
    "no model": ("completions", body(model=None), 404, "model_not_found", "model: give 'served'"),
    "other model": ("completions", body(model="gpt-6"), 404, "model_not_found", "model: give 's"),
    "stream": ("completions", body(stream=True), 400, "unsupported_parameter", "stream: True is"),
    "heat": ("completions", body(temperature=0.7), 400, "unsupported_parameter", "temperature: "),
    "two": ("completions", body(n=2), 400, "unsupported_parameter", "n: 2 is not supported"),
    "new": ("completions", body(novelty={"a": 1}), 400, "unsupported_parameter", "novelty: {'a'"),
    "no prompt": ("completions", body(prompt=None), 400, None, "prompt: the text must be a string"),
    "list": ("completions", body(prompt=["a"]), 400, None, "prompt: the text must be a string"),
    "blank": ("completions", body(prompt=" "), 400, None, "prompt: the text: it is empty"),
    "no text": ("completions", body(prompt="\u200b"), 400, None, "prompt: the prompt: the token"),
    "surrogate": ("completions", body(prompt="\ud800"), 400, None, "prompt: the text is not valid"),
    "long": (
        "completions",
        body(prompt="word " * 2000),
        400,
        "context_length_exceeded",
        "prompt: 2001 tokens; with max_tokens 127 at most 1024",
    ),
    "long answer": (
        "completions",
        body(max_tokens=10**9),
        400,
        "context_length_exceeded",
        "prompt: 7 tokens; with max_tokens 1000000000 at most 0",
    ),
    "no number": ("completions", body(max_tokens="9"), 400, None, "max_tokens: '9' is no whole"),
    "zero": ("completions", body(max_completion_tokens=0), 400, None, "max_tokens: 0 is no whole"),
    "no messages": ("chat/completions", body(), 400, None, "messages: KeyError"),
    "empty": (
        "chat/completions",
        body(messages=[]),
        400,
        None,
        "messages: there is no chat template",
    ),
    "turns": (
        "chat/completions",
        body(messages=messages("a", "b")),
        400,
        None,
        "messages: there is no chat template; give one message",
    ),
    "system": (
        "chat/completions",
        body(messages=messages("a", role="system")),
        400,
        None,
        "messages: there is no chat template; give one message",
    ),
    "parts": (
        "chat/completions",
        body(messages=messages([{"type": "text", "text": "a"}])),
        400,
        None,
        "messages: the content of a message must be a string",
    ),
    "path": ("embeddings", body(), 404, None, "POST /v1/embeddings: Not Found"),
    "method": ("models", body(), 405, None, "POST /v1/models: Method Not Allowed"),
}


@pytest.fixture(scope="module")
def served(t5):
    with serving(t5) as served:
        yield served


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_not_supported_gets_an_error_object(name, served):
    path, content, status, code, beginning = MISTAKES[name]
    found, error = served.post(content, path)
    assert error["message"].startswith(beginning), error["message"]
    assert (found, error["code"]) == (status, code)
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_what_has_no_effect_or_its_default_is_accepted(served):
    options = {"temperature": 0, "stream": False, "n": 1, "stop": None, "seed": 3, "top_p": 0.9}
    assert served.complete("Say 1", **options).text == served.complete("Say 1").text
    with pytest.raises(openai.BadRequestError, match="temperature: 1 is not supported"):
        served.complete("Say 1", temperature=1)


def test_a_batch_that_fails_is_no_end(served):
    with mock.patch.object(served.model.model, "answer", side_effect=MemoryError):
        with pytest.raises(openai.InternalServerError):
            served.complete("Say 1")
    assert served.complete("Say 1").finish_reason


def test_a_run_on_the_prompts_of_sni_answers_no_chat(t5, tmp_path):
    for name in ("base", "served"):
        (tmp_path / name).symlink_to(t5 / name)
    texts = serve.load_tokenizer(serve.Router(t5 / "served", t5 / "base"), t5 / "base")
    texts.instructions = None
    with pytest.raises(ValueError, match="no instructions; give a whole prompt, and no chat"):
        texts.prompt_of_chat([("user", "Say it.")])
    texts.instructions = False
    assert texts.prompt_of_chat([("user", "Say it.")]) == "Say it."


# ----------------------------------------------------------------------------- a trainer's adapter

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<say>{% endif %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_adapters_of_a_trainer_use_the_chat_template(template, decoder, decoder_dir, tmp_path):
    """Their router.json has no rule for prompts."""
    pytest.importorskip("transformers")
    (tmp_path / "base").mkdir()
    for path in decoder_dir.iterdir():
        (tmp_path / "base" / path.name).symlink_to(path)
    settings = read_json(tmp_path / "base/tokenizer_config.json")
    (tmp_path / "base/tokenizer_config.json").unlink()
    if template:
        settings["chat_template"] = template
    write_json(tmp_path / "base/tokenizer_config.json", settings)
    (tmp_path / "served").mkdir()
    for path in (decoder / "served").iterdir():
        (tmp_path / "served" / path.name).symlink_to(path)
    facts = read_json(tmp_path / "served/router.json")
    (tmp_path / "served/router.json").unlink()
    write_json(tmp_path / "served/router.json", facts | {"prompt": None})

    with serving(tmp_path) as served:
        chat = served.chat(("user", "Say 1."))
        prompt = "<user>Say 1.<say>" if template else "Say 1."
        assert chat.choices[0].message.content == served.complete(prompt).text
        turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
        if template:
            text = served.chat(*turns).choices[0].message.content
            assert text == served.complete("<user>a<assistant>b<user>c<say>").text
            with pytest.raises(openai.BadRequestError, match="messages: .*no tools"):
                served.chat(("tool", "a"))
        else:
            with pytest.raises(openai.BadRequestError, match="there is no chat template"):
                served.chat(*turns)
        with pytest.raises(openai.BadRequestError, match="with max_tokens 9 at most 2040"):
            served.complete("a b " * 2000)


# -------------------------------------------------------------------------------------- llama.cpp


class LlamaCpp(BaseHTTPRequestHandler):
    """A stand-in for llama-server. It answers with the number of the LoRA of the largest weight."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, request))
        if self.server.all_are_here is not None:
            self.server.all_are_here.wait(60)
        scales = [lora["scale"] for lora in request["lora"]]
        values = {"content": f"{scales.index(max(scales))}", "stop_type": "eos"}
        values |= {"tokens_predicted": 1, "tokens_evaluated": len(request["prompt"])}
        if request["n_predict"] == 2:
            values["stop_type"] = "limit"
        status = 200
        if request["n_predict"] == 3:
            status, values = 400, {"error": {"message": "too many LoRAs"}}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(values).encode())

    def log_message(self, *_arguments):
        """Print nothing."""


@pytest.fixture
def llama_cpp():
    with ThreadingHTTPServer(("127.0.0.1", 0), LlamaCpp) as stand_in:
        stand_in.requests = []
        stand_in.all_are_here = None
        stand_in.url = f"http://127.0.0.1:{stand_in.server_port}/"
        thread = threading.Thread(target=stand_in.serve_forever)
        thread.start()
        yield stand_in
        stand_in.shutdown()
        thread.join(60)


def test_requests_are_passed_on_to_llama_cpp_with_their_own_weights(home, llama_cpp):
    llama_cpp.all_are_here = threading.Barrier(30)  # none is held back
    with serving(home, llama_cpp.url) as served, ThreadPoolExecutor(30) as pool:
        replies = list(pool.map(lambda text: served.chat(("user", text)), QUESTIONS))
        texts = serve.load_tokenizer(served.router, home / "base")
    sent = {tuple(request["prompt"]): request for _, request in llama_cpp.requests}
    assert {path for path, _ in llama_cpp.requests} == {"/completion"}
    assert len(sent) == len(llama_cpp.requests) == 30
    for question, reply in zip(QUESTIONS, replies, strict=True):
        ids = texts.encode(f"{question}\n\n")
        request = sent[tuple(ids)]
        w = served.router(torch.tensor(ids)).tolist()
        assert request["lora"] == [{"id": k, "scale": scale} for k, scale in enumerate(w)]
        assert (request["n_predict"], request["temperature"]) == (9, 0)
        assert not request["cache_prompt"]
        choice = reply.choices[0]
        assert choice.message.content == f"{w.index(max(w))}"
        assert choice.finish_reason == "stop"
        assert reply.usage.completion_tokens == 1
        assert getattr(choice, "w", [1.0]) == pytest.approx(w, abs=1e-4)
    assert len({reply.choices[0].message.content for reply in replies}) > 1 or len(w) == 1


def test_llama_cpp_that_refuses_or_is_gone_gives_an_error_object(t5, llama_cpp):
    with serving(t5, llama_cpp.url) as served:
        assert served.complete("Say 1", max_tokens=2).finish_reason == "length"
        status, error = served.post(body(max_tokens=3))
        assert (status, error["type"]) == (502, "server_error")
        assert "it refuses with 400: " in error["message"] and "too many LoRAs" in error["message"]
        served.model.url = "http://127.0.0.1:9"
        status, error = served.post(body())
        assert (status, error["type"]) == (502, "server_error")
        assert error["message"].startswith("--server http://127.0.0.1:9: ")


# -------------------------------------------------------------------------------------- the program


def test_a_stop_finishes_what_runs_and_what_waits(t5):
    with serving(t5) as served, ThreadPoolExecutor(2) as pool:
        with held_back(served.model, 2) as (sizes, begin):
            choices = [pool.submit(served.complete, text) for text in QUESTIONS[:2]]
            while not served.model.waiting and sizes != [2]:
                time.sleep(0.01)
            served.uvicorn.handle_exit(signal.SIGINT, None)
            time.sleep(0.3)
            assert served.thread.is_alive()
            begin()
            assert all(choice.result().finish_reason for choice in choices)
        served.thread.join(60)
        assert not served.thread.is_alive()


def test_the_program_serves_on_127_0_0_1_until_ctrl_c(t5):
    words = [sys.executable, "-m", "integrations.server", "--served", "served", "--base", "base"]
    environment = {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*words, "--port", "0"], cwd=t5, env=environment, stdout=-1, stderr=-1, text=True
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("model served answers at http://127.0.0.1:")
        address = line.split()[4].removesuffix(";")
        client = openai.OpenAI(base_url=address, api_key="none")
        reply = client.chat.completions.create(
            model="served", messages=[{"role": "user", "content": QUESTIONS[0]}]
        )
        assert reply.choices[0].w
        port = address.split(":")[2].removesuffix("/v1")
        flags = f"--served served --base base --port {port}"
        refused(f"--host 127.0.0.1 --port {port}: ", f"integrations/server.py {flags}", cwd=t5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


def test_a_second_ctrl_c_does_not_wait_for_what_runs(t5, monkeypatch):
    started = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda *inputs, **options: started.extend(inputs))
    run("integrations/server.py --served served --base base --port 0", cwd=t5)
    with mock.patch("os._exit") as leave:
        started[0].handle_exit(signal.SIGINT, None)
        assert started[0].should_exit and not leave.called
        started[0].handle_exit(signal.SIGINT, None)
        leave.assert_called_once_with(130)


def test_mistakes_are_one_line(t5, monkeypatch):
    line = "integrations/server.py --served served --port 0"
    refused("nope: does not exist; name a local folder", f"{line} --base nope", cwd=t5)
    refused("run/router.json: does not exist", f"{line} --base base --served run", cwd=t5)
    refused("--port 99999: ", f"{line} --base base --port 99999", cwd=t5)
    for package in ("uvicorn", "starlette"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            refused("pip install starlette uvicorn", f"{line} --base base", cwd=t5)
