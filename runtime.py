"""What the programs need from the machine, each thing in one place: whole files or none, flags from
dataclasses, one line for bad input, device and dtype, several processes, seeds and noise, the JSONL log,
signals. Level 0: imports nothing of this project."""

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
import secrets
import shutil
import signal
import sys
import textwrap
import threading
import time
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

LARGEST_JSON = 2**28  # bytes; a task file of a million short instances, and a bound on memory

# ------------------------------------------------------------------------------------------------------ files


@contextmanager
def atomic_write(path: str | Path, *, each_node: bool = False) -> Iterator[BinaryIO]:
    """Binary file that appears under `path` whole or not at all: temporary name, fsync, rename, fsync of the
    folder. An OSError names `path`. Of several processes only the first writes, or the first of each
    node."""
    path = Path(path)
    if (local_rank() if each_node else rank()) != 0:
        with open(os.devnull, "wb") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path, temporary):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Lets an OSError name `path`: writing to an open file names none, and a temporary name tells nobody
    anything."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        kept = "not written, what was saved before is whole; make room or mend the folder, and go on"
        raise OSError(error.errno, f"{error.strerror}; {kept}", str(path)) from None


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Holds `folder` for this process alone; ValueError where another one that lives does. The kernel frees
    the lock however its holder ends, kill -9 included; what a holder killed inside a save has left half
    written, in the folder or in its model/, is removed. At the end the lock's file goes, and of the folders
    made for it those that are still empty. Of several processes the first holds it for all."""
    if rank() != 0:
        yield
        return
    path = Path(folder) / ".lock"
    made = [part for part in path.parents if not part.exists()]
    with _locked(path) as file:
        try:
            yield
        finally:
            with suppress(OSError):
                if _is_at(path, file):
                    path.unlink()  # still locked: who has opened it by now will see that it is gone
                for part in made:
                    part.rmdir()


def _locked(path: Path) -> BinaryIO:
    """The file `path`, made with its folder, for this process alone until it is closed."""
    for left in reversed(range(100)):  # a holder that ends takes file and folder away at any moment
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "wb")
        except (FileNotFoundError, FileExistsError):
            if not left:
                raise
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"{path.parent}: another process is writing this run; wait until it ends, or "
                             "name another folder by --out") from None
        except OSError as error:  # a file system without locks
            warn(f"{path.parent}: no lock ({error.strerror}); start no second run on this folder")
            return file
        if _is_at(path, file):
            for stale in (*path.parent.glob(".*.tmp"), *path.parent.glob("model/.*.tmp")):
                stale.unlink()
            return file
        file.close()
    raise ValueError(f"{path.parent}: cannot be locked; name another folder by --out")


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether `path` names the open file, and not another or none."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def require_model(path: str | Path) -> None:
    """ValueError with the remedy where nothing is at `path`, say because it is a model's name on the Hub."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such folder; name a local one, nothing is downloaded here; "
                         "`hf download NAME --local-dir DIR` gets a model from the Hub")


def write_json(path: str | Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """JSON value in `path`; a ValueError that names the file where there is none, or too much."""
    with open(path, "rb") as file:
        raw = file.read(LARGEST_JSON + 1)
    try:
        if len(raw) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON} bytes")
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); restore the file") from None


def without_duplicates(pairs: list[tuple]) -> dict:
    """The dictionary of a JSON object, for json.loads; two readers may see two files where a name occurs
    twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


class Log:
    """JSON lines in `path`, one record a call; with `resume_step`, records of later steps and half lines are
    dropped first."""

    def __init__(self, path: str | Path, resume_step: int | None = None):
        path = Path(path)
        if resume_step is not None and path.exists() and rank() == 0:
            kept = [line for line in path.read_bytes().split(b"\n") if _step_of(line) <= resume_step]
            with atomic_write(path) as file:
                file.writelines(line + b"\n" for line in kept)
        self._path = path

    def write(self, **record: Any) -> None:
        if rank() != 0:
            return
        with naming(self._path), open(self._path, "ab") as file:
            file.write((json.dumps(record) + "\n").encode())


def _step_of(line: bytes) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf


# ---------------------------------------------------------------------------------- flags, messages, progress


class _Page(argparse.RawDescriptionHelpFormatter):
    """Help in two columns, a flag that has a --no- form on one line."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=31)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose flags come from dataclasses, whose help is the program's docstring (its first
    paragraph, then the indented ones as examples) and whose errors are one line on stderr and exit code 2."""

    def __init__(self, doc: str):
        about, *rest = doc.strip().split("\n\n")
        examples = [part.rstrip() for part in rest if part.startswith("    ")]
        super().__init__(usage="%(prog)s [options]", epilog="\n".join(["examples:", *examples]),
                         description=textwrap.fill(about, shutil.get_terminal_size().columns - 2),
                         allow_abbrev=False, formatter_class=_Page)

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n" if local_rank() == 0 else None)

    def add_dataclass(self, cls: type, defaults: dict[str, Any] | None = None,
                      hidden: Iterable[str] = ()) -> None:
        """One flag a field, named as the field; its help is the comment behind the field and the default,
        from `defaults` where the program has its own. Flags left out stay unset; `hidden` fields are not in
        the help."""
        helps = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
        hints = typing.get_type_hints(cls)
        group = self.add_argument_group(cls.__doc__.split(":")[0].split("\n")[0].lower())
        for field in dataclasses.fields(cls):
            text = helps.get(field.name, "")
            if field.name in (defaults or {}):
                text = re.sub(r" \(default: .*?\)", "", text)
            shown = "" if "default:" in text else _shown((defaults or {}).get(field.name, field.default))
            whole = argparse.SUPPRESS if field.name in hidden else (text + shown).replace("%", "%%")
            group.add_argument("--" + field.name.replace("_", "-"), dest=field.name, help=whole,
                               default=argparse.SUPPRESS, **_argument(hints[field.name], text))


def _shown(default: Any) -> str:
    """A default as the help has it; nothing where it is empty."""
    if default in ("", (), None):
        return ""
    if isinstance(default, bool):
        return f" (default: {'on' if default else 'off'})"
    return f" (default: {','.join(default) if isinstance(default, tuple) else default})"


def _argument(hint: Any, text: str) -> dict[str, Any]:
    """argparse options of one type hint: bool, Literal, tuple[str, ...], `X | None`, or a plain constructor;
    a string is a folder, a file or a text where the help `text` says so."""
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": tuple(filter(None, typing.get_args(hint)))}
    if typing.get_origin(hint) is tuple:
        return {"type": lambda text: tuple(filter(None, text.split(","))), "metavar": "A,B,.."}
    kind = next((word.upper() for word in ("folder", "file", "text") if word in text), "NAME")
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, kind)}


def from_flags(cls: type, flags: dict[str, Any]) -> Any:
    """The dataclass `cls` with those of `flags` that are its fields; lists, as JSON has them, become
    tuples."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in flags.items() if k in names})


def from_json(cls: type, values: Any, path: str | Path) -> Any:
    """The dataclass `cls` as a run saved it in the file `path`; ValueError unless every field is there and no
    other."""
    hints = typing.get_type_hints(cls)
    odd = sorted(hints.keys() ^ values.keys()) if isinstance(values, dict) else sorted(hints)
    odd = odd or [name for name, hint in hints.items() if not _fits(values[name], hint)]
    if odd:
        raise ValueError(f"{path}: {cls.__name__} does not fit this version ({odd[0]}); restore the file")
    try:
        return from_flags(cls, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the type that a field's hint asks for."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    return type(value) is hint or (hint is float and type(value) is int)  # and no bool for an int


def require_least(config: Any, **least: int) -> None:
    """ValueError that names the flag for the first field of `config` below its least value, or not finite."""
    for name, smallest in least.items():
        if not smallest <= getattr(config, name) < math.inf:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(config, name)}: give {smallest} or more")


def run_program(main: Callable[[], None]) -> typing.NoReturn:
    """Runs `main`. Bad input (ValueError, OSError) and a lack of memory are one line on stderr and exit code
    2; Ctrl-C is exit code 130."""
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
        _fail(f"out of memory ({error!s:.120}); lower the batch sizes or the ranks, or use a smaller model")
    sys.exit(0)


def _fail(text: str) -> typing.NoReturn:
    if local_rank() == 0 or _joined():  # before they join, all processes of a node meet the same error
        _complain(text)
    sys.exit(2)


def _complain(text: str) -> None:
    who = f" on rank {rank()}" if rank() else ""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error{who}: {' '.join(text.split())}\n")
    sys.stderr.flush()


def say(text: str = "") -> None:
    """One line on stdout, of the first process, at once, without breaking a progress bar."""
    if rank() != 0:
        return
    with tqdm.external_write_mode(file=sys.stdout):
        print(text, flush=True)


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


def pick_device(gpu: int | None = None, device: str = "", dtype: str = "auto") -> Device:
    """`--gpu N` or `--device cpu|cuda:N`; with no CUDA at all the CPU, said in `reason`. Under torchrun each
    process takes the GPU of its LOCAL_RANK. bf16 on CUDA and float32 on the CPU unless `dtype` says
    otherwise. ValueError for a GPU beyond those there are and for float16, in which T5 overflows."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype}: choose auto, float32 or bfloat16 (T5 overflows in float16)")
    if gpu is not None and device:
        raise ValueError(f"--gpu {gpu} --device {device}: give one of the two")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device and device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: choose cpu or cuda:N")
    wanted = int(device.partition(":")[2] or 0) if device.startswith("cuda") else gpu
    wanted = local_rank() if ranks() > 1 else wanted
    if device.startswith("cuda") and not count:
        raise ValueError(f"--device {device}: no CUDA here or in this torch; use --device cpu")
    on_gpu = device != "cpu" and count > 0
    if wanted is not None and (wanted < 0 or (on_gpu or ranks() == 1) and 0 < count <= wanted):
        remedy = "; start as many processes on a node, or give --device cpu" if ranks() > 1 else ""
        raise ValueError(f"--gpu {wanted}: there are {count} GPUs, numbered from 0{remedy}")
    place = torch.device("cuda", wanted or 0) if on_gpu else torch.device("cpu")
    kind = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and on_gpu) else torch.float32
    name = torch.cuda.get_device_name(place) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    note = "" if on_gpu or device == "cpu" else " (no CUDA here)"
    name += f"{note}, {ranks()} processes" if ranks() > 1 else note
    return Device(place, kind, f"device: {name}, {str(kind)[6:]}, torch {torch.__version__}")


# ------------------------------------------------------------------------------------------ several processes
# Under torchrun every process runs the whole program on its share of each batch; the rest of the code asks
# here. Without torchrun there is one process, rank 0 of 1, and all of this does nothing.

SILENCE = 15  # seconds without a sign of life after which a process is given up
LONGEST_WAIT = timedelta(hours=2)  # for one another, while all are alive: a first start tokenises for long


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ  # clusters set RANK and WORLD_SIZE for a lone process too


def rank() -> int:
    return int(os.environ["RANK"]) if _under_torchrun() else 0


def local_rank() -> int:
    return int(os.environ["LOCAL_RANK"]) if _under_torchrun() else 0


def ranks() -> int:
    return int(os.environ["WORLD_SIZE"]) if _under_torchrun() else 1


def launcher() -> str:
    """What starts this program again."""
    return f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}" if _under_torchrun() else "python"


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def require_alone() -> None:
    """ValueError under torchrun, for programs of one process."""
    if ranks() > 1:
        raise ValueError(f"WORLD_SIZE {ranks()}: this program runs in one process; start it without torchrun")


@contextmanager
def joined(place: Device | None, remedy: str = "start it again") -> Iterator[None]:
    """Joins the processes that torchrun has started, for the body: NCCL between GPUs, gloo on the CPU. When
    one of them is lost the others end within SILENCE seconds and say which it was, and `remedy`."""
    if not _under_torchrun():
        yield
        return
    on_gpu = place is not None and place.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(place.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=LONGEST_WAIT)
    pulse = _Pulse(remedy)
    try:
        meet()  # from here on every process shows its pulse
        pulse.start()
        yield
        meet()
    except (RuntimeError, ValueError, OSError) as error:
        raise pulse.verdict(error) from None
    finally:
        pulse.stop()
    dist.destroy_process_group()  # after an error it would wait for the lost


class _Pulse(threading.Thread):
    """A second thread that tells the others once a second, through torchrun's key-value store, that this
    process is alive, and ends it when another falls silent: stopped, killed, or cut off. A collective that
    waits for a dead partner would not return by itself."""

    def __init__(self, remedy: str):
        super().__init__(daemon=True)
        self._remedy, self._ended = remedy, threading.Event()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SILENCE))
        self._keys = [f"pulse/{number}" for number in range(ranks())]
        self._beat("0")

    def _beat(self, value: str) -> None:
        self._store.set(self._keys[rank()], value)

    def run(self) -> None:
        seen, quiet = [b""] * ranks(), [0] * ranks()
        for count in itertools.count(1):
            if self._ended.wait(1):
                return
            try:
                self._beat(str(count))
                now = self._store.multi_get(self._keys)
            except RuntimeError:  # the store is torchrun's own process
                self._end(f"torchrun itself was lost; {self._remedy}")
            quiet = [n + 1 if old == new != b"left" else 0
                     for n, old, new in zip(quiet, seen, now, strict=True)]
            seen = now
            if max(quiet) >= SILENCE:
                self._end(self._epitaph([number for number, n in enumerate(quiet) if n >= SILENCE]))

    def verdict(self, error: Exception) -> BaseException:
        """What to raise in place of an error: where a collective failed, that another process was lost;
        nothing more to say where another process has said the same."""
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which has noticed too
            before = self._store.multi_get(self._keys)
            time.sleep(3)  # those that live beat at least twice
            pairs = enumerate(zip(before, self._store.multi_get(self._keys), strict=True))
            lost = [number for number, (old, new) in pairs if old == new and number != rank()]
            error = ValueError(self._epitaph(lost) if lost else f"{error!s:.200}; {self._remedy}")
        said_by = self._store.add(f"said/{error}", 1)
        return error if said_by == 1 else SystemExit(2)

    def _epitaph(self, lost: list[int]) -> str:
        which = f"rank {lost[0]} was" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))} were"
        return f"{which} lost (stopped, killed or failed); what was saved is whole; {self._remedy}"

    def _end(self, text: str) -> None:
        _complain(text)
        os._exit(2)  # the main thread hangs in a collective that nothing can interrupt

    def stop(self) -> None:
        self._ended.set()
        with suppress(RuntimeError):
            self._beat("left")


def meet() -> None:
    """Waits until all processes are here."""
    any_rank(False)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    if not _joined():
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags)
    return bool(flags.item())


def sum_ranks(tensors: Sequence[torch.Tensor], *numbers: float) -> list[float]:
    """Replaces the tensors, all of one dtype, by their sums over all processes, and returns those of the
    numbers: one flat all_reduce."""
    if not _joined():
        return list(numbers)
    like = tensors[0] if tensors else torch.empty(0, dtype=torch.float64)
    flat = torch.cat([*(tensor.flatten() for tensor in tensors), like.new_tensor(numbers)])
    dist.all_reduce(flat)
    *sums, numbers = flat.split([*(tensor.numel() for tensor in tensors), len(numbers)])
    for tensor, total in zip(tensors, sums, strict=True):
        tensor.copy_(total.view_as(tensor))
    return numbers.tolist()


def copy_first(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces the tensors of every process by those of the first."""
    for tensor in tensors if _joined() else ():
        dist.broadcast(tensor, 0)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    values = [value]
    if _joined():
        values *= ranks()
        dist.all_gather_object(values, value)
    return values


def is_sharded(module: nn.Module) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in module.parameters())


@contextmanager
def first_of_node_first() -> Iterator[None]:
    """Lets the first process of each node through the body alone, so that the others find what it cached."""
    if local_rank() != 0:
        meet()
    yield
    if local_rank() == 0:
        meet()


def shard(root: nn.Module, units: Iterable[nn.Module], place: Device) -> None:
    """Splits the frozen weights of `root` over all processes by FSDP2, each unit's apart and gathered only
    while it computes; those outside the units stay gathered from the forward to the backward. Weights may be
    views of mapped files, of which each process reads its share alone. What trains is whole in every process,
    on the device. Methods in a module's `entries` gather its weights as its forward does."""
    # Imported here: they take half a second, which no other run need wait.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, Shard

    if not _joined():
        raise ValueError("--shard: splits the base over the processes of torchrun; start it by that")
    frozen = {name: p.detach() for name, p in root.named_parameters() if not p.requires_grad}
    trained = {p for p in root.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(place.device)
    for name, weight in frozen.items():
        owner, _, child = name.rpartition(".")
        empty = torch.empty(weight.shape, dtype=place.dtype, device="meta")
        setattr(root.get_submodule(owner), child, nn.Parameter(empty, requires_grad=False))
    mesh = init_device_mesh(place.device.type, (ranks(),))
    for module in (*units, root):
        fully_shard(module, mesh=mesh, ignored_params=trained)
        for name in getattr(module, "entries", ()):
            register_fsdp_forward_method(module, name)

    def share(weight: torch.Tensor) -> DTensor:
        parts = weight.chunk(ranks())  # along the first dimension, as FSDP2 does; the last may be smaller
        mine = parts[rank()] if rank() < len(parts) else weight[:0]
        mine = mine.to(place.device, place.dtype, copy=True).contiguous()
        return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=weight.shape,
                                  stride=weight.stride())

    shares = {name: share(frozen.pop(name)) for name in progress(list(frozen), "sharding", unit="tensor")}
    root.load_state_dict(shares, strict=False, assign=True)


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
    """Yields `asked()`, true once SIGTERM or Ctrl-C has come, so that a loop can finish its step; a second
    one interrupts."""
    received: list[int] = []

    def handler(number: int, _frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        warn("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def end_with_parent() -> None:
    """Lets no worker outlive a parent that was killed outright: an orphan would wait for work forever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
