"""Answer prompts with the LoRAs and the router that integrations/export.py has written.

For each prompt the router gives w, the weights of the LoRAs. Without --server the answer comes from
transformers and peft. All LoRAs have the same A, so their mixture is one LoRA of the same rank with
B = sum_k w_k B_k. With --server it comes from a running llama-server of llama.cpp, which weights
the LoRAs in each request. It must have been started with all LoRAs, in the order of router.json.
The base is loaded in the dtype of router.json, in which the run computed: rounded in another way,
some answers would differ. A base that was trained in 4 bits is not quantised here.

    python -m integrations.serve --served served --base smollm2 --prompt "Hot is not" "Up is not"
    python -m integrations.serve --served served --base smollm2 --server http://localhost:8080 \
        --prompt "Hot is not"

Letters: K LoRAs, r their rank, O output width, L length. Decoding is greedy.
Test: pytest tests/parity/test_serve.py tests/parity/test_trainer.py
"""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import torch

import checkpoint
import data
import tokenizer
from integrations.peft_folder import load_peft
from integrations.trainer import fingerprint
from orchmoe import TaskRouter
from support import program
from tasks import DataConfig, instruction_prompt, row_of_prompt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Router:
    """Compute w of a prompt from the files of export.py and the base's embedding table.

    Raise UserError if the base is not the one that was exported.
    """

    def __init__(self, served, base):
        path = program.require_path(
            served / "router.json", "name a folder that integrations/export.py wrote, with a router"
        )
        program.require_path(base, program.DOWNLOAD)
        facts = program.read_json(path)
        state, _ = checkpoint.read_safetensors(served / "router.safetensors")
        tensors = checkpoint.read_folder(base)  # mapped: what is not used is not read
        with program.reading(path, "export it again, or give the folder of its base"):
            if facts["base"] != fingerprint(tensors.values()):
                raise ValueError(f"{base} is not the base of these LoRAs")
            self.dtype = DTYPES[facts["dtype"]]
            self.prompt_rule = facts["prompt"]  # see export.save_router
            self.max_new_tokens = facts["max_new_tokens"]
            if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
                raise ValueError(f"max_new_tokens: {self.max_new_tokens!r:.40} is no positive int")
            for name in facts["loras"]:
                if not re.fullmatch(r"\w[\w.-]*", name):  # a path could lead out of the folder
                    raise ValueError(f"loras: {name!r:.60} is not a plain folder name")
            self.loras = [served / name for name in facts["loras"]]
            self.table = tensors[facts["embedding"]]  # (V,D)
            self.router = TaskRouter(self.table.shape[1], len(self.loras))
            self.router.load_state_dict(state)

    @torch.no_grad()
    def __call__(self, ids):
        """Return w (K,) for the token ids (L,) of a prompt."""
        return self.router(self.table[ids][None].to(self.dtype))[0]


class RunTokenizer:
    """Give prompts the ids that they have in a run of train.py.

    instructions: whether the rows of the run are instructions; None if they have SNI's form.
    """

    def __init__(self, base, rule):
        self.tokenizer = tokenizer.load(base)
        with program.reading("router.json", "restore the base, or export again"):
            if self.tokenizer.fingerprint != rule["tokenizer"]:
                raise ValueError(f"the tokenizer in {base} is another one")
            self.instructions = rule["instructions"]
            # The rule names only the settings that decide how a prompt is built.
            self.config = program.from_json(DataConfig, vars(DataConfig()) | rule["dataset"])

    def encode(self, prompt):
        """Return the ids of a prompt, cut as in training."""
        example = data.example_of(row_of_prompt(prompt), self.tokenizer, self.config)
        return example.source_ids.tolist()

    def decode(self, ids):
        return self.tokenizer.decode(ids)


class HubTokenizer:
    """Give prompts the ids that they have in transformers, for an adapter of a trainer."""

    instructions = None

    def __init__(self, base):
        remedy = "if it has a tokenizer, pip install transformers protobuf sentencepiece"
        with program.reading(base, remedy):
            import transformers

            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                base, trust_remote_code=False
            )

    def encode(self, prompt):
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and prompt.startswith(bos)  # a chat template has written it
        return self.tokenizer(prompt, add_special_tokens=not has_bos).input_ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class PeftModel:
    """The base with one LoRA in peft, whose B is mixed anew for each prompt.

    Base and LoRA compute in `dtype`, see Router.dtype. By itself peft keeps a LoRA in float32.

    Threads must take turns, since `answer` changes the model.
    """

    def __init__(self, base, loras, dtype):
        loaded = [load_peft(folder) for folder in loras]
        self.factors = {}  # name of a B -> the B of all LoRAs (K,O,r)
        with program.reading(loras[0].parent, "export it again"):
            for name in loaded[0].factors:
                B = torch.stack([lora.factors[name][1] for lora in loaded])
                self.factors[f"base_model.model.{name}.lora_B.weight"] = B

        with program.reading("peft", "pip install transformers peft"):
            import peft
            import transformers

        with program.reading(base, "name the folder of the base"):
            config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
            model_class = transformers.AutoModelForCausalLM
            if config.is_encoder_decoder:
                model_class = transformers.AutoModelForSeq2SeqLM
            model = model_class.from_pretrained(base, dtype=dtype, device_map="auto")
            self.model = peft.PeftModel.from_pretrained(
                model, loras[0], autocast_adapter_dtype=False
            ).eval()
        self.set_state = peft.set_peft_model_state_dict

    @torch.no_grad()
    def answer(self, ids, w, max_tokens):
        """Return the ids of the answer to a prompt (L,), with the LoRAs weighted by w (K,)."""
        mixed = {name: torch.einsum("k,kor->or", w, B) for name, B in self.factors.items()}
        self.set_state(self.model, mixed)
        prompt = ids[None].to(self.model.device)
        row = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),  # a prompt may spell the padding token out
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,  # generation_config.json of the base may set others
            repetition_penalty=1.0,
        )[0]
        return row if self.model.config.is_encoder_decoder else row[len(ids) :]


def ask_llama_server(url, ids, w, max_tokens):
    """Return the answer of a llama-server to a prompt (L,), with the LoRAs weighted by w (K,).

    Without "cache_prompt": false the server may reuse what it computed with other weights
    (https://github.com/ggml-org/llama.cpp/issues/26207). "lora": [] would leave all LoRAs on
    (https://github.com/ggml-org/llama.cpp/issues/28674; seen with llama-cpp-python 0.3.36). To get
    the answer of the base, list all ids with scale 0.
    """
    request = {
        "prompt": ids.tolist(),
        "n_predict": max_tokens,
        "temperature": 0,
        "cache_prompt": False,
        "lora": [{"id": k, "scale": scale} for k, scale in enumerate(w.tolist())],
    }
    address = url.rstrip("/") + "/completion"
    with program.reading(f"--server {url}", "start llama-server with all LoRAs of router.json"):
        try:
            content = json.dumps(request).encode()
            with urllib.request.urlopen(address, content, timeout=600) as reply:
                return json.loads(reply.read())["content"]
        except urllib.error.HTTPError as error:
            message = error.read().decode(errors="replace")
            raise ValueError(f"it refuses with {error.code}: {message}") from None


def main():
    parser = program.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--served", type=Path, required=True, help="folder that export.py wrote")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--ask", nargs="+", metavar="TEXT", help="instructions, as in rows of JSONL")
    group.add_argument("--prompt", nargs="+", metavar="TEXT", help="whole prompts, as they stand")
    parser.add_argument("--input", default="", help="the input of the instructions")
    parser.add_argument("--server", help="address of a llama-server (default: peft answers)")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: as in training)")
    args = parser.parse_args()
    if args.max_tokens is not None and args.max_tokens < 1:
        parser.error(f"--max-tokens {args.max_tokens}: give 1 or more")
    if args.prompt and args.input:
        parser.error("--input: a whole prompt has no other input; leave it out")
    questions = args.ask or args.prompt
    with program.checking_settings():
        program.require_text("--input", args.input)
        for question in questions:
            program.require_prompt("--ask" if args.ask else "--prompt", question)

    router = Router(args.served, args.base)
    if router.prompt_rule:
        texts = RunTokenizer(args.base, router.prompt_rule)
    else:
        texts = HubTokenizer(args.base)
    prompts = questions
    if args.ask:
        if texts.instructions is None:
            parser.error("--ask: only a run on rows of JSONL has instructions; give --prompt")
        if texts.tokenizer.one_row and not texts.instructions and not args.input:
            program.warn(
                "--ask: the rows of the run are whole prompts, and an instruction ends in an empty "
                "line; give --prompt to ask in their form"
            )
        prompts = [instruction_prompt(instruction, args.input) for instruction in args.ask]
    max_tokens = args.max_tokens or router.max_new_tokens
    model = None if args.server else PeftModel(args.base, router.loras, router.dtype)
    for question, prompt in zip(questions, prompts, strict=True):
        ids = torch.tensor(texts.encode(prompt))
        w = router(ids)
        if args.server:
            answer = ask_llama_server(args.server, ids, w, max_tokens)
        else:
            answer = texts.decode(model.answer(ids, w, max_tokens))
        program.print_line(f"{question} -> {answer}")


if __name__ == "__main__":
    program.run_program(main)
