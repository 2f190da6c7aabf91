"""Kill runs at random moments and inside their saves. They must end as an undisturbed run does.

50 kills, by hand: pytest tests/programs/test_soak.py -m soak -s
"""

import random
import signal
import subprocess
import sys
import time

import pytest

from helpers import ROOT, SHORT, command, environment, run, trace

OPTIONS = [*SHORT, "--steps", "48", "--gumbel"]
RESUME = ["--resume", "--device", "cpu"]

# Runs train.py and kills itself when it reaches a stage of a save for the n-th time. The stages
# are: half of some bytes is written, before fsync, before the file gets its name, and after.
STAGES = ("write", "sync", "name", "named")
DYING = """
import io, os, runpy, signal, sys
folder, stage, remaining = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path.insert(0, folder)
import runtime

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

def open_dying(path, mode, **options):
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

runtime.open = open_dying
os.fsync = dying_fsync
os.replace = dying_replace
sys.argv = ["train.py", *sys.argv[4:]]
runpy.run_path(folder + "/train.py", run_name="__main__")
"""


def start(*arguments, cwd, dying=()):
    """Start train.py. dying: the stage, and the number of times, at which it kills itself."""
    program = command("train.py")
    if dying:
        program = [sys.executable, "-c", DYING, str(ROOT), *dying]
    return subprocess.Popen(
        [*program, *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_at_random(process, log, rng):
    """Kill the process during its start or once its log has grown. Return False if it had ended."""
    grown = rng.choice([0, 1, 200, 1000, 4000])  # bytes
    size = log.stat().st_size if log.exists() else 0
    deadline = time.monotonic() + rng.uniform(0, 3)
    while process.poll() is None:
        if grown == 0 and time.monotonic() > deadline:
            break
        if grown > 0 and log.exists() and log.stat().st_size > size + grown:
            break
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.1))
    process.kill()
    return process.wait() == -signal.SIGKILL


def assert_undisturbed(folder, expected):
    assert trace(folder) == trace(expected)
    for name in ("adapter.safetensors", "scores.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


def soak(home, kills, rng):
    """Kill runs, every third time inside a save. Each run that ends must equal the undisturbed one.

    Return the number of kills by stage, with "moment" for those at a random moment.
    """
    run("train.py", *OPTIONS, "--out", "whole", cwd=home)
    counts = dict.fromkeys(["moment", *STAGES], 0)
    number = 0
    while True:
        folder = home / f"killed-{number}"
        arguments = RESUME if (folder / "config.json").exists() else OPTIONS
        arguments = [*arguments, "--out", folder.name]
        total = sum(counts.values())
        if total == kills:
            break

        inside_saves = total - counts["moment"]
        stage = "moment"
        if 3 * inside_saves < total + 1:
            stage = rng.choice(STAGES)
            count = rng.randrange(1, 8000 if stage == "write" else 9)
            process = start(*arguments, cwd=home, dying=[stage, str(count)])
            killed = process.wait() == -signal.SIGKILL
        else:
            process = start(*arguments, cwd=home)
            killed = kill_at_random(process, folder / "metrics.jsonl", rng)

        if killed:
            counts[stage] += 1
        else:
            assert process.returncode == 0, process.stderr.read()
            assert_undisturbed(folder, home / "whole")
            number += 1

    run("train.py", *arguments, cwd=home)
    assert_undisturbed(folder, home / "whole")
    assert not list(folder.rglob(".*.tmp"))  # what the killed saves left is removed
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_process_dies_at_every_stage(home, stage):
    process = start(*OPTIONS, "--out", "run", cwd=home, dying=[stage, "1"])
    assert process.wait(timeout=120) == -signal.SIGKILL


@pytest.mark.slow
def test_a_few_kills_change_nothing(home):
    counts = soak(home, 4, random.Random(1))
    assert sum(counts.values()) - counts["moment"] >= 2


@pytest.mark.soak
def test_fifty_kills_change_nothing(home):
    started = time.monotonic()
    counts = soak(home, 50, random.Random(0))
    print(f"\n{counts}, {time.monotonic() - started:.0f} s")
    assert counts["moment"] <= 33
    assert all(count > 0 for count in counts.values())
