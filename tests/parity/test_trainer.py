"""integrations/trainer.py: the adapters under transformers' Trainer and Seq2SeqTrainer and under
TRL's SFTTrainer, on a tiny random Llama and T5 on the CPU.

This file is also the program that torchrun starts in the test of two processes.
"""

import math
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers import (
    check_equal,
    interrupted,
    refusal,
    refused,
    run,
    seeded_generator,
    snippets,
    stir,
    text_of,
    torchrun,
    write_rows,
)

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import checkpoint  # noqa: E402
from baselines import LoRA  # noqa: E402
from integrations import finetune_7b  # noqa: E402
from integrations.export import attach_saved  # noqa: E402
from integrations.serve import HubTokenizer  # noqa: E402
from integrations.trainer import (  # noqa: E402
    ADAPTER_FILE,
    RoutedTraining,
    base_fingerprint,
    fingerprint,
    holds_several_samples,
    prompt_mask,
)
from orchmoe import OrchMoE, OrchMoEConfig, attach  # noqa: E402
from support.program import UserError, locked_folder, read_json  # noqa: E402
from variants import Noisy, TokenRouted  # noqa: E402

datasets.disable_progress_bars()
# transformers renames it to activation_checkpointing; both names work until version 6.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


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
IDS = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id}


def make_llama(width=32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=None,
        **IDS,
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
        decoder_start_token_id=TOKENIZER.pad_token_id,
        **IDS,
    )
    return transformers.T5ForConditionalGeneration(config)


def adapted(model, method=OrchMoE, **options):
    """Return the model with adapters of 4 tasks; options go to OrchMoEConfig."""
    targets = ("q_proj", "v_proj", "o_proj", "up_proj")
    if model.config.is_encoder_decoder:
        targets = ("q", "v", "o", "wo")
    config = OrchMoEConfig(**{"abstract_tasks": 4, "targets": targets, "alpha": 8.0, **options})
    attach(model, config, method=method, generator=seeded_generator(1))
    return model


WORDS = ["red", "blue", "green", "cold"]


PROMPTS = [f"{i}: say {WORDS[i % 4]}" for i in range(32)]
TEXT = []  # rows of a decoder for SFTTrainer
CHAT = []  # the same as messages
TOKENS = []  # rows of a decoder for Trainer: the labels of the prompt are -100
PAIRS = []  # rows of an encoder-decoder
for i, text in enumerate(PROMPTS):
    answer = f" {WORDS[i % 4]}"
    TEXT.append({"prompt": text, "completion": answer})
    question = {"role": "user", "content": text}
    reply = {"role": "assistant", "content": answer}
    CHAT.append({"prompt": [question], "completion": [reply]})
    source = TOKENIZER(text).input_ids
    target = TOKENIZER(answer + "<end>").input_ids
    TOKENS.append({"input_ids": source + target, "labels": [-100] * len(source) + target})
    PAIRS.append({"input_ids": source, "labels": target})


def tokens_of(prompts):
    """Return the input_ids and the attention_mask of prompts as a padded batch."""
    return TOKENIZER(prompts, padding=True, return_tensors="pt")


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
        **options,
    }


def make_sft(folder, model=None, rows=TEXT, **options):
    model = model or adapted(make_llama())
    data = datasets.Dataset.from_list(rows)
    args = trl.SFTConfig(**settings(folder, **options))
    return RoutedSFTTrainer(
        model, args, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer()
    )


def make_trainer(folder, model=None, rows=TOKENS, **options):
    """Return a Seq2SeqTrainer for an encoder-decoder, else a Trainer."""
    model = model or adapted(make_llama())
    trainer, arguments = RoutedTrainer, transformers.TrainingArguments
    if model.config.is_encoder_decoder:
        trainer, arguments = RoutedSeq2SeqTrainer, transformers.Seq2SeqTrainingArguments
        rows = PAIRS
    args = arguments(**settings(folder, **options))
    collator = transformers.DataCollatorForSeq2Seq(TOKENIZER)
    return trainer(model, args, collator, train_dataset=rows, eval_dataset=rows)


# A small rate, because Adam turns differences of rounding into a share of the rate.
SMALL_RATE = 3e-3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # of two orders of summation in float32


def state_of(trainer):
    state = trainer.model.skill_adapters.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# ---- training ----


@pytest.mark.parametrize("make, make_base", [(make_trainer, make_t5), (make_sft, make_llama)])
def test_training_lowers_the_loss_and_leaves_the_base(make, make_base, tmp_path):
    """With a base in bfloat16 under autocast, the adapters are still float32."""
    model = adapted(make_base().bfloat16())
    trainer = make(tmp_path, model, bf16=True, max_steps=10, weight_decay=0.01)
    base = make_base().bfloat16()
    trainer.fit_router()
    start = state_of(trainer)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * losses(trainer)[0]

    for name, weight in base.named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name
    for name, tensor in state_of(trainer).items():
        assert tensor.dtype == torch.float32, name
        is_fixed = name in ("router.mu", "router.sd")
        assert torch.equal(tensor, start[name]) == is_fixed, name


def test_a_router_that_was_not_fitted_gives_a_warning_before_it_trains(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match="call fit_router"):
        trainer.create_optimizer()
    trainer.optimizer = None
    trainer.fit_router()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.create_optimizer()


def test_create_optimizer_gives_each_kind_of_parameter_its_rate(tmp_path):
    trainer = make_trainer(tmp_path, weight_decay=0.01)
    groups = trainer.create_optimizer().param_groups
    linears = len(trainer.model.skill_adapters.linears)
    # Skills, router, token router and allocation.
    assert [len(group["params"]) for group in groups] == [2 * linears, 2, 0, 1]
    assert [group["lr"] for group in groups] == [0.03, 1e-3, 1e-2, 1e-1]
    assert [group["weight_decay"] for group in groups] == [0.01, 0, 0, 0]

    trainer.optimizer = None
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.5})
    assert isinstance(trainer.create_optimizer(), torch.optim.SGD)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.5, 1e-3, 1e-2, 1e-1]


def test_checkpointing_and_accumulation_change_nothing(tmp_path):
    """test_model.py tests checkpointing of our own models."""
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    states = []
    for options in ({}, {"gradient_checkpointing": True, **split}):
        trainer = make_sft(tmp_path, max_steps=2, learning_rate=SMALL_RATE, **options)
        trainer.train()
        states.append(state_of(trainer))
    torch.testing.assert_close(*states, **CLOSE)


def test_noise_is_drawn_only_in_training(tmp_path, monkeypatch):
    """The first step after an evaluation is routed in training mode as well."""
    model = adapted(make_llama(), Noisy)
    trainer = make_sft(tmp_path, model, max_steps=2, eval_strategy="steps", eval_steps=1)
    adapters = model.skill_adapters
    modes = []
    routed = adapters.routed

    def recorded(*args, **kwargs):
        modes.append(adapters.training)
        return routed(*args, **kwargs)

    monkeypatch.setattr(adapters, "routed", recorded)
    trainer.train()
    step_and_evaluation = [True, False, False, False, False]  # of four batches
    assert modes == step_and_evaluation * 2


# ---- checkpoints ----


def test_resumed_run_continues_bit_for_bit(tmp_path):
    """With Gumbel noise and dropout of the base, in the second epoch.

    The program for 7B, below, resumes under SFTTrainer.
    """

    def fresh(name):
        model = adapted(make_t5(), Noisy)
        options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
        return make_trainer(tmp_path / name, model, gradient_accumulation_steps=2, **options)

    whole = fresh("run")
    whole.fit_router()
    whole.train()

    folder = tmp_path / "run" / "checkpoint-3"
    assert not any("model" in path.name for path in folder.iterdir())
    saved = torch.load(folder / ADAPTER_FILE)
    assert OrchMoEConfig(**saved["config"]) == whole.model.skill_adapters.config
    assert not torch.equal(saved["state"]["Z"], state_of(whole)["Z"])

    resumed = fresh("again")
    resumed.train(resume_from_checkpoint=str(folder))
    assert losses(resumed) == losses(whole)  # the log of the first three steps is in the checkpoint
    check_equal(state_of(resumed), state_of(whole))
    resumed.save_model()
    check_equal(torch.load(tmp_path / "again" / ADAPTER_FILE)["state"], state_of(whole))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    """With greater_is_better the first checkpoint is the best, so that the last one is not."""
    each_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    each_step |= {"eval_steps": 1, "max_steps": 3}
    options = {"load_best_model_at_end": True, "greater_is_better": True}
    trainer = make_trainer(tmp_path, **each_step, **options)
    trainer.train()
    best = torch.load(tmp_path / "checkpoint-1" / ADAPTER_FILE)["state"]
    last = torch.load(tmp_path / "checkpoint-3" / ADAPTER_FILE)["state"]
    check_equal(state_of(trainer), best)
    assert not torch.equal(best["Z"], last["Z"])


def test_a_save_that_fails_leaves_the_adapters_that_were_saved(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    before = (tmp_path / ADAPTER_FILE).read_bytes()

    def save_half(saved, file):
        file.write(before[:99])
        raise OSError(28, "disk full")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_model()
    assert (tmp_path / ADAPTER_FILE).read_bytes() == before


def fine_tuned(model):
    """Return the model with one weight changed, in a Linear without adapters."""
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data[0, 0] += 1
    return model


@pytest.mark.parametrize(
    "other, message",
    [
        (
            lambda: adapted(make_llama(), alpha=2.0),
            "config changed, from .*; attach with the same config",
        ),
        (lambda: adapted(make_llama(), LoRA), "method changed, from OrchMoE to LoRA; attach with"),
        (
            lambda: adapted(fine_tuned(make_llama())),
            "base changed, from .*; load the base that it was",
        ),
    ],
)
def test_checkpoint_that_belongs_to_something_else_is_refused(other, message, tmp_path):
    make_trainer(tmp_path, adapted(make_llama())).save_model()
    with refusal(f"^{tmp_path}/adapter.pt: {message}"):
        make_trainer(tmp_path, other())._load_from_checkpoint(tmp_path)


def load_llama(folder, **options):
    """Return the Llama in `folder`. With options, its Linears are in few bits."""
    more = {}
    if options:
        quantisation = transformers.BitsAndBytesConfig(**options)
        more = {"quantization_config": quantisation, "device_map": {"": "cpu"}}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **more)


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}])
def test_base_is_known_by_all_its_weights_and_in_few_bits_by_its_files(options, tmp_path):
    """Without the files of a quantised base, its packed weights count."""
    pytest.importorskip("bitsandbytes")
    make_llama(width=64).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    fine_tuned(make_llama(width=64)).save_pretrained(tmp_path / "other")
    models = [load_llama(tmp_path / name, **options) for name in ("base", "base", "other")]
    of_files = fingerprint(checkpoint.read_folder(tmp_path / "base").values())
    first, second, other = map(base_fingerprint, models)
    assert first == second == of_files != other

    for model in models:
        model.name_or_path = "a/name-that-is-not-here"
    first, second, other = map(base_fingerprint, models)
    assert first == second != other
    assert (first == of_files) == (not options)


# ---- the router reads no answer ----

ROUTED = {
    "chat": (make_sft, CHAT, [f"u:{text}\na:" for text in PROMPTS]),
    "labels": (make_trainer, TOKENS, PROMPTS),
}


@pytest.mark.parametrize("make, rows, prompts", ROUTED.values(), ids=ROUTED)
def test_router_reads_only_the_prompts(make, rows, prompts, tmp_path, monkeypatch):
    """In fit_router, training and evaluation w is as in generation, so it depends on no answer."""
    model = adapted(make_llama())
    adapters = model.skill_adapters
    trainer = make(tmp_path, model, rows, max_steps=1, gradient_accumulation_steps=4)
    trainer.fit_router()
    source = tokens_of(prompts)
    embeddings = trainer.router_embeddings(source)
    x_hat = adapters.router.summarise(embeddings, source["attention_mask"])
    torch.testing.assert_close(adapters.router.mu, x_hat.mean(0))

    found = []
    route = adapters.route

    def recorded(*args, **kwargs):
        routing = route(*args, **kwargs)
        found.append(routing.w.detach())
        return routing

    monkeypatch.setattr(adapters, "route", recorded)
    with torch.no_grad(), trainer.routed(source):
        pass
    trainer.evaluate()
    trainer.train()
    # Trainer shuffles the rows.
    alone, *others = [torch.tensor(sorted(w.tolist())) for w in torch.cat(found).split(32)]
    for w in others:
        torch.testing.assert_close(w, alone, rtol=1e-5, atol=1e-6)
    assert len(others) == 2
    assert alone.std(0).max() > 0.05, "prompts must differ in w"


def test_the_first_prompt_routes_a_later_turn_as_in_training(tmp_path):
    """docs/use.md says so of conversations."""
    trainer = make_trainer(tmp_path, adapted(make_llama()))
    conversation = {"input_ids": torch.arange(5, 14)[None]}
    labels = conversation["input_ids"].clone()
    labels[:, :3] = labels[:, 5:7] = -100  # two prompts, each followed by an answer
    first = {name: ids[:, :3] for name, ids in conversation.items()}
    with torch.no_grad():
        with trainer.routed({**conversation, "labels": labels}) as in_training:
            pass
        with trainer.routed(first) as routing:
            generated = trainer.model.generate(**conversation, max_new_tokens=4, do_sample=False)
        with trainer.routed(conversation) as of_all:
            pass
    torch.testing.assert_close(routing.w, in_training.w)
    assert not torch.allclose(of_all.w, in_training.w, atol=1e-3)
    assert generated.shape == (1, 13)


def test_prompt_mask_ends_where_the_first_answer_starts():
    """A second turn without labels, padding on both sides, and a row without an answer."""
    labels = torch.tensor([[-1, 5, -1, 7], [-1, -1, 5, -1], [-1, -1, -1, -1]])
    labels[labels == -1] = -100
    attention_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]]
    assert prompt_mask(labels, attention_mask).int().tolist() == expected


def test_every_method_gets_the_mask_of_the_prompt(tmp_path):
    """A method of a user's own may have another kind of router."""
    trainer = make_trainer(tmp_path, adapted(make_llama(), LoRA))
    batch = next(iter(trainer.get_train_dataloader()))
    expected = prompt_mask(batch["labels"], batch["attention_mask"])
    assert 0 < expected.sum() < batch["attention_mask"].sum()
    assert torch.equal(trainer.router_mask(batch), expected)


def test_positions_of_padding_are_not_those_of_another_sample():
    packed, left, right = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 0, 0]])[:, None]
    assert holds_several_samples(packed)
    assert holds_several_samples(torch.tensor([[0, 0, 1]])), "a sample of one token is the first"
    assert holds_several_samples(packed, torch.ones(1, 4))
    assert not holds_several_samples(left, torch.tensor([[0, 0, 1, 1]]))
    assert not holds_several_samples(right, torch.tensor([[1, 1, 0, 0]]))


def with_a_trained_head():
    model = adapted(make_llama())
    model.lm_head.requires_grad_(True)
    return model


ANSWER_ALONE = {"input_ids": [5, 6], "labels": [5, 6]}
TWO_SAMPLES = {"input_ids": [5] * 4, "labels": [-100, 5, -100, 5], "position_ids": [0, 1, 0, 1]}
REFUSED = {
    "no adapters": (make_trainer, {"model": make_llama()}, "call attach"),
    "no prompt": (make_trainer, {"rows": [*TOKENS[:7], ANSWER_ALONE]}, "labels: a row has no"),
    "flattened": (make_trainer, {"rows": [TWO_SAMPLES] * 8}, "packing: "),
    "noise": (make_trainer, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: "),
    "a head": (make_trainer, {"model": with_a_trained_head()}, "lm_head.weight requires"),
    "packing": (make_sft, {"packing": True, "max_length": 64}, "packing: "),
    "padding_free": (make_sft, {"padding_free": True, "max_length": None}, "packing: "),
}


@pytest.mark.filterwarnings("ignore")  # TRL advises another attention for packed rows
@pytest.mark.parametrize("make, options, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_routed_is_refused(make, options, message, tmp_path):
    with refusal(message):
        make(tmp_path, **options).train()


def test_training_without_a_router_of_samples_takes_any_text(tmp_path):
    model = adapted(make_llama(), TokenRouted)
    trainer = make_sft(tmp_path, model, [{"text": text} for text in PROMPTS], max_steps=1)
    trainer.fit_router()
    trainer.train()
    assert all(skills.B.any() for skills in model.skill_adapters.skills.values())


# ---- generation ----


@pytest.mark.parametrize("place", ["args", "generation_config"])
def test_beams_of_seq2seq_trainer_are_those_of_generate(place, tmp_path):
    model = adapted(make_t5())
    stir(model.skill_adapters, seeded_generator(3))
    options = {"generation_max_length": 9, "predict_with_generate": True}
    if place == "args":
        options["generation_num_beams"] = 3
    trainer = make_trainer(tmp_path, model, per_device_eval_batch_size=4, **options)
    trainer.fit_router()
    if place == "generation_config":
        model.generation_config.num_beams = 3
    found = trainer.predict(PAIRS[:4]).predictions
    source = tokens_of(PROMPTS[:4])
    with trainer.routed(source, beams=3):
        expected = model.generate(**source, num_beams=3, max_length=9)
    assert found[:, : expected.shape[1]].tolist() == expected.tolist()
    assert len(expected.unique(dim=0)) > 1


# ---- integrations/export.py and integrations/serve.py ----


def test_a_prompt_that_spells_its_bos_out_gets_no_second_one(tmp_path):
    """A chat template of Llama or Mistral begins with it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<end>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", bos)]
    )
    tokenizer.save_pretrained(tmp_path)
    served = HubTokenizer(tmp_path)
    assert served.encode("ab") == served.encode("<end>ab") == [bos, *TOKENIZER("ab").input_ids]


@pytest.mark.parametrize("make_base", [make_llama, make_t5])
def test_exported_adapter_answers_as_the_trained_model(make_base, tmp_path):
    pytest.importorskip("peft")
    base = make_base()
    base.generation_config.repetition_penalty = 9.0  # serve.py is greedy without these
    base.generation_config.num_beams = 3
    base.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", adapted(make_base()))
    trainer.fit_router()
    model = trainer.model.eval()
    stir(model.skill_adapters, seeded_generator(3))
    trainer.save_model()
    export = "integrations/export.py --adapter run/adapter.pt --model base --out served"
    run(export)
    lora = read_json(tmp_path / "served/abstract-4/adapter_config.json")
    has_encoder = model.config.is_encoder_decoder
    assert lora["task_type"] == ("SEQ_2_SEQ_LM" if has_encoder else "CAUSAL_LM")

    serve = "integrations/serve.py --served served --base base --max-tokens 9 --prompt"
    prompts = [*PROMPTS[:3], "say <pad>"]  # the last has a token like that of padding
    answers = run(serve, *prompts)
    lines = []
    for prompt in prompts:
        source = tokens_of([prompt])
        with trainer.routed(source):
            row = model.generate(**source, max_new_tokens=9, do_sample=False)[0]
        start = 0 if has_encoder else source["input_ids"].shape[1]
        answer = TOKENIZER.decode(row[start:], skip_special_tokens=True)
        lines.append(f"{prompt} -> {answer}\n")
    assert answers == "".join(lines)
    assert len({line.partition("->")[2] for line in lines}) > 1


def test_the_table_of_a_t5_has_the_name_that_its_file_gives_it(tmp_path):
    model = make_t5()
    model.save_pretrained(tmp_path / "base")
    weights = checkpoint.read_folder(tmp_path / "base")
    weights["decoder.embed_tokens.weight"] = weights.pop("shared.weight").clone()
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    make_trainer(tmp_path / "run", adapted(model)).save_model()
    _, facts = attach_saved(tmp_path / "run" / ADAPTER_FILE, tmp_path / "base")
    assert facts["embedding"] == "decoder.embed_tokens.weight"


def test_a_base_some_of_whose_weights_stay_in_float32_is_known(tmp_path):
    """transformers loads a T5 in float16 without the weights `wo`, which would overflow."""
    model = make_t5()
    model.save_pretrained(tmp_path / "base")
    model.encoder.block[0].layer[1].DenseReluDense.wo.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    load = transformers.T5ForConditionalGeneration.from_pretrained
    base = load(tmp_path / "base", dtype=torch.float16)
    assert {weight.dtype for weight in base.state_dict().values()} == {torch.float16, torch.float32}
    make_trainer(tmp_path / "run", adapted(base)).save_model()
    path = tmp_path / "run" / ADAPTER_FILE
    attach_saved(path, tmp_path / "base")
    with refusal("it was trained on other weights", UserError):
        attach_saved(path, tmp_path / "other")


# ---- integrations/finetune_7b.py ----


def test_7b_takes_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with refusal("^CUDA_VISIBLE_DEVICES: set it to the number of one GPU", UserError):
        finetune_7b.load_base("base")


@pytest.fixture
def base_folder(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = make_llama(width=64)
    model.generation_config.num_beams = 3  # answers are greedy without it
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.filterwarnings("ignore")
def test_program_for_7b_trains_stops_resumes_and_answers(base_folder, tmp_path):
    """SIGTERM saves the step in which it arrives."""
    write_rows(tmp_path / "data.jsonl", TEXT)
    options = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2}
    options |= {"warmup_steps": 0, "learning_rate": 0.03}

    def fine_tune(checkpoint=None):
        model, tokenizer = finetune_7b.load_base(base_folder)
        rows = finetune_7b.read_rows(tmp_path / "data.jsonl")
        out = tmp_path / "run"
        finished = finetune_7b.fine_tune(model, tokenizer, rows, out, checkpoint, **options)
        return finished, model, tokenizer

    with interrupted(finetune_7b.RoutedSFTTrainer, "training_step", 5):  # in the third step
        assert not fine_tune()[0]
    assert not (tmp_path / "run/adapter.pt").exists()
    (tmp_path / "run/checkpoint-10").mkdir()  # it was not saved whole
    (tmp_path / "run/checkpoint-10/adapter.pt").touch()
    checkpoint = finetune_7b.last_checkpoint(tmp_path / "run")
    assert checkpoint.name == "checkpoint-3"
    finished, trained, tokenizer = fine_tune(checkpoint)
    assert finished
    found = torch.load(tmp_path / "run" / ADAPTER_FILE)

    # The program loads the adapters. Answers are as long as the file says.
    assert found["max_new_tokens"] == 127
    torch.save(found | {"max_new_tokens": 9}, tmp_path / "run" / ADAPTER_FILE)
    prompts = [PROMPTS[0], "Please " + PROMPTS[11]]
    answers = finetune_7b.answer(trained, tokenizer, prompts, 9)
    ask = ("integrations/finetune_7b.py --out run --model", base_folder, "--prompt", *prompts)
    said = run(*ask)
    lines = [f"{prompt} -> {reply}\n" for prompt, reply in zip(prompts, answers, strict=True)]
    assert said == "".join(lines)

    # In float32, padding changes nothing.
    plain = load_llama(base_folder)
    assert finetune_7b.load_adapters(plain, tmp_path / "run" / ADAPTER_FILE) == 9
    plain.float()
    alone = [finetune_7b.answer(plain, tokenizer, [prompt], 64)[0] for prompt in prompts]
    assert finetune_7b.answer(plain, tokenizer, prompts, 64) == alone

    # The adapters belong to the files of the base, also where they were trained over 4 bits.
    export = "integrations/export.py --adapter run/adapter.pt --out served --model"
    run(export, base_folder)
    fine_tuned(make_llama(width=64)).save_pretrained(base_folder)
    message = "run/adapter.pt: base changed, from "
    refused(message, f"{PROGRAM_7B} --out run --prompt a --model", base_folder)


PROGRAM_7B = "integrations/finetune_7b.py"


@pytest.mark.filterwarnings("ignore")
def test_program_for_7b_learns_from_one_step(base_folder, tmp_path):
    more = {"messages": [], "images": [], "input_ids": [1], "text": "x"}  # TRL would read these
    write_rows(tmp_path / "data.jsonl", [row | more for row in TEXT[:16]])
    said = run(f"{PROGRAM_7B} --data data.jsonl --out out --model", base_folder)
    assert said.endswith("written: out/adapter.pt\n")
    state = torch.load(tmp_path / "out/adapter.pt")["state"]
    assert all(B.any() for name, B in state.items() if name.endswith(".B"))


@pytest.mark.filterwarnings("ignore")
def test_rows_that_are_too_long_are_counted_and_infinite_weights_are_not_saved(
    base_folder, tmp_path, capsys
):
    rows = [*TEXT[:16], {"prompt": "a " * 1100, "completion": "b"}]
    rows += [{"prompt": "a", "completion": " b" * 1100}] * 2
    model, tokenizer = finetune_7b.load_base(base_folder)
    with refusal("is not finite; train into a new folder", UserError):
        finetune_7b.fine_tune(model, tokenizer, rows, tmp_path / "run", learning_rate=math.inf)
    said = capsys.readouterr().err
    assert "1 of 19 rows are left out" in said
    assert "2 of 19 rows have more than 1024 tokens and lose the end" in said
    assert not list((tmp_path / "run").rglob("adapter.pt"))

    model, tokenizer = finetune_7b.load_base(base_folder)
    with refusal("2 rows: each prompt alone has 1024 tokens or more", UserError):
        finetune_7b.fine_tune(model, tokenizer, [rows[16]] * 2, tmp_path / "long")


GOOD = {"prompt": "Hot is not", "completion": " cold"}
BAD_ROWS = [
    ({"prompt": "Hot is not"}, "completion must be a string, not None"),
    ({"prompt": "", "completion": "cold"}, "prompt: it is empty"),
]


@pytest.mark.parametrize("row, message", BAD_ROWS)
def test_a_bad_row_is_named(row, message, tmp_path):
    """test_tasks.py tests lines that are no rows."""
    write_rows(tmp_path / "a.jsonl", [GOOD] * 8 + [b"", row])
    with refusal(f"a.jsonl, line 10: {message}.*; repair the line", UserError):
        finetune_7b.read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data b.jsonl --out old", "old/adapter.pt: exists"),
        ("--data b.jsonl --out stopped", "stopped/checkpoint-2: exists"),
        ("--data b.jsonl --out written", "written/README.md: exists"),
        ("--data a.jsonl --out old --resume", "--resume: needs --data, and a checkpoint in old"),
        ("--data b.jsonl --out stopped --resume", "stopped/checkpoint-2/adapter.pt: damaged"),
        (
            "--data b.jsonl --out rows --resume",
            "rows/checkpoint-2/adapter.pt: rows changed, from 0 to",
        ),
        ("--data b.jsonl --out locked", "locked: another process is writing here; wait, or"),
        ("--prompt a --out new", "new/adapter.pt: does not exist; finish the training first"),
        ("--prompt a --out old", "old/adapter.pt: damaged"),
        ("--prompt \udcff --out old", "--prompt is not valid Unicode"),
        ("--data a.jsonl --out new", "a.jsonl: 7 rows are too few"),
        ("--data b.jsonl --out a.jsonl/new", "a.jsonl/new: Not a directory"),
    ],
)
def test_mistakes_are_found_before_a_7b_is_loaded(flags, message, tmp_path):
    write_rows(tmp_path / "a.jsonl", [GOOD] * 7)
    write_rows(tmp_path / "b.jsonl", [GOOD] * 8)
    for folder in ("old", "written", "stopped/checkpoint-2", "rows/checkpoint-2"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "trainer_state.json").write_text("{}")
    (tmp_path / "written/README.md").write_text("mine")
    (tmp_path / "old/adapter.pt").write_text("")
    torch.save(Path, tmp_path / "stopped/checkpoint-2/adapter.pt")
    saved = {"method": "OrchMoE", "config": vars(finetune_7b.ADAPTERS), "base": "0"}
    saved |= {"dtypes": {}, "state": {}, "rows": "0"}
    torch.save(saved, tmp_path / "rows/checkpoint-2/adapter.pt")
    with locked_folder(tmp_path / "locked", "wait"):
        refused(f"finetune_7b.py: error: {message}", f"{PROGRAM_7B} --model base {flags}")
    assert not (tmp_path / "new").exists()


# ---- The page ----


def test_snippets_of_the_page_run_as_printed(tmp_path, monkeypatch):
    """The name that the Hub would resolve is a local folder, and training has two steps."""
    name = tmp_path / "HuggingFaceTB/SmolLM2-135M"
    make_llama().save_pretrained(name)
    TOKENIZER.save_pretrained(name)
    datasets.Dataset.from_list(TEXT).to_json(tmp_path / "train.jsonl")
    original = transformers.TrainingArguments.__post_init__

    def shorter(args):
        args.max_steps = 2
        original(args)

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", shorter)

    section = text_of("docs/use.md").partition("\n## transformers' Trainer")[2].split("\n## ")[0]
    names = {}
    for snippet in snippets(section):
        exec(snippet, names)
    names["trainer"].train()
    for folder in ("run", "sft"):
        state = torch.load(tmp_path / folder / "checkpoint-2" / ADAPTER_FILE)["state"]
        assert all(B.any() for name, B in state.items() if name.endswith(".B"))


# ---- Two processes ----


def train_in_a_process(folder):
    """Train the Llama on the same eight rows a step, whatever the number of processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options = {"ddp_backend": "gloo"} if processes > 1 else {}
    trainer = make_sft(
        folder,
        per_device_train_batch_size=8 // processes,
        save_strategy="steps",
        save_steps=3,
        max_steps=3,
        learning_rate=SMALL_RATE,
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    """Two processes sum in another order, and three steps of Adam enlarge the difference."""
    one = train_in_a_process(tmp_path / "one")
    done = torchrun(2, __file__, "two")
    assert "DistributedDataParallel in 2 processes" in done.stdout
    found = torch.load(tmp_path / "two" / "checkpoint-3" / ADAPTER_FILE)["state"]
    torch.testing.assert_close(found, state_of(one), **CLOSE)


if __name__ == "__main__":
    trainer = train_in_a_process(Path(sys.argv[1]))
    if trainer.args.process_index == 0:
        kind = type(trainer.model_wrapped).__name__
        print(f"{kind} in {trainer.args.world_size} processes")
    # Threads of a process group that still lives when Python ends may abort the process.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
