"""Fine-tune a decoder of 7B on one GPU: a base in 4 bits, OrchMoE's adapters, TRL's SFTTrainer.

Each line of the data has a prompt and a completion, both text:

    {"prompt": "Hot is not", "completion": " cold"}

Training writes checkpoints into the folder --out. SIGTERM and Ctrl-C finish the step and save, and
--resume continues from the last checkpoint. In a new process, --prompt loads the adapters and
answers prompts, which must be written as in the data.

    pip install "transformers<5.25" trl datasets bitsandbytes
    python -m integrations.finetune_7b --model Qwen3-8B --data train.jsonl --out run
    python -m integrations.finetune_7b --model Qwen3-8B --out run --prompt "Hot is not" "Up is not"
    python -m integrations.export --adapter run/adapter.pt --model Qwen3-8B --out served

To use it elsewhere, copy this file, trainer.py, support/program.py and orchmoe.py.
Test: pytest tests/parity/test_trainer.py
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import torch

from integrations.trainer import (
    ADAPTER_FILE,
    RoutedTraining,
    base_fingerprint,
    read_adapter,
    require_same,
)
from orchmoe import OrchMoE, OrchMoEConfig, attach
from support import program
from support.program import UserError

try:
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TrainerCallback,
    )
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    packages = "'transformers<5.25' trl datasets bitsandbytes"  # see kernels.py
    print(f"finetune_7b.py: error: {error}; pip install {packages}", file=sys.stderr)
    sys.exit(2)

# "all": every Linear but the output head.
ADAPTERS = OrchMoEConfig(abstract_tasks=8, skills=4, rank=4, targets=("all",))
REMEDY = "give the --model, --data and --out of the training, or train again into a new --out"


class RoutedSFTTrainer(RoutedTraining, SFTTrainer):
    rates = {"router": 2e-4, "token_router": 1e-2, "allocation": 1e-2}  # the skills: learning_rate
    rows_digest = ""
    max_new_tokens = 0  # of an answer

    def bound_to(self):
        more = {"rows": self.rows_digest, "max_new_tokens": self.max_new_tokens}
        return super().bound_to() | more


class SaveAndStop(TrainerCallback):
    """End a training after the step in which a signal has arrived, with a checkpoint."""

    def __init__(self, stop_requested):
        self.stop_requested = stop_requested

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop_requested():
            control.should_save = True
            control.should_training_stop = True


def load_base(name):
    """Return the frozen base on one device, its Linears in 4 bits, and its tokenizer."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    if torch.cuda.device_count() > 1:
        raise UserError("CUDA_VISIBLE_DEVICES: set it to the number of one GPU; leave out torchrun")
    # Not "auto": a base that is spread over several GPUs was never trained.
    device = 0 if torch.cuda.is_available() else "cpu"
    with program.reading(name, "name a decoder of the Hub or its folder"):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.bfloat16,
            quantization_config=four_bits,
            device_map={"": device},
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            padding_side="left",  # for generation
            trust_remote_code=False,
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def read_row(row):
    """Return {"prompt", "completion"} of a row of the data, without any other fields."""
    row = {name: row.get(name) for name in ("prompt", "completion")}
    program.require_prompt("prompt", row["prompt"])
    program.require_text("completion", row["completion"])
    return row


def read_rows(path):
    """Return the rows of a JSONL file, see `read_row`.

    Raise UserError with the number of a bad line, or if there are too few lines.
    """
    rows = []
    for location, _, row in program.read_jsonl(path):
        with program.reading(location, "repair the line"):
            rows.append(read_row(row))
    if len(rows) < ADAPTERS.abstract_tasks:
        raise UserError(
            f"{path}: {len(rows)} rows are too few for a router of {ADAPTERS.abstract_tasks} "
            "abstract tasks; give hundreds"
        )
    return rows


def last_checkpoint(out):
    """Return the last checkpoint in the folder, or None. One that was not saved whole is left out.

    The Trainer writes trainer_state.json when all other files are there.
    """
    found = {}
    for path in out.glob("checkpoint-*/trainer_state.json"):
        if match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name):
            found[int(match[1])] = path.parent
    return found[max(found)] if found else None


def digest(rows):
    """Return 16 hex digits that tell these rows from others."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def count_tokens(row, tokenizer):
    """Return the number of tokens of a prompt, and that of the whole row as SFTTrainer makes it."""
    text = row["prompt"] + row["completion"]
    if not row["completion"].endswith(tokenizer.eos_token):
        text += tokenizer.eos_token
    return len(tokenizer(row["prompt"]).input_ids), len(tokenizer(text).input_ids)


def read_saved(path, **found):
    """Return what is in an adapter.pt. Raise UserError if it belongs to something else than found.

    found: facts by the name that they have in the file, see RoutedTraining.bound_to.
    """
    with program.reading(path, REMEDY):
        saved = read_adapter(path)
        require_same(saved, found)
        return saved


def fine_tune(model, tokenizer, rows, out, checkpoint=None, **options):
    """Train adapters on the rows, and write them into `out`. Return False if a signal stopped it.

    checkpoint: the folder to continue from. options: more for SFTConfig.
    """
    attach(model, ADAPTERS)
    settings = {
        "learning_rate": 2e-4,  # of the skills
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "num_train_epochs": 1,
        "warmup_steps": min(20, len(rows) // 160),  # at most a tenth of the steps
        "max_length": 1024,  # tokens; longer rows lose the end of their answer, with a warning
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_steps": 100,
        "logging_steps": 10,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
    with program.checking_settings():
        args = SFTConfig(str(out), **settings | options)
        data = Dataset.from_list(rows)
        trainer = RoutedSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)

    # Rows that are too long, and the longest answer.
    longest = 0
    too_long = 0
    for row in rows:
        prompt, whole = count_tokens(row, tokenizer)
        longest = max(longest, min(whole, args.max_length) - prompt)
        if whole > args.max_length:
            too_long += 1
    left_out = len(rows) - len(trainer.train_dataset)
    if left_out == len(rows):
        raise UserError(f"{left_out} rows: each prompt alone has {args.max_length} tokens or more")
    if left_out:
        program.warn(
            f"{left_out} of {len(rows)} rows are left out, since their prompts alone have "
            f"{args.max_length} tokens or more"
        )
    if too_long > left_out:
        program.warn(
            f"{too_long - left_out} of {len(rows)} rows have more than {args.max_length} tokens "
            "and lose the end of their completion; shorten them, or raise max_length"
        )
    trainer.max_new_tokens = max(127, longest)
    trainer.rows_digest = digest(rows)

    if checkpoint:
        read_saved(checkpoint / ADAPTER_FILE, **trainer.bound_to())
    else:
        with program.checking_settings():
            trainer.fit_router(max_batches=256)  # 512 prompts

    with program.stop_signals() as stop_requested, program.naming_write_errors(out):
        trainer.add_callback(SaveAndStop(stop_requested))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except FloatingPointError as error:
            raise UserError(str(error)) from error
        if trainer.state.global_step < trainer.state.max_steps:
            return False
        trainer.save_model()
    return True


def load_adapters(model, path):
    """Attach the adapters in the file `path` to their base. Return the most tokens of an answer."""
    saved = read_saved(path, method=OrchMoE.__name__, base=base_fingerprint(model))
    with program.reading(path, REMEDY):
        config = program.from_json(OrchMoEConfig, saved["config"])
        attach(model, config).load_state_dict(saved["state"])
        return saved["max_new_tokens"]


@torch.no_grad()
def answer(model, tokenizer, prompts, max_new_tokens):
    """Return the greedy answers to the prompts, which form one batch."""
    model.eval()
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with model.skill_adapters.routed(embeddings, batch["attention_mask"]):
        rows = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,  # generation_config.json of the base may set others
            repetition_penalty=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    prompt_length = batch["input_ids"].shape[1]
    return tokenizer.batch_decode(rows[:, prompt_length:], skip_special_tokens=True)


def require_new_run(out):
    """Raise UserError if a path exists that a training would write."""
    written = [out / ADAPTER_FILE, out / "README.md", *out.glob("checkpoint-*")]
    program.require_new(written, "add --resume, or name a new folder by --out")


def ask(args):
    """Print the answers to the prompts."""
    with program.checking_settings():
        for prompt in args.prompt:
            program.require_prompt("--prompt", prompt)
    adapter_path = program.require_path(args.out / ADAPTER_FILE, "finish the training first")
    read_saved(adapter_path, method=OrchMoE.__name__)
    model, tokenizer = load_base(args.model)
    max_new_tokens = load_adapters(model, adapter_path)
    replies = answer(model, tokenizer, args.prompt, max_new_tokens)
    for prompt, reply in zip(args.prompt, replies, strict=True):
        program.print_line(f"{prompt} -> {reply or '(empty)'}")


def main():
    parser = program.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="name on the Hub, or folder, of the base")
    parser.add_argument("--out", type=Path, required=True, help="folder of the training")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--data", type=Path, help="JSONL file to train on")
    action.add_argument("--prompt", nargs="+", metavar="PROMPT", help="whole prompts to answer")
    parser.add_argument("--resume", action="store_true", help="continue a stopped training")
    args = parser.parse_args()

    checkpoint = last_checkpoint(args.out) if args.resume else None
    if args.resume and not (args.data and checkpoint):
        raise UserError(
            f"--resume: needs --data, and a checkpoint in {args.out}; train without it, into a new "
            "--out"
        )
    if args.prompt:
        return ask(args)

    # All mistakes that can be found before the base is loaded.
    rows = read_rows(args.data)
    with program.locked_folder(args.out, "wait, or change --out"):
        if args.resume:
            facts = {"method": OrchMoE.__name__, "config": vars(ADAPTERS), "rows": digest(rows)}
            read_saved(checkpoint / ADAPTER_FILE, **facts)
        else:
            require_new_run(args.out)

        model, tokenizer = load_base(args.model)
        if not fine_tune(model, tokenizer, rows, args.out, checkpoint):
            program.print_line("stopped; continue with the same flags and --resume")
            return 130
    program.print_line(f"written: {args.out / ADAPTER_FILE}")
    return 0


if __name__ == "__main__":
    program.run_program(main)
