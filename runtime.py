"""What the programs need from the machine, each thing in one place: whole files or none, flags from
dataclasses, one line for bad input, device and dtype, several processes, seeds and noise, signals. Level 0:
imports nothing of this project. Test: pytest tests/test_programs.py tests/test_ranks.py"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent  # of the repository, whose sni/ and tiny/ are the defaults
LARGEST_JSON = 2**28  # bytes; a task file of a million short instances, and a bound on memory

# ------------------------------------------------------------------------------------------------------ files


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Binary file that appears under `path` whole or not at all. An OSError names `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _naming(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Writing to an open file names no file, and a temporary name tells nobody anything."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch complains on top
        if not isinstance(cause, OSError):
            raise
        kept = "not written, what was saved before is whole; make room or mend the folder, and go on"
        raise OSError(cause.errno, f"{cause.strerror}; {kept}", str(path)) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder`, made if it is not there, for this run alone; ValueError where another one that lives
    has it. The kernel frees the lock however its holder ends, kill -9 included. What a killed save has left
    half written is removed. Of several processes the first holds it for all."""
    if rank() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing this run; wait until it ends, or name "
                             "another folder by --out") from None
        except OSError as error:  # a file system without locks
            warn(f"{folder}: no lock ({error.strerror}); start no second run on this folder")
        for stale in folder.rglob(".*.tmp"):
            stale.unlink()
        yield


def new_folder(name: str) -> Path:
    """NAME-1, NAME-2, ...: makes the first that is not there; of two starts at once each gets its own. All
    processes get the same."""
    def first_free() -> Path:
        for number in itertools.count(1):
            with suppress(FileExistsError):
                (path := Path(f"{name}-{number}")).mkdir(parents=True)
                return path

    return all_gather(first_free() if rank() == 0 else None)[0]


def require_model(path: str | Path) -> None:
    """ValueError with the remedy where nothing is at `path`, say because it is a model's name on the Hub."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such folder; name a local one, nothing is downloaded here; "
                         "`hf download NAME --local-dir DIR` gets a model from the Hub")


def write_json(path: str | Path, value: Any) -> None:
    """Of several processes the first writes."""
    if rank() != 0:
        return
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> dict:
    """JSON object in `path`; a ValueError that names the file where there is none, or too much."""
    with open(path, "rb") as file:
        raw = file.read(LARGEST_JSON + 1)
    try:
        if len(raw) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON} bytes")
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=without_duplicates)
        if not isinstance(value, dict):
            raise ValueError("no object at its top")
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); restore the file") from None


def without_duplicates(pairs: list[tuple]) -> dict:
    """The dictionary of a JSON object; two readers may see two files where a name occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def append_json(path: Path, **record: Any) -> None:
    """Adds a line to a log; of several processes the first writes."""
    if rank() != 0:
        return
    # Buffered: an unbuffered write to a full disk can be short without an error.
    with _naming(path), open(path, "ab") as file:
        file.write((json.dumps(record) + "\n").encode())


def truncate_log(path: Path, steps: int) -> None:
    """Cuts a log of JSON lines before the first that is of a step >= `steps`, damaged or half written."""
    if rank() != 0 or not path.exists():
        return
    with _naming(path), open(path, "r+b") as file:
        end = 0
        for line in file:
            try:
                if json.loads(line)["step"] >= steps or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            end += len(line)
        file.truncate(end)


# ---------------------------------------------------------------------------------- flags, messages, progress


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose flags come from dataclasses and whose errors are ValueErrors, for run_program."""

    def __init__(self, doc: str | None):
        super().__init__(usage="%(prog)s [options]", description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; see --help")

    def add_dataclass(self, cls: type, defaults: dict[str, Any] | None = None,
                      hidden: Iterable[str] = ()) -> None:
        """One flag a field, named as the field; its help is the comment behind the field and the default,
        from `defaults` where the program has its own. Flags left out stay unset; `hidden` ones are not in
        the help."""
        helps = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
        hints = typing.get_type_hints(cls)
        group = self.add_argument_group((cls.__doc__ or cls.__name__).split(":")[0])
        for field in dataclasses.fields(cls):
            default = (defaults or {}).get(field.name, field.default)
            text = helps.get(field.name, "")
            if "(default:" not in text and default not in ("", (), None):
                shown = ",".join(default) if isinstance(default, tuple) else default
                text += f" (default: {shown})"
            text = argparse.SUPPRESS if field.name in hidden else text.replace("%", "%%")
            group.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text,
                               **_argument(hints[field.name]))


def _argument(hint: Any) -> dict[str, Any]:
    """argparse's options for one type hint: bool, Literal, tuple[str, ...], `X | None`, or a constructor."""
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": tuple(filter(None, typing.get_args(hint)))}
    if typing.get_origin(hint) is tuple:
        return {"type": lambda text: tuple(filter(None, text.split(","))), "metavar": "A,B,.."}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "NAME")}


def from_flags(cls: type, flags: dict[str, Any]) -> Any:
    """The dataclass `cls` with those of `flags` that are its fields."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in flags.items() if name in names})


def from_json(cls: type, values: Any, path: str | Path) -> Any:
    """The dataclass `cls` as it was saved in the file `path`. Fields that an older version did not have get
    their defaults; ValueError names file and field for those that this version does not have."""
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        for field in dataclasses.fields(cls):  # a number that is a text would fail later, and name no field
            value, default = values.get(field.name), field.default
            if field.name in values and type(value) is not type(default) and not (
                    default in (None, dataclasses.MISSING) or {type(value), type(default)} == {int, float}):
                raise ValueError(f"{field.name}: {value!r:.60} is of another type than {default!r}")
        return cls(**values)
    except (TypeError, ValueError, AttributeError) as error:
        what = str(error).removeprefix(f"{cls.__name__}.__init__() ")
        raise ValueError(f"{path}: {cls.__name__}: {what:.200}; restore the file") from None


def require_least(config: Any, **least: int) -> None:
    """ValueError that names the flag for the first field of `config` below its least value, or not finite."""
    for name, smallest in least.items():
        if not smallest <= getattr(config, name) < math.inf:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(config, name)}: give {smallest} or more")


def run_program(main: Callable[[], None]) -> typing.NoReturn:
    """Runs `main`. Bad input (ValueError, OSError) and a lack of memory are one line on stderr and exit code
    2; Ctrl-C is exit code 130."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where the shell has closed them
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        named = isinstance(error, OSError) and error.filename
        _fail(f"{error.filename}: {error.strerror}" if named else str(error))
    except (MemoryError, RuntimeError) as error:
        lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not (lacking or "DefaultCPUAllocator" in str(error)):
            raise
        _fail(f"out of memory ({error!s:.120}); lower the batch sizes, or use a smaller model")
    sys.exit(0)


def _fail(text: str) -> typing.NoReturn:
    if local_rank() == 0 or dist.is_initialized():  # before they join, all meet the same error
        who = f" on rank {rank()}" if rank() else ""
        print(f"{Path(sys.argv[0]).name}: error{who}: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def say(text: str = "") -> None:
    """One line on stdout, of the first process, at once, without breaking a progress bar."""
    if rank() != 0:
        return
    try:
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)
    except BrokenPipeError:  # `| head -1`: the run is worth more than its words
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@functools.cache
def warn(text: str) -> None:
    """One line on stderr, of the first process, for what the run survives; each text once."""
    if rank() == 0:
        tqdm.write(f"warning: {text}", file=sys.stderr)


def progress(iterable: Iterable | None, desc: str, total: int | None = None, unit: str = "it",
             **options: Any) -> tqdm:
    """tqdm on stderr, of what takes longer than a second; silent where stderr is no terminal, and in all
    processes but the first, whose bars would overwrite each other."""
    silent = multiprocessing.parent_process() is not None or rank() != 0 or not sys.stderr.isatty()
    return tqdm(iterable, desc=desc, total=total, unit=unit, leave=False, dynamic_ncols=True, delay=1,
                disable=silent, **options)


# ------------------------------------------------------------------------------------------- device and dtype


class Device(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of the base; adapters stay float32
    reason: str  # one line for the user


# Bytes of weights, about a width of 256, from which a CPU that multiplies bfloat16 itself gains by it: below,
# the casts around routers and adapters, which stay float32, cost what the multiplications save.
BF16_WORTH = 4e7


def _cpu_gains(base: str | Path) -> bool:
    """Whether this CPU multiplies bfloat16 itself, and the model in the folder is large enough to gain."""
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    sizes = (path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in Path(base).glob(kind))
    return any(getattr(torch.cpu, name, bool)() for name in native) and sum(sizes) >= BF16_WORTH


def pick_device(gpu: int | None = None, device: str = "", dtype: str = "auto", *, base: str = "") -> Device:
    """`--gpu N` or `--device cpu`; with no CUDA at all the CPU, said in `reason`. Under torchrun each process
    takes the GPU of its LOCAL_RANK. Unless `dtype` says otherwise bf16 on CUDA, and on a CPU that is natively
    faster in it if the model in the folder `base` is large enough to gain; else float32. ValueError for a GPU
    beyond those there are."""
    if gpu is not None and device:
        raise ValueError(f"--gpu {gpu} --device {device}: give one of the two")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_gpu = device != "cpu" and count > 0
    wanted = local_rank() if world_size() > 1 else gpu or 0
    if wanted < 0 or (on_gpu and wanted >= count):
        remedy = "; start as many processes on a node, or give --device cpu" if world_size() > 1 else ""
        raise ValueError(f"--gpu {wanted}: there are {count} GPUs, numbered from 0{remedy}")
    chosen = torch.device("cuda", wanted) if on_gpu else torch.device("cpu")
    fast = on_gpu or bool(base) and _cpu_gains(base)
    kind = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and fast) else torch.float32
    name = torch.cuda.get_device_name(chosen) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    name += "" if on_gpu or device == "cpu" else " (no CUDA here)"
    name += f", {world_size()} processes" if world_size() > 1 else ""
    native = ", which this CPU multiplies itself" if fast and not on_gpu and dtype == "auto" else ""
    return Device(chosen, kind, f"device: {name}, {str(kind)[6:]}{native}, torch {torch.__version__}")


# ------------------------------------------------------------------------------------------ several processes
# Under torchrun every process runs the whole program on its share of each batch; the rest of the code asks
# here. Without torchrun there is one process, rank 0 of 1, and all of this does nothing.

TIMEOUT = timedelta(minutes=30)  # for one another: a first start tokenises for long


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ  # clusters set RANK and WORLD_SIZE for a lone process too


def rank() -> int:
    return int(os.environ["RANK"]) if _under_torchrun() else 0


def local_rank() -> int:
    return int(os.environ["LOCAL_RANK"]) if _under_torchrun() else 0


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if _under_torchrun() else 1


def launcher() -> str:
    """What starts this program again."""
    nodes = os.environ.get("LOCAL_WORLD_SIZE")
    return f"torchrun --nproc-per-node {nodes} --" if _under_torchrun() else "python"  # -- or it takes --run


def require_alone() -> None:
    """ValueError under torchrun, for programs of one process."""
    if world_size() > 1:
        raise ValueError(f"WORLD_SIZE {world_size()}: this program runs in one process; start it without "
                         "torchrun")


@contextmanager
def joined(place: Device | None) -> Iterator[None]:
    """Joins the processes that torchrun has started, for the body: NCCL between GPUs, gloo on the CPU. One
    that fails is said by itself and ends the others through torchrun; one that hangs, by TIMEOUT."""
    if not _under_torchrun():
        yield
        return
    on_gpu = place is not None and place.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(place.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    yield
    barrier()  # the first may still be writing
    dist.destroy_process_group()  # not after an error: it would wait for the lost


def barrier() -> None:
    """Waits until all processes are here."""
    any_rank(False)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return bool(all_reduce([], flag)[0])


def all_reduce(tensors: Sequence[torch.Tensor], *numbers: float) -> list[float]:
    """Replaces the tensors, all of one dtype, by their sums over all processes, and returns those of the
    numbers: one flat all_reduce."""
    if not dist.is_initialized():
        return list(numbers)
    like = tensors[0] if tensors else torch.empty(0, dtype=torch.float64)
    flat = torch.cat([*(tensor.flatten() for tensor in tensors), like.new_tensor(numbers)])
    dist.all_reduce(flat)
    *sums, numbers = flat.split([*(tensor.numel() for tensor in tensors), len(numbers)])
    for tensor, total in zip(tensors, sums, strict=True):
        tensor.copy_(total.view_as(tensor))
    return numbers.tolist()


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces the tensors of every process by those of the first."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.broadcast(tensor, 0)


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    values = [value]
    if dist.is_initialized():
        values *= world_size()
        dist.all_gather_object(values, value)
    return values


@contextmanager
def first_of_node_first() -> Iterator[None]:
    """Lets the first process of each node through the body alone, so that the others find what it cached."""
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def is_sharded(module: nn.Module) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in module.parameters())


def shard(root: nn.Module, units: Iterable[nn.Module], place: Device) -> None:
    """Splits the frozen weights of `root` over all processes by FSDP2, each unit's apart and gathered only
    while it computes; those outside the units stay gathered from the forward to the backward. Weights may be
    views of mapped files, of which each process reads its share alone. What trains is whole in every process,
    on the device. Methods in a module's `entries` gather its weights as its forward does."""
    # Imported here: they take half a second, which no other run need wait.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if not dist.is_initialized():
        raise ValueError("--shard: splits the base over the processes of torchrun; start it by that")
    frozen = {name: p.detach() for name, p in root.named_parameters() if not p.requires_grad}
    trained = {p for p in root.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(place.device)
    for name, weight in frozen.items():  # FSDP2 first divides weights without values, then gets each share
        owner, _, child = name.rpartition(".")
        empty = torch.empty(weight.shape, dtype=place.dtype, device="meta")
        setattr(root.get_submodule(owner), child, nn.Parameter(empty, requires_grad=False))
    mesh = init_device_mesh(place.device.type, (world_size(),))
    for module in (*units, root):
        fully_shard(module, mesh=mesh, ignored_params=trained)
        for name in getattr(module, "entries", ()):
            register_fsdp_forward_method(module, name)
    bar = progress(list(frozen), "sharding", unit="tensor")
    root.load_state_dict({name: _share(frozen.pop(name), mesh, place) for name in bar}, strict=False,
                         assign=True)


def _share(weight: torch.Tensor, mesh: Any, place: Device) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Shard

    parts = weight.chunk(world_size())  # along the first dimension, as FSDP2 does; the last may be smaller
    mine = parts[rank()] if rank() < len(parts) else weight[:0]
    mine = mine.to(place.device, place.dtype, copy=True).contiguous()
    return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=weight.shape,
                              stride=weight.stride())


# ------------------------------------------------------------------------------------------ seeds and signals


def generator(*seed: int) -> torch.Generator:
    """CPU generator whose stream is a pure function of the numbers given, e.g. (seed, step, sample)."""
    mixed = 0x9E3779B97F4A7C15
    for number in seed:  # splitmix64's finaliser after each number, so that neighbouring seeds share nothing
        mixed = (mixed + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed >> 1)


def uniform_noise(seed: int, step: int, samples: Iterable[int], shape: tuple[int, ...],
                  *stream: int) -> torch.Tensor:
    """u (B, *shape) in [0, 1) on the CPU, row b from (seed, step, sample b) alone: the same whatever the
    ranks, the accumulation or the device."""
    rows = (generator(seed, step, sample, *stream) for sample in samples)
    return torch.stack([torch.rand(shape, generator=row) for row in rows])


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields `asked()`, true once SIGTERM or Ctrl-C has come, so that a loop can finish its step."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: received.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def end_with_parent() -> None:
    """Lets no worker outlive a parent that was killed outright: an orphan would wait for work forever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
