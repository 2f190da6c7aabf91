"""Kill runs at random moments and inside their saves. They must end as an undisturbed run does.

50 kills, by hand: pytest tests/programs/test_soak.py -m soak
"""

import random
import sys

import pytest

from helpers import ROOT, SHORT, run, run_shell, trace

OPTIONS = f"{SHORT} --steps 24 --method orchmoe-gumbel"
RESUME = "--resume --device cpu"

# Runs train.py and kills itself after some milliseconds of processor time, or when it reaches a
# stage of a save for the n-th time. The stages are: half of some bytes is written, before fsync,
# before the file gets its name, and after.
DYING = """
import io, os, runpy, signal, sys
folder, stage, remaining = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path.insert(0, folder)
import train
from support import program

def reached(name):
    global remaining
    if name == stage:
        remaining -= 1
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)

class DyingFile(io.FileIO):
    def write(self, content):
        content = memoryview(content).cast("B")
        half = len(content) // 2
        written = super().write(content[:half])
        reached("write")
        return written + super().write(content[half:])

def open_dying(path, mode="r", **options):
    if str(path).endswith(".tmp"):
        return DyingFile(path, "w")
    return open(path, mode, **options)

fsync, replace = os.fsync, os.replace

def dying_fsync(number):
    reached("sync")
    fsync(number)

def dying_replace(source, target):
    reached("name")
    replace(source, target)
    reached("named")

program.open = open_dying
os.fsync = dying_fsync
os.replace = dying_replace
if stage == "moment":
    signal.setitimer(signal.ITIMER_PROF, remaining / 1000)  # it kills like SIGKILL
sys.argv = ["train.py", *sys.argv[4:]]
runpy.run_path(folder + "/train.py", run_name="__main__")
"""
STAGES = ("moment", "write", "sync", "name", "named")
COUNTS = {"moment": 5000, "write": 1500, "sync": 6, "name": 6, "named": 6}  # at most


def soak(home, kills, rng):
    """Kill runs in all stages in turn. Each run that ends must equal the undisturbed one."""
    run(f"train.py {OPTIONS} --out whole")
    number = 0
    killed = 0
    while True:
        folder = home / f"killed-{number}"
        stage = STAGES[killed % len(STAGES)]
        count = rng.randrange(1, COUNTS[stage])
        if killed == kills:
            count = 10**9  # the last run ends
        arguments = RESUME if (folder / "config.json").exists() else OPTIONS
        words = [sys.executable, "-c", DYING, str(ROOT), stage, str(count), *arguments.split()]
        done = run_shell([*words, "--out", folder.name])
        if done.returncode < 0:  # a signal
            killed += 1
            continue

        assert done.returncode == 0, done.stderr
        assert trace(folder) == trace(home / "whole")
        for name in ("adapter.safetensors", "scores.json"):
            assert (folder / name).read_bytes() == (home / "whole" / name).read_bytes()
        assert not list(folder.rglob(".*.tmp"))  # what the killed saves left is removed
        number += 1
        if killed == kills:
            break


@pytest.mark.slow
def test_a_kill_in_each_stage_changes_nothing(home):
    soak(home, len(STAGES), random.Random(1))


@pytest.mark.soak
def test_fifty_kills_change_nothing(home):
    soak(home, 50, random.Random(0))
