"""The routing explorer: a page where a finished run answers, and shows what its router does.

    python -m experiments.explorer --run RUN    # then open the address that it prints

The page shows w of a sample of the run's data, or of a prompt that you type. Sliders move w; the
page shows the weights c of the skills, the answer and, with a reference, the loss. It tries some
samples, opens with the one whose loss rises most with equal weights, and says so. It is served on
127.0.0.1 alone until Ctrl-C. It computes in float32 on the CPU, also for a run in bfloat16, whose
answers by eval.py may differ. docs/annotated.html holds the same page with stored answers. Markup,
style and script are in explorer.html, explorer.css and explorer.js.

Letters: M samples, K abstract tasks, S skills, N adapted Linears.
Test: pytest tests/repo/test_explorer.py
"""

import functools
import html
import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import data
import eval as evaluation
import metrics
import run_folder
import tasks
from baselines import load_method
from data import Example
from model import Backbone
from orchmoe import Adapters, OrchMoE
from support import program, runtime
from support.program import UserError
from tasks import NO_TASK, DataConfig
from tokenizer import Tokenizer

SHOWN = 3  # samples of each task in SNI's form that can be chosen
SHOWN_ROWS = 1000  # of each task of a JSONL file, and of rows that name no task
TRIED = 100  # samples among which the page looks for one where routing matters

# The examples of a task are together.
read_task = functools.lru_cache(1)(tasks.read_task)
read_rows = functools.lru_cache(1)(tasks.read_rows)


class Loaded(NamedTuple):
    """A finished run of OrchMoE with a sample router, on the CPU."""

    base: Backbone
    adapters: Adapters
    tokenizer: Tokenizer
    run: run_folder.Run
    data_config: DataConfig
    sets: dict[str, data.Examples]  # with "seen" and, if there are other tasks, "unseen"


def load(run_dir: str | Path, *, model: str = "", moved_data: str = "") -> Loaded:
    """Load a run. Raise UserError if it has nothing to show, or if its data have changed.

    model, moved_data: where its base and its data are now, if they have moved. Data that have moved
    are without --test.
    """
    device = runtime.pick_device(device="cpu", dtype="float32")
    base, adapters, tokenizer = run_folder.load(device, run_dir=run_dir, model=model)
    if not isinstance(adapters, OrchMoE) or adapters.router is None:
        raise UserError(
            f"{run_dir}: has no sample router of OrchMoE, so there are no weights of abstract "
            "tasks to show"
        )
    run = run_folder.read_run(run_dir)
    data_config = run.settings.part(DataConfig)
    if moved_data:
        data_config = replace(data_config, data=moved_data, test="")
    sets = data.load_sets(data_config, tokenizer)
    data.require_set(sets, "train", data_config)
    found = {f"{name}_tasks": sets[name].digest for name in ("train", "test") if name in sets}
    run.require_same(sets["train"].facts | found)
    if "test" in sets:
        sets["unseen"] = sets["test"]
    return Loaded(base, adapters, tokenizer, run, data_config, sets)


# ------------------------------------------------------------------------- the numbers of a page


@torch.no_grad()
def collect(loaded: Loaded) -> dict[str, Any]:
    """Return what a page shows of a run without answers, as plain JSON values."""
    explored = {
        "run": loaded.run.path.name,
        "linears": list(loaded.adapters.linears),
        "Zhat": rounded(loaded.adapters.allocation_weights()),  # (N,K,S)
        "sums_to_one": loaded.run.settings.method != "orchmoe-no-softmax",
        "mean_w": {},
        "tasks": [],
        "samples": [],
        "first": 0,  # the sample that is shown first
    }
    for kind in ("seen", "unseen"):
        examples = loaded.sets.get(kind, [])
        if examples:
            w = evaluation.router_weights(loaded.base, loaded.adapters, examples)  # (M,K)
            explored["mean_w"][kind] = rounded(w.mean(dim=0))
        for rows in rows_by_task(examples):
            add_task(explored, loaded, kind, rows, w)
    return explored


def rows_by_task(examples: Sequence[Example]) -> list[list[int]]:
    """Return the positions of the examples of each task."""
    rows = {}
    for row, example in enumerate(examples):
        rows.setdefault(example.task, []).append(row)
    return list(rows.values())


def add_task(
    explored: dict[str, Any], loaded: Loaded, kind: str, rows: list[int], w: Tensor
) -> None:
    """Add one task to "tasks", and its samples that are shown to "samples".

    They are evenly spaced over its rows. Rows that name no task count as one task, whose name is
    empty.
    """
    examples = loaded.sets[kind]
    shown = data.subsample(rows, SHOWN_ROWS if loaded.data_config.is_jsonl else SHOWN)
    texts = {row: texts_of(loaded, kind, examples[row]) for row in shown}
    head = os.path.commonprefix([prompt for _, prompt in texts.values()])
    head = head[: head.rfind("\n") + 1]
    for row in shown:
        # Half of the set away, so most likely of another task.
        other = (row + len(examples) // 2) % len(examples)
        other_task = name_of(examples[other])
        other_input = ""
        if not other_task:
            other_input, _ = texts_of(loaded, kind, examples[other])
        explored["samples"].append(
            {
                "task": len(explored["tasks"]),
                "row": row,
                "input": texts[row][0],
                "tail": texts[row][1][len(head) :],  # the prompt without the head of its task
                "references": examples[row].references,
                "w": rounded(w[row]),
                "other_w": rounded(w[other]),
                "other_task": other_task,
                "other_input": other_input,  # of a row that names no task
            }
        )
    explored["tasks"].append(
        {
            "name": name_of(examples[rows[0]]),
            "kind": kind,
            "count": len(rows),
            "w": rounded(w[rows].mean(dim=0)),
            "head": head,  # the common beginning of the prompts that are shown
        }
    )


def name_of(example: Example) -> str:
    """Return the name of the task of an example, or "" if its row names none."""
    return "" if example.task == NO_TASK else example.task


def texts_of(loaded: Loaded, kind: str, example: Example) -> tuple[str, str]:
    """Return the input and the prompt of an example, seen or unseen, as text.

    The input of a row of JSONL includes its instruction.
    """
    config = loaded.data_config
    if config.is_jsonl:
        rows = read_rows(config.data if kind == "seen" else config.test)
        prompt = rows[example.position].prompt
        return prompt.removesuffix("\n\n"), prompt
    task = read_task(Path(config.data) / "tasks" / f"{example.task}.json")
    row = tasks.sni_row(kind, task, example.position, loaded.tokenizer, config)
    return task["instances"][example.position]["input"], row.prompt


def seen_numbers(explored: dict[str, Any]) -> list[int]:
    """Return the numbers of the samples of seen tasks."""
    numbers = []
    for number, sample in enumerate(explored["samples"]):
        if explored["tasks"][sample["task"]]["kind"] == "seen":
            numbers.append(number)
    return numbers


@torch.no_grad()
def choose_first(explored: dict[str, Any], loaded: Loaded) -> None:
    """Choose the sample with which the page opens: the one whose loss rises most with w = 1/K.

    At most TRIED seen samples are tried. "tried" says how many.
    """
    numbers = data.subsample(seen_numbers(explored), TRIED)
    samples = [explored["samples"][number] for number in numbers]
    examples = [loaded.sets["seen"][sample["row"]] for sample in samples]
    own = torch.tensor([sample["w"] for sample in samples])  # (M,K)
    losses = []
    for w in (own, torch.full_like(own, 1 / own.shape[1])):
        found = evaluation.measure(loaded.base, loaded.adapters, examples, w=w)
        losses.append(torch.tensor([loss.nats / loss.tokens for loss in found]))
    explored["first"] = numbers[int((losses[1] - losses[0]).argmax())]
    explored["tried"] = len(numbers)


def predict(loaded: Loaded, examples: Sequence[Example], w: Tensor) -> list[str]:
    """Return the answers of M examples with w (M,K)."""
    return evaluation.predict(
        loaded.base,
        loaded.adapters,
        examples,
        loaded.tokenizer,
        max_new_tokens=loaded.data_config.max_new_tokens,
        w=w,
    )


def is_right(loaded: Loaded, example: Example, text: str) -> bool:
    """Return whether an answer is right by the exact match of the data of the run."""
    return metrics.exact_match(text, example.references, loaded.data_config.metric_rules) == 1


def answer(loaded: Loaded, example: Example, w: Tensor) -> list:
    """Return [answer, loss, whether the answer is right] of one example with w (K).

    Loss and rightness are None without a reference.
    """
    [text] = predict(loaded, [example], w[None])
    if not example.references:
        return [text, None, None]
    losses = evaluation.measure(loaded.base, loaded.adapters, [example], w=w[None])
    return [text, round(evaluation.mean_loss(losses), 4), is_right(loaded, example, text)]


def rounded(values: Tensor, decimals: int = 4) -> list:
    """Return a tensor as nested lists of rounded numbers."""
    return values.double().cpu().round(decimals=decimals).tolist()


# ----------------------------------------------------------------------------------------- the page


def read(name: str) -> str:
    """Return the text of one of the files of the page."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def json_script(name: str, values: dict[str, Any]) -> str:
    """Return a script element that holds values as JSON."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    # No text of a value may end the element, or begin a comment in it.
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def section(explored: dict[str, Any]) -> str:
    """Return the explorer as HTML: markup, numbers and script. Its style is explorer.css."""
    return (
        f"{read('explorer.html')}{json_script('explorer-data', explored)}"
        f"<script>\n{read('explorer.js')}</script>\n"
    )


def page(explored: dict[str, Any]) -> str:
    """Return the served page: a title, two lines of introduction, and the explorer."""
    run = html.escape(explored["run"])
    title = "Ask the model, and move its routing weights"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: {run}</title>\n<style>\n{read('explorer.css')}</style></head>\n"
        f"<body><main class='alone'><h1>{title}</h1>\n"
        f"<p>The run <b>{run}</b> answers here. Its router gives each prompt weights w on abstract "
        "tasks, and these decide how much each skill (a small LoRA) adds.<br>Choose a sample or "
        "type a prompt, then move a slider or press a row: the model answers with that w. "
        "docs/annotated.html explains the words.</p>\n"
        f"{section(explored)}</main></body></html>\n"
    )


# --------------------------------------------------------------------------------------- the server


class Server(ThreadingHTTPServer):
    """Answer on 127.0.0.1. Each connection has a thread; the model answers one at a time."""

    def __init__(self, loaded: Loaded, port: int):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; give another one") from None
        self.loaded = loaded
        self.lock = threading.Lock()  # whoever holds it may use the model
        explored = collect(loaded)
        choose_first(explored, loaded)
        explored |= {
            "live": True,
            "is_jsonl": loaded.data_config.is_jsonl,
            "metric_rules": loaded.data_config.metric_rules,
        }
        self.page = page(explored).encode()
        # What a browser sends as Host.
        self.hosts = [f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"]

    def handle_error(self, *arguments: Any) -> None:
        """Print the traceback of a bug, and nothing if a client has left or is silent."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(*arguments)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page. POST / takes and returns JSON, see `reply`.

    Another site that is open in the same browser cannot use the server: its requests have another
    Origin or, if its name leads here, another Host.
    """

    server: Server
    timeout = 10  # seconds for one read, so that a silent client does not keep its thread

    def do_GET(self) -> None:
        if self.is_refused():
            return
        self.send(200, "text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        if self.is_refused():
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            with self.server.lock:
                answered = reply(self.server.loaded, body)
        except UserError as error:
            self.send_error_text(400, str(error))
        else:
            self.send(200, "application/json", program.to_json(answered))

    def is_refused(self) -> bool:
        """Refuse a request that this page did not make. Return whether it is refused."""
        host = self.headers.get("Host", "")
        is_post = self.command == "POST"
        origin = self.headers.get("Origin", "" if is_post else f"http://{host}")
        if host not in self.server.hosts or origin != f"http://{host}":
            address = f"http://{self.server.hosts[0]}"
            text = f"not from the page; open {address}; through ssh, forward the same port"
            self.send_error_text(403, text)
        elif self.path != "/":
            self.send_error_text(404, "there is no such page; open /")
        else:
            return False
        return True

    def send_error_text(self, code: int, text: str) -> None:
        """Send a problem as JSON, in the form in which the page shows it."""
        self.send(code, "application/json", program.to_json({"error": text}))

    def send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        policy = "default-src 'none'; connect-src 'self'"
        policy += "; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@torch.no_grad()
def reply(loaded: Loaded, body: bytes) -> dict[str, Any]:
    """Return {"w", "result", "warning"} for a request {"prompt", "references", "w"} in JSON.

    An answer is right if it is one of the references; the loss is that of the first. A w of null
    means the router's. The warning is empty, or it says that a text has characters that the
    tokenizer loses. Raise UserError for a prompt that is empty or has no tokens.
    """
    with program.reading("request", "send what the page sends"):
        request = json.loads(body)
        prompt = request["prompt"]
        references = request["references"]
        w = request["w"]
    if not prompt.strip():
        raise UserError("prompt: it is empty; write one")
    row = tasks.row_of_prompt(prompt, references or [""])
    sets, lost = data.tokenise([row], loaded.tokenizer, loaded.data_config)
    [example] = sets[row.set]
    example = example._replace(references=references)
    if w is None:
        w = evaluation.router_weights(loaded.base, loaded.adapters, [example])[0]
    else:
        w = torch.tensor(w)
    warnings = []
    for kind, name in (("source", "prompt"), ("target", "right answer")):
        if lost[kind]:
            warnings.append(f"The {name} is too long and loses its end.")
    if lost["characters"]:
        name = "prompt"
        if loaded.tokenizer.unknown_id not in example.source_ids:
            name = "right answer"
        warnings.append(f"The {name} has {data.UNKNOWN_CHARACTERS}.")
    are_instructions = loaded.run.facts.get("instructions", False)
    if loaded.tokenizer.one_row and are_instructions and not prompt.endswith("\n\n"):
        warnings.append("The prompt does not end in an empty line, as all rows of the run do.")
    warning = " ".join(warnings)
    return {"w": rounded(w), "result": answer(loaded, example, w), "warning": warning}


# -------------------------------------------------------------------------------------- the program


@dataclass(frozen=True)
class ExplorerConfig:
    """Explorer: the run, and the port of the page."""

    run: str = ""  # folder of a run of train.py
    model: str = ""  # where the base of the run is now, if it has moved
    method: str = ""  # FILE.py:Class of a run whose method is from a file
    data: str = ""  # where the data of the run are now, if they have moved
    port: int = 8000  # of the page; 0: any free one

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("give --run, the folder of a run")
        if self.port != 0 and not 1024 <= self.port < 2**16:
            raise ValueError(f"--port {self.port}: give 0, or 1024 to 65535")


def main() -> None:
    config = program.from_flags(ExplorerConfig, program.read_flags(__doc__, ExplorerConfig))
    program.print_line(f"loading {config.run}")
    if config.method:
        load_method(config.method)
    loaded = load(config.run, model=config.model, moved_data=config.data)
    with Server(loaded, config.port) as server:
        program.print_line(f"open http://127.0.0.1:{server.server_port} (Ctrl-C ends it)")
        server.serve_forever()
