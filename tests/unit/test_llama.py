"""Llama, Mistral, Qwen2, Qwen3. On random models of all of them: rows depend neither on one another
nor on their padding; the cache changes nothing; adapters work, and their router reads the prompt
alone; configs that describe another computation are refused.

parity/test_transformers.py compares loss, greedy tokens and folders with those of transformers.
"""

import copy
import dataclasses
import json
import re
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import data
import eval as evaluation
import orchmoe
import runtime
from baselines import NoAdapter
from helpers import (
    LLAMA3_ROPE,
    ROOT,
    command,
    environment,
    hf_llama,
    process,
    rows_of,
    run,
    stir,
    trace,
    write_words,
)
from llama import Llama, LlamaConfig, causal_attention

pytest.importorskip("transformers")  # it makes the random models


@pytest.fixture
def plain(tmp_path) -> Llama:
    hf_llama("llama2").save_pretrained(tmp_path / "plain")
    return checkpoint.load(tmp_path / "plain")


def test_loss_of_a_batch_is_the_sum_of_its_rows(llama_pair, llama_batch):
    own = llama_pair[1]
    alone = 0
    for source, target in rows_of(llama_batch):
        alone += own.loss(source, torch.ones_like(source), target)
    torch.testing.assert_close(own.loss(*llama_batch), alone, rtol=1e-5, atol=0)


def with_early_eos(model: Llama, llama_batch):
    """Return a copy that ends at two tokens of its answers, and these answers (lists) without ends.

    One row ends at its first token, another no later than at its third.
    """
    free = model.generate(*llama_batch[:2], max_new_tokens=6).tolist()
    own = copy.deepcopy(model)
    own.config = dataclasses.replace(own.config, eos_ids=(free[1][0], free[2][2]))
    return own, free


def length_before_eos(row: list[int], eos_ids: tuple) -> int:
    for i, token in enumerate(row):
        if token in eos_ids:
            return i
    return len(row)


def test_rows_end_at_any_eos_and_are_dropped(llama_pair, llama_batch):
    own, free = with_early_eos(llama_pair[1], llama_batch)
    kept = []
    got = own.generate(
        *llama_batch[:2], max_new_tokens=6, on_keep=lambda rows: kept.append(len(rows))
    )
    for row, expected in zip(got.tolist(), free, strict=True):
        end = length_before_eos(expected, own.config.eos_ids) + 1  # EOS itself is kept
        assert row[:end] == expected[:end]
        assert set(row[end:]) <= {own.config.eos_ids[0]}
    assert kept and kept[0] < 4


def test_predictions_end_at_any_eos_alone_and_in_a_batch(llama_pair, llama_batch):
    """Rows are padded with the first EOS, which must not become part of a prediction."""
    own, free = with_early_eos(llama_pair[1], llama_batch)
    eos_ids = own.config.eos_ids
    expected = [row[: length_before_eos(row, eos_ids)] for row in free]
    assert min(len(row) for row in expected) == 0

    words = SimpleNamespace(decode=lambda ids: [i for i in ids if i >= 0], eos_ids=eos_ids)
    examples = []
    for source, target in rows_of(llama_batch):
        examples.append(data.Example("", "", "", source[0].numpy(), [target[0].numpy()], []))
    adapters = NoAdapter(own, full=False)
    assert evaluation.predict(own, adapters, examples, words, max_new_tokens=6) == expected
    for example, row in zip(examples, expected, strict=True):
        assert evaluation.predict(own, adapters, [example], words, max_new_tokens=6) == [row]


def test_cached_logits_equal_the_teacher_forced_ones(llama_pair, llama_batch):
    own, targets = llama_pair[1], llama_batch[2].clamp(min=10)
    newest, state = own.start(*llama_batch[:2], 6)
    for t in range(6):
        logits = own.step(newest, state)
        for row, (source, _) in enumerate(rows_of(llama_batch)):
            whole = own.hidden(torch.cat((source, targets[row : row + 1, :t]), 1))
            torch.testing.assert_close(logits[row], own.logits(whole)[0, -1], rtol=1e-4, atol=1e-4)
        newest = targets[:, t]


def test_a_sample_alone_generates_as_in_a_mixed_batch(llama_pair, llama_batch):
    own = llama_pair[1]
    mixed = own.generate(*llama_batch[:2], max_new_tokens=12).tolist()
    for row, (source, _) in zip(mixed, rows_of(llama_batch), strict=True):
        alone = own.generate(source, torch.ones_like(source), max_new_tokens=12)[0].tolist()
        assert row[: len(alone)] == alone


def test_neither_junk_in_the_padding_nor_its_side_matters(llama_pair, llama_batch):
    own = llama_pair[1]
    ids, mask, labels = llama_batch
    junk = torch.where(mask, ids, torch.randint(0, 97, ids.shape))
    left, left_mask = ids.clone(), mask.flip(1)
    for row in range(4):
        left[row, left_mask[row]] = ids[row, mask[row]]
    loss = own.loss(ids, mask, labels)
    tokens = own.generate(ids, mask, max_new_tokens=5)
    for other_ids, other_mask in ((junk, mask), (left, left_mask), (ids, mask.long())):
        assert torch.equal(own.loss(other_ids, other_mask, labels), loss)
        assert torch.equal(own.generate(other_ids, other_mask, max_new_tokens=5), tokens)


def test_checkpointed_and_compiled_blocks_give_the_same_gradients(llama_pair, llama_batch):
    def gradients(own):
        for part in (llama_batch, tuple(x[:2] for x in llama_batch)):
            own.loss(*part).backward()
        own.eval().generate(*llama_batch[:2], max_new_tokens=2)
        return {name: p.grad for name, p in own.named_parameters()}

    def counted(own):
        """Return a list that gets an entry for each forward of the first block."""
        calls = []
        own.blocks[0].up.register_forward_hook(lambda *_: calls.append(1) if own.training else None)
        return calls

    plain = copy.deepcopy(llama_pair[1]).train()
    calls = counted(plain)
    expected = gradients(plain)
    assert len(calls) == 2

    checkpointed = copy.deepcopy(llama_pair[1]).train()
    checkpointed.checkpoint_blocks = True
    calls = counted(checkpointed)
    torch.testing.assert_close(gradients(checkpointed), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4  # once more in each backward

    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = copy.deepcopy(llama_pair[1]).train()
    compiled.compile_blocks(backend)
    torch.testing.assert_close(gradients(compiled), expected, rtol=1e-4, atol=1e-5)
    assert graphs


def test_bfloat16_is_near_float32(llama_pair, llama_batch):
    own = copy.deepcopy(llama_pair[1]).bfloat16()
    loss = own.loss(*llama_batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, llama_pair[1].loss(*llama_batch), rtol=0.1, atol=0)


@pytest.mark.parametrize("heads, groups, length", [(4, 4, 7), (9, 3, 50), (4, 1, 256), (4, 2, 257)])
def test_attention_of_short_rows_in_bfloat16_equals_that_of_torch(heads, groups, length):
    torch.manual_seed(0)
    half, exact = [], []
    for n in (heads, groups, groups):
        x = torch.randn(2, n, length, 16).bfloat16()
        half.append(x.clone().requires_grad_())
        exact.append(x.double().requires_grad_())
    weight = torch.randn(2, heads, length, 16)
    y = causal_attention(*half)
    y_exact = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    (y * weight).sum().backward()
    (y_exact * weight).sum().backward()

    assert y.dtype == torch.bfloat16
    assert (y - y_exact).norm() < 0.01 * y_exact.norm()
    for ours, theirs in zip(half, exact, strict=True):
        assert (ours.grad - theirs.grad).norm() < 0.01 * theirs.grad.norm()


def test_rows_that_cannot_be_computed_are_refused(plain, llama_batch):
    ids, mask, labels = llama_batch
    mask = mask.clone()
    mask[1] = False
    for without in (mask, torch.zeros_like(mask)):  # one row without a source, or all
        with pytest.raises(ValueError, match="a row has no source"):
            plain.loss(ids, without, labels)
        with pytest.raises(ValueError, match="a row has no source"):
            plain.generate(ids, without)
    long = torch.full((1, 60), 9)
    plain.loss(long, long > 0, long[:, :4])
    with pytest.raises(ValueError, match="65 tokens, but the model has 64 positions"):
        plain.loss(long, long > 0, long[:, :5])
    plain.generate(long, long > 0, max_new_tokens=5)
    with pytest.raises(ValueError, match="65 tokens, but the model has 64 positions"):
        plain.generate(long, long > 0, max_new_tokens=6)


# ----------------------------------------------------------------------------------------- adapters


def adapted(model, **changes):
    own = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    return own, orchmoe.attach(own, orchmoe.OrchMoEConfig(**changes), generator=generator)


def test_adapters_start_as_the_base_and_then_train(llama_pair, llama_batch):
    own, adapters = adapted(llama_pair[1])
    with adapters.routed(own.embed(llama_batch[0]), llama_batch[1]):
        loss = own.loss(*llama_batch)
        assert torch.equal(loss, llama_pair[1].loss(*llama_batch))
        loss.backward()
    assert len(adapters.linears) == 4  # q and v of two blocks
    for linear in adapters.linears.values():
        assert linear.skill_B.grad.abs().sum() > 0


def test_the_router_reads_the_prompt_alone(llama_pair, llama_batch):
    ids, mask, labels = llama_batch
    own, adapters = adapted(llama_pair[1])
    weights, losses = [], []
    stir(adapters, torch.Generator().manual_seed(2))
    for target in (labels, labels.where(labels == -100, 7)):
        one = data.Batch(ids, mask, target, torch.full((4,), -1), list("abcd"))
        with evaluation.routed(own, adapters, one) as routing:
            losses.append(own.loss(ids, mask, target))
            weights.append(routing.w)
    assert torch.equal(*weights) and not torch.equal(*losses)
    with adapters.routed(own.embed(ids.flip(1)), mask.flip(1)) as routing:  # the same tokens
        assert torch.allclose(routing.w, weights[0])
    with adapters.routed(own.embed(ids + 1), mask) as routing:  # another prompt
        assert not torch.allclose(routing.w, weights[0])


@pytest.mark.parametrize("router", ["sample", "token"])
def test_adapted_samples_do_not_depend_on_one_another(llama_pair, llama_batch, router):
    own, adapters = adapted(llama_pair[1], router=router, targets=("all",))
    stir(adapters.eval(), torch.Generator().manual_seed(2))
    with adapters.routed(own.embed(llama_batch[0]), llama_batch[1]):
        mixed = own.loss(*llama_batch)
    with adapters.routed(own.embed(llama_batch[0]), llama_batch[1]):
        tokens = own.generate(*llama_batch[:2], max_new_tokens=8, on_keep=adapters.keep).tolist()
    alone = 0
    for row, (source, target) in zip(tokens, rows_of(llama_batch), strict=True):
        mask = torch.ones_like(source)
        with adapters.routed(own.embed(source), mask):
            alone = alone + own.loss(source, mask, target)
            expected = own.generate(source, mask, max_new_tokens=8)[0].tolist()
        assert row[: len(expected)] == expected
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------ configs and folders


def test_a_copy_of_a_tied_table_is_no_head_and_another_is_refused(tmp_path):
    model = hf_llama("smollm2")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = model.state_dict()  # with lm_head.weight
    path = tmp_path / "pytorch_model.bin"
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(weights | unused, path)
    assert checkpoint.load(tmp_path).head is None
    torch.save(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, path)
    with pytest.raises(ValueError, match="unexpected tensors.*lm_head.weight"):
        checkpoint.load(tmp_path)


VALUES = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 3,
}
PLACES_OF_THETA = [
    {"rope_theta": 500},
    {"rope_parameters": {"rope_theta": 500, "rope_type": "default"}},
    {"rope_scaling": None, "rope_theta": 500},
    {"rope_scaling": {"rope_theta": 500, "type": "default"}},
    {"rope_parameters": {"rope_theta": None}, "rope_theta": 500},
    {"rope_parameters": {"rope_theta": 500}, "rope_scaling": LLAMA3_ROPE | {"rope_theta": None}},
]


@pytest.mark.parametrize("change", PLACES_OF_THETA)
def test_theta_is_read_from_each_of_its_places(change):
    assert LlamaConfig.from_hf(VALUES | change).rope_theta == 500


def test_what_a_config_may_leave_out():
    config = LlamaConfig.from_hf(VALUES)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 10_000)
    assert LlamaConfig.from_hf(VALUES | {"model_type": "qwen3"}).head_dim == 128
    unused = {"rope_parameters": {"rope_type": "default", "factor": 8.0}}
    assert LlamaConfig.from_hf(VALUES | unused).factor == 1
    mistral = VALUES | {"model_type": "mistral", "max_position_embeddings": 32768}
    assert LlamaConfig.from_hf(mistral).max_position_embeddings == 4096
    assert LlamaConfig.from_hf(mistral | {"sliding_window": None}).max_position_embeddings == 32768


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
REFUSED = [
    ({"rope_scaling": YARN}, "rope_type 'yarn'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    ({"rope_scaling": {**LLAMA3_ROPE, "factor": None}}, "factor is missing"),
    ({"rope_scaling": {**LLAMA3_ROPE, "factor": "8"}}, "factor must be float, not '8'"),
    (
        {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4.0}},
        "low_freq_factor 4.0 must be below",
    ),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_type 'yarn'"),
    ({"rope_scaling": YARN | {"type": "yarn", "rope_type": None}}, "rope_type 'yarn'"),
    ({"rope_scaling": 7}, "rope_parameters and rope_scaling must be objects, not"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"use_sliding_window": True}, "use_sliding_window True"),
    ({"num_experts": 8}, "num_experts 8"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types 'sliding_attention'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"eos_token_id": None}, "eos_token_id"),
    ({"eos_token_id": []}, "eos_token_id"),
    ({"eos_token_id": [3, 97]}, "eos_token_id"),
    ({"head_dim": 7}, "head_dim 7 must be even"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide"),
    ({"hidden_size": "32"}, "hidden_size must be int, not '32'"),
    ({"vocab_size": 9.5}, "vocab_size"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"model_type": "mistral", "sliding_window": "64"}, "sliding_window must be int, not '64'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be above 0 and below 2^63, not 0"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_a_config_of_another_computation_is_refused_by_field_and_value(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LlamaConfig.from_hf(VALUES | change)


# -------------------------------------------------------------------------------------- a real base


@pytest.mark.soak
def test_smollm2_is_scored_answers_and_goes_on_after_a_kill(smollm2_dir, sni_dir, tmp_path):
    common = ["--model", smollm2_dir, "--data", sni_dir, "--device", "cpu"]
    common += ["--max-source-length", "256"]
    evaluate = ["eval.py", *common, "--max-tasks", "8", "--limit", "16", "--num-pos", "1"]
    run(*evaluate, "--max-new-tokens", "16", "--out", "scored", cwd=tmp_path)
    scores = json.loads((tmp_path / "scored/scores.json").read_text())
    assert scores["config"]["instances"] == 16 and 0 < scores["overall"]["rougeL"] < 100

    options = [*common, "--steps", "20", "--max-tasks", "4", "--train-instances", "10"]
    options += ["--batch-size", "4", "--max-target-length", "32"]
    options += ["--eval-every", "5", "--eval-instances", "2"]
    process("train.py", *options, "--out", "whole", cwd=tmp_path)
    killed = subprocess.Popen(
        command("train.py", *options, "--out", "killed"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    log = tmp_path / "killed/metrics.jsonl"
    while not log.exists() or len(log.read_bytes().splitlines()) < 9:  # after the first checkpoint
        time.sleep(0.02)
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    assert len(trace(tmp_path / "killed")) < 20
    process("train.py", "--resume", "--device", "cpu", "--out", "killed", cwd=tmp_path)
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    for name in ("adapter.safetensors", "scores.json"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == whole, name

    question = ["--ask", "Answer yes or no.", "--input", "Is the sky blue?"]
    evaluate = ["eval.py", "--run", "killed", "--device", "cpu", "--max-new-tokens", "8"]
    out = process(*evaluate, *question, cwd=tmp_path)
    assert "answer: " in out and "router: abstract task" in out


# ------------------------------------------------------------------------------------- the programs

SHORT = ["--data", ROOT / "sni", "--device", "cpu", "--max-tasks", "2", "--train-instances", "8"]
SHORT += ["--steps", "2", "--batch-size", "4", "--eval-every", "1", "--eval-instances", "4"]
SHORT += ["--max-source-length", "384", "--out", "run"]


def base_folder(path, **changes):
    """Return the folder of a random model with a byte-level vocabulary."""
    task = json.loads(next((ROOT / "sni/tasks").glob("*.json")).read_text(encoding="utf-8"))
    write_words(path, [row["input"] for row in task["Instances"]])
    sizes = {"vocab_size": 512, "eos_token_id": 1, "max_position_embeddings": 512}
    config = VALUES | sizes | changes
    checkpoint.save(Llama(LlamaConfig.from_hf(config)), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["orchmoe", "full"])
def test_the_programs_run_on_a_decoder_only_model(tmp_path, method):
    model = base_folder(tmp_path / "model")
    out = run("train.py", "--model", model, "--method", method, *SHORT, cwd=tmp_path)
    assert f"| {method} |" in out
    cpu = ["--device", "cpu"]
    out = run("eval.py", "--run", "run", "--split", "seen", "--limit", "2", *cpu, cwd=tmp_path)
    assert "2 instances of" in out
    out = run("eval.py", "--run", "run", "--ask", "Say yes.", "--input", "no", *cpu, cwd=tmp_path)
    assert "answer: " in out and ("router: abstract task" in out) == (method == "orchmoe")


BEYOND_THE_MODEL = [
    ({"max_position_embeddings": 300}, "the model has 300 positions"),
    ({"model_type": "mistral", "sliding_window": 301}, "the model has 301 positions"),
    ({"vocab_size": 400}, "the model has 400 tokens; the tokenizer in its folder"),
    ({"eos_token_id": [2, 7]}, "eos_token_id: config.json says (2, 7), the tokenizer (1,)"),
]


@pytest.mark.parametrize("changes, message", BEYOND_THE_MODEL)
def test_examples_beyond_the_model_are_refused_before_the_first_step(tmp_path, changes, message):
    base_folder(tmp_path / "model", **changes)
    error = run("train.py", "--model", "model", *SHORT, cwd=tmp_path, code=2)
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_question_longer_than_the_model_and_a_model_without_eos_are_one_line(tmp_path):
    path = base_folder(tmp_path / "model") / "config.json"
    ask = ["eval.py", "--model", "model", "--device", "cpu", "--ask", "Say yes.", "--input"]
    error = run(*ask, "x " * 600, cwd=tmp_path, code=2)
    cut, refused = error.splitlines()
    assert cut.startswith("warning: ") and cut.endswith("the end of the input is cut off")
    too_long = r"an example and its answer have up to \d+ tokens, but the model has 512 positions"
    assert re.fullmatch(rf"eval.py: error: .*{too_long}.*", refused)

    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    error = run(*ask, "x", cwd=tmp_path, code=2)
    expected = "eos_token_id (None,) must be one or more token ids below vocab_size"
    assert error.startswith(f"eval.py: error: model/config.json: {expected}")
    assert error.count("\n") == 1


NATIVE = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


CPUS = [
    (5e7, NATIVE[:1], "bfloat16"),
    (5e7, NATIVE[1:], "bfloat16"),
    (3e7, NATIVE, "float32"),
    (5e7, (), "float32"),
]


@pytest.mark.parametrize("size, native, expected", CPUS)
def test_a_cpu_uses_bfloat16_if_it_gains_from_it(tmp_path, monkeypatch, size, native, expected):
    for name in NATIVE:
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in native, raising=False)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(int(size))
    picked = runtime.pick_device(device="cpu", base=str(tmp_path))
    assert str(picked.dtype) == f"torch.{expected}" and expected in picked.description
    for dtype in ("float32", "bfloat16"):
        picked = runtime.pick_device(device="cpu", dtype=dtype, base=str(tmp_path))
        assert str(picked.dtype) == f"torch.{dtype}"
    for name in NATIVE:
        monkeypatch.delattr(torch.cpu, name)  # as in a torch that cannot tell
    assert runtime.pick_device(device="cpu", base=str(tmp_path)).dtype == torch.float32
