"""Answer prompts with the LoRAs and the router that integrations/export.py has written.

For each prompt the router gives w, the weights of the LoRAs. Without --server the answer comes from
transformers and peft. All LoRAs have the same A, so their mixture is one LoRA of the same rank with
B = sum_k w_k B_k. With --server it comes from a running llama-server of llama.cpp, which weights
the LoRAs in each request. It must have been started with all LoRAs, in the order of router.json.

    python -m integrations.serve --served served --base smollm2 --ask "Hot is not" "Up is not"
    python -m integrations.serve --served served --base smollm2 --server http://localhost:8080 \
        --ask "Hot is not"

Letters: K LoRAs, r their rank, O output width, L length. Decoding is greedy.
Test: pytest tests/parity/test_peft.py
"""

import argparse
import json
import urllib.request
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file

import checkpoint
import program
from orchmoe import OrchMoEConfig, TaskRouter


class Router:
    """Computes w of a prompt from the files of export.py and the base's embedding table."""

    def __init__(self, served, base):
        facts = json.loads((served / "router.json").read_text(encoding="utf-8"))
        config = OrchMoEConfig(
            abstract_tasks=len(facts["loras"]),
            router_attention=facts["attention"],
            router_norm=facts["norm"],
        )
        self.loras = facts["loras"]
        self.table = checkpoint.read_folder(base)[facts["embedding"]]  # (V,D), not in memory
        self.router = TaskRouter(self.table.shape[1], config)
        self.router.load_state_dict(load_file(served / "router.safetensors"))

    @torch.no_grad()
    def __call__(self, ids):
        """Return w (K,) for the token ids (L,) of a prompt."""
        return self.router(self.table[ids][None])[0]


class PeftModel:
    """The base with one LoRA in peft, whose B is mixed anew for each prompt."""

    def __init__(self, served, base, loras):
        config = transformers.AutoConfig.from_pretrained(base)
        model_class = transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            model_class = transformers.AutoModelForSeq2SeqLM
        model = model_class.from_pretrained(base, dtype="auto", device_map="auto")
        self.model = peft.PeftModel.from_pretrained(model, served / loras[0]).eval()
        states = [load_file(served / lora / "adapter_model.safetensors") for lora in loras]
        self.factors = {}  # name of a B -> the B of all LoRAs (K,O,r)
        for name in states[0]:
            if ".lora_B." in name:
                self.factors[name] = torch.stack([state[name] for state in states])

    @torch.no_grad()
    def answer(self, ids, w, max_tokens):
        """Return the ids of the answer to a prompt (L,), with the LoRAs weighted by w (K,)."""
        mixed = {name: torch.einsum("k,kor->or", w, B) for name, B in self.factors.items()}
        peft.set_peft_model_state_dict(self.model, mixed)
        prompt = ids[None].to(self.model.device)
        row = self.model.generate(input_ids=prompt, max_new_tokens=max_tokens, do_sample=False)[0]
        return row if self.model.config.is_encoder_decoder else row[len(ids) :]


def ask_llama_server(url, ids, w, max_tokens):
    """Return the answer of a llama-server to a prompt (L,), with the LoRAs weighted by w (K,)."""
    request = {
        "prompt": ids.tolist(),
        "n_predict": max_tokens,
        "temperature": 0,
        "cache_prompt": False,  # or it may reuse what it computed with other weights
        "lora": [{"id": k, "scale": scale} for k, scale in enumerate(w.tolist())],
    }
    with urllib.request.urlopen(f"{url}/completion", json.dumps(request).encode()) as reply:
        return json.loads(reply.read())["content"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--served", type=Path, required=True, help="folder that export.py wrote")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    parser.add_argument("--ask", nargs="+", required=True, metavar="PROMPT", help="whole prompts")
    parser.add_argument("--server", help="address of a llama-server (default: peft answers)")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (default: 64)")
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.base)
    router = Router(args.served, args.base)
    model = None if args.server else PeftModel(args.served, args.base, router.loras)
    for prompt in args.ask:
        ids = torch.tensor(tokenizer(prompt).input_ids)
        w = router(ids)
        if args.server:
            answer = ask_llama_server(args.server, ids, w, args.max_tokens)
        else:
            tokens = model.answer(ids, w, args.max_tokens)
            answer = tokenizer.decode(tokens, skip_special_tokens=True)
        print(f"{prompt} -> {answer}")


if __name__ == "__main__":
    program.run_program(main)
