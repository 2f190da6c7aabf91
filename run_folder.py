"""A run of train.py: its settings, what it is bound to, and the files in its folder.

    config.json           the settings, and the facts that the run is bound to
    metrics.jsonl         one line for each step, and one for each evaluation
    progress.pt           the last state, from which the run resumes
    adapter.safetensors   the adapter with the lowest dev loss
    scores.json           scores on seen and unseen tasks

metrics.jsonl grows line by line. Every other file is written completely or not at all. Only rank 0
writes. progress.pt and adapter.safetensors hold the id of their run, see `Run.run_id`.

Test: pytest tests/unit/test_run_folder.py tests/programs/test_faults.py
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import checkpoint
from baselines import attach_method, load_method, settings_of_method, without_adapters
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
    compile: Literal["auto", "on", "off"] = "auto"  # compile the blocks; auto: in long runs on CUDA
    start: str = ""  # run to start from: its base, method, adapter and data settings

    def __post_init__(self) -> None:
        program.require_least(self, steps=1, batch_size=1, accumulate=1, eval_every=1)

    @property
    def eval_batch_size(self) -> int:
        return 4 * self.batch_size


@dataclass(frozen=True)
class Settings(TrainConfig, DataConfig, OrchMoEConfig):
    """All settings of a run. Each field is a flag, and a key of config.json."""

    def __post_init__(self) -> None:
        # Each part checks its own fields. Python calls only the first __post_init__.
        for part in (OrchMoEConfig, DataConfig, TrainConfig):
            self.part(part)

    def part(self, cls: type) -> Any:
        """Return those of the settings that are fields of the dataclass `cls`."""
        return program.from_flags(cls, vars(self))


# Paths that a resumed run may change, since the same files may be elsewhere.
PATHS = {"model", "data", "test"}
RATES = {field.name for field in fields(TrainConfig) if field.name.startswith("lr_")}


def unread_settings(settings: Settings) -> dict[str, str]:
    """Return {field: reason} for the settings without effect: {"steps": "with --epochs"}."""
    reason = f"with --method {settings.method}"
    read = settings_of_method(settings.method)
    method_fields = {field.name for field in fields(OrchMoEConfig)} | RATES
    unread = dict.fromkeys(method_fields - read, reason)
    if settings.epochs:
        unread["steps"] = "with --epochs"
    return unread | dict.fromkeys(settings.idle, f"with --data {settings.data}")


# ---------------------------------------------------------------------------------------- the run

TRAIN_AGAIN = "restore the file, or train again"  # the remedy for a damaged file
# The remedy for a changed fact; "held_out" has its own.
RESTORE = "restore it (if it moved, give --model, --data, --test or --method), or start a new run"
RESTORE_HELD_OUT = (
    "rows that are held out now may have been training rows; restore --data, score new rows with "
    "eval.py --test FILE --split test, or start a new run"
)


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
    initial_w: Tensor | None = None  # w (M,K) of the M dev examples before training
    best_router: dict[str, float] | None = None  # eval.router_report of the weights with that loss


class Run:
    """A run: its folder, its settings, and the facts that it is bound to.

    The facts are JSON values, see `train.train`: fingerprints of the base, of the tokenizer, of the
    task files and of the adapter in --start, the method, the names of the training tasks, and what
    tasks.jsonl_rows says about rows of JSONL.
    """

    def __init__(self, path: str | Path, settings: Settings, facts: dict[str, Any]):
        self.path = Path(path)
        self.settings = settings
        self.facts = facts
        self.config_path = self.path / "config.json"
        self.log_path = self.path / "metrics.jsonl"
        self.progress_path = self.path / "progress.pt"
        self.adapter_path = self.path / "adapter.safetensors"
        self.scores_path = self.path / "scores.json"

    @property
    def run_id(self) -> str:
        """Return a hash of the facts and the settings, 16 hex digits.

        Paths are left out, since the facts have fingerprints of the files. So is `compile`, since a
        resumed run may change it.
        """
        values = asdict(self.settings)
        for name in PATHS | {"start", "compile"}:
            del values[name]
        content = json.dumps([values, self.facts], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def require_same(self, **found: Any) -> None:
        """Raise UserError if one of the facts differs from what is found now."""
        for name, value in found.items():
            saved = self.facts.get(name)
            if value != saved:
                remedy = RESTORE_HELD_OUT if name == "held_out" else RESTORE
                raise UserError(
                    f"{self.path}: {name} is {value!r:.60}, but the run began with {saved!r:.60}; "
                    f"{remedy}"
                )

    def require_own(self, run_id: Any) -> None:
        """Raise ValueError if a file with this run_id belongs to another run."""
        if run_id != self.run_id:
            raise ValueError("belongs to another run, with other settings, base or data")

    # ----------------------------------------------------------------------- while the run trains

    def require_new(self) -> None:
        """Raise UserError if a file that the run writes exists."""
        paths = [self.config_path, self.log_path, self.progress_path]
        paths += [self.adapter_path, self.scores_path]
        program.require_new(paths, "add --resume, or give another --out")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder and lock it. Remove what killed processes left incomplete.

        Raise UserError if another process has locked it.
        """
        with program.locked_folder(self.path, "wait, or change --out"):
            if program.rank() == 0:
                for incomplete in self.path.glob(".*.[0-9]*.tmp"):  # see program.atomic_write
                    incomplete.unlink()
            yield

    def bind(self) -> None:
        """Write config.json, in a resumed run with its new paths.

        Raise UserError if the folder belongs to another run.
        """
        if self.config_path.exists():
            saved = read_run(self.path)
            saved.require_same(**self.facts)
            with program.reading(self.config_path, TRAIN_AGAIN):
                self.require_own(saved.run_id)
        elif program.rank() == 0:  # another rank might find what rank 0 has just written
            self.require_new()
        settings = asdict(self.settings)
        for name in PATHS | {"start"}:
            if settings[name]:  # so that the run can be resumed from any working folder
                settings[name] = str(Path(settings[name]).absolute())
        values = {"settings": settings, "facts": self.facts, "torch": str(torch.__version__)}
        program.write_json(self.config_path, values)  # on rank 0

    def log(self, **record: Any) -> None:
        """Add a line to metrics.jsonl."""
        if program.rank() == 0:
            with program.naming_write_errors(self.log_path), open(self.log_path, "ab") as file:
                file.write(program.to_json(record))

    def log_size(self) -> int:
        """Return the size of metrics.jsonl in bytes."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def save_progress(self, progress: Progress, adapters: Adapters, optimizer: Optimizer) -> None:
        """Write progress.pt."""
        if program.rank() != 0:
            return
        state = {
            "run_id": self.run_id,
            "progress": vars(progress),
            "log_size": self.log_size(),
            "adapters": adapters.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        with program.atomic_write(self.progress_path) as file:
            torch.save(state, file)

    def resume(self, adapters: Adapters, optimizer: Optimizer) -> Progress | None:
        """Load progress.pt into adapters and optimizer, and remove the log lines of later steps.

        Return None if nothing was saved yet, so that the run begins at step 0. Raise UserError if
        progress.pt is damaged, belongs to another run, or is missing although the run is finished.
        """
        progress = None
        log_size = 0
        if self.progress_path.exists():
            state = checkpoint.read_torch(self.progress_path)
            with program.reading(self.progress_path, TRAIN_AGAIN):
                self.require_own(state["run_id"])
                adapters.load_state_dict(state["adapters"])
                optimizer.load_state_dict(state["optimizer"])
                progress = Progress(**state["progress"])
                log_size = state["log_size"]
            if progress.best_loss < math.inf:
                self.read_best()  # fail now rather than after the last step
        elif self.settings.method in self.read_scores():  # it is scored, so it is finished
            raise UserError(
                f"{self.progress_path}: missing, but the run is finished; put it back, or give "
                "another --out to train again"
            )
        if self.log_size() > log_size and program.rank() == 0:
            os.truncate(self.log_path, log_size)  # later steps are run again
        return progress

    def save_best(self, adapters: Adapters) -> None:
        """Write the adapter with the lowest dev loss.

        The file also has its config, its method and the fingerprint of its base.
        """
        if program.rank() != 0:
            return
        about = {
            "run_id": self.run_id,
            "method": self.facts["method"],
            "config": asdict(self.settings.part(OrchMoEConfig)),
            "base": self.facts["base"],
        }
        # Copies, because safetensors refuses tensors that share memory.
        state = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
        checkpoint.write_safetensors(self.adapter_path, state, {"adapter": json.dumps(about)})

    # -------------------------------------------------------------------------------- its results

    def warn_if_unfinished(self) -> None:
        """Warn if progress.pt says that steps are missing. Without the file this is not known."""
        if self.progress_path.exists():
            steps = self.settings.steps
            state = checkpoint.read_torch(self.progress_path)
            with program.reading(self.progress_path, TRAIN_AGAIN):
                done = state["progress"]["next_step"]
            if done < steps:
                program.warn(
                    f"{self.path}: this run has saved {done} of its {steps} steps, so its weights "
                    "are only the best so far; train.py --resume goes on"
                )

    def read_best(self) -> dict[str, Tensor]:
        """Return the state of the adapter that was best on dev.

        Raise UserError if it is missing, or belongs to another run.
        """
        runtime.barrier()  # rank 0 may still be writing
        remedy = "restore it, resume the run if it was never evaluated, or start a new run"
        path = program.require_path(self.adapter_path, remedy)
        state, metadata = checkpoint.read_safetensors(path)
        with program.reading(path, TRAIN_AGAIN):
            self.require_own(json.loads(metadata["adapter"])["run_id"])
        return state

    def load_best(self, adapters: Adapters) -> None:
        """Load the adapter that was best on dev."""
        state = self.read_best()
        with program.reading(self.adapter_path, TRAIN_AGAIN):
            adapters.load_state_dict(state)

    def adapter_digest(self) -> str:
        """Return 16 hex digits that identify the adapter that was best on dev."""
        return hashlib.sha256(self.adapter_path.read_bytes()).hexdigest()[:16]

    def add_scores(self, name: str, scores: dict[str, dict]) -> dict[str, dict]:
        """Add the scores of the model `name` to scores.json. Return the scores of all models."""
        all_scores = self.read_scores() | {name: scores}
        program.write_json(self.scores_path, all_scores)  # on rank 0
        return all_scores

    def read_scores(self) -> dict[str, dict]:
        """Return the content of scores.json: {name of a model: {"seen": ..., "unseen": ...}}."""
        return program.read_json(self.scores_path) if self.scores_path.exists() else {}


def kind_of(adapters: Adapters) -> str:
    """Return a name for what computes the routing: the method, and the class of its router.

    The class is part of it since programs in experiments/ put in routers of their own.
    """
    return f"{adapters.kind or type(adapters).__name__}, {type(adapters.router).__name__}"


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


# ---------------------------------------------------------------------------------------- loading


def read_run(run_dir: str | Path) -> Run:
    """Return the run in a folder, from its config.json. Raise UserError if there is none."""
    path = Path(run_dir, "config.json")
    remedy = "name the folder of a run of train.py, or restore its file"
    program.require_path(path, remedy)
    values = program.read_json(path)
    with program.reading(path, remedy):
        settings = program.from_json(Settings, values["settings"])
        facts = values["facts"]
        if not isinstance(facts, dict):
            raise ValueError("facts: expected an object")
        return Run(run_dir, settings, facts)


def load_own_method(run: Run, text: str) -> None:
    """Load the file of `--method FILE.py:Class`. Raise UserError if the run has another method.

    The file may have moved: settings.method is the name of the class, and the facts have a hash of
    the file.
    """
    name = load_method(text)
    if run.settings.method != name:
        raise UserError(f"--method {text}: the method of the run is {run.settings.method}")


def attach_adapters(
    settings: Settings, base: Backbone, num_tasks: int, attach_function: Callable[..., Adapters]
) -> Adapters:
    """Attach the adapters of a run, with their initial values. Raise UserError if they do not fit.

    The seed fixes the initial values, so that `load` draws them again, also those that are not
    saved.
    """
    with program.checking_settings():
        return attach_function(
            settings.method,
            base,
            settings,
            num_tasks=num_tasks,
            extra_rank=settings.extra_rank,
            generator=runtime.generator(settings.seed, 0),  # stream 0: initial values
        )


def load(
    device: runtime.Device,
    *,
    run_dir: str | Path = "",
    model: str | Path = "",
    shard: bool = False,
    attach_function: Callable[..., Adapters] = attach_method,
) -> Model:
    """Load the result of a run, in eval mode: its best adapters on its base.

    Without a run, load the model in the folder `model` as it is. With a run, `model` is the new
    folder of its base, if that has moved. shard: split the base over the processes of torchrun.
    attach_function: a function like baselines.attach_method, for studies that change the routing.
    Raise UserError if the base, tokenizer, method or adapter is not the one of the run.
    """
    run = read_run(run_dir) if run_dir else None
    if run is not None and not model:
        remedy = "it is the base of the run; if it has moved, give --model"
        model = program.require_path(run.settings.model, remedy)

    tokenizer = load_tokenizer(model)
    base = checkpoint.mapped(model)
    if run is not None:
        run.require_same(tokenizer=tokenizer.fingerprint, base=checkpoint.fingerprint(model))
    if not shard:  # runtime.shard moves one block at a time
        base.to(device.torch_device, device.dtype)
    if run is None:
        adapters = without_adapters(base)
    else:
        run.warn_if_unfinished()
        run.read_best()  # a damaged file must fail before adapters take memory
        adapters = attach_adapters(run.settings, base, len(run.facts["tasks"]), attach_function)
        run.require_same(method=kind_of(adapters))
        run.load_best(adapters)
    if shard:
        runtime.shard(base, base.blocks, device)
    return Model(base, adapters.eval(), tokenizer)
