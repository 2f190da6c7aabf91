"""What the programs need from the machine, each thing in one place: whole files or none, flags from
dataclasses, one line for bad input, device and dtype, several processes, seeds and noise, signals. Level 0:
imports nothing of this project. Test: pytest tests/test_programs.py tests/test_ranks.py"""

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
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
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
        with _naming(path), open(temporary, "wb") as file:
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
    """Holds `folder`, made if need be, for this run alone, and clears it of what a killed save left half
    written; ValueError where another run has it. Of several processes the first holds it for all."""
    if rank() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again however its holder ends
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing this run; wait or change --out") from None
        except OSError as error:  # a file system without locks
            warn(f"{folder}: no lock ({error.strerror}); start no second run on this folder")
        for stale in (*folder.glob(".*.*.tmp"), *folder.glob("model/.*.*.tmp")):
            stale.unlink()
        yield


def new_folder(name: str) -> Path:
    """Makes the first of NAME-1, NAME-2, .. that is not there; all processes of a start get the same."""
    path = None
    Path(name).parent.mkdir(parents=True, exist_ok=True)  # apart, since a link that leads nowhere exists, too
    for number in itertools.count(1) if rank() == 0 else ():
        with suppress(FileExistsError):
            (path := Path(f"{name}-{number}")).mkdir()
            break
    return all_gather(path)[0]


def existing(path: str | Path, remedy: str = "name a local folder, nothing is downloaded here; `hf download "
             "NAME --local-dir DIR` gets a model from the Hub") -> Path:
    """`path`, or a ValueError with the remedy where nothing is there."""
    if not Path(path).exists():
        raise ValueError(f"{path}: not there; {remedy}")
    return Path(path)


def write_json(path: str | Path, value: Any) -> None:
    """Of several processes the first writes."""
    if rank() == 0:
        with atomic_write(path) as file:
            file.write(to_json(value, indent=1, ensure_ascii=False))


def to_json(value: Any, **options: Any) -> bytes:
    """A line of JSON, or several; NaN, which JSON does not have, becomes null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return (json.dumps(plain, **options) + "\n").encode()


def read_json(path: str | Path) -> dict:
    """JSON object in `path`; a ValueError that names the file where there is none, or too much."""
    with open(path, "rb") as file:
        raw = file.read(LARGEST_JSON + 1)
    try:
        if len(raw) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON} bytes")
        value = json.loads(raw.decode("utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError("no object at its top")
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); restore the file") from None


def append_json(path: Path, **record: Any) -> None:
    """Adds a line to a log; of several processes the first writes."""
    if rank() == 0:  # Buffered: an unbuffered write to a full disk can be short without an error.
        with _naming(path), open(path, "ab") as file:
            file.write(to_json(record))


def truncate_log(path: Path, steps: int) -> None:
    """Cuts a log of JSON lines before the first that is of a step >= `steps`, damaged or half written."""
    if rank() != 0 or not path.exists():
        return
    with _naming(path), open(path, "r+b") as file:
        end = 0
        with suppress(ValueError, KeyError, TypeError, RecursionError):  # of a line that is no record
            for line in file:
                if json.loads(line)["step"] >= steps or not line.endswith(b"\n"):
                    break
                end += len(line)
        file.truncate(end)


# ---------------------------------------------------------------------------------- flags, messages, progress


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; see --help")


def read_flags(doc: str | None, *classes: type, defaults: dict[str, Any] | None = None,
               hidden: Iterable[str] = ()) -> dict[str, Any]:
    """What the command line gives, of one flag for each field of the classes. The help is the comment behind
    the field and the default, from `defaults` where the program has its own; the `hidden` have none."""
    parser = Parser(usage="%(prog)s [options]", description=doc, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for cls in classes:
        helps = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
        hints = typing.get_type_hints(cls)
        group = parser.add_argument_group(cls.__doc__.split(":")[0])  # with -OO a dataclass makes its own
        for field in dataclasses.fields(cls):
            default, text = (defaults or {}).get(field.name, field.default), helps.get(field.name, "")
            if "(default:" not in text and default not in ("", (), None):
                text += f" (default: {','.join(default) if isinstance(default, tuple) else default})"
            text = argparse.SUPPRESS if field.name in hidden else text.replace("%", "%%")
            group.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text,
                               **_argument(hints[field.name]))
    if re.search("[\ud800-\udfff]", " ".join(sys.argv)):  # which no file that names it could hold
        parser.error("an argument is not UTF-8; rename what it names")
    return vars(parser.parse_args())


def _argument(hint: Any) -> dict[str, Any]:
    """argparse's options for one type hint: bool, Literal, tuple[str, ...], `X | None`, or a constructor."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": tuple(filter(None, typing.get_args(hint)))}
    if typing.get_origin(hint) is tuple:
        return {"type": lambda text: tuple(filter(None, text.split(","))), "metavar": "A,B,.."}
    make, *_ = typing.get_args(hint) or (hint,)
    return {"type": make, "metavar": {int: "N", float: "X"}.get(make, "NAME")}


def from_flags(cls: type, flags: dict[str, Any]) -> Any:
    """The dataclass `cls` with those of `flags` that are its fields."""
    return cls(**{field.name: flags[field.name] for field in dataclasses.fields(cls) if field.name in flags})


def from_json(cls: type, values: Any, path: str | Path) -> Any:
    """The dataclass `cls` as it was saved in the file `path`; a field that it does not say has its default.
    ValueError names file and field for one that is unknown, or of another type."""
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        for name, hint in typing.get_type_hints(cls).items():
            if name in values and not _fits(values[name], hint):  # it would fail later, and name no field
                raise ValueError(f"{name}: {values[name]!r:.60} is of another type, or no choice")
        return cls(**values)
    except (TypeError, ValueError, AttributeError) as error:
        what = str(error).removeprefix(f"{cls.__name__}.__init__() ")
        raise ValueError(f"{path}: {cls.__name__}: {what:.200}; restore the file") from None


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    return type(value) in (hint, *typing.get_args(hint)) or (type(value) is int and _fits(0.0, hint))


def require_least(config: Any, **least: int) -> None:
    """ValueError that names the flag for the first number of `config` below its least value, which is 0 where
    none is given, or not finite."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, smallest = getattr(config, name), least.get(name, 0)
        if hint in (int, float) and not smallest <= value < (2**53 if isinstance(value, int) else math.inf):
            raise ValueError(f"--{name.replace('_', '-')} {value}: give {smallest} or more, below 2^53")


def run_program(main: Callable[[], int | None]) -> typing.NoReturn:
    """Runs `main` and ends the process by the code that it returns (None: 0). Bad input (ValueError, OSError)
    and a lack of memory or a compiler are one line on stderr, exit code 2; Ctrl-C is exit code 130."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where the shell has closed them
    sys.stderr = sys.stderr or open(os.devnull, "w")
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # where its encoding lacks letters
    try:
        code = main() or 0
        if dist.is_torchelastic_launched():
            # A sharded base keeps gloo's threads, which may abort as Python goes down; all said is flushed.
            os._exit(code)
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        named = isinstance(error, OSError) and error.filename
        said = f"{error.filename}: {error.strerror}" if named else str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            said = f"out of memory ({error!s:.120}); lower the batch sizes, or use a smaller model"
        elif re.search(r"C(\+\+)? compiler", str(error)):
            said = "torch.compile finds no C compiler; install one (gcc, g++), or set TORCHDYNAMO_DISABLE=1"
        else:
            raise
    if local_rank() == 0 or dist.is_initialized():  # before they join, all meet the same error
        who = f" on rank {rank()}" if rank() else ""
        print(f"{Path(sys.argv[0]).name}: error{who}: {' '.join(said.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def say(text: str = "", file: Any = None) -> None:
    """One line on stdout, or file, of the first process, at once, without breaking a progress bar."""
    if rank() != 0:
        return
    file = file or sys.stdout
    try:
        with tqdm.external_write_mode(file=file):
            print(text, file=file, flush=True)
    except OSError:  # `| head -1`, or a terminal that is gone: the run is worth more than its words
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


@functools.cache
def warn(text: str) -> None:
    """One line on stderr, of the first process, for what the run survives; each text once."""
    say(f"warning: {text}", sys.stderr)


def progress(iterable: Iterable | None, desc: str, **options: Any) -> tqdm:
    """tqdm on stderr, of what takes longer than a second; the first process's alone, and on a terminal."""
    silent = multiprocessing.parent_process() is not None or rank() != 0 or not sys.stderr.isatty()
    return tqdm(iterable, desc, leave=False, dynamic_ncols=True, delay=1, disable=silent, **options)


# ------------------------------------------------------------------------------------------ device, processes


class Device(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of the base; adapters stay float32
    reason: str  # one line for the user


def _cpu_gains(base: str | Path) -> bool:
    """Whether this CPU multiplies bfloat16 itself, and the model in the folder is large enough to gain."""
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    sizes = (path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in Path(base).glob(kind))
    # Below 40 MB, about a width of 256, the casts around what stays float32 cost what the products save.
    return any(getattr(torch.cpu, name, bool)() for name in native) and sum(sizes) >= 4e7


def pick_device(gpu: int | None = None, device: str = "", dtype: str = "auto", *, base: str = "") -> Device:
    """`--gpu N` or `--device cpu`; with no CUDA at all the CPU, said in `reason`. Under torchrun each process
    takes the GPU of its LOCAL_RANK. Unless `dtype` says otherwise bf16 on CUDA, and on a CPU where the model
    in the folder `base` gains by it; else float32. ValueError for a GPU beyond those there are."""
    if gpu is not None and device:
        raise ValueError(f"--gpu {gpu} --device {device}: give one of the two")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_gpu = device != "cpu" and count > 0
    wanted = local_rank() if world_size() > 1 else gpu or 0
    if wanted < 0 or (on_gpu and max(wanted, _torchrun("LOCAL_WORLD_SIZE", 1) - 1) >= count):
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


# Under torchrun every process runs the whole program on its share of each batch; the rest of the code asks
# here. Without it there is one process, rank 0 of 1, and all of this does nothing.


def _torchrun(name: str, alone: int) -> int:
    # By torchrun's own mark: clusters set RANK and WORLD_SIZE for a lone process too.
    return int(os.environ[name]) if dist.is_torchelastic_launched() else alone


rank = functools.partial(_torchrun, "RANK", 0)
local_rank = functools.partial(_torchrun, "LOCAL_RANK", 0)
world_size = functools.partial(_torchrun, "WORLD_SIZE", 1)


def launcher() -> str:
    """What starts this program again."""
    ours = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE')} --"  # -- or it takes --run
    return ours if dist.is_torchelastic_launched() else "python"


def require_alone() -> None:
    """ValueError under torchrun, for programs of one process."""
    if (count := world_size()) > 1:
        raise ValueError(f"WORLD_SIZE {count}: this program runs in one process; start it without torchrun")


@contextmanager
def joined(place: Device | None) -> Iterator[None]:
    """Joins the processes that torchrun has started, for the body: NCCL between GPUs, gloo on the CPU. One
    that fails speaks for itself and ends the others through torchrun; one that hangs, after half an hour."""
    if not dist.is_torchelastic_launched():
        yield
        return
    on_gpu = place is not None and place.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(place.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    yield
    any_rank(False)  # the first may still be writing
    dist.destroy_process_group()  # not after an error: it would wait for the lost


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true in any process; waits for all."""
    return bool(all_reduce([], flag)[0])


def all_reduce(tensors: Sequence[torch.Tensor], *numbers: float) -> list[float]:
    """Replaces the tensors, all of one dtype, by their sums over all processes; returns the numbers' sums."""
    if not dist.is_initialized():
        return list(numbers)
    like = tensors[0] if tensors else torch.empty(0, dtype=torch.float64)
    parts = [*tensors, like.new_tensor(numbers)]
    dist.all_reduce(flat := parameters_to_vector(parts))
    vector_to_parameters(flat, parts)
    return parts[-1].tolist()


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces the tensors of every process by those of the first."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.broadcast(tensor, 0)


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def shard(root: nn.Module, units: Iterable[nn.Module], place: Device) -> None:
    """Splits the frozen weights of `root` over all processes by FSDP2, each unit's apart and gathered only
    while it computes, in its forward and the methods that its `entries` name. Weights may be views of mapped
    files, of which each process reads its share alone. What trains is whole, on every process's device."""
    # Imported here: they take half a second, which no other run need wait.
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, Shard

    # Old torch files hold transposed weights, which FSDP2 does not take.
    frozen = {name: p.detach().contiguous() for name, p in root.named_parameters() if not p.requires_grad}
    if not frozen:
        raise ValueError("--shard: splits a frozen base; not with --method full")
    if not dist.is_initialized():
        raise ValueError("--shard: splits the base over the processes of torchrun; start it by that")
    trained = {p for p in root.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(place.device)
    # FSDP2 first divides weights without values, then gets each share.
    empty = {name: weight.to("meta", place.dtype) for name, weight in frozen.items()}
    root.load_state_dict(empty, strict=False, assign=True)
    mesh = dist.init_device_mesh(place.device.type, (world_size(),))
    for module in (*units, root):
        fully_shard(module, mesh=mesh, ignored_params=trained)
        for name in getattr(module, "entries", ()):
            register_fsdp_forward_method(module, name)
    shares = {}
    for name in progress(list(frozen), "sharding", unit="tensor"):
        weight = frozen.pop(name)
        size = -(-len(weight) // world_size())  # of the first dimension, as FSDP2 cuts; the last gets less
        mine = weight[rank() * size:][:size].to(place.device, place.dtype, copy=True).contiguous()
        shares[name] = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=weight.shape,
                                          stride=weight.stride())
    root.load_state_dict(shares, strict=False, assign=True)


# ------------------------------------------------------------------------------------------ seeds and signals


def generator(*seed: int) -> torch.Generator:
    """CPU generator whose stream is a pure function of the numbers given, e.g. (seed, step, sample)."""
    mixed = 0x9E3779B97F4A7C15
    for number in seed:  # splitmix64's finaliser after each number, so that neighbouring seeds share nothing
        mixed = (mixed + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed = (mixed ^ mixed >> shift) * factor & (2**64 - 1)
    return torch.Generator().manual_seed(mixed >> 1)


def uniform_noise(seed: int, step: int, samples: Iterable[int], shape: tuple[int, ...], *stream: int
                  ) -> torch.Tensor:
    """u (B, *shape) in [0, 1) on the CPU, row b a function of (seed, step, sample b, *stream) alone."""
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
