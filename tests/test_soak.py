"""A run killed outright again and again, at random moments and inside its saves, against one that nobody
disturbed. 50 kills, by hand: pytest tests/test_soak.py -m soak -s"""

import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SHORT, command, environment, run, trace

OPTIONS = [*SHORT, "--steps", "48", "--eval-every", "4", "--eval-instances", "8", "--gumbel"]

# train.py in a process that kills itself when it reaches a stage of a save for the n-th time: half-way
# through some bytes, before they are on the disk, before they get their name, or right after.
DYING = """
import io, os, runpy, signal, sys
folder, stage, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path.insert(0, folder)
import runtime

def reached(where):
    global left
    left -= where == stage
    if left == 0 and where == stage:
        os.kill(os.getpid(), signal.SIGKILL)

class Dying(io.FileIO):
    def write(self, raw):
        raw = memoryview(raw).cast("B")
        half = super().write(raw[:len(raw) // 2])
        reached("write")
        return half + super().write(raw[half:])

def before(where, function, after=False):
    def call(*arguments):
        reached(where)
        result = function(*arguments)
        reached("named") if after else None
        return result
    return call

def opened(path, mode, **more):
    return Dying(path, "w") if str(path).endswith(".tmp") else open(path, mode, **more)

runtime.open = opened
os.fsync = before("sync", os.fsync)
os.replace = before("name", os.replace, after=True)
sys.argv = ["train.py", *sys.argv[4:]]
runpy.run_path(folder + "/train.py", run_name="__main__")
"""


STAGES = ("write", "sync", "name", "named")


def start(*arguments, cwd, dying=()):
    program = [sys.executable, "-c", DYING, str(ROOT), *dying] if dying else command("train.py")
    return subprocess.Popen([*program, *arguments], cwd=cwd, env=environment(),
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip


def kill_at_random(process, folder, rng):
    """SIGKILL at a moment of the start, or once the log has grown; false if it ended first."""
    log = folder / "metrics.jsonl"
    before, wanted = log.stat().st_size if log.exists() else 0, rng.choice([0, 1, 200, 1000, 4000])
    deadline = time.monotonic() + rng.uniform(0, 3) if not wanted else float("inf")
    while process.poll() is None and time.monotonic() < deadline:
        if wanted and log.exists() and log.stat().st_size > before + wanted:
            break
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.1))
    process.kill()
    return process.wait() == -signal.SIGKILL


def soak(home, kills, rng):
    """Kills of runs, every third inside a save; each run that comes to its end must equal the undisturbed
    one. Returns what happened."""
    run("train.py", *OPTIONS, "--out", "whole", cwd=home)
    counts = {"kills": 0, "inside a save": 0, "runs": 0, **dict.fromkeys(STAGES, 0)}

    def current():
        folder = home / f"killed{counts['runs']}"
        begun = (folder / "config.json").exists()
        return folder, ["--resume", "--device", "cpu"] if begun else OPTIONS

    def compare(folder):
        counts["runs"] += 1
        assert trace(folder) == trace(home / "whole")
        for name in ("adapter.safetensors", "scores.json"):
            assert (folder / name).read_bytes() == (home / "whole" / name).read_bytes(), name

    while counts["kills"] < kills:
        folder, arguments = current()
        inside = counts["inside a save"] * 3 < counts["kills"] + 1
        stage = rng.choice(STAGES)
        dying = [stage, str(rng.randrange(1, 8000 if stage == "write" else 9))] if inside else []
        process = start(*arguments, "--out", folder.name, cwd=home, dying=dying)
        killed = process.wait() == -signal.SIGKILL if inside else kill_at_random(process, folder, rng)
        if killed:
            counts["kills"] += 1
            counts["inside a save"] += inside
            counts[stage] += inside
        else:
            assert process.returncode == 0, process.stderr.read()
            compare(folder)
    folder, arguments = current()
    run("train.py", *arguments, "--out", folder.name, cwd=home)
    compare(folder)
    assert not list(folder.rglob(".*.tmp"))  # what the killed saves had begun is gone
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_process_dies_at_every_stage(home, stage):
    process = start(*OPTIONS, "--out", "run", cwd=home, dying=[stage, "1"])
    assert process.wait(timeout=120) == -signal.SIGKILL


@pytest.mark.slow
def test_a_few_kills_change_nothing(home):
    assert soak(home, 4, random.Random(1))["inside a save"] >= 2


@pytest.mark.soak
def test_fifty_kills_change_nothing(home):
    began = time.monotonic()
    counts = soak(home, 50, random.Random(0))
    print(f"\n{counts}, {time.monotonic() - began:.0f} s")
    assert counts["inside a save"] >= 17 and all(counts[stage] for stage in STAGES)
