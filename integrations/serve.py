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
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import checkpoint
import data
import kernels
import tokenizer
from integrations.peft_folder import load_peft, set_skills
from integrations.trainer import fingerprint
from orchmoe import Adapters, OrchMoEConfig, Routing, TaskRouter, attach, full_precision
from support import program, runtime
from tasks import DataConfig, instruction_prompt, row_of_prompt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST = 2**15  # tokens of a prompt and its answer, where nothing else limits them


class Router:
    """Compute w of a prompt from the files of export.py and the base's embedding table.

    A folder with one plain LoRA has no router: `router` is None, and w is 1. Raise UserError if the
    base is not the one that was exported.
    """

    def __init__(self, served, base):
        path = program.require_path(
            served / "router.json", "name a folder that integrations/export.py wrote"
        )
        program.require_path(base, program.DOWNLOAD)
        facts = program.read_json(path)
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
            self.table = None
            if facts["embedding"] is not None:
                self.table = tensors[facts["embedding"]]  # (V,D)

        self.router = None
        if self.table is not None:
            path = served / "router.safetensors"
            state, _ = checkpoint.read_safetensors(path)
            with program.reading(path, "export it again"):
                self.router = TaskRouter(self.table.shape[1], len(self.loras))
                self.router.load_state_dict(state)

    @torch.no_grad()
    def __call__(self, ids):
        """Return w (K,) for the token ids (L,) of a prompt."""
        if self.router is None:
            return torch.ones(1)
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
        self.longest = self.config.max_source_length  # tokens of a prompt in training

    def encode(self, prompt):
        """Return the ids of a prompt, cut as in training."""
        example = data.example_of(row_of_prompt(prompt), self.tokenizer, self.config)
        return example.source_ids.tolist()

    def encode_whole(self, prompt):
        """Return the ids of a prompt, even if training would have cut it."""
        uncut = replace(self.config, max_source_length=2**40)
        example = data.example_of(row_of_prompt(prompt), self.tokenizer, uncut)
        return example.source_ids.tolist()

    def prompt_of_chat(self, messages):
        """Return the prompt of messages, (role, text) each. Raise ValueError if there is none.

        The only message is an instruction, perhaps with its input after an empty line. If the rows
        of the run are whole prompts, it is one of these.
        """
        if self.instructions is None:
            raise ValueError(
                "the rows of the run are no instructions; give a whole prompt, and no chat"
            )
        text = only_message(messages)
        return instruction_prompt(text, "") if self.instructions else text

    def decode(self, ids):
        return self.tokenizer.decode(ids)


class HubTokenizer:
    """Give prompts the ids that they have in transformers, for an adapter of a trainer."""

    instructions = None
    longest = LONGEST

    def __init__(self, base):
        packages = '"transformers<5.25" protobuf sentencepiece'
        remedy = f"if it has a tokenizer, pip install {packages}"
        with program.reading(base, remedy):
            import transformers

            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                base, trust_remote_code=False
            )

    def encode(self, prompt):
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and prompt.startswith(bos)  # a chat template has written it
        return self.tokenizer(prompt, add_special_tokens=not has_bos).input_ids

    encode_whole = encode

    def prompt_of_chat(self, messages):
        """Return the prompt of messages, (role, text) each, by the chat template if there is one.

        Raise ValueError if the template refuses them, or if there are several and no template.
        """
        if not self.tokenizer.chat_template:
            return only_message(messages)
        conversation = [{"role": role, "content": text} for role, text in messages]
        with program.reading("messages", "change them as the chat template of the base needs them"):
            return self.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_tokenizer(router, base):
    """Return the tokenizer of the prompts that the adapters were trained on."""
    if router.prompt_rule:
        return RunTokenizer(base, router.prompt_rule)
    return HubTokenizer(base)


def only_message(messages):
    """Return the text of the only message, (role, text). Raise ValueError if it is not a user's."""
    if len(messages) != 1 or messages[0][0] != "user":
        raise ValueError("there is no chat template; give one message, of the role user")
    return messages[0][1]


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

        # Later versions of transformers fail beside kernels.py, as its docstring says.
        with program.reading("peft", 'pip install "transformers<5.25" peft'):
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


class LoraMixture(Adapters):
    """K LoRAs as the skills of each Linear, with the weights c = w; 1 without a router."""

    def route(self, embeddings=None, mask=None, **_options):
        """Return w (B,K), and c = w for all Linears."""
        if self.router is None:
            w = torch.ones(len(embeddings), 1, device=embeddings.device)
        else:
            with full_precision(embeddings.device):
                w = self.router(embeddings, mask)  # (B,K)
        return Routing(w.expand(len(self.skills), -1, -1), w)


class Answer(NamedTuple):
    """The answer to a prompt."""

    text: str
    w: list[float]  # weights of the K LoRAs
    prompt_tokens: int
    tokens: int  # without the EOS
    is_cut: bool  # whether it has as many tokens as it may have, and no EOS


class MixtureModel:
    """Our model of the base with the LoRAs and the router. It answers several prompts at once.

    texts: the tokenizer. Raise UserError if the base is of a kind that our models lack, or has not
    the Linears of the LoRAs.
    """

    def __init__(self, router, texts, base):
        device = runtime.pick_device().torch_device
        self.texts = texts
        self.base = checkpoint.load(base, dtype=router.dtype, device=device)
        self.longest = self.base.longest or LONGEST  # tokens of a prompt and its answer
        loras = [load_peft(folder) for folder in router.loras]
        targets = set()
        for path, child in self.base.named_modules():
            name = checkpoint.hf_name(self.base, f"{path}.").removesuffix(".")
            if name in loras[0].factors and isinstance(child, torch.nn.Linear):
                targets.add(path.rpartition(".")[2])
        rank = max(lora.rank for lora in loras)
        with program.reading(loras[0].folder, "export it again"):
            config = OrchMoEConfig(skills=len(loras), rank=rank, targets=tuple(targets))
            self.adapters = attach(self.base, config, LoraMixture, mix=kernels.mix_skills)
            set_skills(self.adapters, loras)
        self.adapters.router = router.router
        self.adapters.to(device).eval()

    @torch.no_grad()
    def answer(self, prompts, max_tokens):
        """Return the Answers to B prompts, given the ids and the most new tokens of each."""
        sources = [torch.tensor(ids) for ids in prompts]
        masks = [torch.ones(len(source), dtype=torch.bool) for source in sources]
        input_ids = pad_sequence(sources, batch_first=True).to(self.base.device)  # (B,L)
        mask = pad_sequence(masks, batch_first=True).to(self.base.device)
        with self.adapters.routed(self.base.embed(input_ids), mask) as routing:
            rows = self.base.generate(
                input_ids, mask, max_new_tokens=max(max_tokens), on_keep=self.adapters.keep
            )

        answers = []
        for i, row in enumerate(rows.tolist()):
            row = row[: max_tokens[i]]
            ids = list(takewhile(lambda token: token not in self.base.config.eos_ids, row))
            answer = Answer(
                text=self.texts.decode(ids),
                w=routing.w[i].tolist(),
                prompt_tokens=len(prompts[i]),
                tokens=len(ids),
                is_cut=len(ids) == max_tokens[i],
            )
            answers.append(answer)
        return answers


def ask_llama_server(url, ids, w, max_tokens):
    """Return the Answer of a llama-server to a prompt (L,), with the LoRAs weighted by w (K,).

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
                values = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            message = error.read().decode(errors="replace")
            raise ValueError(f"it refuses with {error.code}: {message}") from None
        return Answer(
            text=values["content"],
            w=w.tolist(),
            prompt_tokens=len(ids),
            tokens=values.get("tokens_predicted", 0),
            is_cut=values.get("stop_type") == "limit",
        )


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
    texts = load_tokenizer(router, args.base)
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
            answer = ask_llama_server(args.server, ids, w, max_tokens).text
        else:
            answer = texts.decode(model.answer(ids, w, max_tokens))
        program.print_line(f"{question} -> {answer or '(empty)'}")


if __name__ == "__main__":
    program.run_program(main)
