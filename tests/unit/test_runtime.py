"""runtime.pick_device: where the programs compute, and in which dtype.

programs/test_ranks.py tests several processes.
"""

import pytest
import torch

from helpers import refusal
from support import runtime

GPUS = [
    ("H100", (9, 0), torch.bfloat16),
    ("Tesla T4", (7, 5), torch.float32),  # it emulates bfloat16
]


@pytest.mark.parametrize("name, capability, expected", GPUS)
def test_auto_is_bfloat16_on_a_gpu_that_does_not_emulate_it(
    name, capability, expected, monkeypatch
):
    current = []  # devices that became torch's current one
    functions = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda device: name,
        "get_device_capability": lambda device: capability,
        "set_device": current.append,
    }
    for function, value in functions.items():
        monkeypatch.setattr(torch.cuda, function, value)
    torch.backends.cuda.enable_cudnn_sdp(True)

    device, dtype, description = runtime.pick_device(1)
    assert (device, dtype) == (torch.device("cuda", 1), expected)
    assert description.startswith(f"device: {name}, {runtime.dtype_name(expected)}, ")
    assert current == [device]
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it plans anew for each shape
    assert runtime.pick_device(dtype="bfloat16").dtype == torch.bfloat16
    for gpu in (2, -1):
        with refusal(f"^GPU {gpu}: there are 2, numbered from 0; give"):
            runtime.pick_device(gpu)
    # Under torchrun each process has its own GPU, whatever --gpu says.
    monkeypatch.setattr(runtime.program, "torchrun_variable", lambda *_: 2)  # rank 2 of a node
    for gpu in (0, 1, None):
        with refusal("^GPU 2: there are 2, numbered from 0; give"):
            runtime.pick_device(gpu)


NATIVE = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
CPUS = [
    (5e7, NATIVE[:1], torch.bfloat16),
    (5e7, NATIVE[1:], torch.bfloat16),
    (3e7, NATIVE, torch.float32),
    (5e7, (), torch.float32),
]


@pytest.mark.parametrize("size, native, expected", CPUS)
def test_pick_device_uses_bfloat16_on_a_cpu_that_gains_from_it(
    tmp_path, monkeypatch, size, native, expected
):
    for name in NATIVE:
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in native, raising=False)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(int(size))
    assert runtime.pick_device(device="cpu", base=tmp_path).dtype == expected
