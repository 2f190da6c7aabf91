"""integrations/trainer.py: the adapters under transformers' Trainer and Seq2SeqTrainer and under
TRL's SFTTrainer, on a tiny random Llama and T5 on the CPU.

This file is also the program that torchrun starts in the test of two processes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import PYTHONPATH, ROOT, stir

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from integrations.trainer import ADAPTER_FILE, RoutedTraining, prompt_mask  # noqa: E402
from orchmoe import OrchMoEConfig, attach, mix_skills  # noqa: E402

datasets.disable_progress_bars()
pytestmark = [
    # transformers renames it to activation_checkpointing; both names work until version 6.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]

WORDS = ["red", "blue", "green", "cold"]
LLAMA_TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj")
T5_TARGETS = ("q", "v", "o", "wo")


class RoutedTrainer(RoutedTraining, transformers.Trainer):
    pass


class RoutedSeq2SeqTrainer(RoutedTraining, transformers.Seq2SeqTrainer):
    pass


class RoutedSFTTrainer(RoutedTraining, trl.SFTTrainer):
    pass


# ---- tiny models and data ----


def make_tokenizer():
    """Return a tokenizer of bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<end>", "<pad>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return tokenizer


TOKENIZER = make_tokenizer()


def make_llama(width=32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    return transformers.LlamaForCausalLM(config)


def make_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=258,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,  # draws random numbers, which a resumed run must draw again
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
        decoder_start_token_id=TOKENIZER.pad_token_id,
    )
    return transformers.T5ForConditionalGeneration(config)


def adapted(model, mix=mix_skills, **options):
    """Return the model with adapters of 4 tasks; options go to OrchMoEConfig."""
    targets = T5_TARGETS if model.config.is_encoder_decoder else LLAMA_TARGETS
    config = OrchMoEConfig(**{"tasks": 4, "targets": targets, "alpha": 8.0, **options})
    attach(model, config, mix, generator=torch.Generator().manual_seed(1))
    return model


def prompt(i):
    return f"{'ab'[i % 2] * (i % 3)} {i}: say {WORDS[i % 4]}"


def word(i):
    return f" {WORDS[i % 4]}"


def text_rows(answer=word):
    """Return rows of a decoder for SFTTrainer."""
    return [{"prompt": prompt(i), "completion": answer(i)} for i in range(32)]


def chat_rows(answer=word):
    """Return the same as messages."""
    rows = []
    for row in text_rows(answer):
        question = {"role": "user", "content": row["prompt"]}
        reply = {"role": "assistant", "content": row["completion"]}
        rows.append({"prompt": [question], "completion": [reply]})
    return rows


def whole_text_rows():
    """Return rows that do not say what is the prompt."""
    return [{"text": row["prompt"] + row["completion"]} for row in text_rows()]


def token_rows(answer=word):
    """Return rows of a decoder for Trainer: the labels of the prompt are -100."""
    rows = []
    for row in text_rows(answer):
        source = TOKENIZER(row["prompt"]).input_ids
        target = TOKENIZER(row["completion"] + "<end>").input_ids
        rows.append({"input_ids": source + target, "labels": [-100] * len(source) + target})
    return rows


def seq2seq_rows():
    """Return rows of an encoder-decoder for Trainer."""
    rows = []
    for row in text_rows():
        source = TOKENIZER(row["prompt"]).input_ids
        rows.append(
            {"input_ids": source, "labels": TOKENIZER(row["completion"] + "<end>").input_ids}
        )
    return rows


def settings(folder, **options):
    """Return arguments that all three kinds of settings take."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 0.03,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,  # SFTConfig has it on
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }


def make_sft(folder, model=None, rows=None, **options):
    model = model or adapted(make_llama())
    data = datasets.Dataset.from_list(rows or text_rows())
    args = trl.SFTConfig(**settings(folder, **options))
    return RoutedSFTTrainer(
        model, args, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer()
    )


def make_trainer(folder, model=None, rows=None, **options):
    model = model or adapted(make_llama())
    args = transformers.TrainingArguments(**settings(folder, **options))
    rows = rows or token_rows()
    collator = transformers.DataCollatorForSeq2Seq(TOKENIZER)
    return RoutedTrainer(model, args, collator, train_dataset=rows, eval_dataset=rows)


def make_seq2seq(folder, model=None, **options):
    model = model or adapted(make_t5())
    args = transformers.Seq2SeqTrainingArguments(**settings(folder, **options))
    collator = transformers.DataCollatorForSeq2Seq(TOKENIZER, model)
    rows = seq2seq_rows()
    return RoutedSeq2SeqTrainer(model, args, collator, train_dataset=rows, eval_dataset=rows)


def base_for(make):
    """Return the base that this maker of a trainer takes."""
    return make_t5() if make is make_seq2seq else make_llama()


MAKE = {"SFTTrainer": make_sft, "Trainer": make_trainer, "Seq2SeqTrainer": make_seq2seq}
every_trainer = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
both_families = pytest.mark.parametrize("make", [make_sft, make_seq2seq], ids=["llama", "t5"])

# For comparing two ways to one result: rounding changes Adam's steps by a share of the rate.
SMALL_RATE = 3e-3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # of two orders of summation in float32


def state_of(trainer):
    state = trainer.model.skill_adapters.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def base_of(model):
    return {name: p.clone() for name, p in model.named_parameters() if "skill_" not in name}


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# ---- training ----


@every_trainer
def test_the_loss_falls_and_the_base_stays(make, tmp_path):
    trainer = make(tmp_path, max_steps=20, weight_decay=0.01)
    base = base_of(trainer.model)
    trainer.fit_router()
    start = state_of(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]

    assert_equal(base_of(trainer.model), base)
    fixed = {"router.mu", "router.sd"}
    unchanged = {
        name for name, tensor in state_of(trainer).items() if torch.equal(tensor, start[name])
    }
    assert unchanged == fixed


def test_each_kind_of_parameter_has_its_rate(tmp_path):
    trainer = make_trainer(tmp_path, weight_decay=0.01)
    optimizer = trainer.create_optimizer()
    found = {}
    kinds = ("skills", "router", "token_router", "allocation")
    for kind, group in zip(kinds, optimizer.param_groups, strict=True):
        found[kind] = (group["lr"], group["weight_decay"], len(group["params"]))
    linears = len(trainer.model.skill_adapters.linears)
    assert found == {
        "skills": (0.03, 0.01, 2 * linears),
        "router": (2e-5, 0.01, 2),
        "token_router": (1e-2, 0.01, 0),
        "allocation": (1e-2, 0.01, 1),
    }


def test_fit_router_reads_the_prompts_of_the_training_data(tmp_path):
    """It is the router that all prompts by themselves, without answers and padding, start."""
    trainer = make_sft(tmp_path)
    trainer.fit_router()
    router = trainer.model.skill_adapters.router
    embed = trainer.model.get_input_embeddings()
    features = []
    for i in range(32):
        ids = torch.tensor([TOKENIZER(prompt(i)).input_ids])
        features.append(router.summarise(embed(ids)))
    torch.testing.assert_close(router.mu, torch.cat(features).mean(0))


@both_families
def test_gradient_checkpointing_changes_nothing(make, tmp_path):
    calls = []

    def counted(*arguments):
        calls.append(1)
        return mix_skills(*arguments)

    states, counts = [], []
    for checkpointing in (False, True):
        model = adapted(base_for(make), counted)
        options = {"gradient_checkpointing": checkpointing, "learning_rate": SMALL_RATE}
        trainer = make(tmp_path, model, max_steps=3, **options)
        calls.clear()
        trainer.train()
        states.append(state_of(trainer))
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0], "every Linear must have run twice"
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, **CLOSE)


def test_gradient_accumulation_is_the_large_batch(tmp_path):
    options = {"max_steps": 3, "learning_rate": SMALL_RATE}
    whole = make_sft(tmp_path, **options)
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = make_sft(tmp_path, **options)
    whole.train()
    parts.train()
    expected = state_of(whole)
    for name, tensor in state_of(parts).items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE)


@both_families
def test_in_bfloat16_the_loss_falls_and_the_adapters_stay_float32(make, tmp_path):
    """Autocast, over a base in bfloat16."""
    model = adapted(base_for(make).bfloat16())
    trainer = make(tmp_path, model, bf16=True, max_steps=20)
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    assert {tensor.dtype for tensor in state_of(trainer).values()} == {torch.float32}


def test_noise_is_drawn_in_training_alone(tmp_path, monkeypatch):
    """The first step after an evaluation is routed in training mode as well."""
    trainer = make_sft(
        tmp_path,
        adapted(make_llama(), gumbel=True),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
    )
    adapters = trainer.model.skill_adapters
    modes = []
    routed = adapters.routed

    def recorded(*args, **kwargs):
        modes.append(adapters.training)
        return routed(*args, **kwargs)

    monkeypatch.setattr(adapters, "routed", recorded)
    trainer.train()
    step_and_evaluation = [True, False, False, False, False]  # of four batches
    assert modes == step_and_evaluation * 3


# ---- checkpoints ----


@every_trainer
def test_a_resumed_run_continues_bit_for_bit(make, tmp_path):
    """With Gumbel noise, dropout of the router and (in T5) of the base, in the second epoch."""

    def fresh(name):
        model = adapted(base_for(make), gumbel=True, router_dropout=0.3)
        options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        return make(tmp_path / name, model, gradient_accumulation_steps=2, **options)

    whole = fresh("run")
    whole.fit_router()
    whole.train()

    folder = tmp_path / "run" / "checkpoint-3"
    names = {path.name for path in folder.iterdir()}
    assert ADAPTER_FILE in names and not any("model" in name for name in names)
    saved = torch.load(folder / ADAPTER_FILE)["state"]
    assert saved.keys() == state_of(whole).keys()
    assert not torch.equal(saved["Z"], state_of(whole)["Z"])

    resumed = fresh("again")
    resumed.train(resume_from_checkpoint=str(folder))
    assert losses(resumed) == losses(whole)  # the log of the first three steps is in the checkpoint
    assert_equal(state_of(resumed), state_of(whole))


def logits(model):
    """Return the logits of four rows, routed by their prompts."""
    rows = seq2seq_rows() if model.config.is_encoder_decoder else token_rows()
    collator = transformers.DataCollatorForSeq2Seq(TOKENIZER, model)
    batch = collator(rows[:4])
    mask = batch["attention_mask"]
    if not model.config.is_encoder_decoder:
        mask = prompt_mask(batch["labels"], mask)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    model.eval()
    with torch.no_grad(), model.skill_adapters.routed(embeddings, mask):
        return model(**batch).logits


@every_trainer
def test_the_saved_adapter_gives_the_same_logits_on_a_fresh_base(make, tmp_path):
    trainer = make(tmp_path)
    trainer.fit_router()
    trainer.train()
    trainer.save_model()
    model = base_for(make)
    saved = torch.load(tmp_path / ADAPTER_FILE)
    attach(model, OrchMoEConfig(**saved["config"])).load_state_dict(saved["state"])
    expected = logits(trainer.model)
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        model.skill_adapters.Z.mul_(-1)
    assert not torch.allclose(logits(model), expected)


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = make_trainer(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the first is the best
        max_steps=3,
        **options,
    )
    trainer.train()
    best = torch.load(tmp_path / "checkpoint-1" / ADAPTER_FILE)["state"]
    last = torch.load(tmp_path / "checkpoint-3" / ADAPTER_FILE)["state"]
    assert not torch.equal(best["Z"], last["Z"])
    assert_equal(state_of(trainer), best)


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=3, max_steps=3)
    trainer.train()
    other = make_trainer(tmp_path, adapted(make_llama(), alpha=2.0))
    with pytest.raises(ValueError, match="attach with the same config"):
        other.train(resume_from_checkpoint=True)


# ---- the router reads no answer ----


def recorded_routings(trainer, monkeypatch):
    """Train, and return {prompt: w (K,)} of all rows that were trained on."""
    adapters = trainer.model.skill_adapters
    found = {}
    step = trainer.training_step

    def recorded(model, inputs, *args, **kwargs):
        with torch.no_grad(), trainer.routed(inputs) as routing:
            w = routing.w
        mask = trainer.router_mask(inputs)
        for row in range(len(w)):
            text = TOKENIZER.decode(inputs["input_ids"][row][mask[row]])
            found[text] = w[row]
        return step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", recorded)
    adapters.requires_grad_(False)  # the router stays as it is, so that all steps compare
    trainer.train()
    return found


ROWS = {
    "text": (make_sft, text_rows),
    "chat": (make_sft, chat_rows),
    "labels": (make_trainer, token_rows),
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_router_does_not_see_the_answer(kind, tmp_path, monkeypatch):
    """Other answers, even of other lengths, leave w as it is: that of the prompt in generation."""
    make, rows_of = ROWS[kind]
    routings = []
    for answer in (word, lambda i: " zz" * (1 + i % 5)):
        model = adapted(make_llama())
        torch.nn.init.normal_(model.skill_adapters.router.W_task, generator=torch.manual_seed(5))
        trainer = make(tmp_path, model, rows_of(answer), max_steps=4)
        routings.append(recorded_routings(trainer, monkeypatch))
    first, second = routings
    assert len(first) == 32 and first.keys() == second.keys()
    for text, w in first.items():
        torch.testing.assert_close(second[text], w, rtol=1e-5, atol=1e-6)
        alone = TOKENIZER(text, return_tensors="pt")
        with torch.no_grad(), trainer.routed(alone) as routing:
            torch.testing.assert_close(routing.w[0], w, rtol=1e-5, atol=1e-6)
    assert torch.stack(list(first.values())).std(0).max() > 0.05, "prompts must differ in w"


def test_the_prompt_ends_where_the_first_answer_starts():
    """A second turn without labels, padding on both sides, and a row without an answer."""
    ignored = -100
    labels = torch.tensor(
        [
            [ignored, ignored, 5, 6, ignored, ignored, 7],
            [ignored, ignored, ignored, 5, ignored, ignored, ignored],
            [ignored, ignored, ignored, ignored, ignored, ignored, ignored],
        ]
    )
    attention_mask = torch.tensor(
        [[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    )
    expected = [[1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    assert prompt_mask(labels, attention_mask).int().tolist() == expected
    assert prompt_mask(labels).int().tolist()[0] == expected[0]


REFUSED = {
    "text without a prompt": ({"rows": whole_text_rows()}, "labels: a row has no prompt"),
    "loss on the prompt": ({"completion_only_loss": False}, "labels: a row has no prompt"),
    "packing": ({"packing": True, "max_length": 64}, "packing: "),
    "wrapped": ({"packing": True, "max_length": 64, "packing_strategy": "wrapped"}, "packing: "),
}


@pytest.mark.filterwarnings("ignore")  # TRL advises another attention for packed rows
@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_have_no_one_prompt_are_refused(case, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make_sft(tmp_path, **options).train()


@pytest.mark.parametrize("router", ["token", "none"])
def test_without_a_router_of_samples_any_text_trains(router, tmp_path):
    model = adapted(make_llama(), router=router)
    trainer = make_sft(tmp_path, model, whole_text_rows(), max_steps=20)
    trainer.fit_router()
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="call attach"):
        make_trainer(tmp_path, make_llama())


# ---- generation ----


def test_beams_of_seq2seq_trainer_are_those_of_generate(tmp_path):
    model = adapted(make_t5())
    stir(model.skill_adapters, torch.Generator().manual_seed(3))
    options = {"generation_num_beams": 3, "generation_max_length": 9, "predict_with_generate": True}
    trainer = make_seq2seq(tmp_path, model, per_device_eval_batch_size=4, **options)
    trainer.fit_router()
    found = trainer.predict(trainer.eval_dataset[:4]).predictions
    collator = transformers.DataCollatorForSeq2Seq(TOKENIZER)
    batch = collator(seq2seq_rows()[:4])
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with trainer.routed(source, beams=3):
        expected = model.generate(**source, num_beams=3, max_length=9)
    assert found[:, : expected.shape[1]].tolist() == expected.tolist()
    assert len(expected.unique(dim=0)) > 1


# ---- A quantised base ----


def int8_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def nf4_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def int8_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def is_quantised(model):
    linears = model.skill_adapters.linears.values()
    return all(type(linear.weight) is not torch.nn.Parameter for linear in linears)


def as_plain(tensor):
    """Return the numbers of a weight, whether or not it is quantised by torchao."""
    return tensor.dequantize() if hasattr(tensor, "qdata") else tensor.detach()


QUANTISED = [int8_torchao, nf4_bitsandbytes, int8_bitsandbytes]


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("make_config", QUANTISED, ids=lambda make: make.__name__)
def test_skills_train_over_a_quantised_base(make_config, tmp_path):
    make_llama(width=64).save_pretrained(tmp_path / "base")  # bitsandbytes has blocks of 64 weights

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            dtype=torch.bfloat16,
            quantization_config=make_config(),
            device_map={"": "cpu"},
        )

    model = adapted(load())
    assert is_quantised(model)
    base = base_of(model)
    trainer = make_trainer(tmp_path, model, max_steps=20, gradient_checkpointing=True)
    trainer.fit_router()
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    for name, tensor in base_of(model).items():
        assert torch.equal(as_plain(tensor), as_plain(base[name])), name

    trainer.save_model()
    saved = torch.load(tmp_path / ADAPTER_FILE)
    fresh = load()
    attach(fresh, OrchMoEConfig(**saved["config"])).load_state_dict(saved["state"])
    assert torch.equal(logits(fresh), logits(model))

    source = TOKENIZER([prompt(1)], return_tensors="pt")
    with trainer.routed(source):
        new = model.generate(**source, max_new_tokens=5)[:, source["input_ids"].shape[1] :]
    assert new.shape[0] == 1 and 1 <= new.shape[1] <= 5
    with pytest.raises(ValueError, match="q_proj"):
        model.skill_adapters.merge(torch.full((4,), 0.25))


# ---- The page ----

PAGE = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_snippets_of_the_page_run_as_printed(tmp_path, monkeypatch):
    """The names that the Hub would resolve are local folders, and training is cut short."""
    pytest.importorskip("torchao")
    for name in ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-8B"):
        make_llama().save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    datasets.Dataset.from_list(text_rows()).to_json(tmp_path / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    shorter = "max_steps=2, use_cpu=True, bf16=False, report_to=[]"

    names = {}
    printed = [text for text in SNIPPETS if "RoutedSFTTrainer" in text or "trainer.routed" in text]
    assert len(printed) == 3
    for snippet in printed:
        exec(snippet.replace("max_steps=1000", shorter), names)
    assert (tmp_path / "run" / "checkpoint-2" / ADAPTER_FILE).exists()
    assert all(linear.skill_B.any() for linear in names["adapters"].linears.values())

    [quantised] = [text for text in SNIPPETS if "Int8WeightOnlyConfig" in text]
    exec(quantised, names)
    assert is_quantised(names["model"])


# ---- Two processes ----


def train_in_a_process(folder):
    """Train the Llama on the same eight rows a step, whatever the number of processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    model = adapted(make_llama())
    sources = [torch.tensor([TOKENIZER(prompt(i)).input_ids]) for i in range(32)]
    embed = model.get_input_embeddings()
    model.skill_adapters.fit_router(
        [embed(ids) for ids in sources], generator=torch.Generator().manual_seed(2)
    )
    options = {"ddp_backend": "gloo"} if processes > 1 else {}
    trainer = make_sft(
        folder,
        model,
        per_device_train_batch_size=8 // processes,
        save_strategy="steps",
        save_steps=4,
        max_steps=8,
        learning_rate=SMALL_RATE,
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    """To a tolerance of float32: sums in another order, enlarged by eight steps of Adam."""
    one = train_in_a_process(tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    program = [__file__, str(tmp_path / "two")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = PYTHONPATH
    done = subprocess.run(
        [*torchrun, "--standalone", "--nproc-per-node", "2", *program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "DistributedDataParallel in 2 processes" in done.stdout
    expected = state_of(one)
    found = torch.load(tmp_path / "two" / "checkpoint-8" / ADAPTER_FILE)["state"]
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE)


if __name__ == "__main__":
    trainer = train_in_a_process(Path(sys.argv[1]))
    if trainer.args.process_index == 0:
        kind = type(trainer.model_wrapped).__name__
        print(f"{kind} in {trainer.args.world_size} processes")
    # Threads of a process group that still lives when Python ends may abort the process.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
