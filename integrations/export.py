"""Write trained adapters as plain LoRAs for servers.

OrchMoE is K LoRAs of rank S R, mixed by the router: sum_k w_k LoRA_k. The program writes each of
them as a folder in PEFT's form, see integrations/peft_folder.py, and the router beside them. The
adapters come from a run of train.py, or from the adapter.pt of integrations/trainer.py.
integrations/server.py serves what is written; docs/use.md names other servers.

    python -m integrations.export --run runs/orchmoe-1 --out served    # K LoRAs and the router
    python -m integrations.export --run runs/lora-1 --out served       # one LoRA
    python -m integrations.export --adapter run/adapter.pt --model Qwen3-8B --out served

--mean adds a LoRA for the mean w of the run's dev set.

Letters: K abstract tasks, S skills, R rank of a skill, D width of the embeddings.

Test: pytest tests/unit/test_export.py tests/parity/test_peft.py
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
import data
import eval as evaluation
import run_folder
from integrations.peft_folder import save_peft
from integrations.trainer import fingerprint, read_adapter, require_same
from model import Backbone
from orchmoe import Adapters, OrchMoE, OrchMoEConfig, TaskRouter, attach
from support import program, runtime
from support.program import UserError
from tasks import DataConfig
from tokenizer import Tokenizer


@dataclass(frozen=True)
class ExportConfig:
    """Export: which adapters, what of them, and where to."""

    run: str = ""  # folder of a run of train.py
    adapter: str = ""  # adapter.pt of integrations/trainer.py, instead of a run
    model: str = ""  # folder of the adapter's base, or where the run's base is now
    data: str = ""  # where the run's data is now, if it has moved; for --mean
    out: str = ""  # folder to write; each LoRA gets a folder inside
    mean: bool = False  # add a LoRA for the mean w of the run's dev set
    w: tuple[str, ...] = ()  # add a LoRA for these K weights; if the first is negative: --w=-1,2

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.adapter):
            raise UserError("give --run, the folder of a run, or --adapter, an adapter.pt")
        if self.adapter and not self.model:
            raise UserError("--adapter: give the folder of its base with --model")
        if not self.out:
            raise UserError("give --out, the folder to write")
        if self.mean and self.adapter:
            raise UserError("--mean: only a run knows its dev set; give --w, or leave it out")
        if self.data and not self.mean:
            raise UserError("--data: only --mean reads data; leave it out")


# ------------------------------------------------------------------------ an adapter of a trainer


def attach_saved(path: str, model: str) -> tuple[Adapters, dict[str, Any]]:
    """Return the adapters in an adapter.pt, and facts for `save_router`.

    They are attached to transformers' model of the folder `model`, because the file has its names.
    Its weights have no values (they are on the meta device) and so take no memory.
    """
    program.require_path(path, "name an adapter.pt")
    with program.reading(path, "name an adapter.pt of integrations/trainer.py"):
        saved = read_adapter(path)
        require_same(saved, {"method": OrchMoE.__name__})
        adapter_config = program.from_json(OrchMoEConfig, saved["config"])
        state = {name: tensor.float() for name, tensor in saved["state"].items()}

    # Imported here, since runs of train.py do not need it.
    with program.reading("transformers", 'pip install "transformers<5.25"'):
        import transformers.modeling_utils  # fails without the classes of models

    program.require_path(model, program.DOWNLOAD)
    with program.reading(model, "name a folder that transformers loads"), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        model_class = transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            model_class = transformers.AutoModelForSeq2SeqLM
        base = model_class.from_config(config)

    tensors = checkpoint.read_folder(model)
    with program.reading(path, f"{model} must be the base that it was trained on"):
        require_base(saved, tensors)
        with torch.device("meta"):
            adapters = attach(base, adapter_config)
        adapters.load_state_dict(state, assign=True)

    # A tied table has several names, and the files have one of them.
    table = base.get_input_embeddings().weight
    named = base.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in named if parameter is table]
    names_in_files = [name for name in names if name in tensors]
    if not names_in_files:
        raise UserError(f"{model}: its files have no tensor {' or '.join(names)}")
    facts = {
        "embedding": names_in_files[0],
        "dtype": saved["dtypes"][names_in_files[0]],
        "max_new_tokens": saved.get("max_new_tokens", 127),  # finetune_7b.py saves it
        "prompt": None,
    }
    return adapters.eval(), facts


def require_base(saved: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless these tensors of files are the base that adapters were trained on.

    The fingerprint of a quantised base covers all tensors of its files. That of any other base
    covers the weights of the model, each in the dtype that it had in training.
    """
    names = [name for name in tensors if name in saved["dtypes"]]
    weights = [tensors[name] for name in names]
    dtypes = [getattr(torch, saved["dtypes"][name]) for name in names]
    if saved["base"] not in (fingerprint(tensors.values()), fingerprint(weights, dtypes)):
        raise ValueError(
            "it was trained on other weights (or transformers changes those of the files, as in an "
            "MoE)"
        )


# ------------------------------------------------------------------------------------- the program


def given_routing(config: ExportConfig, K: int) -> Tensor:
    """Return w (K,), the weights that --w gives."""
    with program.reading("--w", f"give K = {K} finite numbers with commas between"):
        w = torch.tensor([float(value) for value in config.w])
        if len(w) != K:
            raise ValueError(f"{len(w)} numbers")
        if not w.isfinite().all():
            raise ValueError("a number is not finite")
    return w


def mean_routing(
    config: ExportConfig,
    run: run_folder.Run,
    base: Backbone,
    adapters: Adapters,
    tokenizer: Tokenizer,
) -> Tensor:
    """Return the mean w (K,) of the run's dev set."""
    data_config = replace(run.settings.part(DataConfig), test="")  # dev does not need that file
    if config.data:
        data_config = replace(data_config, data=config.data)
    dev = data.require_set(data.load_sets(data_config, tokenizer), "dev", data_config)
    run.require_same(dev.facts | {"train_tasks": dev.digest})
    return evaluation.router_weights(base, adapters, dev).mean(dim=0)


def prompt_rule(run: run_folder.Run, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how a run makes the ids of a prompt.

    dataset: fields of DataConfig with which data.tokenise makes the ids.
    instructions: whether the rows of the run are instructions. It is null for SNI's form, in which
        a server builds no prompts.
    """
    config = run.settings
    return {
        "dataset": {
            "data": ".jsonl" if config.is_jsonl else "sni",
            "max_source_length": config.max_source_length,
        },
        "instructions": run.facts.get("instructions"),
        "tokenizer": tokenizer.fingerprint,
    }


def save_router(
    router: TaskRouter | None, facts: dict[str, Any], base: str | Path, folder: str | Path
) -> None:
    """Write what a server needs to build prompts, and to compute their w if there is a router.

    router.safetensors: W_task (K,D), bias (K), mu and sd (D). router.json: the fingerprint of the
    base in the folder `base`, and these facts:

    loras: the folders whose weights w holds, in this order.
    embedding: the name of the embedding table, or None without a router.
    dtype: that in which the run computed, and its router read the embeddings.
    prompt: the rule of `prompt_rule`, or None if prompts have the ids of transformers, as in a
        trainer.
    max_new_tokens: the most tokens of an answer.
    """
    folder = Path(folder)
    if router is None:
        facts = facts | {"embedding": None}
    else:
        checkpoint.write_safetensors(
            folder / "router.safetensors", router.state_dict(), {"format": "pt"}
        )
    digest = fingerprint(checkpoint.read_folder(base).values())
    program.write_json(folder / "router.json", {"base": digest} | facts)


def export(config: ExportConfig) -> None:
    """Write the LoRAs that the config asks for, and the router. All appear at once, or nothing."""
    out = Path(config.out)
    program.require_new([out], "name a new folder by --out")

    method = "orchmoe"
    if config.adapter:
        adapters, facts = attach_saved(config.adapter, config.model)
        base_folder = config.model
    else:
        run = run_folder.read_run(config.run)
        method = run.settings.method
        if method not in ("orchmoe", "lora"):
            raise UserError(
                f"{config.run}: --method {method}: no LoRAs with fixed weights compute the same; "
                "export runs of orchmoe or lora"
            )
        if method == "lora" and (config.mean or config.w):
            raise UserError(f"{config.run}: --method lora has no routing; leave out --mean and --w")
        # In the dtype of the run, in which its router read the embeddings.
        device = runtime.pick_device(device="cpu", dtype=run.settings.dtype)
        base, adapters, tokenizer = run_folder.load(device, run_dir=config.run, model=config.model)
        base_folder = config.model or run.settings.model
        tensors = checkpoint.read_folder(base_folder)
        facts = {
            "embedding": next(name for name in base.tables if name in tensors),
            "dtype": run.settings.dtype,
            "max_new_tokens": run.settings.max_new_tokens,
            "prompt": prompt_rule(run, tokenizer),
        }

    # The routing of each LoRA, by the name of its folder. LoRA k has w = 1 for abstract task k.
    routings: dict[str, Tensor | None] = {"lora": None}
    if method == "orchmoe":
        one_hot = torch.eye(adapters.config.abstract_tasks)
        routings = {f"abstract-{k + 1}": w for k, w in enumerate(one_hot)}
    facts["loras"] = list(routings)
    if config.w:
        routings["w"] = given_routing(config, adapters.config.abstract_tasks)
    if config.mean:
        routings["mean"] = mean_routing(config, run, base, adapters, tokenizer)

    base_name = str(Path(base_folder).resolve())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        incomplete = Path(temporary) / out.name
        for name, w in routings.items():
            rank = save_peft(adapters, w, incomplete / name, base_name)
        save_router(adapters.router, facts, base_folder, incomplete)
        incomplete.rename(out)

    program.print_line(
        f"written to {out}: LoRAs of rank {rank} for {base_name}: {', '.join(routings)}"
    )
    files = "router.json" if adapters.router is None else "router.safetensors and router.json"
    program.print_line(f"written to {out}: {files}")


def main() -> None:
    export(program.from_flags(ExportConfig, program.read_flags(__doc__, ExportConfig)))


if __name__ == "__main__":
    program.run_program(main)
