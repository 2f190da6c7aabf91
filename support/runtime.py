"""What the programs need from the machine: device and dtype, processes, sharding, seeds.

Test: pytest tests/unit/test_runtime.py tests/programs/test_ranks.py
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support import program
from support.program import UserError

# --------------------------------------------------------------------------------------- device

DtypeChoice = Literal["auto", "float32", "bfloat16"]  # of --dtype


class Device(NamedTuple):
    """Where the model computes."""

    torch_device: torch.device
    dtype: torch.dtype  # of the frozen base; adapters stay in float32
    description: str  # one line for the user


def pick_device(
    gpu: int | None = None, device: str = "", dtype: str = "auto", *, base: str | Path = ""
) -> Device:
    """Return the device for `--gpu N` or `--device cpu`: the CPU if there is no CUDA.

    A GPU becomes torch's current device, and attention by cuDNN is switched off. Under torchrun
    each process takes the GPU of its LOCAL_RANK. With dtype "auto" the dtype is bfloat16 on a GPU
    that multiplies it natively. On a CPU that multiplies it natively, it is bfloat16 if the model
    in the folder `base` is large. Otherwise it is float32. Raise UserError if there are GPUs, but
    not the one asked for.
    """
    if device == "cpu" or not torch.cuda.is_available():
        chosen = torch.device("cpu")
        name = f"cpu, {torch.get_num_threads()} threads"
        if device != "cpu":
            name += " (no CUDA here)"
        fast_bfloat16 = bool(base) and _cpu_gains_from_bfloat16(base)
    else:
        number = program.torchrun_variable("LOCAL_RANK", gpu or 0)
        gpus = torch.cuda.device_count()
        if not 0 <= number < gpus:
            raise UserError(
                f"GPU {number}: there are {gpus}, numbered from 0; give another --gpu, start fewer "
                "processes, or give --device cpu"
            )
        chosen = torch.device("cuda", number)
        torch.cuda.set_device(chosen)  # torch chooses the form of attention for the current device
        # On an H100 torch prefers attention by cuDNN, which makes a plan for each new shape.
        # Lengths of batches, and of answers while they grow, are always new.
        torch.backends.cuda.enable_cudnn_sdp(False)
        name = torch.cuda.get_device_name(chosen)
        fast_bfloat16 = torch.cuda.get_device_capability(chosen) >= (8, 0)

    if dtype == "auto":
        dtype = "bfloat16" if fast_bfloat16 else "float32"
    description = f"device: {name}, {dtype}, torch {torch.__version__}"
    return Device(chosen, getattr(torch, dtype), description)


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _cpu_gains_from_bfloat16(base):
    """Return whether this CPU multiplies bfloat16 natively and the model is large enough."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    files = [*Path(base).glob("*.safetensors"), *Path(base).glob("*.bin")]
    # Below 40 MB (a width of about 256) casting costs as much as the faster products save.
    return native and sum(path.stat().st_size for path in files) >= 4e7


# -------------------------------------------------------------------------------------- processes

# Each process of torchrun runs the whole program on its share of every batch. Without torchrun
# there is one process, and only `shard` cannot be used.


@contextmanager
def distributed(device: torch.device, shard: bool = False) -> Iterator[None]:
    """Join the processes of torchrun: NCCL between GPUs, gloo on the CPU.

    A process that fails prints its own message, and torchrun ends the others. Raise UserError if
    the base is to be sharded, but torchrun did not start this process.
    """
    if not dist.is_torchelastic_launched():
        if shard:
            raise UserError("--shard: splits the base over processes; start it with torchrun")
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield
    # Not in a `finally`: after an error this would wait for processes that are gone.
    barrier()
    dist.destroy_process_group()


def any_rank(value: bool) -> bool:
    """Return whether `value` is true in any process. Waits for all processes."""
    total = torch.tensor(float(value))
    sum_over_ranks([total])
    return total.item() > 0


def barrier() -> None:
    """Wait until all processes are here, so that they can read what rank 0 has written."""
    any_rank(False)


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Replace the tensors in every process by those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather_from_ranks(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * program.world_size()
    dist.all_gather_object(values, value)
    return values


def shard(root: nn.Module, blocks: Iterable[nn.Module], device: Device) -> None:
    """Split the frozen weights of `root` over all processes with FSDP2.

    The weights of a block are gathered only while it computes: in its forward and in the methods
    that its attribute `fsdp_methods` names. While it loads weights that are views of mapped files,
    a process holds its share and, in addition, at most three whole blocks or the root's own
    weights. Trained parameters stay whole.
    """
    # Imported here because it takes half a second, and only this function needs it.
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    trained = {parameter for parameter in root.parameters() if parameter.requires_grad}
    mesh = dist.init_device_mesh(device.torch_device.type, (program.world_size(),))
    for module in (*blocks, root):  # for the root this changes only what is in no block
        module.to(device.torch_device)
        for parameter in module.parameters():
            if not parameter.requires_grad:
                # Contiguous, since FSDP2 refuses transposed weights.
                parameter.data = parameter.data.to(device.dtype).contiguous()
        fully_shard(module, mesh=mesh, ignored_params=trained)
        for method in getattr(module, "fsdp_methods", ()):
            register_fsdp_forward_method(module, method)


# ------------------------------------------------------------------------------------------ seeds


def generator(*seed: int) -> torch.Generator:
    """Return a CPU generator whose stream depends only on the given numbers (seed, step, ...).

    The numbers are mixed with the finaliser of splitmix64, so that neighbouring seeds have
    unrelated streams.
    """
    mask = 2**64 - 1
    mixed = 0x9E3779B97F4A7C15
    for number in seed:
        mixed = (mixed + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        mixed = mixed ^ (mixed >> 31)
    return torch.Generator().manual_seed(mixed >> 1)  # a seed of 63 bits
