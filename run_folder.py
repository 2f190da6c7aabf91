"""The folder of a training run: its files, what it is bound to, resuming, and loading the result.

    config.json           settings of the run, fingerprints of its base and data: see RunConfig
    metrics.jsonl         one line for each step, and one for each evaluation
    progress.pt           the last state, from which a run resumes
    adapter.safetensors   the adapter with the lowest dev loss
    scores.json           scores on seen and unseen tasks

metrics.jsonl grows line by line. Every other file is written completely or not at all. Only rank 0
writes.

Test: pytest tests/unit/test_run_folder.py tests/programs/test_faults.py
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import checkpoint
from baselines import METHODS, attach_method, load_method, method_class, probe, without_adapters
from model import Backbone
from orchmoe import Adapters, OrchMoEConfig
from support import program, runtime
from support.program import UserError
from tasks import DataConfig
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer

# Settings that are paths. A resumed run may find the same data and base under other paths.
PATHS = {"model", "data", "test"}
REMEDY = "restore the file, or train again if an older version wrote it"

# What to do if something that a run is bound to has changed, by its name in RunConfig.
CHANGED_REMEDIES = {
    "base": "restore it, give its folder with --model, or start a new run",
    "tokenizer": "restore it, give the folder of the base with --model, or start a new run",
    "tasks": "restore the data, give them with --data (and --test), or start a new run",
    "data": "restore them, give them with --data (and --test), or start a new run",
    "kind": "load it with the program that trained it, and with the same file of --method",
    "start": "restore the adapter of the run in --start, or start a new run",
    "rule": "its rows are read or split in another way now; restore the data, or start a new run",
}


# ------------------------------------------------------------------------------------ config.json


@dataclass(frozen=True)
class RunConfig:
    """Content of config.json: the settings of a run, and fingerprints of what it was made from."""

    run_dir: str  # folder of the run, for its files and messages; not saved
    training: dict  # fields of TrainConfig
    dataset: dict  # the data settings: fields of DataConfig
    adapter: dict  # fields of OrchMoEConfig
    tasks: tuple[str, ...]  # training tasks, in the order of their ids
    base: str  # fingerprint of the frozen base
    tokenizer: str  # fingerprint of the tokenizer
    data: dict  # hashes of the task files on each list: {"train": ..., "test": ...}
    kind: str  # name of its method and class of its router, see kind_of
    rule: dict  # facts about the rows of JSONL, {} for SNI; see data.Examples
    start: str  # hash of the adapter in --start, "" without --start
    torch: str = str(torch.__version__)  # version of torch that last trained it

    @property
    def method(self) -> str:
        return self.training["method"]

    def section(self, cls: type, name: str) -> Any:
        """Return the section `name` as the dataclass `cls`. Raise UserError if it does not fit."""
        with program.reading(f"{self.run_dir}/config.json", REMEDY):
            return program.from_json(cls, getattr(self, name))

    def require_same(self, **found: Any) -> None:
        """Raise UserError if one of the named fields differs from what is found now."""
        for name, value in found.items():
            saved = getattr(self, name)
            if value != saved:
                raise UserError(
                    f"{self.run_dir}: {name} changed since the run began, from {saved!r:.60} to "
                    f"{value!r:.60}; {CHANGED_REMEDIES[name]}"
                )

    def require_same_split(self, rule: dict) -> None:
        """Raise UserError if other rows than those of the run are in dev and seen of a JSONL file.

        rule: the facts of the sets as they are now, see data.Examples.
        """
        data_config = self.section(DataConfig, "dataset")
        if data_config.is_jsonl and rule.get("held_out") != self.rule.get("held_out"):
            raise UserError(
                f"{self.run_dir}: it has other rows in train, dev and seen, so that rows of dev "
                "and seen may have trained; restore --data, give new rows with --test and "
                "--split test, or start a new run"
            )

    def adapter_digest(self) -> str:
        """Return 16 hex digits that identify the adapter that was best on dev."""
        content = RunFolder(self.run_dir).adapter_path.read_bytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def adapter_state(self) -> tuple[dict[str, Tensor], Any]:
        """Return the state of the adapter that was best on dev, and its probe.

        Raise UserError if it belongs to another run.
        """
        path = RunFolder(self.run_dir).adapter_path
        state, info = checkpoint.load_adapter(path)
        expected = {
            "method": self.method,
            "config": self.adapter,
            "kind": self.kind,
            "tasks": list(self.tasks),
            "base": self.base,
        }
        for name, value in expected.items():
            if info.get(name) != value:
                raise UserError(f"{path}: its {name} is not the run's; restore the file")
        return state, info.get("probe")

    def load_adapter(self, adapters: Adapters) -> None:
        """Load the adapter that was best on dev, see `adapter_state` and `load_probed`."""
        state, probed = self.adapter_state()
        load_probed(RunFolder(self.run_dir).adapter_path, adapters, state, probed)


def kind_of(adapters: Adapters) -> str:
    """Return a name for what computes the routing: the method, and the class of its router.

    The class is part of it since programs in experiments/ put in routers of their own.
    """
    method = adapters.method
    return f"{method.kind or type(method).__name__}, {type(adapters.router).__name__}"


def load_probed(path: Path, adapters: Adapters, state: dict[str, Tensor], probed: Any) -> None:
    """Load a state into adapters. `probed` is what baselines.probe returned when it was saved.

    Raise UserError if the state does not fit, or if the adapters now compute something else.
    """
    with program.reading(path, REMEDY):
        adapters.load_state_dict(state)
        expected = torch.tensor(probed or [])
    if not probed:  # an older version saved it, or the run has no adapters
        return
    found = torch.tensor(probe(adapters))
    # Devices round differently. If a constructor drew other values than in training, and did not
    # keep them in the state, the numbers differ by far more.
    tolerance = 0.02 * expected.abs().amax(dim=0)
    if found.shape != expected.shape or not ((found - expected).abs() <= tolerance).all():
        raise UserError(
            f"{path}: the method computes something else than when this was saved; restore the "
            "file; a constructor must draw with `generator`, and the state must hold what changes"
        )


def read_config(run_dir: str | Path) -> RunConfig:
    """Return the config of the run in the folder `run_dir`. Raise UserError if there is none."""
    path = program.require_path(
        Path(run_dir) / "config.json", "name the folder of a run of train.py"
    )
    values = program.read_json(path)
    with program.reading(path, REMEDY):
        run_config = program.from_json(RunConfig, values | {"run_dir": str(run_dir)})
        for name in ("model", "method"):
            if not isinstance(run_config.training[name], str):
                raise ValueError(f"training: {name} must be a string")
    return run_config


# ------------------------------------------------------------------------------------- the folder


class RunFolder:
    """Read and write the files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.log_path = self.path / "metrics.jsonl"
        self.progress_path = self.path / "progress.pt"
        self.adapter_path = self.path / "adapter.safetensors"
        self.scores_path = self.path / "scores.json"

    def is_new(self, method: str) -> bool:
        """Return whether nothing was saved yet, so that a run of `method` begins at step 0.

        Raise UserError if the run is finished, but progress.pt is missing.
        """
        if self.progress_path.exists():
            return False
        if method in self.read_scores():
            raise UserError(
                f"{self.progress_path}: missing, but the run is finished; put it back, or give "
                "another --out to train again"
            )
        return True

    def require_new(self) -> None:
        """Raise UserError if a path that a run writes exists."""
        written = (self.config_path, self.log_path, self.progress_path, self.scores_path)
        program.require_new((*written, self.adapter_path), "add --resume, or give another --out")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder and lock it.

        Raise UserError if another process has locked it. Remove files that a killed process left
        incomplete. Rank 0 holds the lock for all processes.
        """
        if program.rank() != 0:
            yield
            return
        with program.locked_folder(self.path, "wait, or change --out"):
            # Remove what an interrupted program.atomic_write left.
            for half_written in self.path.glob(".*.[0-9]*.tmp"):
                half_written.unlink()
            yield

    def bind(self, run_config: RunConfig, is_new: bool) -> None:
        """Write config.json. is_new: what the method `is_new` has returned.

        Raise UserError if an older one names another base, tokenizer or kind of adapters, other
        tasks or data, or another rule for samples; or if there is none, but a file that a run would
        overwrite.
        """
        if is_new and self.progress_path.exists():
            raise UserError(f"{self.path}: another process wrote it meanwhile; give another --out")
        if self.config_path.exists():
            saved = read_config(self.path)
            if not is_new:  # the run does not depend on --start any more
                run_config = replace(run_config, start=saved.start)
            names = ("rule", "tasks", "base", "tokenizer", "data", "kind", "start")
            saved.require_same(**{name: getattr(run_config, name) for name in names})
        elif program.rank() == 0:  # a later rank may find what rank 0 has just written
            self.require_new()
        values = asdict(run_config)
        del values["run_dir"]
        for section in ("training", "dataset"):  # they have the paths; `start` above is a digest
            for name in PATHS | {"start"}:
                path = values[section].get(name)
                if path:  # so that the run can be resumed from any working folder
                    values[section][name] = str(Path(path).absolute())
        program.write_json(self.config_path, values)

    def log(self, **record: Any) -> None:
        """Add a line to metrics.jsonl."""
        if program.rank() == 0:
            with program.naming_write_errors(self.log_path), open(self.log_path, "ab") as file:
                file.write(program.to_json(record))

    def log_size(self) -> int:
        """Return the size of metrics.jsonl in bytes."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def truncate_log(self, size: int) -> None:
        """Cut off what was logged after the log had this size: steps that are run again."""
        if program.rank() == 0 and 0 <= size < self.log_size():
            os.truncate(self.log_path, size)

    def save_progress(
        self,
        next_step: int,
        best_loss: float,
        adapters: Adapters,
        optimizer: Optimizer,
        initial_w: Tensor | None = None,
    ) -> None:
        """Write progress.pt.

        next_step: from which a resumed run goes on. best_loss: the lowest dev loss so far.
        initial_w: the router's w (M,K) of the M dev examples before training.
        """
        if program.rank() != 0:
            return
        # The names in the file are those of older versions, whose runs can be resumed.
        state = {
            "step": next_step,
            "best": best_loss,
            "start_w": initial_w,
            "log_size": self.log_size(),
            "weights": adapters.state_dict(),
            "probe": probe(adapters),
            "optimizer": optimizer.state_dict(),
        }
        with program.atomic_write(self.progress_path) as file:
            torch.save(state, file)

    def load_progress(
        self, adapters: Adapters, optimizer: Optimizer, dev_examples: int
    ) -> tuple[int, float, Tensor | None]:
        """Load the adapters and the optimizer's state from progress.pt, and truncate the log.

        dev_examples: M. Return (next_step, best_loss, initial_w), see `save_progress`.
        """
        state = checkpoint.read_torch(self.progress_path)
        with program.reading(self.progress_path, "restore the file, or start a new run"):
            for name, expected in (("step", int), ("best", float), ("log_size", int)):
                if type(state[name]) is not expected:
                    raise ValueError(f"{name} has the wrong type")
            initial_w = state["start_w"]
            if initial_w is not None and len(initial_w) != dev_examples:
                raise ValueError("start_w does not fit the dev examples")
            weights = state["weights"]
            # Only the moments are loaded. The learning rates are those of the config.
            moments = state["optimizer"]["state"]
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
            for parameter, loaded in optimizer.state.items():  # torch does not compare shapes
                for name in ("exp_avg", "exp_avg_sq"):
                    if loaded[name].shape != parameter.shape:
                        raise ValueError("the moments of the optimizer do not fit the weights")
        load_probed(self.progress_path, adapters, weights, state.get("probe"))
        if self.log_size() < state["log_size"]:
            program.warn(f"{self.log_path}: lines are missing that were there at the last save")
        self.truncate_log(state["log_size"])
        return state["step"], state["best"], initial_w

    def save_best(self, run_config: RunConfig, adapters: Adapters) -> None:
        """Write the adapter that is best on dev."""
        if program.rank() != 0:
            return
        checkpoint.save_adapter(
            self.adapter_path,
            adapters.state_dict(),
            method=run_config.method,
            config=run_config.adapter,
            kind=run_config.kind,
            tasks=list(run_config.tasks),
            base=run_config.base,
            probe=probe(adapters),
        )

    def read_best(self) -> tuple[dict[str, Tensor], Any]:
        """Return the state that `save_best` wrote, and its probe.

        Raise UserError if it is missing, or if the adapter belongs to another run.
        """
        runtime.barrier()  # rank 0 may still be writing
        run_config = read_config(self.path)
        program.require_path(self.adapter_path, "restore it, or start a new run")
        return run_config.adapter_state()

    def load_best(self, adapters: Adapters) -> None:
        """Load the state that `save_best` wrote, see `load_probed`."""
        state, probed = self.read_best()
        load_probed(self.adapter_path, adapters, state, probed)

    def add_scores(self, name: str, scores: dict[str, dict]) -> dict[str, dict]:
        """Add the scores of the model `name` to scores.json. Return those of all its models."""
        all_scores = self.read_scores() | {name: scores}
        program.write_json(self.scores_path, all_scores)
        return all_scores

    def read_scores(self) -> dict[str, dict]:
        """Return the content of scores.json: {name of a model: {"seen": ..., "unseen": ...}}."""
        if not self.scores_path.exists():
            return {}
        all_scores = program.read_json(self.scores_path)
        with program.reading(self.scores_path, "restore or delete the file"):
            for scores in all_scores.values():
                for scores_of_set in scores.values():
                    for metric in ("loss", "rougeL", "exact_match"):
                        # An older version saved no loss, and null stands for NaN.
                        value = scores_of_set["overall"].get(metric)
                        if not isinstance(value, int | float | None):
                            raise ValueError(f"{metric} must be a number, not {value!r:.40}")
        return all_scores


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


def load(
    device: runtime.Device,
    *,
    run_dir: str | Path = "",
    model: str | Path = "",
    shard: bool = False,
    attach_function: Callable[..., Adapters] = attach_method,
) -> tuple[Backbone, Adapters, Tokenizer]:
    """Load the result of a run, in eval mode: its adapters on its base.

    Without a run, load the model in the folder `model` as it is. With a run, `model` is the new
    folder of its base, if that has moved. shard: split the base over the processes of torchrun.
    attach_function: a function like baselines.attach_method, for studies that change the routing.
    Raise UserError if the base, tokenizer or adapter is not the one of the run.
    """
    run_config = read_config(run_dir) if run_dir else None
    path = model
    if run_config is not None:
        path = model or run_config.training["model"]

    tokenizer = load_tokenizer(path)
    if run_config is not None:
        run_config.require_same(tokenizer=tokenizer.fingerprint)
        run_config.require_same(base=checkpoint.fingerprint(path))

    base = checkpoint.mapped(path)
    if not shard:  # runtime.shard moves one block at a time
        base.to(device.torch_device, device.dtype)
    if run_config is None:
        adapters = without_adapters(base)
    else:
        adapters = attach_trained(run_config, base, attach_function)
    if shard:
        runtime.shard(base, base.blocks, device)
    return base, adapters.eval(), tokenizer


def load_own_method(run_config: RunConfig | None, text: str) -> None:
    """Load the file of `--method FILE.py:Class`. Raise UserError if the run has another method."""
    name = load_method(text)
    if run_config is None or run_config.method != name:
        raise UserError(f"--method {text}: this is not the method of the run; leave it out")


def attach_trained(
    run_config: RunConfig, base: Backbone, attach_function: Callable[..., Adapters]
) -> Adapters:
    """Attach the best adapters of the run (lowest dev loss) to its base."""
    method = run_config.method
    method_class(method)  # UserError if its file is not loaded
    state, probed = run_config.adapter_state()
    run = RunFolder(run_config.run_dir)
    adapter_config = run_config.section(OrchMoEConfig, "adapter")
    num_tasks = len(run_config.tasks)
    with program.reading(run.config_path, REMEDY):
        seed = int(run_config.training["seed"])

    def attach_to(model: Backbone) -> Adapters:
        # Stream 0, as in training. The state replaces all parameters, but a method from a file may
        # draw further values in its constructor, and must draw the same again.
        generator = runtime.generator(seed, 0)
        return attach_function(
            method, model, adapter_config, num_tasks=num_tasks, generator=generator
        )

    # Try it on the meta device first, so that a damaged config cannot allocate much memory. The
    # constructor of a method from a file may look at values, which are not there; it is not tried.
    if method in METHODS:
        with program.reading(run.config_path, REMEDY), torch.device("meta"):
            empty = attach_to(type(base)(base.config))
        run_config.require_same(kind=kind_of(empty))
        with program.reading(run.adapter_path, REMEDY):
            empty.load_state_dict(state)
    adapters = attach_to(base)
    run_config.require_same(kind=kind_of(adapters))
    load_probed(run.adapter_path, adapters, state, probed)
    return adapters
