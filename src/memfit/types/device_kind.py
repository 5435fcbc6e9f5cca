"""Kinds of devices, and all in which they differ: what torch chooses by the type of a device, what memfit can
measure there, and what is known of its memory.

A trace runs on fake CPU tensors, whatever the device. What torch would do differently on the device follows
from the fields of its `DeviceKind`. Other modules ask for these fields and do not compare names of kinds.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Final

HOST: Final = "cpu"  # torch's name of the host's processor and its memory
CUDA: Final = "cuda"  # and of devices that run CUDA or, with torch's build for it, ROCm


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """A type of device, by torch's name for it, and what torch chooses by that type. Of a boolean field, the
    text says what True means.

    - ``block_bytes``: its allocator rounds sizes up to multiples of this.
    - ``kernels``: "cpu" or "cuda": whose attention, normalisation and softmax kernels it runs, with their
      outputs and temporary memory.
    - ``autocast``: "cpu" or "cuda": whose lists of float32 functions its autocast follows.
    - ``fused_dropout``: dropout keeps a mask of one byte per element, not one of the input's dtype.
    - ``one_kernel_networks``: of torch's recurrent networks ("lstm", "gru", "rnn_tanh", "rnn_relu"), those
      that run as one kernel each. The others run step by step.
    - ``fused_cells``: the cell of an LSTM or a GRU is one kernel.
    - ``foreach``: torch's optimizers update all parameters together by default.
    - ``streams``: torch has streams for it, on which copies run while operators do.
    - ``reserves_as_cuda``: its allocator keeps segments as that of CUDA does, which cost/allocator.py
      replays, and the other memory of a process is that of cost/device_overhead.py. Without it, what training
      takes besides its tensors is unknown, and the answer says so.
    - ``keeps_peak``: its allocator keeps the peak of its bytes, and ``torch.accelerator`` answers for it.
      Otherwise memfit samples them, through functions that its module has under the names of ``torch.mps``.
    - ``default_memory_ratio``: the share of the device's memory that its allocator may take by default.
    - ``visible_variable``: the environment variable that says which of its devices a process sees; "": none.
    - ``nvml``: NVIDIA's management library knows its energy and memory.
    - ``bitsandbytes``: bitsandbytes has kernels for it.
    - ``managed_memory``: bitsandbytes has memory for it that host and device share, and pages it.
    - ``runs_cuda``: code that was written for ``torch.cuda``, as parts of engines are, runs on it.
    - ``checked``: predictions were compared with measurements on devices of this kind.
    - ``gpu_target``: the architecture for which torch compiles the device's kernels, as
      ``torch.cuda.get_arch_list`` names it: "sm_75" for compute capability 7.5, AMD's "gfx942"; "": unknown.
    """

    name: str
    block_bytes: int = 512  # smallest block of torch's caching allocator
    kernels: str = "cuda"
    autocast: str = "cuda"
    fused_dropout: bool = True
    one_kernel_networks: tuple[str, ...] = ()
    fused_cells: bool = True
    foreach: bool = True
    streams: bool = True
    reserves_as_cuda: bool = False
    keeps_peak: bool = True
    default_memory_ratio: float = 1.0
    visible_variable: str = ""
    nvml: bool = False
    bitsandbytes: bool = False
    managed_memory: bool = False
    runs_cuda: bool = False
    checked: bool = False
    gpu_target: str = ""

    def __post_init__(self) -> None:
        assert self.kernels in ("cpu", "cuda"), self.kernels
        assert self.autocast in ("cpu", "cuda"), self.autocast

    @property
    def is_host(self) -> bool:
        """Whether the device is the host's processor, so that its memory is the host's."""
        return self.name == HOST

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """CUDA's compute capability, such as (8, 6), or None if it is unknown or not CUDA's."""
        number = self.gpu_target.removeprefix("sm_")
        return (int(number[:-1]), int(number[-1])) if number.isdigit() and len(number) > 1 else None

    @property
    def attention_since(self) -> tuple[int, int]:
        """The lowest compute capability (major, minor) whose devices have the same attention kernels: (5, 0),
        (7, 0), (8, 0), or (8, 6) for GPUs with less shared memory (8.6 to 8.9, and 12.0 or above). A device
        of unknown capability counts as 8.0."""
        capability = self.compute_capability or (8, 0)
        if (8, 6) <= capability <= (8, 9) or capability >= (12, 0):
            return 8, 6
        return max((since for since in ((7, 0), (8, 0)) if since <= capability), default=(5, 0))

    def with_target(self, gpu_target: str) -> DeviceKind:
        """Return this kind for devices of the architecture ``gpu_target``, such as "sm_90"."""
        return dataclasses.replace(self, gpu_target=gpu_target)


_KINDS: Final[dict[str, DeviceKind]] = {}


def add_device_kind(kind: DeviceKind) -> None:
    """Make ``kind`` known under its name. It replaces an earlier one of that name. A package that brings a
    device to torch can call this when torch loads it (entry point group ``torch.backends``)."""
    _KINDS[kind.name] = kind
    device_kind.cache_clear()


def device_kinds() -> tuple[DeviceKind, ...]:
    """Return all kinds that were added, the host's first."""
    return tuple(_KINDS.values())


@functools.cache  # asked for every allocation of a trace
def device_kind(name: str) -> DeviceKind:
    """Return the kind with torch's name ``name``, such as "cuda", or that for devices of one architecture
    (`Device.trace_kind`), such as "cuda:sm_75". A kind that nobody has added counts as one with CUDA's
    kernels, unchecked."""
    name, _, gpu_target = name.partition(":")
    kind = _KINDS.get(name) or DeviceKind(name=name)
    return kind.with_target(gpu_target) if gpu_target else kind


add_device_kind(
    DeviceKind(
        name=HOST,
        block_bytes=64,  # alignment of c10's allocator
        kernels="cpu",
        autocast="cpu",
        fused_dropout=False,
        fused_cells=False,
        foreach=False,
        bitsandbytes=True,
        checked=True,
    )
)
add_device_kind(
    DeviceKind(
        name=CUDA,
        one_kernel_networks=("lstm", "gru", "rnn_tanh", "rnn_relu"),  # cuDNN, MIOpen
        reserves_as_cuda=True,
        visible_variable="CUDA_VISIBLE_DEVICES",
        nvml=True,
        bitsandbytes=True,
        managed_memory=True,
        runs_cuda=True,
        checked=True,
    )
)
add_device_kind(DeviceKind(name="xpu", visible_variable="ZE_AFFINITY_MASK", bitsandbytes=True))
add_device_kind(
    DeviceKind(
        name="mps",
        fused_dropout=False,
        one_kernel_networks=("lstm",),
        fused_cells=False,
        foreach=False,
        streams=False,
        keeps_peak=False,
        default_memory_ratio=1.7,  # of the recommended memory (torch.mps)
    )
)
