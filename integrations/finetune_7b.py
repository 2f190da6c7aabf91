"""Fine-tune a decoder of 7B on one GPU: a base in 4 bits, OrchMoE's adapters, TRL's SFTTrainer.

Each line of the data has a prompt and a completion, both text:

    {"prompt": "Hot is not", "completion": " cold"}

Training writes checkpoints into the folder --out, and --resume continues from the last one. In a
new process, --ask loads the adapters and answers prompts, which must be written as in the data.

    pip install transformers trl datasets bitsandbytes
    python -m integrations.finetune_7b --model Qwen3-8B --data train.jsonl --out run
    python -m integrations.finetune_7b --model Qwen3-8B --out run --ask "Hot is not" "Up is not"
    python -m integrations.export --adapter run/adapter.pt --model Qwen3-8B --out served

To use it elsewhere, copy this file, trainer.py and orchmoe.py.
Test: pytest tests/parity/test_trainer.py
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from integrations.trainer import ADAPTER_FILE, RoutedTraining
from orchmoe import OrchMoEConfig, attach

# "all": every Linear but the output head.
ADAPTERS = OrchMoEConfig(abstract_tasks=8, skills=4, rank=4, targets=("all",))


class RoutedSFTTrainer(RoutedTraining, SFTTrainer):
    rates = {"router": 2e-4, "token_router": 1e-2, "allocation": 1e-2}  # the skills: learning_rate


def load_base(name):
    """Return the frozen base on one device, its Linears in 4 bits, and its tokenizer."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    # Not "auto": a base that is spread over several GPUs is refused.
    device = 0 if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.bfloat16, quantization_config=four_bits, device_map={"": device}
    )
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")  # for generation
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def read_rows(path):
    """Return the rows of a JSONL file. Raise ValueError if a prompt or a completion is no text."""
    rows = load_dataset("json", data_files=str(path), split="train")
    for name in ("prompt", "completion"):
        values = rows[name] if name in rows.column_names else [None]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f'each line needs a "{name}" that is a text')
    return rows


def fine_tune(model, tokenizer, rows, out, resume, **options):
    """Train adapters on the rows, and write them into `out`. options: more for SFTConfig."""
    attach(model, ADAPTERS)
    settings = {
        "learning_rate": 2e-4,  # of the skills
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "num_train_epochs": 1,
        "warmup_steps": 20,
        "max_length": 1024,  # tokens; longer rows lose the end of their answer
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_steps": 100,
        "logging_steps": 10,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
    args = SFTConfig(str(out), **settings | options)
    trainer = RoutedSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    if not resume:
        trainer.fit_router(max_batches=256)  # 512 prompts
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()


def load_adapters(model, path):
    """Attach the adapters in the file `path` to the model."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    attach(model, OrchMoEConfig(**saved["config"])).load_state_dict(saved["state"])


@torch.no_grad()
def answer(model, tokenizer, prompts, max_new_tokens=64):
    """Return the greedy answers to the prompts, which form one batch."""
    model.eval()
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with model.skill_adapters.routed(embeddings, batch["attention_mask"]):
        rows = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    prompt_length = batch["input_ids"].shape[1]
    return tokenizer.batch_decode(rows[:, prompt_length:], skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="name on the Hub, or folder, of the base")
    parser.add_argument("--out", type=Path, required=True, help="folder of the training")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--data", help="JSONL file to train on")
    action.add_argument("--ask", nargs="+", metavar="PROMPT", help="prompts to answer")
    parser.add_argument("--resume", action="store_true", help="continue a stopped training")
    args = parser.parse_args()
    if args.data and args.out.exists() and not args.resume:
        parser.error(f"--out {args.out}: exists; name a new folder, or add --resume")
    if args.resume and not (args.data and any(args.out.glob("checkpoint-*"))):
        parser.error(f"--resume: needs --data, and a checkpoint in {args.out}; leave it out")
    if args.ask and not (args.out / ADAPTER_FILE).exists():
        parser.error(f"--out {args.out}: no {ADAPTER_FILE} here; finish the training first")
    try:
        rows = read_rows(args.data) if args.data else None
    except Exception as error:  # datasets has many ways to fail on a bad file
        parser.error(f"--data {args.data}: {error}")

    model, tokenizer = load_base(args.model)
    if args.data:
        fine_tune(model, tokenizer, rows, args.out, args.resume)
    else:
        load_adapters(model, args.out / ADAPTER_FILE)
        for prompt, reply in zip(args.ask, answer(model, tokenizer, args.ask), strict=True):
            print(f"{prompt} -> {reply}")


if __name__ == "__main__":
    main()
