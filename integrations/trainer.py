"""Train OrchMoE's adapters with transformers' Trainer or Seq2SeqTrainer, or with TRL's SFTTrainer.

Copy this file and orchmoe.py into your project. List the mixin before the trainer among the base
classes. docs/use.md has a whole program.

    class RoutedSFTTrainer(RoutedTraining, SFTTrainer):
        pass

What does not work: DataParallel, FSDP and DeepSpeed; `lm_head` as a target in SFTTrainer, which
never calls it; `peft_config`, which freezes the skills; token classification, masked language
models, labels under another name, and methods that need task ids.

B batch, L length, D width of the embeddings. Test: pytest tests/parity/test_trainer.py
"""

import hashlib
import json
import math
import os
import pickle
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchmoe import TaskRouter

ADAPTER_FILE = "adapter.pt"  # the only weights in a checkpoint folder
# What adapters are bound to, and what to do if it is something else when they are loaded.
REMEDIES = {
    "method": "attach with the same method",
    "config": "attach with the same config",
    "base": "load the base that it was trained on",
}
# Settings of SFTConfig that put several samples into one row.
PACKING_SETTINGS = ("packing", "eval_packing", "padding_free")


def prompt_mask(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the mask (B,L) of the prompt: the real tokens before the first label that is not -100.

    Tokens without a label that come later, such as a second user turn, are left out: they follow an
    answer and may repeat it.
    """
    answer_tokens_so_far = (labels != -100).cumsum(dim=1)  # (B,L)
    mask = answer_tokens_so_far == 0
    if attention_mask is not None:
        mask = mask & attention_mask.bool()
    return mask


def holds_several_samples(position_ids: Tensor, attention_mask: Tensor | None = None) -> bool:
    """Return whether the positions (B,L) of real tokens start anew within a row."""
    starts_anew = position_ids.diff(dim=1) <= 0  # (B,L-1)
    if attention_mask is not None:
        is_real = attention_mask.bool()
        starts_anew = starts_anew & is_real[:, 1:] & is_real[:, :-1]
    return bool(starts_anew.any())


# ---- What adapters are bound to ----


def fingerprint(tensors: Iterable[Tensor], dtypes: Iterable[torch.dtype] | None = None) -> str:
    """Return 16 hex digits that tell these weights from others.

    They cover the shape and up to 1,024 evenly spaced values of each tensor. With `dtypes`, one for
    each tensor, the values are cast to them. Names are left out, since a tied weight has one name
    or several.
    """
    if dtypes is None:
        pairs = ((tensor, tensor.dtype) for tensor in tensors)
    else:
        pairs = zip(tensors, dtypes, strict=True)
    digests = set()
    for tensor, dtype in pairs:
        stride = max(1, math.ceil(tensor.numel() / 1024))
        sample = tensor.detach().flatten()[::stride].cpu().contiguous().to(dtype)
        content = f"{list(tensor.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes()
        digests.add(hashlib.sha256(content).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model's frozen base, by name."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if "skill_adapters." not in name and isinstance(tensor, Tensor):
            weights[name] = tensor
    return weights


def base_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of a model's frozen base.

    A quantised base has that of the files that it was loaded from, because each device may pack
    weights in its own way. If the files are not found, its weights count as they are in memory.
    """
    weights = base_weights(model).values()
    if any(is_of_torchao(tensor) or not tensor.is_floating_point() for tensor in weights):
        in_files = tensors_in_files(model)
        first = next(in_files, None)
        if first is not None:
            return fingerprint(chain([first], in_files))
    # One after the other, since all of them together may not fit into memory.
    return fingerprint(
        tensor.dequantize() if is_of_torchao(tensor) else tensor for tensor in weights
    )


def is_of_torchao(tensor: Tensor) -> bool:
    """Return whether torchao has quantised the tensor, or torch has wrapped it in another way."""
    return hasattr(tensor, "__tensor_flatten__")


def tensors_in_files(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors in the safetensors files of the folder or name that the model came from.

    Yield nothing if they are not on this machine.
    """
    name = getattr(model, "name_or_path", "")
    if not name:
        return
    # Both come with transformers.
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = Path(name)
    if not folder.is_dir():
        revision = getattr(model.config, "_commit_hash", None)
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (OSError, ValueError):  # not in the cache, or no name of the Hub
            return
    paths = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists() and not paths[0].exists():
        shards = json.loads(index.read_text())["weight_map"].values()
        paths = [folder / Path(shard).name for shard in sorted(set(shards))]
    if not all(path.exists() for path in paths):
        return
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                yield file.get_tensor(key)


def read_adapter(path: str | Path) -> dict[str, Any]:
    """Return what is in an adapter.pt. Raise ValueError if it is not one of this version."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError):  # some advise a load that runs code
        raise ValueError("damaged, or more than plain tensors") from None
    missing = [name for name in (*REMEDIES, "dtypes", "state") if name not in saved]
    if missing:
        raise ValueError(
            f"it has no {missing[0]!r}, so nothing tells what its weights belong to; "
            "integrations/trainer.py did not write it"
        )
    return saved


def require_same(saved: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ValueError if adapters that were saved belong to something else than what is found."""
    for name, value in found.items():
        if saved.get(name) != value:
            remedy = REMEDIES.get(name, "give the same as in training")
            before = saved.get(name)
            raise ValueError(f"{name} changed, from {before!s:.400} to {value!s:.400}; {remedy}")


class RoutedTraining:
    """Mixin for a trainer whose model has adapters: routes each batch and saves the adapters alone.

    `args.learning_rate` is the rate of the skills; `rates` has those of the other parameters, here
    for a decoder of 0.1 to 1 B (docs/use.md, recommended settings).
    """

    rates = {"router": 1e-3, "token_router": 1e-2, "allocation": 1e-1}

    def __init__(self, model, *args, **kwargs):
        if not hasattr(model, "skill_adapters"):
            raise ValueError(
                "model: it has no adapters; call attach(model, OrchMoEConfig(...)) first"
            )
        self.base = base_fingerprint(model)
        # export.py reads the files of the base in these dtypes. They can differ: transformers keeps
        # some weights of a T5 in float32 when it loads the others in float16.
        self.base_dtypes = {}
        for name, weight in base_weights(model).items():
            self.base_dtypes[name] = str(weight.dtype).removeprefix("torch.")

        # Trainer refuses a quantised model unless it finds adapters, and it looks for peft's only.
        model._hf_peft_config_loaded = True
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        values = [parameter.data for parameter in trained]
        try:
            super().__init__(model, *args, **kwargs)
        finally:
            model._hf_peft_config_loaded = False
        # On a quantised base SFTTrainer casts what trains to bfloat16. Adapters stay in float32.
        for parameter, value in zip(trained, values, strict=True):
            parameter.data = value.to(parameter.device)

    # ---- What the router reads ----

    def router_embeddings(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the embeddings (B,L,D) of the input_ids."""
        return self.model.get_input_embeddings()(inputs["input_ids"]).detach()

    def router_mask(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Return the mask (B,L) of the tokens that the router may read: the prompt, not the answer.

        Raise ValueError if a row has no prompt or holds several samples, or if it gets noise.
        """
        mask = inputs.get("attention_mask")
        has_router = self.model.skill_adapters.router is not None
        if has_router and getattr(self.args, "neftune_noise_alpha", None):
            raise ValueError(
                "neftune_noise_alpha: the router would read the noise, too; leave it unset"
            )
        if self.model.config.is_encoder_decoder:
            return mask  # the input_ids are the source; the answer is in the labels alone

        is_packed = any(getattr(self.args, name, False) for name in PACKING_SETTINGS)
        is_flattened = "cu_seq_lens_q" in inputs  # a flattening collator gives this or positions
        positions = inputs.get("position_ids")
        if positions is not None and positions.dim() == 2:
            is_flattened = is_flattened or holds_several_samples(positions, mask)
        if has_router and (is_packed or is_flattened):
            raise ValueError(
                "packing: a packed row holds several samples, but the router weights the skills "
                "once per row; set packing=False and padding_free=False, or attach the method "
                "TokenRouted of variants.py"
            )

        labels = inputs.get("labels")
        if labels is None or labels.shape != inputs["input_ids"].shape:
            return mask  # the row is a prompt, as in generation and in classification
        mask = prompt_mask(labels, mask)
        if has_router and not mask.any(dim=1).all():
            raise ValueError(
                "labels: a row has no prompt, since its labels start at its first token; set the "
                "labels of prompts to -100 (SFTTrainer does so for prompt-completion data)"
            )
        return mask

    def routed(self, inputs: dict[str, Tensor], beams: int = 1) -> AbstractContextManager:
        """Return a context that routes this batch. Open it around `generate`, too.

        In training the router reads a conversation only up to its first answer. For a later turn,
        give the inputs of the first prompt here, and the whole conversation to `generate`.
        """
        embeddings = self.router_embeddings(inputs)
        return self.model.skill_adapters.routed(embeddings, self.router_mask(inputs), beams=beams)

    def fit_router(self, max_batches: int = 64) -> None:
        """Start the router from prompts of the training batches. Call it once before `train`."""
        batches = list(islice(self.get_train_dataloader(), max_batches))
        embeddings = (self.router_embeddings(batch) for batch in batches)
        masks = (self.router_mask(batch) for batch in batches)
        self.model.skill_adapters.fit_router(embeddings, masks)

    # ---- Training and evaluation ----

    def create_optimizer(self, model=None):
        """Give each kind of parameter its own learning rate.

        args.weight_decay applies to the skills alone. It would pull the allocation towards equal
        weights, and the router towards one w for all samples.
        Warn if the router was not fitted. Raise ValueError if a parameter of the base requires a
        gradient.
        """
        if self.optimizer is not None:
            return self.optimizer

        router = self.model.skill_adapters.router
        if isinstance(router, TaskRouter) and not router.mu.any():
            warnings.warn(
                "the router was not fitted, so w is nearly equal for all samples; "
                "call fit_router() before train()",
                stacklevel=2,
            )
        found = getattr(self, "optimizer_cls_and_kwargs", None)  # what the caller gave
        if found is None:
            found = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        optimizer_class, options = found
        rates = {"skills": options.get("lr", self.args.learning_rate), **self.rates}
        groups = []
        ours = set()
        for kind, parameters in self.model.skill_adapters.parameter_groups().items():
            decay = self.args.weight_decay if kind == "skills" else 0.0
            groups.append({"params": parameters, "lr": rates[kind], "weight_decay": decay})
            ours |= set(parameters)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter not in ours:
                raise ValueError(f"model: {name} requires a gradient, but only adapters can train")
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def training_step(self, model, inputs, *args, **kwargs):
        model.train()  # before routing, which draws noise in training only
        if hasattr(self.optimizer, "train"):  # schedule-free ones change the weights here
            self.optimizer.train()
        # The step includes backward, which runs checkpointed blocks again.
        with self.routed(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        # What Seq2SeqTrainer passes on to generate: the arguments of `predict`, or those of args.
        options = {**getattr(self, "_gen_kwargs", {}), **kwargs}
        beams = options.get("num_beams")
        own_config = getattr(self.model, "generation_config", None)
        for config in (options.get("generation_config"), own_config):
            beams = beams or getattr(config, "num_beams", None)
        with self.routed(inputs, beams or 1):
            return super().prediction_step(model, inputs, *args, **kwargs)

    # ---- Checkpoints ----

    def bound_to(self) -> dict[str, Any]:
        """Return what the adapters belong to. It is saved with them and compared at loading."""
        adapters = self.model.skill_adapters
        return {
            "method": type(adapters).__name__,
            "config": vars(adapters.config),
            "base": self.base,
        }

    def _save(self, output_dir=None, state_dict=None):
        """Write the adapters alone: the base never changes, and the tokenizer is yours.

        Raise FloatingPointError if they are not finite. The last checkpoint is as it was then.
        """
        if not self.args.should_save:  # only one process writes
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.skill_adapters.state_dict()
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{name} is not finite; train into a new folder with lower learning rates (a "
                    "resumed training keeps its own)"
                )
        saved = {**self.bound_to(), "dtypes": self.base_dtypes, "state": state}
        incomplete = folder / f".{ADAPTER_FILE}.tmp"  # a killed process leaves no half adapter.pt
        with open(incomplete, "wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        incomplete.replace(folder / ADAPTER_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load the adapters. Raise ValueError if they belong to something else."""
        path = Path(resume_from_checkpoint) / ADAPTER_FILE
        try:
            saved = read_adapter(path)
            require_same(saved, self.bound_to())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.model.skill_adapters.load_state_dict(saved["state"])

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)
