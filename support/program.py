"""What a command-line program needs: errors, files, flags, messages, signals.

This file imports no other file of the project.

Test: pytest tests/unit/test_program.py tests/programs/test_programs.py
    tests/programs/test_faults.py
"""

import argparse
import dataclasses
import fcntl
import functools
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from tqdm import tqdm

# The repository. Its sni/ and tiny/ are the default data and the default base.
ROOT = Path(__file__).resolve().parents[1]
OWN_METHOD = "method_"  # prefix of the module name under which the file of a method is loaded
BETWEEN_LINES = 60  # seconds between the lines of a long computation without a terminal
# What helps if the folder of a model does not exist.
DOWNLOAD = (
    "name a local folder, nothing is downloaded here; "
    "`hf download NAME --local-dir DIR` gets a model from the Hub"
)


# --------------------------------------------------------------------------------------- errors


class UserError(ValueError):
    """A mistake that the user can mend. `run_program` prints it as one line."""


@contextmanager
def checking_settings() -> Iterator[None]:
    """Turn a ValueError inside the block into a UserError.

    Use it where a config is made from flags, and where adapters are attached as flags say. A
    ValueError of torch, or of a line in the file of a method, is a bug, and keeps its traceback.
    """
    try:
        yield
    except ValueError as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if frames[-1].f_globals["__name__"].startswith((OWN_METHOD, "torch.")):
            raise
        raise UserError(str(error)) from error


# ---------------------------------------------------------------------------------------- files


@contextmanager
def reading(path: str | Path, remedy: str = "restore the file") -> Iterator[None]:
    """Turn any failure inside the block into one UserError: "path: what is wrong; remedy".

    Only parsing belongs inside. A bug in what computes with the parsed values must not look like a
    damaged file.

    Readers of damaged or foreign files fail in many ways: KeyError, TypeError, errors of other
    packages. All are caught here. An OSError that names its file is passed on unchanged.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # panics of packages written in Rust are not Exceptions
        if isinstance(error, OSError) and error.filename:
            raise
        problem = textwrap.shorten(str(error), 200, placeholder=" ...")
        if type(error) not in (ValueError, UserError):  # KeyError, JSONDecodeError, ...
            problem = f"{type(error).__name__}: {problem}"
        raise UserError(f"{path}: {problem}; {remedy}") from error


def require_path(path: str | Path, remedy: str) -> Path:
    """Return `path`. Raise UserError with the remedy if nothing is there."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: does not exist; {remedy}")
    return path


@contextmanager
def locked_folder(folder: Path, remedy: str) -> Iterator[None]:
    """Make the folder and lock it by the file `.lock`. Rank 0 holds the lock for all processes.

    Raise UserError with the remedy if another process has locked it. The system frees the lock when
    the process ends, even if it is killed.
    """
    if rank() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is writing here; {remedy}") from None
        except OSError as error:  # a file system without locks
            warn(f"{folder}: no lock ({error.strerror}); start one run at a time here")
        yield


def require_new(paths: Iterable[Path], remedy: str) -> None:
    """Raise UserError with the remedy if one of the paths, which are to be written, exists."""
    for path in paths:
        if os.path.lexists(path):  # also a link to nowhere
            raise UserError(f"{path}: exists, and nothing is overwritten; {remedy}")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file that appears under `path` complete or not at all.

    A failed write raises OSError with `path` as its file name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes, and threads of one process, may write the same file.
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    try:
        with naming_write_errors(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could leave an empty file under `path`
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming_write_errors(path: Path) -> Iterator[None]:
    """Re-raise write errors with the final file name; the system names the temporary file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error
        if isinstance(error, RuntimeError):  # torch.save raises one on top of the OSError
            cause = error.__context__
        if not isinstance(cause, OSError):
            raise
        problem = (
            f"{cause.strerror}; not written, nothing was replaced; free space, or fix the folder"
        )
        raise OSError(cause.errno, problem, str(path)) from error


def read_json(path: str | Path) -> dict:
    """Return the JSON object in `path`. Raise UserError if it holds none."""
    with reading(path), open(path, encoding="utf-8-sig") as file:
        value = json.load(file, object_pairs_hook=_each_key_once)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value


def _each_key_once(pairs):
    """Return the pairs of a JSON object as a dict. Raise ValueError if a key occurs twice."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"an object gives the key {key!r:.60} twice")
        values[key] = value
    return values


def read_jsonl(path: str | Path) -> Iterator[tuple[str, int, dict]]:
    """Yield each object of a JSONL file: the words "path, line N", the number N, and the object.

    Raise UserError with the number of a line that is no JSON object. Empty lines are skipped.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            location = f"{path}, line {number}"
            with reading(location, "repair the line"):
                row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_each_key_once)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
            yield location, number, row


def require_text(name: str, value: Any) -> None:
    """Raise ValueError, which names the field, unless its value is a string of valid Unicode.

    JSON can spell a lone surrogate (\\ud800). It is refused, because replacing it would silently
    change prompts and references.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, not {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid Unicode (lone surrogate)") from None


def require_prompt(name: str, value: Any) -> None:
    """Raise ValueError unless the value is a text (see `require_text`) that is not blank."""
    require_text(name, value)
    if not value.strip():
        raise ValueError(f"{name}: it is empty")


def to_json(value: Any, **options: Any) -> bytes:
    """Return `value` as JSON with a final newline. NaN and infinity become null."""
    # json.dumps writes NaN as a bare word, which is not JSON. Read it back as null.
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return (json.dumps(plain, **options) + "\n").encode()


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON. Only rank 0 writes."""
    if rank() == 0:
        with atomic_write(path) as file:
            file.write(to_json(value, indent=1))


# ---------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")


def flag(name: str) -> str:
    """Return the command-line flag of a field: "lr_skills" gives "--lr-skills"."""
    return "--" + name.replace("_", "-")


def read_flags(
    doc: str,
    *classes: type,
    defaults: dict[str, Any] | None = None,
    hidden: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the values that the command line gives. Each field of the dataclasses is a flag.

    The help text of a flag is the comment on the line of its field, with its default. `defaults`
    replaces the defaults that the help shows, nothing else. Fields in `hidden` are not shown.
    doc: the text above the flags. How to test the program is left out.
    """
    parser = Parser(
        prog=program_name(),
        usage="%(prog)s [options]",
        description=doc.partition("Test: ")[0],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = defaults or {}
    for cls in classes:
        # Fields have the form "    name: type = value  # help text".
        comments = dict(
            re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.MULTILINE)
        )
        types = typing.get_type_hints(cls)
        group = parser.add_argument_group(cls.__doc__.split(":")[0])
        for field in dataclasses.fields(cls):
            default = defaults.get(field.name, field.default)
            text = comments.get(field.name, "").replace("%", "%%")
            if "(default:" not in text and default not in ("", (), None):
                if isinstance(default, tuple):
                    default = ",".join(default)
                text += f" (default: {default})"
            if field.name in hidden:
                text = argparse.SUPPRESS
            options = _argparse_options(types[field.name])
            group.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text, **options)

    values = vars(parser.parse_args())
    for name, value in values.items():
        if value == "":  # often a variable of the shell that is not set
            parser.error(f"{flag(name)}: empty; give a value, or leave it out")
    return values


def _argparse_options(hint):
    """Return argparse's options for a type hint: bool, Literal, tuple[str, ...], int | None, ..."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": [choice for choice in parts if choice]}  # "": the flag is not given
    if typing.get_origin(hint) is tuple:
        return {"type": lambda text: tuple(text.split(",")), "metavar": "A,B,.."}
    return {"type": parts[0] if parts else hint}  # that of X | None is X


def refuse_unread(flags: Iterable[str], unread: dict[str, str]) -> None:
    """Raise UserError for a given flag without effect. unread: {name of a flag: "with ..."}."""
    for name in flags:
        if name in unread:
            raise UserError(f"{flag(name)}: has no effect {unread[name]}; leave it out")


def from_flags(cls: type, flags: dict[str, Any]) -> Any:
    """Return an instance of the dataclass `cls`, from the flags that are its fields."""
    names = {field.name for field in dataclasses.fields(cls)}
    with checking_settings():
        return cls(**{name: value for name, value in flags.items() if name in names})


def from_json(cls: type, values: dict[str, Any]) -> Any:
    """Return an instance of the dataclass `cls` from the saved values of all its fields.

    Raise ValueError for an unknown or missing field, and for a value that `check` refuses. Call it
    inside `reading`.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    different = sorted(names ^ values.keys())
    if different:
        raise ValueError(f"{cls.__name__}: the field {different[0]!r:.60} is unknown or missing")
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    config = cls(**values | lists)
    check(config)
    return config


def check(config: Any, **least: int) -> None:
    """Raise UserError unless each field of a dataclass has its type, and each number is in range.

    A number is at least 0, or what `least` gives for its field, and below 2^53. So it is finite.
    """
    types = typing.get_type_hints(type(config))
    for name, value in vars(config).items():
        if not _has_type(value, types[name]):
            raise UserError(
                f"{name}: {value!r:.60} has the wrong type, or is not one of the choices"
            )
        smallest = least.get(name, 0)
        if type(value) in (int, float) and not smallest <= value < 2**53:
            raise UserError(f"{name}: {value} must be {smallest} or more, and below 2^53")


def _has_type(value, hint):
    """Return whether a value has the type of a field. An int counts as a float, as in JSON."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        item_type = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(type(item) is item_type for item in value)
    allowed = typing.get_args(hint) or (hint,)
    if type(value) is int and float in allowed:
        return True
    return type(value) in allowed


# -------------------------------------------------------------------------------------- processes

# torchrun starts several processes of one program. Without it there is one, rank 0 of 1.
# runtime.py has what they do together.


def torchrun_variable(name: str, default: int) -> int:
    # Clusters set RANK and WORLD_SIZE without torchrun too, so they do not show that it runs.
    if not dist.is_torchelastic_launched():
        return default
    return int(os.environ[name])


def rank() -> int:
    return torchrun_variable("RANK", 0)


def world_size() -> int:
    return torchrun_variable("WORLD_SIZE", 1)


# ------------------------------------------------------------------------------------- messages


def run_program(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run `main` and exit with the code that it returns (None means 0).

    A UserError, an OSError that names a file and too little memory print one line on stderr, under
    torchrun one for each process, and exit with code 2. So does a closed stdout. Ctrl-C and SIGTERM
    exit with code 130. All other exceptions are bugs and keep their traceback.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        code = main() or 0
    except KeyboardInterrupt:
        print(f"{program_name()}: stopped", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # as in `train.py | head`
        print(f"{program_name()}: stopped, since nothing reads its output", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"{program_name()}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)

    if dist.is_torchelastic_launched():
        # A sharded base keeps threads of gloo that may abort while Python shuts down.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def program_name() -> str:
    """Return the name that messages give this program: "train.py", or "compare" of a folder."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def user_message(error: Exception) -> str | None:
    """Return one line for an error that the user can fix, None for a bug."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(
        "DefaultCPUAllocator|CUDA error: out of memory", text
    ):
        text = (
            f"out of memory ({text:.120}); lower the batch sizes, train with --accumulate, or use "
            "a smaller model"
        )
    elif not isinstance(error, UserError):
        return None
    return " ".join(text.split())


def print_line(text: str, file: Any = None) -> None:
    """Print a line at once, above a progress bar if there is one. Only rank 0 prints."""
    if rank() == 0:
        file = file or sys.stdout
        tqdm.write(text, file)
        file.flush()


@functools.cache
def warn(text: str) -> None:
    """Print a warning on stderr, each text once."""
    print_line(f"warning: {text}", sys.stderr)


class LineStream:
    """The stream of a bar without a terminal. It prints each state of the bar as a line."""

    def write(self, text: str) -> None:
        if text.strip():
            print_line(text.strip(), sys.stderr)


def progress(iterable: Iterable | None, description: str, **options: Any) -> tqdm:
    """Return a tqdm bar on stderr, in rank 0. Without a terminal it prints a line each minute."""
    if not sys.stderr.isatty():
        form = "{desc}: {n_fmt} of {total_fmt} after {elapsed}, {remaining} left"
        options |= {"file": LineStream(), "bar_format": form, "position": 0}
        # With miniters=1 a line is printed only when an item is finished. Otherwise a thread of
        # tqdm would also print old numbers.
        options |= {"mininterval": BETWEEN_LINES, "miniters": 1}
    # In a worker, and in other ranks, another process shows the progress.
    is_silent = multiprocessing.parent_process() is not None or rank() != 0
    return tqdm(iterable, description, leave=False, delay=1, disable=is_silent, **options)


# ---------------------------------------------------------------------------------------- signals


@contextmanager
def stop_signals(say: Callable[[str], None] = print_line) -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM and Ctrl-C, and answer at once. Yield a function that tells whether one came.

    A loop can thus finish its step and save before it stops. A second Ctrl-C ends it at once.
    """
    received = []

    def remember(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("stopping after this step; Ctrl-C stops at once")

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, remember)
    try:
        yield lambda: len(received) > 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
