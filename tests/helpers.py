"""What tests share: how to run the programs, small models, tokenizers, and files of data."""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from torch import nn

import checkpoint
import data
import eval as evaluation
from baselines import attach_method
from llama import Llama, LlamaConfig
from model import IGNORED
from orchmoe import OrchMoEConfig
from random_t5 import init_weights
from support import runtime
from support.program import read_json, run_program, warn, write_json
from t5 import T5, T5Config
from tokenizer import load as load_tokenizer
from variants import TokenSkills

ROOT = Path(__file__).resolve().parent.parent

CPU = runtime.Device(torch.device("cpu"), torch.float32, "")

# PYTHONPATH of a process whose program is a file of tests/ and imports this one.
PYTHONPATH = os.pathsep.join((str(ROOT), str(ROOT / "tests")))

# Flags of a short training run.
SHORT = (
    "--device cpu --max-tasks 4 --max-source-length 64 --eval-instances 8 --steps 8 "
    "--eval-every 4 --batch-size 4 --warmup 2"
)

# What resumes a run, before the name of its folder.
RESUME = "train.py --resume --device cpu --out"


# ------------------------------------------------------------------------------------- the programs


def run(line, *more, cwd=".", code=0):
    """Run a program in this process, which saves the imports. It must end with `code`.

    line: the command line, as in a shell. more: further words of it, such as paths.
    Return its stdout or, if it was refused (code 2), its stderr.
    """
    words = [*shlex.split(line), *map(str, more)]
    module = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
    warn.cache_clear()
    output = io.StringIO()
    errors = io.StringIO()
    previous_folder = os.getcwd()
    os.chdir(cwd)
    try:
        with (
            mock.patch.object(sys, "argv", words),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            pytest.raises(SystemExit) as end,
        ):
            run_program(module.main)
    finally:
        os.chdir(previous_folder)
    assert end.value.code == code, output.getvalue() + errors.getvalue()
    return (errors if code == 2 else output).getvalue()


@contextlib.contextmanager
def refusal(words, kind=ValueError):
    """Require an error of this kind, in one line that `words` matches."""
    with pytest.raises(kind, match=words) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def refused(expected, line, *more, cwd="."):
    """Run a program that must refuse its command line, in one line with `expected`. Return it.

    Packages may have printed lines before.
    """
    *_, said = run(line, *more, cwd=cwd, code=2).splitlines()
    assert ": error: " in said and expected in said, said
    return said


def torchrun(processes, program, flags, *more, code=0):
    """Run several processes of a program, which must end with `code`. Return what has ended."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    launcher += ["--", program]  # without "--" it takes --run of eval.py
    words = [sys.executable, *launcher, *shlex.split(flags), *more]
    done = run_shell([str(word) for word in words], PYTHONPATH=PYTHONPATH)
    assert done.returncode == code, done.stderr
    return done


def run_shell(words, **variables):
    """Start a command in another process, and wait for its end."""
    return subprocess.run(
        words,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


def spied(owner, name):
    """Return a context in which `owner.name` is a mock that calls it and records its arguments."""
    return mock.patch.object(owner, name, wraps=getattr(owner, name))


def ids_of_question(*words):
    """Ask the run `run` with these flags of eval.py. Return the ids of the source."""
    with spied(evaluation, "routed") as routed:
        run("eval.py --run run --device cpu --max-new-tokens 1", *words)
    return routed.call_args.args[2].input_ids[0].tolist()


@contextlib.contextmanager
def interrupted(module, name, number, error=None, kind=signal.SIGTERM):
    """Interrupt one call of `module.name`, counted from 1, by an error or else by a signal."""
    original = getattr(module, name)
    calls = itertools.count(1)

    def function(*arguments, **options):
        if next(calls) == number:
            if error:
                raise error
            signal.raise_signal(kind)
        return original(*arguments, **options)

    with mock.patch.object(module, name, function):
        yield


def change_config(folder, section, **values):
    """Change fields in a section of config.json."""
    path = folder / "config.json"
    config = read_json(path)
    config[section] |= values
    write_json(path, config)


def records(folder):
    """Return the lines of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def trace(folder):
    """Return all losses, norms and dev losses. They must not depend on interruptions."""
    names = ("step", "loss", "norm", "dev_loss")
    return [[row.get(name, 0.0) for name in names] for row in records(folder)]


def links(folder):
    """Link the bundled data and base into `folder`, so that README's commands work in it."""
    for name in ("sni", "tiny"):
        (folder / name).symlink_to(ROOT / name)
    return folder


# ---------------------------------------------------------------------------------------- the pages


def text_of(path):
    """Return the text of a file, whose path may begin at the root of this repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def snippets(text, about=""):
    """Return the Python code blocks of a page that contain `about`."""
    return [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if about in code]


# ------------------------------------------------------------------------------------ files of data

WORDS = (
    "river stone window garden letter morning teacher yellow simple answer number little people "
    "under travel orange silver market doctor planet summer winter bridge don't isn't we're I've"
).split()


def sentences(count, seed=0):
    """Return random sentences."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(WORDS, k=rng.randint(3, 25))).capitalize()
        + rng.choice([".", "?", ", yes!"])
        for _ in range(count)
    ]


CORPUS = [*sentences(500), "Definition: Input: Output: 0 1 2 3 4 5 6 7 8 9", "Hello, world"]


def task_json(n=10, **changes):
    """Return a task file with `n` instances, and some fields of it changed."""
    example = {"input": "river", "output": "stone", "explanation": "So it is."}
    instances = [
        {"id": f"id-{i}", "input": sentence, "output": ["yes", "no", "maybe so"][: 1 + i % 3]}
        for i, sentence in enumerate(sentences(n))
    ]
    return {
        "Categories": ["Sorting"],
        "Definition": ["Sort the words."],
        "URL": [float("nan")],
        "Positive Examples": [example, example],
        "Negative Examples": [example],
        "Instances": instances,
        **changes,
    }


def write_task(folder, name, task):
    """Write a task file, given as an object or as bytes, and return its path."""
    path = folder / "tasks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(task if isinstance(task, bytes) else json.dumps(task).encode())
    return path


def write_lists(folder, train, test):
    """Write the lists of the default split."""
    lists = folder / "splits" / "default"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "train_tasks.txt").write_text("\n".join(train) + "\n")
    (lists / "test_tasks.txt").write_text("\n".join(test))


def write_rows(path, rows):
    """Write a JSONL file, of objects or of lines as bytes, and return its path."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def own_rows(count, **more):
    """Return rows of a JSONL file with different prompts."""
    return [{"prompt": f"Say {i}.", "completion": f"{i}", **more} for i in range(count)]


def make_example(name, source, targets, index=0):
    """Return an example with these token ids."""
    return data.Example(
        id=name,
        task="task1_a",
        category="category",
        source_ids=np.array(source, np.int32),
        target_ids=[np.array(target, np.int32) for target in targets],
        references=["reference"] * len(targets),
        task_index=index,
    )


# --------------------------------------------------------------------------------------- tokenizers

PROMPT = "Definition: Sort them.\n\nInput: 12  and 345.\nOutput: "
TOKENIZER_TEXTS = [
    "Hello, world!",
    " leading",
    "trailing ",
    "",
    "a\n\nb\t c",
    "naïve 漢字 😀 \u200b",
    "x" * 50,
    PROMPT,
    "it 's , fine . isn 't it ?",
]
TOKENIZER_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "clean_up_tokenization_spaces": False,
}


class Bytes:
    """The tokenizer with which golden/prompts.jsonl was made."""

    def encode(self, text):
        return [*text.encode(), 256]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="ignore")


def write_words(folder, corpus=CORPUS, *, post=None, **settings):
    """Train a byte-level BPE on the lines of `corpus`, write it into `folder` and return that."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=alphabet,
    )
    words.train_from_iterator(corpus, trainer)
    if post:
        ends = [("<s>", 0), ("</s>", 1)]
        words.post_processor = tokenizers.processors.TemplateProcessing(post, special_tokens=ends)
    folder.mkdir(exist_ok=True)
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_SETTINGS | settings))
    return folder


def source_of(tokenizer, text):
    """Return the ids of a prompt in SNI's form."""
    return next(tokenizer.sources([text]))


def target_of(tokenizer, text):
    """Return the ids of an answer in SNI's form."""
    return next(tokenizer.targets([text]))


def train_pieces(prefix, lines, **options):
    """Train a SentencePiece model on the lines and write it as PREFIX.model."""
    prefix.parent.mkdir(exist_ok=True)
    text = prefix.with_name("text")
    text.write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), minloglevel=2, **options
    )


def write_pieces(folder):
    """Train Llama 2's kind of pieces on CORPUS. Write their tokenizer.json into `folder`."""
    transformers = pytest.importorskip("transformers")
    train_pieces(
        folder / "tokenizer",
        CORPUS,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
    )
    transformers.LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    return folder


# -------------------------------------------------------------------------------------- safetensors

# Metadata that transformers asks for.
PT = {"format": "pt"}


def weights_of(folder):
    """Return the tensors of a folder as copies, so that the file can be written again."""
    return {name: tensor.clone() for name, tensor in checkpoint.read_folder(folder).items()}


def state_of(run_dir):
    """Return the tensors of a run's adapter."""
    return checkpoint.read_safetensors(run_dir / "adapter.safetensors")[0]


def check_equal(found, expected):
    """Require the same structure, dtypes and values."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------- T5

# Unequal depths, and a span of few buckets, so that the logarithmic ones are used at these lengths.
T5_SIZES = dict(vocab_size=37, d_model=32, d_kv=8, d_ff=48, num_heads=3)
T5_SPAN = dict(relative_attention_num_buckets=8, relative_attention_max_distance=20)
T5_V1_1 = dict(feed_forward_proj="gated-gelu", scale_decoder_outputs=False, tied_head=False)
T5_CONFIGS = {
    "v1.0": T5Config(**T5_SIZES, **T5_SPAN, num_layers=2, num_decoder_layers=3),
    "v1.1": T5Config(**T5_SIZES, **T5_SPAN, **T5_V1_1, num_layers=3, num_decoder_layers=1),
}
SMALL_T5 = T5Config(
    **T5_SIZES | {"vocab_size": 64, "num_heads": 4},
    **T5_V1_1,
    num_layers=2,
    num_decoder_layers=2,
)
# For tests of each kind of T5.
both_t5 = pytest.mark.parametrize("kind", T5_CONFIGS)


def t5_values(config):
    """Return the values of a config.json that describes a T5Config."""
    values = {"model_type": "t5", "is_encoder_decoder": True, **dataclasses.asdict(config)}
    values["tie_word_embeddings"] = values.pop("tied_head")
    return values


def random_t5(config, seed=0):
    """Return a T5 whose attention is sharp, where positions matter and outputs vary."""
    t5 = init_weights(T5(config), seed)
    t5.hf_config = t5_values(config)
    generator = seeded_generator(seed + 1)
    with torch.no_grad():
        for name, weight in t5.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            elif "position" in name:
                weight.normal_(generator=generator)
            else:
                weight.mul_(0.3 if "embedding" in name else 2)
    return t5.eval()


class Inputs(NamedTuple):
    """A batch."""

    input_ids: torch.Tensor  # (B,L)
    attention_mask: torch.Tensor  # (B,L)
    labels: torch.Tensor  # (B,Lt)


def random_batch(low, high, lengths=(9, 4, 7, 2), target_lengths=(6, 3, 6, 2), seed=1):
    """Return padded sources and targets of these lengths, of ids in [low, high)."""
    generator = seeded_generator(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    label_mask = torch.arange(max(target_lengths)) < torch.tensor(target_lengths)[:, None]
    input_ids = torch.randint(low, high, mask.shape, generator=generator) * mask
    labels = torch.randint(low, high, label_mask.shape, generator=generator)
    return Inputs(input_ids, mask, labels.masked_fill(~label_mask, IGNORED))


def examples_of(inputs):
    """Return the rows of a batch of `random_batch` as examples of three tasks."""
    found = []
    for i, (source, target) in enumerate(rows_of(inputs)):
        found.append(make_example("abcd"[i], source[0].tolist(), target.tolist(), index=i % 3))
    return found


def t5_batch(lengths=(9, 14, 5, 1), target=7):
    """Return a batch for T5_CONFIGS. Each target is one token shorter than that before it."""
    target_lengths = range(target, target - len(lengths), -1)
    return random_batch(2, 37, lengths, target_lengths, seed=0)


def teacher_forced(t5, *inputs: torch.Tensor):
    """Return logits (B,Lt,V) for sources (B,Ls), their mask, and targets so far (B,Lt)."""
    return t5.logits(t5.hidden(*inputs))


# -------------------------------------------------------------------------- Llama and its relatives

LLAMA_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 3,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA_FAMILIES = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": (
        "llama",
        {"rope_parameters": LLAMA3_ROPE, "head_dim": 16, "eos_token_id": [3, 5, 8]},
    ),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_theta": 100_000}),
    "mistral": (
        "mistral",
        {"head_dim": 12, "sliding_window": None, "max_position_embeddings": 8192},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}


def hf_llama(name):
    """Return a random model of transformers whose greedy choices are far apart."""
    transformers = pytest.importorskip("transformers")
    kind, changes = LLAMA_FAMILIES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(LLAMA_SIZES | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # biases and norms too
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_llama(*, std=0.3, **changes):
    """Return a random model of LLAMA_SIZES with some values of its config.json changed."""
    values = LLAMA_SIZES | changes
    model = Llama(LlamaConfig.from_hf(values))
    model.hf_config = values
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std, generator=seeded_generator())
    return model


def small_model(name):
    """Return a random model of T5_CONFIGS or LLAMA_FAMILIES."""
    if name in T5_CONFIGS:
        return random_t5(T5_CONFIGS[name])
    kind, changes = LLAMA_FAMILIES[name]
    return random_llama(model_type=kind, **changes)


def write_decoder(folder, write, *, std=0.3, **sizes):
    """Write a random Llama, and a tokenizer by `write`, into the folder. Return the folder."""
    write(folder)
    eos_id = load_tokenizer(folder).eos_ids[0]
    values = {"model_type": "llama", "eos_token_id": eos_id, **sizes}
    checkpoint.save(random_llama(std=std, **values), folder)
    return folder


def rows_of(batch):
    """Yield (source, target) of each row without padding, each as a batch of one."""
    for ids, mask, labels in zip(*batch, strict=True):
        yield ids[mask][None], labels[labels != -100][None]


# ----------------------------------------------------------------------------------------- adapters

# Adapters that are exported.
EXPORT_CONFIG = OrchMoEConfig(abstract_tasks=3, alpha=4.0)


def stir(adapters, generator):
    """Set B and the token routers to random values, so that the outputs depend on the routing."""
    for skills in adapters.skills.values():
        nn.init.normal_(skills.B, std=0.3, generator=generator)
        if isinstance(skills, TokenSkills):
            nn.init.normal_(skills.W_task, generator=generator)


def seeded_generator(seed=0):
    """Return a CPU generator with this seed."""
    return torch.Generator().manual_seed(seed)


def adapted(base, method="orchmoe", **options):
    """Attach a method to the base. Return adapters whose outputs depend on the routing."""
    config = OrchMoEConfig(**options)
    adapters = attach_method(method, base, config, num_tasks=3, generator=seeded_generator())
    stir(adapters, seeded_generator(1))
    return adapters


def load_adapted(folder, config=EXPORT_CONFIG, method="orchmoe", **options):
    """Return the base in `folder` and its adapters, which change the outputs a little."""
    base = checkpoint.load(folder, dtype=torch.float32)
    adapters = attach_method(method, base, config, generator=seeded_generator(), **options).eval()
    stir(adapters, seeded_generator(1))
    for skills in adapters.skills.values():
        skills.B.data *= 0.1
    return base, adapters


def factors_in(folder):
    """Return the tensors of an exported LoRA."""
    return load_file(folder / "adapter_model.safetensors")
