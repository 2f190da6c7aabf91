"""Answer OpenAI's API over HTTP with the LoRAs that integrations/export.py has written.

It has /v1/completions, /v1/chat/completions and /v1/models. The router gives each prompt its own w,
the weights of the LoRAs, which the answer shows. Prompts that wait are answered as one batch. With
--server a llama-server of llama.cpp answers, which must have all LoRAs in the order of router.json.
Decoding is greedy. There is no password. It needs starlette and uvicorn.

    python -m integrations.server --served served --base smollm2 --port 8000
    curl http://127.0.0.1:8000/v1/completions -d '{"model": "served", "prompt": "Hot is not"}'

Test: pytest tests/programs/test_server.py
"""

import asyncio
import json
import os
import socket
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from integrations import serve
from support import program

LARGEST_BATCH = 64  # prompts
READ = {"model", "prompt", "messages", "max_tokens", "max_completion_tokens"}  # fields of a request
WITHOUT_EFFECT = {"user", "seed", "top_p", "metadata", "store"}  # on a greedy answer


class RequestError(Exception):
    """What is wrong with a request, in OpenAI's form."""

    def __init__(self, message, param=None, code=None, status=400):
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.status = status


class Batches:
    """Answer all prompts that wait as one batch, by a serve.MixtureModel."""

    def __init__(self, model):
        self.model = model
        self.longest = model.longest
        self.waiting = []  # (ids, max_tokens, future of the Answer) of each prompt
        self.task = None  # answers what waits

    async def answer(self, ids, max_tokens):
        """Return the Answer to a prompt, given its ids."""
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((ids, max_tokens, answer))
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self.work())
        return await answer

    async def work(self):
        """Answer batches until no prompt waits."""
        while self.waiting:
            batch = self.waiting[:LARGEST_BATCH]
            self.waiting = self.waiting[LARGEST_BATCH:]
            prompts, max_tokens, futures = zip(*batch, strict=True)
            try:
                answers = await asyncio.to_thread(self.model.answer, prompts, max_tokens)
            except Exception as error:  # such as too little memory
                for future in futures:
                    future.set_exception(error)
            else:
                for future, answer in zip(futures, answers, strict=True):
                    future.set_result(answer)


class LlamaServer:
    """Pass each prompt on to a llama-server, with the weights that the router gives it."""

    longest = serve.LONGEST

    def __init__(self, router, url):
        self.router = router
        self.url = url
        self.threads = ThreadPoolExecutor(LARGEST_BATCH)  # each waits for one answer

    async def answer(self, ids, max_tokens):
        """Return the Answer to a prompt, given its ids. Raise RequestError without one."""
        ids = torch.tensor(ids)
        ask = partial(serve.ask_llama_server, self.url, ids, self.router(ids), max_tokens)
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, ask)
        except program.UserError as error:
            raise RequestError(str(error), status=502) from error


@contextmanager
def reading(param):
    """Turn any failure inside the block into a RequestError that names the field `param`."""
    try:
        with program.reading(param, "change the request"):
            yield
    except program.UserError as error:
        raise RequestError(str(error), param) from error


class Api:
    """What the paths return, in OpenAI's form. The methods take the body of a request."""

    def __init__(self, name, texts, model, max_tokens):
        self.name = name
        self.texts = texts
        self.model = model
        self.max_tokens = max_tokens  # of an answer, if the request names no number

    async def models(self, _body):
        return {"object": "list", "data": [{"id": self.name, "object": "model", "created": 0}]}

    async def completions(self, body):
        fields = self.fields_of(body)
        answer = await self.answer("prompt", fields.get("prompt"), fields)
        return self.reply("text_completion", answer, {"text": answer.text})

    async def chat_completions(self, body):
        fields = self.fields_of(body)
        with reading("messages"):
            messages = []
            for message in fields["messages"]:
                program.require_prompt("the content of a message", message["content"])
                messages.append((message["role"], message["content"]))
            prompt = self.texts.prompt_of_chat(messages)
        answer = await self.answer("messages", prompt, fields)
        message = {"role": "assistant", "content": answer.text}
        return self.reply("chat.completion", answer, {"message": message})

    def fields_of(self, body):
        """Return the fields of a request. Raise RequestError if one of them is not supported."""
        with reading("body"):
            fields = json.loads(body)
            if not isinstance(fields, dict):
                raise ValueError("it is no JSON object")
            fields = {name: value for name, value in fields.items() if value is not None}
        if fields.get("model") != self.name:
            message = f"model: give {self.name!r}, the only one"
            raise RequestError(message, "model", "model_not_found", status=404)
        for name, value in fields.items():
            is_default = value in (False, 0, [], {}) or (name == "n" and value == 1)
            if name not in READ | WITHOUT_EFFECT and not is_default:
                message = f"{name:.60}: {value!r:.60} is not supported; leave it out"
                raise RequestError(message, name, "unsupported_parameter")
        return fields

    async def answer(self, param, prompt, fields):
        """Return the Answer to a prompt, which is in the field `param`."""
        with reading(param):
            program.require_prompt("the text", prompt)
            ids = self.texts.encode_whole(prompt)
        with reading("max_tokens"):
            max_tokens = fields.get("max_tokens", self.max_tokens)
            max_tokens = fields.get("max_completion_tokens", max_tokens)
            if type(max_tokens) is not int or max_tokens < 1:
                raise ValueError(f"{max_tokens!r:.60} is no whole number above 0")

        # The last token of an answer is only predicted.
        most = max(0, min(self.texts.longest, self.model.longest - max_tokens + 1))
        if len(ids) > most:
            message = f"{param}: {len(ids)} tokens; with max_tokens {max_tokens} at most {most}"
            raise RequestError(message, param, "context_length_exceeded")
        return await self.model.answer(ids, max_tokens)

    def reply(self, kind, answer, content):
        """Return an answer as an object of OpenAI's API. `content` is the text in its place."""
        choice = {"index": 0, **content, "logprobs": None}
        choice["finish_reason"] = "length" if answer.is_cut else "stop"
        if len(answer.w) > 1:
            choice["w"] = [round(weight, 4) for weight in answer.w]
        usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens}
        usage["total_tokens"] = answer.prompt_tokens + answer.tokens
        values = {"id": f"{kind}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
        return values | {"model": self.name, "choices": [choice], "usage": usage}


def application(api):
    """Return the Starlette application of an Api."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def route(path, method, function):
        async def endpoint(request):
            return JSONResponse(await function(await request.body()))

        return Route(path, endpoint, methods=[method])

    async def refuse(request, error):
        if isinstance(error, HTTPException):  # there is no such path, or not for this method
            message = f"{request.method} {request.url.path}: {error.detail}"
            error = RequestError(message, status=error.status_code)
        return JSONResponse(error.body, error.status)

    return Starlette(
        routes=[
            route("/v1/models", "GET", api.models),
            route("/v1/completions", "POST", api.completions),
            route("/v1/chat/completions", "POST", api.chat_completions),
        ],
        exception_handlers={RequestError: refuse, HTTPException: refuse},
    )


def main():
    parser = program.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--served", type=Path, required=True, help="folder that export.py wrote")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    parser.add_argument("--server", help="address of a llama-server, which answers instead")
    args = parser.parse_args()
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise program.UserError(f"{error.name} is missing; pip install starlette uvicorn") from None

    with program.reading(f"--host {args.host} --port {args.port}", "give others"):
        listener = socket.create_server((args.host, args.port))
    router = serve.Router(args.served, args.base)
    texts = serve.load_tokenizer(router, args.base)
    if args.server:
        model = LlamaServer(router, args.server)
    else:
        model = Batches(serve.MixtureModel(router, texts, args.base))
    api = Api(args.served.resolve().name, texts, model, router.max_new_tokens)

    address, port = listener.getsockname()[:2]
    program.print_line(f"model {api.name} answers at http://{address}:{port}/v1; Ctrl-C stops it")
    uvicorn_server = uvicorn.Server(uvicorn.Config(application(api), log_level="warning"))

    def stop(*signal_and_frame):
        if uvicorn_server.should_exit:
            os._exit(130)  # a second signal does not wait for what runs
        uvicorn.Server.handle_exit(uvicorn_server, *signal_and_frame)

    uvicorn_server.handle_exit = stop
    uvicorn_server.run(sockets=[listener])


if __name__ == "__main__":
    program.run_program(main)
