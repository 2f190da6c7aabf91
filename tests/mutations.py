"""Break the code in many small ways, one at a time, and report which ones the tests notice.

    python tests/mutations.py

Each line of mutations.jsonl replaces one text `old`, which occurs once in `file`. It is killed if a
test fails that passes without it: one of those in `tests`, or else any of the fast suite. One that
survives is a property that no test holds.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fails(checkout: Path, tests: list[str]) -> bool:
    """Return whether a test fails, or cannot even be imported."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode != 0


def main() -> None:
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    killed = 0
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", "runs"))
        for tests in sorted({"", *(json.loads(line)["tests"] for line in lines)}):
            if fails(checkout, tests.split()):
                raise SystemExit(f"without any mutation these tests fail: {tests}")
        for line in lines:
            mutation = json.loads(line)
            path = checkout / mutation["file"]
            text = path.read_text(encoding="utf-8")
            before, after = text.split(mutation["old"])  # ValueError unless it occurs once
            path.write_text(before + mutation["new"] + after, encoding="utf-8")
            found = fails(checkout, mutation["tests"].split()) or fails(checkout, [])
            path.write_text(text, encoding="utf-8")
            killed += found
            print("killed  " if found else "SURVIVES", line, flush=True)
    print(f"{killed} of {len(lines)} killed")


if __name__ == "__main__":
    main()
