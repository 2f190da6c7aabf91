"""What must not be lost, and what must not get in: a full disk, hostile files, code in a pickle. Everything
is refused in one line, in bounded time and memory, and the last good state stays."""

import re
import resource
import subprocess

import pytest
import torch
from test_programs import SHORT, command, environment, home, run, terminate_after, trace  # noqa: F401

import checkpoint

# -------------------------------------------------------------------------------------------------- full disk


def mounted(folder, size):
    """The empty folder as a file system of `size` bytes; skips where this user may not mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs is not permitted here")
    except OSError:
        pytest.skip("no mount here")


@pytest.fixture
def small_disk(home):  # noqa: F811
    """A file system of 4 MB."""
    mounted(home / "disk", 4_000_000)
    yield home / "disk"
    subprocess.run(["umount", "-l", str(home / "disk")], check=True)


LONG = [*SHORT, "--steps", "40"]


def check_kept(folder, before, error, named):
    """The error is one line that names the file, nothing half-written is there, the last state loads."""
    assert error.count("\n") == 1 and re.search(named, error), error
    assert not list(folder.rglob("*.tmp"))
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert checkpoint.load_state(folder / "checkpoint.pt")["step"] < 40


@pytest.mark.parametrize("room, named", [
    (0, r"disk/run/metrics.jsonl: No space left on device; not written"),
    (100_000, r"disk/run/(adapter.safetensors|checkpoint.pt): No space left on device; not written"),
])  # fmt: skip
def test_a_full_disk_keeps_the_last_state_and_the_run_goes_on(home, small_disk, room, named):  # noqa: F811
    run("train.py", *LONG, "--out", "whole", cwd=home)
    terminate_after(1, *LONG, cwd=home, out="disk/run")
    folder = small_disk / "run"
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(OSError), open(small_disk / "junk", "wb", buffering=0) as junk:
        while True:
            assert junk.write(bytes(4096)), "full"
    with open(small_disk / "junk", "r+b") as junk:
        junk.truncate((small_disk / "junk").stat().st_size - room)
    resume = ["train.py", "--resume", "--out", "disk/run", "--device", "cpu"]
    check_kept(folder, before, run(*resume, cwd=home, code=2), named)
    (small_disk / "junk").unlink()
    run(*resume, cwd=home)
    assert trace(folder) == trace(home / "whole")


def test_a_limit_on_file_sizes_keeps_the_last_state(home):  # noqa: F811
    """As a quota does it; a checkpoint is larger than that, adapters and log are smaller."""
    terminate_after(1, *LONG, cwd=home)
    before = (home / "run/checkpoint.pt").read_bytes()
    done = subprocess.run(command("train.py", "--resume", "--out", "run", "--device", "cpu"), cwd=home,
                          env=environment(home), capture_output=True, text=True, timeout=600,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)))
    assert done.returncode == 2, done.stderr
    check_kept(home / "run", before, done.stderr, "run/checkpoint.pt: File too large; not written")


def test_a_full_disk_costs_the_token_cache_alone(home):  # noqa: F811
    heuristic = ["eval.py", "--heuristic", "copy-demo", "--max-tasks", "3"]
    run(*heuristic, "--out", "one", cwd=home)
    mounted(home / "disk", 40_000)
    try:
        done = subprocess.run(command(*heuristic, "--out", "two", "--cache", "disk"), cwd=home, text=True,
                              capture_output=True, env=environment(home), timeout=600)
        assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
        assert "disk: no token cache (No space left on device" in done.stderr
        assert not list((home / "disk").iterdir())
    finally:
        subprocess.run(["umount", "-l", str(home / "disk")], check=True)
    assert (home / "one/predictions.jsonl").read_bytes() == (home / "two/predictions.jsonl").read_bytes()


@pytest.mark.parametrize("save", [
    lambda path, ones: checkpoint.save_state(path, {"step": 1, "x": ones}),  # torch answers with its own error
    lambda path, ones: checkpoint.write_safetensors(path, {"x": ones}),
], ids=["torch.save", "safetensors"])  # fmt: skip
def test_a_write_that_fails_is_an_error_of_the_file(tmp_path, save):
    save(tmp_path / "file", torch.ones(9))
    before, limits = (tmp_path / "file").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large; not written") as refusal:
            save(tmp_path / "file", torch.ones(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refusal.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
