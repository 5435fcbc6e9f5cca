"""The devices on which training runs, and all that memfit asks of them. How one kind of accelerator differs
from another is in the fields of its `DeviceKind` (types/device_kind.py).

Torch serves most accelerators through one interface, ``torch.accelerator``. What it lacks comes from the
module of the kind, such as ``torch.cuda``, ``torch.xpu`` or ``torch.mps``: the memory fraction, names and
properties. An accelerator that a package adds to torch needs the same functions in its module.

Asking for the memory of an accelerator creates a context on it, which takes some of this memory for as long
as the process runs. `accelerator_kind` and `accelerator_count` do not; `accelerators` asks a child process.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from memfit.runtime.child_process import child_environment, dying_with_parent
from memfit.types.device_kind import HOST, device_kind
from memfit.types.errors import MemfitError, UserError

if TYPE_CHECKING:
    import torch

    from memfit.runtime.energy import Board

_SAMPLING_S: Final = 0.0005
_DESCRIBE_LIMIT_S: Final = 120.0
_INSTEAD: Final = "`--on this:cpu` uses the processor instead"
_BUILDS: Final = {"hip": "ROCm", "cuda": "CUDA", "xpu": "XPU"}  # attribute of torch.version -> its name
# Vendor -> the file that its driver makes, and the file that has the driver's version.
_DRIVERS: Final = {
    "NVIDIA": (Path("/proc/driver/nvidia/version"), Path("/proc/driver/nvidia/version")),
    "AMD": (Path("/dev/kfd"), Path("/sys/module/amdgpu/version")),
}
_ROOT: Final = Path("/")
# Files below the root of which each names an accelerator -> the expression whose group is the name.
_PRODUCTS: Final = {
    "proc/driver/nvidia/gpus/*/information": r"^Model:\s*(.+)$",
    "sys/bus/pci/drivers/amdgpu/*/product_name": r"^(.+)$",
}
_SAFE_PATH: Final = "PYTHONSAFEPATH"  # as for every worker (engines/native.py)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """An accelerator of this machine, as torch sees it.

    ``device``: torch's name, such as "cuda:0". ``name``: its product name. ``total_bytes`` and
    ``free_bytes``: its memory, and what of it nobody uses. ``context_bytes``: what a process takes of it
    before it makes a tensor; 0 where that is unknown, as without NVML. ``driver``: version of its driver if
    torch names it, as for Intel's, else "". ``gpu_target``: the architecture for which torch compiles its
    kernels, such as "sm_90" or "gfx942"; "" of another kind than CUDA and ROCm.
    """

    device: str
    name: str
    total_bytes: int
    free_bytes: int
    context_bytes: int = 0
    driver: str = ""
    gpu_target: str = ""

    @property
    def kind(self) -> str:
        """Torch's name of the type of device, such as "cuda"."""
        return self.device.partition(":")[0]


def accelerator_kind() -> str:
    """Return the kind of the accelerator that torch can use here, such as "cuda", or "" if there is none.
    This imports torch but creates no context on the device."""
    import torch

    if not torch.accelerator.is_available():
        return ""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None else ""


def accelerator_count() -> int:
    """Return the number of accelerators that torch can use here; 0 if there are none."""
    import torch

    return torch.accelerator.device_count() if accelerator_kind() else 0


def visible_accelerators(first: int, count: int) -> dict[str, str]:
    """Return the environment variable, name -> value, such as CUDA_VISIBLE_DEVICES, under which a process
    sees only ``count`` of the accelerators that this one sees, from number ``first`` (counted from 0) on;
    fewer if there are not so many. Empty without accelerators, and for a kind of which memfit knows no such
    variable."""
    name = device_kind(accelerator_kind()).visible_variable
    if not name:
        return {}
    seen = os.environ.get(name)
    numbers = seen.split(",") if seen else [str(i) for i in range(accelerator_count())]
    return {name: ",".join(numbers[first : first + count])}


@functools.cache
def accelerators() -> tuple[Accelerator, ...]:
    """Return the accelerators of this machine that torch can use; () if there are none. A child process looks
    at them, so that this process creates no context. Its answer is kept for the life of this process, so
    ``free_bytes`` are those of the first call. Raises MemfitError if the child fails, with the last line of
    its error, or does not answer within 120 s."""
    if not accelerator_kind():
        return ()
    command = dying_with_parent([sys.executable, "-m", "memfit.worker", "devices"])
    env = child_environment({_SAFE_PATH: "1"})
    try:
        child = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=_DESCRIBE_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise MemfitError(
            f"the accelerator did not answer within {_DESCRIBE_LIMIT_S:.0f} s; {_INSTEAD}"
        ) from None
    lines = [line for line in child.stdout.splitlines() if line.startswith("[{")]
    if child.returncode or not lines:
        reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise MemfitError(f"the accelerator of this machine could not be used: {reason}; {_INSTEAD}")
    return tuple(Accelerator(**facts) for facts in json.loads(lines[-1]))


def accelerator_names() -> tuple[str, ...]:
    """Return the product names of this machine's accelerators: those that `accelerators` has found, if this
    process has called it, else those in the files of NVIDIA's and AMD's drivers; () if there are none. Torch
    is not loaded."""
    if accelerators.cache_info().currsize:
        return tuple(accelerator.name for accelerator in accelerators())
    names = []
    for pattern, expression in _PRODUCTS.items():
        files = sorted(_ROOT.glob(pattern))
        names += [match[1].strip() for file in files if (match := re.search(expression, _text(file), re.M))]
    return tuple(names)


def describe_accelerators() -> list[Accelerator]:
    """Return the accelerators that torch sees, with a context created on each. `accelerators` calls this in a
    child process. Raises torch's error, such as RuntimeError, for one that does not work."""
    import torch

    return [_describe(torch.device(accelerator_kind(), i)) for i in range(accelerator_count())]


def _describe(device: torch.device) -> Accelerator:
    import torch

    board = _board(device)
    before = None if board is None else board.free_bytes()
    torch.zeros(1, device=device)
    synchronize(device)
    free_bytes, total_bytes = memory_info(device)
    outside = free_bytes + reserved_bytes(device)
    return Accelerator(
        device=str(device),
        name=device_name(device),
        total_bytes=total_bytes,
        free_bytes=before if before is not None else outside,
        context_bytes=max(0, before - outside) if before is not None else 0,
        driver=_driver(device),
        gpu_target=_gpu_target(device),
    )


def _gpu_target(device: torch.device) -> str:
    """Return the architecture of an accelerator under CUDA, such as "sm_90", or ROCm, such as "gfx942"; "" of
    another kind."""
    import torch

    module = _module(device)
    if getattr(torch.version, "hip", None):
        return str(module.get_device_properties(device).gcnArchName).partition(":")[0]
    if not device_kind(device.type).runs_cuda:
        return ""
    return "sm_{}{}".format(*module.get_device_capability(device))


def _driver(device: torch.device) -> str:
    properties = getattr(_module(device), "get_device_properties", None)
    return str(getattr(properties(device), "driver_version", "")) if properties is not None else ""


def _board(device: torch.device) -> Board | None:
    """Return a handle of the device in NVIDIA's management library, which needs no context on it. Return None
    for another kind of device, and without that library."""
    if not device_kind(device.type).nvml:
        return None
    from memfit.runtime.energy import board

    return board(str(device))


def driver_used_bytes(device: torch.device) -> int | None:
    """Return the bytes of the device's memory that all processes use together, contexts included, or None if
    the driver does not tell."""
    board = _board(device)
    return None if board is None else board.used_bytes()


def loaded_drivers() -> dict[str, str]:
    """Return the version of each accelerator driver that this system has loaded: vendor ("NVIDIA" or "AMD")
    -> version, "" where it is unknown. Drivers of other vendors are not looked for."""
    return {vendor: _version(file) for vendor, (path, file) in _DRIVERS.items() if path.exists()}


def _version(file: Path) -> str:
    """Return the first version number in a file, such as "570.86.15"; "" if there is none or the file cannot
    be read."""
    match = re.search(r"\b\d+(\.\d+)+", _text(file))
    return match[0] if match else ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def torch_build() -> str:
    """Return the accelerator software for which this build of torch was made, with its version, such as "CUDA
    12.8" or "ROCm 6.4"; "" if torch names none of CUDA, ROCm and XPU."""
    import torch

    versions = {name: getattr(torch.version, key, None) for key, name in _BUILDS.items()}
    return next((f"{name} {version}" for name, version in versions.items() if version), "")


def has_memory_fraction(kind: str) -> bool:
    """Return whether torch can limit the memory that its allocator takes from devices of this kind."""
    import torch

    return hasattr(_module(torch.device(kind)), "set_per_process_memory_fraction")


def device_name(device: torch.device) -> str:
    """Return the product name of an accelerator, such as "NVIDIA H100 80GB HBM3", or its kind in capitals,
    such as "MPS", if torch does not tell it."""
    name = getattr(_module(device), "get_device_name", None)
    return str(name(device)) if name is not None else device.type.upper()


def _module(device: torch.device) -> Any:
    """Return torch's module for this kind of device, such as ``torch.cuda``."""
    import torch

    return torch.get_device_module(device)


# -- the device of a process ---------------------------------------------------------------------------


def use_device(kind: str, local_rank: int = 0) -> torch.device:
    """Make the device number ``local_rank`` (from 0) of this kind the current one of the process and return
    it. For the kind "cpu" that is the processor, whatever the number. Raises UserError if torch finds no such
    device here."""
    import torch

    if kind == HOST:
        return torch.device(HOST)
    if accelerator_kind() != kind:
        raise UserError(
            f"torch finds no device of the kind {kind!r} here",
            allowed=f"{accelerator_kind()} or cpu" if accelerator_kind() else "cpu",
            hint="`memfit doctor` says what torch finds",
        )
    if local_rank >= accelerator_count():
        raise UserError(
            f"rank {local_rank} on this machine, counted from 0, has no {kind} device: there are "
            f"{accelerator_count()}",
            allowed=f"at most {accelerator_count()} ranks on this machine, one for each device",
        )
    torch.accelerator.set_device_index(local_rank)
    return torch.device(kind, local_rank)


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done all work that was handed to it. On the host, do nothing."""
    import torch

    if device.type != HOST:
        torch.accelerator.synchronize(device)


def collective_backend(kind: str) -> str:
    """Return the backends of a process group for training on devices of this kind, as
    ``torch.distributed.init_process_group`` takes them, such as "gloo" or "cpu:gloo,cuda:nccl". The host's
    tensors have one too, because offloaded states are reduced there."""
    from torch.distributed.distributed_c10d import get_default_backend_for_device

    on_host = get_default_backend_for_device(HOST)
    if kind == HOST:
        return on_host
    return f"{HOST}:{on_host},{kind}:{get_default_backend_for_device(kind)}"


def local_rank() -> int:
    """Return the number of this process, from 0, among those of the launch on this machine, as the
    environment variable LOCAL_RANK of torchrun says, or 0 if that is not set."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launch_rank() -> tuple[int, int]:
    """Return (the rank of this process, the number of processes), as the environment variables RANK and
    WORLD_SIZE of torchrun say; 0 and 1 where these are not set."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launch_node() -> int:
    """Return the number of this machine, from 0, among those of the launch, as the environment variable
    GROUP_RANK of torchrun says, or 0 if that is not set."""
    return int(os.environ.get("GROUP_RANK", "0"))


def launch_attempt() -> str:
    """Return a text that is the same for all ranks which torchrun has started together, and another after a
    restart: the ID of the run and the port that it chose for this start. "" under another launcher."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_PORT")
    return "-".join(os.environ[n] for n in names) if all(n in os.environ for n in names) else ""


def collective_library(kind: str) -> str:
    """Return the name of the library that carries collectives on devices of this kind, such as "gloo"; for
    NCCL with its version, such as "nccl 2.27.5"."""
    import torch

    name = collective_backend(kind).rpartition(":")[2]
    if name != "nccl":
        return name
    return f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}"


_SLURM_UNITS: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def slurm_memory() -> tuple[int, str] | None:
    """Return (bytes, variable) of the memory that Slurm has allotted to this job on this node, by the first
    environment variable that says so: SLURM_MEM_PER_NODE; SLURM_MEM_PER_CPU times SLURM_CPUS_ON_NODE; or
    SLURM_MEM_PER_GPU times SLURM_GPUS_ON_NODE. Return None outside a job, if the job has the whole node (0),
    and if the values cannot be read. Whether Slurm also enforces it, by a control group, depends on its
    configuration."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    for name, count_name in (
        ("SLURM_MEM_PER_NODE", ""),
        ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
        ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE"),
    ):
        size_bytes = _slurm_bytes(os.environ.get(name, ""))
        count = os.environ.get(count_name, "") if count_name else "1"
        if size_bytes and count.isdigit() and int(count):
            return size_bytes * int(count), name
    return None


def _slurm_bytes(text: str) -> int:
    """Return the bytes of a size as Slurm writes it: a whole number of MiB, or one with the unit K, M, G or
    T. Return 0 for any other text."""
    unit = _SLURM_UNITS.get(text[-1:].upper())
    number = text[:-1] if unit else text
    return int(number) * (unit or _SLURM_UNITS["M"]) if number.isdigit() and len(number) <= 12 else 0


# -- memory -------------------------------------------------------------------------------------------


def memory_info(device: torch.device) -> tuple[int, int]:
    """Return (free, total) bytes of the accelerator's memory, as its driver counts them over all processes.
    For a kind of which torch keeps no peak, such as MPS, the total is the most that the system recommends to
    use, and free is that less what this process has taken."""
    import torch

    if not device_kind(device.type).keeps_peak:
        total = int(_module(device).recommended_max_memory())
        return total - int(_module(device).driver_allocated_memory()), total
    free, total = torch.accelerator.get_memory_info(device)
    return int(free), int(total)


def allocated_bytes(device: torch.device) -> int:
    """Return the bytes of this process's tensors on the accelerator now, as torch's allocator rounds them."""
    import torch

    if not device_kind(device.type).keeps_peak:
        return int(_module(device).current_allocated_memory())
    return int(torch.accelerator.memory_allocated(device))


def reserved_bytes(device: torch.device) -> int:
    """Return the bytes that torch's allocator has taken from the accelerator for this process."""
    import torch

    if not device_kind(device.type).keeps_peak:
        return int(_module(device).driver_allocated_memory())
    return int(torch.accelerator.memory_reserved(device))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorFigures:
    """Statistics of torch's allocator of an accelerator: bytes of tensors (allocated), bytes taken from the
    device (reserved), the peaks of both since the process began or they were reset, and how often the
    allocator freed its cache to find a block (``retries``). None: the allocator does not count this."""

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    retries: int | None = None


def allocator_figures(device: torch.device) -> AllocatorFigures:
    """Return the figures of the accelerator's allocator now. Nothing is reset, and nothing waits for the
    device."""
    import torch

    if not device_kind(device.type).keeps_peak:
        return AllocatorFigures(
            allocated_bytes=allocated_bytes(device), reserved_bytes=reserved_bytes(device)
        )
    figures = torch.accelerator.memory_stats(device)
    return AllocatorFigures(
        allocated_bytes=int(figures.get("allocated_bytes.all.current", 0)),
        reserved_bytes=int(figures.get("reserved_bytes.all.current", 0)),
        peak_allocated_bytes=figures.get("allocated_bytes.all.peak"),
        peak_reserved_bytes=figures.get("reserved_bytes.all.peak"),
        retries=figures.get("num_alloc_retries"),
    )


def free_cache(device: torch.device) -> None:
    """Give back to the accelerator the memory that torch's allocator keeps for reuse and no tensor uses."""
    import torch

    if not device_kind(device.type).keeps_peak:
        _module(device).empty_cache()
    else:
        torch.accelerator.empty_cache()


def lift_memory_fraction(device: torch.device) -> None:
    """Undo `set_memory_fraction`: set the limit of torch's allocator to its default for this kind of device.
    Raises MemfitError if the kind has no such limit."""
    set_memory_fraction(device, device_kind(device.type).default_memory_ratio)


def set_memory_fraction(device: torch.device, fraction: float) -> None:
    """Let torch's allocator take at most this share (``fraction``, 1.0: all) of the accelerator's memory for
    this process. Raises MemfitError if the kind of device has no such limit."""
    limit = getattr(_module(device), "set_per_process_memory_fraction", None)
    if limit is None:
        raise MemfitError(f"torch has no memory limit for devices of the kind {device.type!r}")
    if not device_kind(device.type).keeps_peak:
        limit(fraction)
    else:
        limit(fraction, device)


def reset_reserved_peak(counter: object) -> None:
    """Set the peak of reserved bytes of an accelerator's counter to what is reserved now. Do nothing for a
    counter of the host."""
    if isinstance(counter, AllocatorCounter | SampledCounter):
        counter.reset_reserved_peak()


def accelerator_counter(device: torch.device) -> AllocatorCounter | SampledCounter:
    """Return a counter of the accelerator's tensor bytes: torch's own statistics, or samples of them where
    torch keeps no peak."""
    return AllocatorCounter(device) if device_kind(device.type).keeps_peak else SampledCounter(device)


class AllocatorCounter:
    """The statistics of torch's allocator of an accelerator, which are exact because it provides every block.
    They include tensors that existed before. Constructing a counter resets the peaks."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._reserved_peak = device, 0
        self.source = f"torch's allocator of {device.type}"
        self.reset_peak()
        self.reset_reserved_peak()

    def live_bytes(self) -> int:
        """Return the bytes of tensors now."""
        return allocated_bytes(self._device)

    def peak_bytes(self) -> int:
        """Return the peak of the bytes of tensors since `reset_peak`."""
        import torch

        return int(torch.accelerator.max_memory_allocated(self._device))

    def reserved_peak_bytes(self) -> int:
        """Return the peak of the bytes that the allocator has taken from the device since
        `reset_reserved_peak`."""
        import torch

        self._reserved_peak = max(
            self._reserved_peak, int(torch.accelerator.max_memory_reserved(self._device))
        )
        return self._reserved_peak

    def reset_peak(self) -> None:
        """Set the peak of tensors to what is there now. The peak of `reserved_peak_bytes` stays."""
        import torch

        self.reserved_peak_bytes()
        torch.accelerator.reset_peak_memory_stats(self._device)

    def reset_reserved_peak(self) -> None:
        """Set the peak of `reserved_peak_bytes` to what is reserved now."""
        self.reset_peak()
        self._reserved_peak = reserved_bytes(self._device)

    def retries(self) -> int | None:
        """Return how often the allocator found no free block, freed its cache and tried again, since the
        process started; None if it does not count this."""
        import torch

        count = torch.accelerator.memory_stats(self._device).get("num_alloc_retries")
        return None if count is None else int(count)


class SampledCounter:
    """Samples of the bytes that an accelerator's tensors take, for accelerators of which torch keeps no peak.
    A thread takes one every half millisecond, so that a shorter peak can be missed."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._peak = device, 0
        self.source = f"samples of {device.type}'s allocator, which may miss short peaks"
        self._lock = threading.Lock()
        self.reset_peak()
        threading.Thread(target=_sample, args=[weakref.ref(self)], daemon=True).start()

    def live_bytes(self) -> int:
        """Return the bytes of tensors now."""
        return allocated_bytes(self._device)

    def peak_bytes(self) -> int:
        """Return the highest sample since `reset_peak`."""
        self.take()
        return self._peak

    def reserved_peak_bytes(self) -> int:
        """Return the bytes that the allocator has taken from the device now: it keeps no peak of them."""
        return reserved_bytes(self._device)

    def reset_peak(self) -> None:
        """Forget earlier samples, and take one now."""
        with self._lock:
            self._peak = self.live_bytes()

    def reset_reserved_peak(self) -> None:
        """Do nothing: there is no such peak."""

    def retries(self) -> None:
        """Return None: this allocator does not count how often it tried again."""

    def take(self) -> None:
        """Take a sample now."""
        with self._lock:
            self._peak = max(self._peak, self.live_bytes())


def _sample(counter: weakref.ref[SampledCounter]) -> None:
    """Take samples until the counter is no longer used."""
    while (used_counter := counter()) is not None:
        used_counter.take()
        del used_counter
        time.sleep(_SAMPLING_S)
