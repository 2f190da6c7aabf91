"""Llama, Mistral, Qwen2, Qwen3: on random models of all families loss and greedy tokens equal transformers';
rows feel neither one another nor their padding; the cache changes nothing; adapters work, and their router
reads the prompt alone; configs that describe another computation are refused."""

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
from conftest import ROOT, command, environment, process, run, stir, trace
from test_tokenizer import write_words

import checkpoint
import data
import eval as evaluation
import orchmoe
import runtime
import tokenizer
from baselines import NoAdapter
from llama import Llama, LlamaConfig
from model import causal_attention

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 3,
         "pad_token_id": None}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
FAMILIES = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16, "eos_token_id": [3, 5, 8]}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_theta": 100_000}),
    "mistral": ("mistral", {"head_dim": 12, "sliding_window": None, "max_position_embeddings": 8192}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}


def theirs(name: str) -> torch.nn.Module:
    """A random model whose greedy choices are far enough apart to be compared."""
    kind, changes = FAMILIES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=FAMILIES, scope="module")
def folder(request, tmp_path_factory):
    """A folder in shards, as transformers writes it."""
    path = tmp_path_factory.mktemp(request.param)
    theirs(request.param).save_pretrained(path, max_shard_size="20KB")
    return path


@pytest.fixture(scope="module")
def pair(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval(), checkpoint.load(folder)


@pytest.fixture
def plain(tmp_path) -> Llama:
    theirs("llama2").save_pretrained(tmp_path / "plain")
    return checkpoint.load(tmp_path / "plain")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 97, (4, 9), generator=generator)
    labels = torch.randint(10, 97, (4, 6), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]
    labels[1, 3:] = labels[3, 2:] = -100
    return ids, mask, labels


def rows_of(batch):
    """(source, target) of each row, without padding, as batches of one."""
    for ids, mask, labels in zip(*batch, strict=True):
        yield ids[mask][None], labels[labels != -100][None]


def test_loss_is_that_of_transformers(pair, batch):
    model, own = pair
    for row, (source, target) in enumerate(rows_of(batch)):
        logits = model(torch.cat((source, target), 1)).logits[0, source.shape[1] - 1 : -1]
        expected = F.cross_entropy(logits, target[0], reduction="sum")
        one = own.loss(*(x[row : row + 1] for x in batch))  # padded, alone
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=0)


def test_loss_of_a_batch_is_the_sum_of_its_rows(pair, batch):
    own = pair[1]
    alone = sum(own.loss(source, torch.ones_like(source), target) for source, target in rows_of(batch))
    torch.testing.assert_close(own.loss(*batch), alone, rtol=1e-5, atol=0)


def test_greedy_tokens_are_those_of_transformers(pair, batch):
    model, own = pair
    got, options = own.generate(*batch[:2], max_new_tokens=20), {"do_sample": False, "pad_token_id": 0}
    for tokens, (source, _) in zip(got.tolist(), rows_of(batch), strict=True):
        mask = torch.ones_like(source)
        whole = model.generate(source, attention_mask=mask, max_new_tokens=20, **options)
        expected = whole[0, source.shape[1] :].tolist()
        assert tokens[: len(expected)] == expected
        assert set(tokens[len(expected) :]) <= {own.config.pad_token_id}


def until(config: LlamaConfig, *eos_ids: int) -> LlamaConfig:
    return dataclasses.replace(config, eos_ids=eos_ids)


def test_rows_end_at_any_eos_and_are_dropped(pair, batch):
    own = copy.deepcopy(pair[1])
    free = pair[1].generate(*batch[:2], max_new_tokens=6).tolist()
    own.config = until(own.config, free[1][0], free[2][2])
    ends = [next((i for i, token in enumerate(row) if token in own.config.eos_ids), 5) for row in free]
    kept = []
    got = own.generate(*batch[:2], max_new_tokens=6, on_keep=lambda rows: kept.append(len(rows)))
    for row, expected, end in zip(got.tolist(), free, ends, strict=True):
        assert row[: end + 1] == expected[: end + 1]
        assert set(row[end + 1 :]) <= {free[1][0]}
    assert kept and kept[0] < 4


def test_what_a_model_says_ends_at_any_eos(pair, batch):
    """Alone or not, though rows are filled up with the first EOS, which may be a word."""
    own, said = copy.deepcopy(pair[1]), []
    free = pair[1].generate(*batch[:2], max_new_tokens=6).tolist()
    own.config = until(own.config, free[1][0], free[2][2])
    ends = [next((i for i, token in enumerate(row) if token in own.config.eos_ids), 6) for row in free]
    words = SimpleNamespace(decode=lambda ids: [i for i in ids if i >= 0], eos_ids=own.config.eos_ids)
    examples = [data.Example("", "", "", source[0].numpy(), [target[0].numpy()], [])
                for source, target in rows_of(batch)]  # fmt: skip
    for some in (examples, *([example] for example in examples)):
        said += evaluation.predict(own, NoAdapter(own, full=False), some, words, max_new_tokens=6)
    assert said == 2 * [row[:end] for row, end in zip(free, ends, strict=True)] and min(ends) == 0


def test_cached_is_teacher_forced(pair, batch):
    own, targets = pair[1], batch[2].clamp(min=10)
    newest, state = own.start(*batch[:2], 6)
    for t in range(6):
        logits = own.step(newest, state)
        for row, (source, _) in enumerate(rows_of(batch)):
            whole = own.hidden(torch.cat((source, targets[row : row + 1, :t]), 1))
            torch.testing.assert_close(logits[row], own.logits(whole)[0, -1], rtol=1e-4, atol=1e-4)
        newest = targets[:, t]


def test_a_sample_alone_generates_as_in_a_mixed_batch(pair, batch):
    own = pair[1]
    mixed = own.generate(*batch[:2], max_new_tokens=12).tolist()
    for row, (source, _) in zip(mixed, rows_of(batch), strict=True):
        alone = own.generate(source, torch.ones_like(source), max_new_tokens=12)[0].tolist()
        assert row[: len(alone)] == alone


def test_neither_junk_in_the_padding_nor_its_side_matters(pair, batch):
    own, (ids, mask, labels) = pair[1], batch
    junk = torch.where(mask, ids, torch.randint(0, 97, ids.shape))
    left, left_mask = ids.clone(), mask.flip(1)
    for row in range(4):
        left[row, left_mask[row]] = ids[row, mask[row]]
    loss, tokens = own.loss(ids, mask, labels), own.generate(ids, mask, max_new_tokens=5)
    for other_ids, other_mask in ((junk, mask), (left, left_mask), (ids, mask.long())):
        assert torch.equal(own.loss(other_ids, other_mask, labels), loss)
        assert torch.equal(own.generate(other_ids, other_mask, max_new_tokens=5), tokens)


def test_checkpointed_and_compiled_blocks_give_the_same_gradients(pair, batch):
    gradients = []
    for way in ("plain", "checkpointed", "compiled"):
        own = copy.deepcopy(pair[1]).train()
        own.checkpoint_blocks = way == "checkpointed"
        seen, graphs = [], []
        if way != "compiled":
            own.blocks[0].up.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        else:
            torch._dynamo.reset()
            own.compile_blocks(lambda graph, _, graphs=graphs: graphs.append(graph) or graph.forward)
        for part in (batch, tuple(x[:2] for x in batch)):
            own.loss(*part).backward()
        assert graphs if way == "compiled" else len(seen) == (4 if own.checkpoint_blocks else 2)
        own.eval().generate(*batch[:2], max_new_tokens=2)
        gradients.append({name: p.grad for name, p in own.named_parameters()})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float32(pair, batch):
    own = copy.deepcopy(pair[1]).bfloat16()
    loss = own.loss(*batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pair[1].loss(*batch), rtol=0.1, atol=0)


@pytest.mark.parametrize("heads, groups, length", [(4, 4, 7), (9, 3, 50), (4, 1, 256), (4, 2, 257)])
def test_attention_of_short_rows_in_bfloat16_is_torch_s(heads, groups, length):
    torch.manual_seed(0)
    half = [torch.randn(2, n, length, 16).bfloat16().requires_grad_() for n in (heads, groups, groups)]
    exact = [x.detach().double().requires_grad_() for x in half]
    y, weight = causal_attention(*half), torch.randn(2, heads, length, 16)
    wanted = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    (y * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert y.dtype == torch.bfloat16
    for ours, due in zip((y, *(x.grad for x in half)), (wanted, *(x.grad for x in exact)), strict=True):
        assert (ours - due).norm() < 0.01 * due.norm()


def test_dropout_acts_in_training_alone(plain, batch):
    own, still = plain, plain.loss(*batch)
    own.set_dropout(0.5)
    assert torch.equal(own.loss(*batch), still)
    assert not torch.equal(own.train().loss(*batch), still)


def test_rows_that_cannot_be_computed_are_refused(plain, batch):
    own, (ids, mask, labels) = plain, batch
    mask = mask.clone()
    mask[1] = False
    for alone in (mask, torch.zeros_like(mask)):  # the second: a batch of targets and nothing else
        with pytest.raises(ValueError, match="a row has no source"):
            own.loss(ids, alone, labels)
        with pytest.raises(ValueError, match="a row has no source"):
            own.generate(ids, alone)
    long = torch.full((1, 60), 9)
    own.loss(long, long > 0, long[:, :4])
    with pytest.raises(ValueError, match="65 tokens, but the model has 64 positions"):
        own.loss(long, long > 0, long[:, :5])
    own.generate(long, long > 0, max_new_tokens=5)
    with pytest.raises(ValueError, match="65 tokens, but the model has 64 positions"):
        own.generate(long, long > 0, max_new_tokens=6)


# ------------------------------------------------------------------------------------------------- adapters


def adapted(model, **changes):
    own, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    return own, orchmoe.attach(own, orchmoe.OrchMoEConfig(**changes), generator=generator)


def test_adapters_start_as_the_base_and_then_train(pair, batch):
    own, adapters = adapted(pair[1])
    with adapters.routed(own.embed(batch[0]), batch[1]):
        loss = own.loss(*batch)
        assert torch.equal(loss, pair[1].loss(*batch))
        loss.backward()
    assert len(adapters.linears) == 4  # q and v of two blocks
    assert all(linear.skill_B.grad.abs().sum() > 0 for linear in adapters.linears.values())


def test_the_router_reads_the_prompt_alone(pair, batch):
    ids, mask, labels = batch
    own, adapters = adapted(pair[1])
    weights, losses = [], []
    stir(adapters, torch.Generator().manual_seed(2))
    for target in (labels, labels.where(labels == -100, 7)):
        one = data.Batch(ids, mask, target, torch.full((4,), -1), list("abcd"))
        with evaluation.routed(own, adapters, one) as routing:
            losses.append(own.loss(ids, mask, target))
            weights.append(routing.w)
    assert torch.equal(*weights) and not torch.equal(*losses)
    with adapters.routed(own.embed(ids.flip(1)), mask.flip(1)) as routing:  # another prompt's w is another
        assert torch.allclose(routing.w, weights[0])
    with adapters.routed(own.embed(ids + 1), mask) as routing:
        assert not torch.allclose(routing.w, weights[0])


@pytest.mark.parametrize("router", ["sample", "token"])
def test_adapted_samples_do_not_feel_one_another(pair, batch, router):
    own, adapters = adapted(pair[1], router=router, targets=("all",))
    stir(adapters.eval(), torch.Generator().manual_seed(2))
    with adapters.routed(own.embed(batch[0]), batch[1]):
        mixed = own.loss(*batch)
    with adapters.routed(own.embed(batch[0]), batch[1]):
        tokens = own.generate(*batch[:2], max_new_tokens=8, on_keep=adapters.keep).tolist()
    alone = 0
    for row, (source, target) in zip(tokens, rows_of(batch), strict=True):
        mask = torch.ones_like(source)
        with adapters.routed(own.embed(source), mask):
            alone = alone + own.loss(source, mask, target)
            expected = own.generate(source, mask, max_new_tokens=8)[0].tolist()
        assert row[: len(expected)] == expected
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=0)


# --------------------------------------------------------------------------------------- configs and folders


def test_folders_go_to_transformers_and_back_bit_for_bit(pair, tmp_path):
    model, own = pair
    checkpoint.save(own, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    back = checkpoint.load(tmp_path)
    assert back.config == own.config
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), back.parameters(), strict=True))


def test_a_copy_of_a_tied_table_is_no_head_and_another_is_refused(tmp_path):
    model = theirs("smollm2")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = model.state_dict()  # with lm_head.weight
    torch.save(weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
               tmp_path / "pytorch_model.bin")  # fmt: skip
    assert checkpoint.load(tmp_path).head is None
    torch.save(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="unexpected tensors: 'lm_head.weight'"):
        checkpoint.load(tmp_path)


def test_configs_survive_the_way_out_and_back(pair):
    model, own = pair
    values = own.config.to_hf()
    assert LlamaConfig.from_hf(values) == own.config
    assert LlamaConfig.from_hf(json.loads(json.dumps(values))) == own.config
    again = transformers.AutoConfig.for_model(**values)
    assert LlamaConfig.from_hf(again.to_dict()) == own.config
    assert again.rope_parameters == pytest.approx(model.config.rope_parameters)


SAID = {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "eos_token_id": 3}  # fmt: skip


@pytest.mark.parametrize(
    "place",
    [{"rope_theta": 500}, {"rope_parameters": {"rope_theta": 500, "rope_type": "default"}},
     {"rope_scaling": None, "rope_theta": 500}, {"rope_scaling": {"rope_theta": 500, "type": "default"}},
     {"rope_parameters": {"rope_theta": None}, "rope_theta": 500},
     {"rope_parameters": {"rope_theta": 500}, "rope_scaling": LLAMA3 | {"rope_theta": None}}],
)  # fmt: skip
def test_theta_is_read_wherever_it_stands(place):
    assert LlamaConfig.from_hf(SAID | place).rope_theta == 500


def test_what_a_config_may_leave_out():
    config = LlamaConfig.from_hf(SAID)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 10_000)
    assert LlamaConfig.from_hf(SAID | {"model_type": "qwen3"}).head_dim == 128
    unused = {"rope_parameters": {"rope_type": "default", "factor": 8.0}}
    assert LlamaConfig.from_hf(SAID | unused).factor == 1
    mistral = SAID | {"model_type": "mistral", "max_position_embeddings": 32768}
    assert LlamaConfig.from_hf(mistral).max_position_embeddings == 4096
    assert LlamaConfig.from_hf(mistral | {"sliding_window": None}).max_position_embeddings == 32768


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "change, said",
    [({"rope_scaling": YARN}, "rope_type 'yarn'"),
     ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
     ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
     ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention"),
     ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be float above 0"),
     ({"rope_scaling": {**LLAMA3, "factor": None}}, "factor must be float above 0, not None"),
     ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4.0 must be below"),
     ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_type 'yarn'"),
     ({"rope_scaling": YARN | {"type": "yarn", "rope_type": None}}, "rope_type 'yarn'"),
     ({"rope_scaling": 7}, "rope_parameters and rope_scaling must be objects, not"),
     ({"hidden_act": "gelu"}, "hidden_act 'gelu'"), ({"mlp_bias": True}, "mlp_bias True"),
     ({"use_sliding_window": True}, "use_sliding_window True"), ({"num_experts": 8}, "num_experts 8"),
     ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types 'sliding_attention'"),
     ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}"),
     ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
     ({"eos_token_id": None}, "eos_token_id"), ({"eos_token_id": []}, "eos_token_id"),
     ({"eos_token_id": [3, 97]}, "eos_token_id"), ({"head_dim": 7}, "head_dim 7 must be even"),
     ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide"),
     ({"hidden_size": "32"}, "hidden_size must be int above 0, not '32'"),
     ({"vocab_size": 9.5}, "vocab_size"), ({"rope_theta": float("nan")}, "rope_theta"),
     ({"model_type": "mistral", "sliding_window": "64"}, "sliding_window must be int, not '64'"),
     ({"num_hidden_layers": 0}, "num_hidden_layers"), ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
     ({"tie_word_embeddings": 1}, "tie_word_embeddings")],
)  # fmt: skip
def test_a_config_of_another_computation_is_refused_by_field_and_value(change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        LlamaConfig.from_hf(SAID | change)


# ------------------------------------------------------------------------------------------------ a real base


@pytest.mark.parametrize("count", [pytest.param(10, marks=pytest.mark.slow),
                                   pytest.param(50, marks=pytest.mark.soak)])  # fmt: skip
def test_smollm2_answers_real_prompts_as_transformers_has_it(count, smollm2_dir, sni_dir):
    own, words = checkpoint.load(smollm2_dir, dtype=torch.float32), tokenizer.load(smollm2_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    prompts = []
    for name in data.read_splits(sni_dir)["test"][:count]:
        task = data.read_task(sni_dir / "tasks" / f"{name}.json")
        prompts.append(data.render_prompt(task, task["instances"][0], words, max_source_length=400))
    sources = [words.source(prompt) for prompt in prompts]
    assert sources == [theirs(prompt.removesuffix(" "))["input_ids"] for prompt in prompts]
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sources], batch_first=True)
    mask = torch.arange(rows.shape[1]) < torch.tensor(list(map(len, sources)))[:, None]
    for start in range(0, count, 5):
        part = slice(start, start + 5)
        got = own.generate(rows[part], mask[part], max_new_tokens=20).tolist()
        for ids, tokens in zip(sources[part], got, strict=True):
            whole = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0]
            assert tokens[: len(whole) - len(ids)] == whole[len(ids) :].tolist()


@pytest.mark.soak
def test_smollm2_is_scored_answers_and_goes_on_after_a_kill(smollm2_dir, sni_dir, tmp_path):
    place = ["--data", sni_dir, "--device", "cpu"]
    run("eval.py", "--model", smollm2_dir, *place, "--max-tasks", "8", "--limit", "16", "--num-pos", "1",
        "--max-source-length", "256", "--max-new-tokens", "16", "--out", "scored", cwd=tmp_path)  # fmt: skip
    scores = json.loads((tmp_path / "scored/scores.json").read_text())
    assert scores["config"]["instances"] == 16 and 0 < scores["overall"]["rougeL"] < 100
    options = ["--model", smollm2_dir, *place, "--steps", "20", "--max-tasks", "4", "--train-instances", "10",
               "--batch-size", "4", "--max-source-length", "256", "--max-target-length", "32",
               "--eval-every", "5", "--eval-instances", "2"]  # fmt: skip
    process("train.py", *options, "--out", "whole", cwd=tmp_path)
    killed = subprocess.Popen(command("train.py", *options, "--out", "killed"), cwd=tmp_path,
                              env=environment(), stdout=subprocess.DEVNULL)  # fmt: skip
    log = tmp_path / "killed/metrics.jsonl"
    while not log.exists() or len(log.read_bytes().splitlines()) < 9:  # behind the first checkpoint
        time.sleep(0.02)
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    assert len(trace(tmp_path / "killed")) < 20
    process("train.py", "--resume", "--device", "cpu", "--out", "killed", cwd=tmp_path)
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    for name in ("adapter.safetensors", "scores.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    said = process("eval.py", "--run", "killed", "--device", "cpu", "--ask", "Answer yes or no.", "--input",
                   "Is the sky blue?", "--max-new-tokens", "8", cwd=tmp_path)  # fmt: skip
    assert "answer: " in said and "router: abstract task" in said


# --------------------------------------------------------------------------------------------- the programs


SHORT = ["--data", ROOT / "sni", "--device", "cpu", "--max-tasks", "2", "--train-instances", "8",
         "--steps", "2", "--batch-size", "4", "--eval-every", "1", "--eval-instances", "4",
         "--max-source-length", "384", "--out", "run"]  # fmt: skip


def base_folder(path, **changes):
    """A random model with a byte-level vocabulary."""
    task = json.loads(next((ROOT / "sni/tasks").glob("*.json")).read_text(encoding="utf-8"))
    write_words(path, [row["input"] for row in task["Instances"]])
    config = SAID | {"vocab_size": 512, "eos_token_id": 1, "max_position_embeddings": 512} | changes
    checkpoint.save(Llama(LlamaConfig.from_hf(config)), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["orchmoe", "full"])
def test_the_programs_run_on_it_as_on_any_other(tmp_path, method):
    model = base_folder(tmp_path / "model")
    out = run("train.py", "--model", model, "--method", method, *SHORT, cwd=tmp_path)
    assert f"| {method} |" in out
    cpu = ["--device", "cpu"]
    out = run("eval.py", "--run", "run", "--split", "seen", "--limit", "2", *cpu, cwd=tmp_path)
    assert "2 instances of" in out
    out = run("eval.py", "--run", "run", "--ask", "Say yes.", "--input", "no", *cpu, cwd=tmp_path)
    assert "answer: " in out and ("router: abstract task" in out) == (method == "orchmoe")


@pytest.mark.parametrize(
    "changes, said",
    [({"max_position_embeddings": 300}, "the model has 300 positions"),
     ({"model_type": "mistral", "sliding_window": 301}, "the model has 301 positions"),
     ({"vocab_size": 400}, "the model has 400; the tokenizer beside"),
     ({"eos_token_id": [2, 7]}, "the tokenizer's is (1,)")],
)  # fmt: skip
def test_examples_that_go_beyond_the_model_are_refused_before_the_first_step(tmp_path, changes, said):
    base_folder(tmp_path / "model", **changes)
    error = run("train.py", "--model", "model", *SHORT, cwd=tmp_path, code=2)
    assert said in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_question_longer_than_the_model_and_a_model_without_eos_are_one_line(tmp_path):
    path = base_folder(tmp_path / "model") / "config.json"
    ask = ["eval.py", "--model", "model", "--device", "cpu", "--ask", "Say yes.", "--input"]
    error = run(*ask, "x " * 600, cwd=tmp_path, code=2)
    cut, refused = error.splitlines()
    assert cut.startswith("warning: ") and cut.endswith("the end of the input is cut off")
    assert re.fullmatch(r"eval.py: error: rows of \d+ tokens, the model has 512 positions; .*", refused)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    error = run(*ask, "x", cwd=tmp_path, code=2)
    assert error == ("eval.py: error: model/config.json: eos_token_id (None,) must be token ids below "
                     "vocab_size\n")  # fmt: skip


NATIVE = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@pytest.mark.parametrize(
    "size, native, expected",
    [(5e7, NATIVE[:1], "bfloat16"), (5e7, NATIVE[1:], "bfloat16"), (3e7, NATIVE, "float32"),
     (5e7, (), "float32")],
)  # fmt: skip
def test_a_cpu_takes_bfloat16_where_it_gains(tmp_path, monkeypatch, size, native, expected):
    for name in NATIVE:
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in native, raising=False)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(int(size))
    place = runtime.pick_device(device="cpu", base=str(tmp_path))
    assert str(place.dtype) == f"torch.{expected}" and expected in place.reason
    for asked in ("float32", "bfloat16"):
        place = runtime.pick_device(device="cpu", dtype=asked, base=str(tmp_path))
        assert str(place.dtype) == f"torch.{asked}"
    for name in NATIVE:
        monkeypatch.delattr(torch.cpu, name)  # a torch that cannot tell
    assert runtime.pick_device(device="cpu", base=str(tmp_path)).dtype == torch.float32
