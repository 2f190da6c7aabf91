"""Session set-up and the fixtures of more than one test module; helpers.py has the functions."""

import contextlib
import functools
import gc
import inspect
import os
import resource
import shutil
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

import checkpoint
from random_t5 import init_weights
from support import program
from t5 import T5
from tasks import DataConfig
from tokenizer import load as load_tokenizer

pytest.register_assert_rewrite("helpers")  # so that its assertions show their values
from helpers import (  # noqa: E402
    LLAMA_FAMILIES,
    ROOT,
    SHORT,
    SMALL_T5,
    examples_of,
    hf_llama,
    links,
    random_batch,
    run,
    sentences,
    task_json,
    train_pieces,
    write_decoder,
    write_lists,
    write_pieces,
    write_task,
)

torch.set_num_threads(1)  # the models are tiny: more threads would only wait for each other

try:  # pytest tests/programs/test_fuzz.py --hypothesis-profile=long
    from hypothesis import HealthCheck, settings

    settings.register_profile("long", max_examples=10_000, deadline=5000)
    settings.register_profile(
        "short",
        max_examples=50,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("short")
except ImportError:
    pass

# The programs make their help texts from their source. Reading it takes most of the time that a
# refused command line takes, so each class is read once in a session.
program.inspect = types.SimpleNamespace(getsource=functools.cache(inspect.getsource))


def pytest_collection_finish():
    """Spare the programs' searches for garbage what the session has imported."""
    gc.freeze()


# ------------------------------------------------------------------------------------- real data


def folder_of(variable):
    """Return a fixture for the folder that an environment variable names."""

    @pytest.fixture(scope="session")
    def folder():
        if not os.environ.get(variable):
            pytest.skip(f"{variable} is not set")
        return Path(os.environ[variable])

    return folder


sni_dir = folder_of("SNI_DIR")  # the real Super-NaturalInstructions (tasks/, splits/)
smollm2_dir = folder_of("SMOLLM2_DIR")  # what `python -m experiments.smollm2 --out DIR` has made
golden_dir = folder_of("SNI_GOLDEN")  # prompts.jsonl and metrics.jsonl, made with official code


# ---------------------------------------------------------------------------------- the programs


@pytest.fixture(autouse=True)
def fresh_start(tmp_path, monkeypatch):
    """Let each test begin in an empty folder, and draw the same numbers whatever ran before it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def home(tmp_path):
    """Return an empty folder with the bundled data and base."""
    return links(tmp_path)


@pytest.fixture(scope="module")
def short_answers():
    """Let answers have at most 8 tokens. Use it in modules that take no `finished`."""
    with mock.patch.object(DataConfig, "max_new_tokens", 8):
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return a folder with `run`, a finished run of OrchMoE. Tests must not change it."""
    folder = links(tmp_path_factory.mktemp("finished"))
    run(f"train.py {SHORT} --out run", cwd=folder)
    return folder


@pytest.fixture(scope="session")
def decoder_dir(tmp_path_factory):
    """Return a folder with a random decoder and its tokenizer."""
    sizes = {"vocab_size": 400, "max_position_embeddings": 2048}
    folder = tmp_path_factory.mktemp("llama")
    return write_decoder(folder, write_pieces, std=0.6, **sizes)


@pytest.fixture
def copied(finished, tmp_path):
    """Return a copy of that run, which tests may change. Its parent is the working folder."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def little_memory():
    """Fail if the process grows by 500 MB or more, including what hypothesis remembers."""
    with contextlib.suppress(OSError):  # Linux: reset the peak, which an earlier test may have set
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


# ------------------------------------------------------------------------------------ the models


@pytest.fixture
def small_t5():
    """Return a random v1.1-shaped T5 in float64. Its outputs differ clearly between samples."""
    base = T5(SMALL_T5)
    init_weights(base, 0)
    return base.double().eval()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def inputs():
    """Return a batch for `small_t5`."""
    return random_batch(2, 60)


@pytest.fixture
def examples(inputs):
    """Return the rows of `inputs` as examples."""
    return examples_of(inputs)


@pytest.fixture(params=LLAMA_FAMILIES, scope="module")
def llama_pair(request, tmp_path_factory):
    """Return a model in the class of transformers and, from a folder in shards, in ours."""
    model = hf_llama(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model, checkpoint.load(folder)


@pytest.fixture
def llama_batch():
    """Return a batch for the models of LLAMA_FAMILIES."""
    return random_batch(10, 97)


# --------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Return a folder with a small spiece.model like T5's."""
    folder = tmp_path_factory.mktemp("model")
    train_pieces(
        folder / "spiece",
        [*sentences(2000), "Definition: Input: Output: Positive Example 1 - 2"],
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        num_threads=1,
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    """Return the tokenizer of `model_dir`."""
    return load_tokenizer(model_dir)


@pytest.fixture(scope="session")
def tiny_words():
    """Return the tokenizer of the bundled base."""
    return load_tokenizer(ROOT / "tiny")


@pytest.fixture
def repository(tmp_path):
    """Return a folder with three training tasks, a test task, and files that are no tasks."""
    folder = tmp_path / "sni"
    for name, n in (("task3_c", 10), ("task1_a", 30), ("task2_b", 40), ("task9_t", 3)):
        write_task(folder, name, task_json(n))
    for name in ("README.md", ".DS_Store", "task1_a.json.swp"):
        (folder / "tasks" / name).write_bytes(b"\xff not a task")
    write_lists(folder, ["task3_c", "task1_a", "task2_b"], ["task9_t"])
    return folder


# ------------------------------------------------------------------------------------- the browser

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
    """Return the browser with the annotated page, which must not write to the console."""
    browser.get((ROOT / "docs/annotated.html").as_uri())
    yield browser
    assert not browser.get_log("browser")
