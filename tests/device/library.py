"""Build the C++ files of this folder. Without a compiler the tests that need them skip."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

FOLDER = Path(__file__).parent


def build(name: str) -> Path:
    """Return the library of NAME.cpp. It is built once for each installation of torch."""
    source = FOLDER / f"{name}.cpp"
    # The library looks for libtorch where this torch is installed.
    where = hashlib.sha256(str(Path(torch.__file__).parent).encode()).hexdigest()[:8]
    library = FOLDER / f"build/{name}-{torch.__version__}-{where}.so"
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return library
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler})")
    library.parent.mkdir(exist_ok=True)
    unfinished = library.with_name(f"{os.getpid()}.so")
    command = [compiler, "-std=c++20", "-shared", "-fPIC", source, "-o", unfinished]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    for folder in cpp_extension.library_paths():
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)
    unfinished.rename(library)
    return library
