"""Session set-up and the fixtures of more than one test module; helpers.py has the functions."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import sentencepiece
import torch

import checkpoint
import tokenizer as tokenizers
from experiments.pretrain import init_weights
from t5 import T5, T5Config

pytest.register_assert_rewrite("helpers")  # so that its assertions show their values
from helpers import LLAMA_FAMILIES, ROOT, SHORT, hf_llama, links, run, sentences  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: more threads would only wait for each other

try:  # pytest tests/programs/test_fuzz.py --hypothesis-profile=long
    from hypothesis import HealthCheck, settings

    settings.register_profile("long", max_examples=10_000, deadline=5000)
    settings.register_profile(
        "short",
        max_examples=150,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("short")
except ImportError:
    pass

# One token cache for the whole session.
CACHE = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = CACHE.name

# ------------------------------------------------------------------------------------- real data


def _folder(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def sni_dir() -> Path:
    """Return the real Super-NaturalInstructions (tasks/, splits/)."""
    return _folder("SNI_DIR")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Return the folder that `python -m experiments.smollm2 --out DIR` has made."""
    return _folder("SMOLLM2_DIR")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Return the folder of prompts.jsonl and metrics.jsonl, made with the official code."""
    return _folder("SNI_GOLDEN")


# ---------------------------------------------------------------------------------- the programs


@pytest.fixture
def home(tmp_path):
    """Return an empty folder with the bundled data and base."""
    return links(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return a folder with `run`, a finished run of OrchMoE. Tests must not change it."""
    folder = links(tmp_path_factory.mktemp("finished"))
    run("train.py", *SHORT, "--out", "run", cwd=folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """Return a copy of that run, which tests may change. Its parent is the working folder."""
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


# ------------------------------------------------------------------------------------ the models


class Inputs(NamedTuple):
    """A batch for `small_t5`."""

    input_ids: torch.Tensor  # (B,L)
    attention_mask: torch.Tensor  # (B,L)
    labels: torch.Tensor  # (B,Lt)


@pytest.fixture
def small_t5() -> T5:
    """Return a random v1.1-shaped T5 in float64. Its outputs differ clearly between samples."""
    base = T5(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            scale_decoder_outputs=False,
            tied_head=False,
        )
    )
    init_weights(base, 0)
    return base.double().eval()


@pytest.fixture
def inputs() -> Inputs:
    """Return four sources and targets of different lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 60, (4, 9), generator=generator)
    labels = torch.randint(2, 60, (4, 6), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    labels[1, 3:] = -100
    labels[3, 2:] = -100
    return Inputs(ids.masked_fill(~mask, 0), mask, labels)


@pytest.fixture(params=LLAMA_FAMILIES, scope="module")
def llama_folder(request, tmp_path_factory):
    """Return a model folder in shards, as transformers writes it."""
    path = tmp_path_factory.mktemp(request.param)
    hf_llama(request.param).save_pretrained(path, max_shard_size="20KB")
    return path


@pytest.fixture(scope="module")
def llama_pair(llama_folder):
    """Return the model in `llama_folder` in the class of transformers, and in ours."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        llama_folder, attn_implementation="eager"
    )
    return model.eval(), checkpoint.load(llama_folder)


@pytest.fixture
def llama_batch():
    """Return four sources, their mask and labels, of different lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 97, (4, 9), generator=generator)
    labels = torch.randint(10, 97, (4, 6), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    labels[1, 3:] = labels[3, 2:] = -100
    return ids, mask, labels


# --------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Return a folder with a small spiece.model like T5's."""
    folder = tmp_path_factory.mktemp("model")
    lines = [*sentences(2000), "Definition: Input: Output: Positive Example 1 - 2"]
    (folder / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spiece"),
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        minloglevel=2,
        num_threads=1,
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    """Return the tokenizer of `model_dir`."""
    return tokenizers.load(model_dir)


@pytest.fixture(scope="module")
def corpus():
    """Return lines of text to train tokenizers on."""
    task = json.loads(next((ROOT / "sni" / "tasks").glob("*.json")).read_text(encoding="utf-8"))
    lines = [task["Definition"][0]] + [row["input"] for row in task["Instances"]]
    return [line for text in lines for line in text.splitlines()] + [
        "Output: 12 345",
        "Hello, world",
    ]
