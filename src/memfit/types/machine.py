"""Machine: what the job runs on. Every figure is a Fact with a source and a date, or unknown (None)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.types.device_kind import device_kind


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A number that somebody published, that was measured on this machine, or that is assumed.

    ``kind``: "measured", "published" or "assumed". ``low`` and ``high``: its stated or assumed range; None:
    no range.
    """

    value: float
    source: str
    date: str  # ISO
    kind: str = "published"
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        assert self.kind in ("measured", "published", "assumed"), self.kind

    @property
    def bounds(self) -> tuple[float, float]:
        """``low`` and ``high``; one that is None is ``value``."""
        return (
            self.value if self.low is None else self.low,
            self.value if self.high is None else self.high,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A connection between devices or hosts. ``bytes_s``: bytes per second in one direction, per device.
    ``latency_s``: seconds of one hop; None if unknown."""

    name: str
    bytes_s: Fact
    latency_s: Fact | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One server around the devices.

    Data rates in bytes per second: ``device_bytes_s`` between its memory and one device, in one direction;
    ``shared_bytes_s`` the same for all its devices together; ``storage_bytes_s`` of its local NVMe storage.
    None: unknown.
    """

    name: str
    memory_bytes: Fact | None = None
    device_bytes_s: Fact | None = None
    shared_bytes_s: Fact | None = None
    storage_bytes_s: Fact | None = None
    power_w: Fact | None = None  # without the devices, under load


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or this machine's processor as one device. A field that is None is unknown, unless its
    comment states otherwise.
    """

    name: str
    kind: str  # torch's name, such as "cpu" or "cuda"
    gpu_target: str = ""  # for which torch compiles its kernels (`DeviceKind.gpu_target`); "": unknown
    memory_bytes: Fact
    bandwidth_bytes_s: Fact | None = None
    peak_flops: Mapping[str, Fact] = dataclasses.field(default_factory=dict)  # dense, by dtype name
    power_w: Fact | None = None
    usd_per_hour: Fact | None = None
    usd_to_buy: Fact | None = None
    context_bytes: Fact | None = None  # of one process's CUDA context, before any kernel is loaded
    kernels_bytes: Fact | None = None  # code loaded by a training step; None: included in context_bytes
    blas_workspace_bytes: Fact | None = None  # of one BLAS handle, through PyTorch's allocator
    nccl_channels: Fact | None = None  # of one communicator, for collectives
    nccl_multicast_channels: Fact | None = None  # NVLink SHARP; None: the device has none
    multiprocessor_count: Fact | None = None  # streaming multiprocessors or compute units
    link: Link | None = None  # to its neighbours in one host
    # Share of the peak rate that large operators reach, by class: matmul, attention, attention_backward,
    # memory.
    efficiency_ratio: Mapping[str, Fact] = dataclasses.field(default_factory=dict)
    embodied_kg: Fact | None = None  # CO2 equivalent of its manufacture

    @property
    def trace_kind(self) -> str:
        """The kind and the architecture, such as "cuda:sm_75", which determine the kernels in a trace."""
        return f"{self.kind}:{self.gpu_target}" if self.gpu_target else self.kind

    @property
    def is_host(self) -> bool:
        """Whether the device is a processor, so that its memory is the host's."""
        return device_kind(self.kind).is_host


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place where machines run: the price and CO2 of its electricity. ``pue_ratio``: electricity of a whole
    site over that of its computers.
    """

    name: str
    usd_per_kwh: Fact
    co2_g_per_kwh: Fact
    pue_ratio: Fact


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Devices, hosts and network.

    ``device_count``: number of devices in all hosts together. ``devices_per_host``: number in one host; 0:
    all are in one host. ``network``: the connection between hosts. ``is_here``: it is the machine on which
    memfit runs. ``place``, ``host`` and ``network`` are None if unknown.
    """

    name: str
    device: Device
    device_count: int = 1
    place: Place | None = None
    devices_per_host: int = 0
    host: Host | None = None
    network: Link | None = None
    is_here: bool = False

    @property
    def devices_in_host(self) -> int:
        """Number of devices in one host, also where ``devices_per_host`` is 0."""
        return self.devices_per_host or self.device_count


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured on this machine. In a calibration without measurements (``Calibration()``), the
    catalog's figures are used instead.

    ``op_s``: operator signature -> median seconds of the operator's calls, run alone. ``op_peak_bytes``:
    operator signature -> bytes at its peak, including outputs. ``op_spread_ratio``: operator signature ->
    (median over shortest time of its calls) - 1. ``not_timed``: signatures of operators that cannot run
    alone. ``overhead_s``: time of one operator call of negligible size. ``flops_s``: dtype -> FLOPs per
    second of a dense matrix product. ``bandwidth_bytes_s``: bytes read plus written per second by a large
    copy. ``disk_bytes_s`` and ``disk_file_s``, for activation offload: on a processor the bytes per second of
    writing tensors to a file and reading them back, and the additional seconds per tensor; on an accelerator
    the bytes per second of copies to the host's memory and back, and 0. ``load_count``: the system's load
    average over one minute, at the end of the timings. ``waited_ratio``: share of their time during which
    they waited for a processor that others used. ``idle_w``: power in watts without load.

    Short runs of whole steps correct predicted step times (cost/step_time_calibration.py): ``step_ratio`` is
    a factor for every plan; ``technique_ratio``: technique -> factor for each plan that has it;
    ``step_spread_ratio``: the relative error that remains, None if too few plans were run. ``corrected_by``:
    ID of the proof of concept that made them; "" if trials of the search did, or without a correction.
    ``corrected_count``: number of plans in them.
    """

    machine: str = ""
    threads: int = 0
    overhead_s: float = 0.0
    flops_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bandwidth_bytes_s: float = 0.0
    disk_bytes_s: float = 0.0
    disk_file_s: float = 0.0
    op_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    op_peak_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    op_kept_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # workspace passed to backward
    op_spread_ratio: Mapping[str, float] = dataclasses.field(default_factory=dict)
    not_timed: tuple[str, ...] = ()
    load_count: float = 0.0
    waited_ratio: float = 0.0
    idle_w: float | None = None
    took_s: float = 0.0
    step_ratio: float = 1.0
    technique_ratio: Mapping[str, float] = dataclasses.field(default_factory=dict)
    step_spread_ratio: float | None = None
    corrected_by: str = ""
    corrected_count: int = 0

    @property
    def spread_ratio(self) -> float:
        """Mean of ``op_spread_ratio``, weighted by the operators' times in ``op_s``; 0 if none was timed."""
        total_s = sum(self.op_s.get(s, 0.0) for s in self.op_spread_ratio)
        weighted_sum = sum(ratio * self.op_s.get(s, 0.0) for s, ratio in self.op_spread_ratio.items())
        return weighted_sum / total_s if total_s else 0.0
