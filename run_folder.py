"""A run of train.py: its settings, its facts, the files in its folder, and how its model is built.

    config.json           the settings, and the facts: fingerprints of the base, the data, ...
    metrics.jsonl         one line for each step, and one for each evaluation
    progress.pt           the last state, from which the run resumes
    adapter.safetensors   the adapter with the lowest dev loss
    scores.json           scores on seen and unseen tasks

Settings and facts are the identity of a run. progress.pt and adapter.safetensors hold it, too, and
`Run.require_same` compares it with what is found.

metrics.jsonl grows line by line. Every other file is written completely or not at all. Only rank 0
writes.

Test: pytest tests/unit/test_run_folder.py tests/programs/test_faults.py
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import checkpoint
from baselines import attach_method, settings_of_method, without_adapters
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig
from support import program, runtime
from support.program import UserError
from tasks import DataConfig
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer

# --------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class TrainConfig:
    """Training: model, method, steps and learning rates."""

    model: str = str(program.ROOT / "tiny")  # Hugging Face folder (default: tiny/ of the project)
    method: str = "orchmoe"  # orchmoe, lora, moe-lora, poly, mhr, c-poly, variants, FILE.py:Class
    extra_rank: int = 0  # extra ranks in all, spread evenly over the adapted Linears
    seed: int = 0  # random seed (data order, initialisation, noise)
    steps: int = 600  # optimiser steps
    epochs: int = 0  # passes over the training rows, in place of --steps
    batch_size: int = 16  # examples per optimiser step; evaluation takes four times as many
    accumulate: int = 1  # micro-batches per optimiser step
    lr_skills: float = 1e-2  # peak learning rate of A and B; a rate of 0 freezes its parameters
    lr_router: float = 1e-3  # peak learning rate of the sample router
    lr_token_router: float = 1e-2  # peak learning rate of token routers, also in moe-lora
    lr_allocation: float = 1e-2  # peak learning rate of the allocation
    warmup: int = 50  # steps of linear warm-up; a tenth of --steps if --steps is not larger
    schedule: Literal["linear", "constant"] = "linear"  # after warm-up: fall to 0, or stay
    eval_every: int = 100  # steps between evaluations on dev; each also saves progress.pt
    eval_instances: int = 2000  # evaluate at most this many instances of each set (0: all)
    checkpoint_blocks: bool = False  # gradient checkpointing: less memory, more time
    dtype: runtime.DtypeChoice = "auto"  # dtype of the frozen base (auto: the faster one here)
    compile: Literal["on", "off"] = "off"  # compile the blocks; this pays in long runs on CUDA
    start: str = ""  # run to start from: its adapter, and its settings where no flag is given

    def __post_init__(self) -> None:
        program.check(self, steps=1, batch_size=1, accumulate=1, eval_every=1)

    @property
    def eval_batch_size(self) -> int:
        return 4 * self.batch_size


@dataclass(frozen=True)
class Settings(TrainConfig, DataConfig, OrchMoEConfig):
    """All settings of a run. Each field is a flag, and a key of config.json."""

    def __post_init__(self) -> None:
        # This overrides the __post_init__ of the parts. Making each part runs its checks.
        for part in (OrchMoEConfig, DataConfig, TrainConfig):
            self.part(part)

    def part(self, cls: type) -> Any:
        """Return those of the settings that are fields of the dataclass `cls`."""
        return program.from_flags(cls, vars(self))


PATHS = {"model", "data", "test"}  # a resumed run may find the same files elsewhere
# These are no part of the identity of a run: the facts identify the files at the paths, progress.pt
# has the weights that came from --start, and another machine may have no compiler or less memory.
NOT_BOUND = {*PATHS, "start", "compile", "accumulate", "checkpoint_blocks"}


def unread_settings(settings: Settings) -> dict[str, str]:
    """Return {field: reason} for the settings without effect: {"steps": "with --epochs"}."""
    names = [field.name for field in fields(OrchMoEConfig)]
    names += [field.name for field in fields(TrainConfig) if field.name.startswith("lr_")]
    of_method = set(names) - settings_of_method(settings.method)
    unread = dict.fromkeys(of_method, f"with --method {settings.method}")
    unread |= dict.fromkeys(settings.idle, f"with --data {settings.data}")
    if settings.epochs:
        unread["steps"] = "with --epochs"
    return unread


# ---------------------------------------------------------------------------------------- the run

FILES = ("config.json", "metrics.jsonl", "progress.pt", "adapter.safetensors", "scores.json")
# What helps if a file of the folder is damaged, or of another run.
TRAIN_AGAIN = "restore the file, or train again"
# What helps if a setting, the base, the data or the method is not that of the run.
RESTORE = "take that of the run (if its files moved, give their flag), or start a new run"


class Model(NamedTuple):
    """A base with its adapters and its tokenizer."""

    base: Backbone
    adapters: Adapters
    tokenizer: Tokenizer


@dataclass
class Progress:
    """The state of a training, apart from its weights."""

    next_step: int = 0  # counted from 0
    best_loss: float = math.inf  # the lowest dev loss so far


@dataclass
class Run:
    """A run: its folder, its settings, and its facts.

    The facts are JSON values, see `train.facts_of`: fingerprints of the base, of the tokenizer and
    of the task files, the class of the method, the names of the training tasks, and what
    tasks.jsonl_rows says about rows of JSONL.
    """

    path: Path
    settings: Settings
    facts: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """Return the settings and facts that the numbers depend on, as JSON has them."""
        values = asdict(self.settings) | self.facts
        bound = {name: value for name, value in values.items() if name not in NOT_BOUND}
        return json.loads(json.dumps(bound))

    def require_same(
        self, found: dict[str, Any], path: Path | None = None, remedy: str = RESTORE
    ) -> None:
        """Raise UserError if a part of the identity differs from what is found now.

        path: the file in which it was found; without it the message names the folder of the run.
        """
        identity = self.identity
        for name, value in found.items():
            if value != identity.get(name):
                raise UserError(
                    f"{path or self.path}: {name} is {value!r:.60}, but the run has "
                    f"{identity.get(name)!r:.60}; {remedy}"
                )

    # ----------------------------------------------------------------------- while the run trains

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, lock it, and write config.json, in a resumed run with its new paths.

        Raise UserError if another process has locked the folder, if it belongs to another run, or
        if it has other files that the run would write.
        """
        config_path = self.path / "config.json"
        with program.locked_folder(self.path, "wait, or change --out"):
            if program.rank() == 0:
                paths = [self.path / name for name in FILES]
                for path in paths:
                    for incomplete in self.path.glob(f".{path.name}.[0-9]*.tmp"):
                        incomplete.unlink()  # of a killed process
                if config_path.exists():
                    read_run(self.path).require_same(self.identity)
                else:
                    program.require_new(paths, "give another --out")
            settings = asdict(self.settings)
            for name in PATHS | {"start"}:
                if settings[name]:  # so that the run can be resumed from any working folder
                    settings[name] = str(Path(settings[name]).absolute())
            program.write_json(config_path, {"settings": settings, "facts": self.facts})
            yield

    def log(self, **record: Any) -> None:
        """Add a line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        if program.rank() == 0:
            with program.naming_write_errors(path), open(path, "ab") as file:
                file.write(program.to_json(record))

    def save_progress(self, progress: Progress, adapters: Adapters, optimizer: Optimizer) -> None:
        """Write progress.pt."""
        if program.rank() == 0:
            state = {
                "run": self.identity,
                "progress": vars(progress),
                "log_size": (self.path / "metrics.jsonl").stat().st_size,
                "adapters": adapters.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            with program.atomic_write(self.path / "progress.pt") as file:
                torch.save(state, file)

    def resume(self, adapters: Adapters, optimizer: Optimizer) -> Progress | None:
        """Load progress.pt into adapters and optimizer, and remove the log lines of later steps.

        Return None if nothing was saved yet, so that the run begins at step 0. Raise UserError if
        progress.pt is damaged, belongs to another run, or is missing although the run is finished.
        """
        path = self.path / "progress.pt"
        progress = None
        log_size = 0
        if path.exists():
            state = checkpoint.read_torch(path)
            with program.reading(path, TRAIN_AGAIN):
                identity = dict(state["run"])
            self.require_same(identity, path, TRAIN_AGAIN)
            with program.reading(path, TRAIN_AGAIN):
                adapters.load_state_dict(state["adapters"])
                optimizer.load_state_dict(state["optimizer"])
                progress = Progress(**state["progress"])
                log_size = state["log_size"]
        elif (self.path / "scores.json").exists():  # train.py writes it after the last step
            raise UserError(
                f"{path}: missing, but the run is finished; put it back, or give another --out to "
                "train again"
            )
        if program.rank() == 0:
            with open(self.path / "metrics.jsonl", "ab") as file:
                # Later steps are run again. The log may be shorter, if it was lost.
                file.truncate(min(log_size, file.tell()))
        return progress

    # -------------------------------------------------------------------------------- its results

    def save_best(self, adapters: Adapters) -> None:
        """Write the adapter with the lowest dev loss, with the identity of its run."""
        if program.rank() == 0:
            # Copies, because safetensors refuses tensors that share memory.
            state = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
            metadata = {"run": json.dumps(self.identity)}
            checkpoint.write_safetensors(self.path / "adapter.safetensors", state, metadata)

    def read_best(self) -> dict[str, Tensor]:
        """Return the state of the adapter that was best on dev.

        Raise UserError if it is missing or damaged, or belongs to another run.
        """
        runtime.barrier()  # rank 0 may still be writing
        path = self.path / "adapter.safetensors"
        program.require_path(path, "restore it, or resume the run if it was never evaluated")
        state, metadata = checkpoint.read_safetensors(path)
        with program.reading(path, TRAIN_AGAIN):
            identity = dict(json.loads(metadata["run"]))
        self.require_same(identity, path, TRAIN_AGAIN)
        return state


def class_of(adapters: Adapters) -> str:
    """Return a name for the class of the method. That of a method from a file has its digest."""
    method = type(adapters)
    return getattr(method, "kind", method.__name__)  # see baselines.load_method


def new_folder(name: str) -> Path:
    """Make the first of NAME-1, NAME-2, ... that does not exist. All ranks return the same.

    Under torchrun, call it inside `runtime.distributed`.
    """
    number = 1
    if program.rank() == 0:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):
                Path(f"{name}-{number}").mkdir()
                break
            number += 1
    return Path(f"{name}-{runtime.gather_from_ranks(number)[0]}")


# ------------------------------------------------------------------------------ building, loading


def read_run(run_dir: str | Path) -> Run:
    """Return the run in a folder, from its config.json. Raise UserError if there is none."""
    path = Path(run_dir, "config.json")
    remedy = "name the folder of a run of train.py, or restore its file"
    program.require_path(path, remedy)
    values = program.read_json(path)
    with program.reading(path, remedy):
        settings = program.from_json(Settings, values["settings"])
        return Run(Path(run_dir), settings, dict(values["facts"]))


def attach_adapters(settings: Settings, base: Backbone, num_tasks: int) -> Adapters:
    """Attach the adapters of a run, with their initial values. Raise UserError if they do not fit.

    The seed fixes the initial values, so that `load` draws them again, also those that are not
    saved.
    """
    with program.checking_settings():
        return attach_method(
            settings.method,
            base,
            settings,
            num_tasks=num_tasks,
            extra_rank=settings.extra_rank,
            generator=runtime.generator(settings.seed, 0),  # stream 0: initial values
        )


def build(
    settings: Settings, device: runtime.Device, num_tasks: int | None, shard: bool = False
) -> Model:
    """Return the frozen base of a run, its adapters at their initial values, and its tokenizer.

    num_tasks: number of training tasks, None for a base without adapters. shard: split the base
    over the processes of torchrun. Raise UserError if the tokenizer or the adapters do not fit.
    """
    tokenizer = load_tokenizer(settings.model)
    base = checkpoint.load(settings.model, dtype=None)  # its weights are views of the files
    config = base.config
    if tokenizer.size > config.vocab_size or set(tokenizer.eos_ids).isdisjoint(config.eos_ids):
        raise UserError(
            f"{settings.model}: its tokenizer has {tokenizer.size} tokens and the EOS "
            f"{tokenizer.eos_ids}, but the model (config.json, generation_config.json) has "
            f"{config.vocab_size} and {config.eos_ids}; give the files of one model"
        )
    base.checkpoint_blocks = settings.checkpoint_blocks
    if not shard:  # runtime.shard moves one block at a time
        base.to(device.torch_device, device.dtype)
    if num_tasks is None:
        adapters = without_adapters(base)
    else:
        adapters = attach_adapters(settings, base, num_tasks)
    if shard:
        runtime.shard(base, base.blocks, device)
    return Model(base, adapters, tokenizer)


def load(
    device: runtime.Device,
    *,
    run_dir: str | Path = "",
    model: str | Path = "",
    shard: bool = False,
) -> Model:
    """Load the result of a run, in eval mode: its best adapters on its base.

    Without a run, load the model in the folder `model` as it is. With a run, `model` is the new
    folder of its base, if that has moved. For shard see `build`. Raise UserError if the base,
    tokenizer, method or adapter is not the one of the run.
    """
    if not run_dir:
        return build(Settings(model=str(model)), device, num_tasks=None, shard=shard)

    run = read_run(run_dir)
    best = run.read_best()  # a damaged file must fail before adapters take memory
    settings = replace(run.settings, model=str(model or run.settings.model))
    loaded = build(settings, device, len(run.facts["tasks"]), shard)
    run.require_same(
        {
            "base": loaded.base.fingerprint,
            "tokenizer": loaded.tokenizer.fingerprint,
            "method_class": class_of(loaded.adapters),
        }
    )
    with program.reading(run.path / "adapter.safetensors", TRAIN_AGAIN):
        loaded.adapters.load_state_dict(best)
    return loaded
