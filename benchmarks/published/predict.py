"""A setup as (job, plan), traced through the CUDA lens; the number that its source measured."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from memfit.catalog.load import device, device_names
from memfit.cost.allocator import Settings, replay
from memfit.cost.device_overhead import (
    device_overhead,
    interval_of,
    nccl_bytes,
    total_interval,
    with_workspaces,
)
from memfit.cost.estimate import MEMORY_RATIO, allocated_interval, interval_around
from memfit.cost.memory import levels, memory_profile
from memfit.cost.memory_estimate import ASSUMED_RESERVED_RATIO, footprint
from memfit.techniques.registry import make_use
from memfit.techniques.zero.zero_stage12 import ZeroTwo
from memfit.trace.trace_extrapolation import deep_trace
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.machine import Calibration, Device, Fact, Machine
from memfit.types.plan import KnobValue, Plan, Use
from memfit.types.result import Interval
from memfit.types.trace import Phase, Trace
from published.megatron import rank_jobs
from published.models import HUGGING_FACE_CODES, STACKS, job_of, known, needed
from published.rows import Setup


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Peaks of a training step. ``phase``: where the allocated one lies. ``ranges``: (low, high) over the
    value by kind of memory, as memfit's estimates give them; of "unstated" over the allocated one."""

    allocated_bytes: int
    phase: str
    resident_bytes: int = 0  # kept for backward when forward ends
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def use(technique: str, **settings: KnobValue) -> Use:
    """With the defaults of what is not said."""
    return make_use(technique, settings)


def plan_of(setup: Setup) -> Plan:
    uses = [*_memory(setup), *_optimizer(setup), *_sharding(setup)]
    ranks = setup.ranks
    if ranks["tp"] > 1:  # torchtitan's plan cuts embedding, head and loss too
        uses.append(use("tensor-parallel", degree=ranks["tp"], sequence=True, vocabulary="parallel-loss"))
    if ranks["cp"] > 1:
        uses.append(use("context-parallel", degree=ranks["cp"]))
    return Plan(uses=tuple(uses), ranks=ranks["dp"] * ranks["tp"] * ranks["cp"])


def _memory(setup: Setup) -> list[Use]:
    uses: list[Use] = []
    if setup.micro_batches > 1:
        uses.append(use("gradient-accumulation", micro_batches=setup.micro_batches))
    if _autocast(setup):
        uses.append(use("fp16-autocast" if setup.compute == "float16" else "bf16-autocast"))
    if setup.recompute == "full" or setup.recompute.startswith("every"):
        every = int(setup.recompute.rpartition("-")[2]) if "-" in setup.recompute else 1
        uses.append(use("activation-checkpointing", every=every))
    if setup.recompute == "operators":
        keep = "every-second-matmul" if setup.code == "titan" else "matmul"
        uses.append(use("selective-checkpointing", keep=keep))
    if "activations" in setup.offload:
        uses.append(use("activation-offload", to="host", minimum_kib=1))
    packed = setup.lora is not None and setup.lora.base  # 4-bit weights stay outside of graphs
    alone = setup.ranks["tp"] == setup.ranks["cp"] == 1  # with others, recomputed blocks are as large without
    if setup.compiled and not packed and alone:
        uses.append(use("compile", scope=_graphs(setup)))
        if setup.float8:
            uses.append(use("float8-linear", scaling="tensorwise"))
    return uses


def _autocast(setup: Setup) -> bool:
    """FSDP and ZeRO cast by themselves, but FSDP does not where adapters are wider than their base."""
    adapters = setup.lora is not None and setup.lora.adapter_dtype == "float32"
    if _shares(setup):
        return adapters and setup.sharding.startswith("fsdp") and setup.parameters != "float32"
    return adapters or (setup.parameters == "float32" and setup.compute != "float32")


EXPRESSED = ("adamw", "adamw-8bit", "adamw-4bit", "adamw-paged", "adafactor", "sgd", "lion")


def _optimizer(setup: Setup) -> list[Use]:
    if setup.optimizer == "none":
        return []
    if setup.optimizer not in EXPRESSED:
        raise UserError(f"the optimizer {setup.optimizer} is not expressed")
    uses: list[Use] = []
    if setup.optimizer != "adamw":
        uses.append(use("sgd" if setup.optimizer == "lion" else setup.optimizer))  # one moment each
    elif _on_host(setup):
        uses.append(use("adamw-paged"))
        if "gradients" in setup.offload:  # each leaves when it is complete
            uses.append(use("optimizer-in-backward"))
    elif setup.optimizer_kernels in ("fused", "single"):
        uses.append(use(f"adamw-{setup.optimizer_kernels}"))
    if setup.optimizer_in_backward:
        uses.append(use("optimizer-in-backward"))
    return uses


def _on_host(setup: Setup) -> bool:
    """Whether an optimizer of its own keeps the states in host memory, where no sharding does (torchao's
    CPUOffloadOptimizer)."""
    return "optimizer" in setup.offload and not _shares(setup)


def _shares(setup: Setup) -> bool:
    """Whether FSDP or ZeRO steps the optimizer: over several ranks, or DeepSpeed on one, which keeps a
    float32 copy there as well."""
    if setup.sharding in ("", "ddp"):
        return False
    return setup.ranks["dp"] * setup.ranks["cp"] > 1 or _alone(setup)


def _alone(setup: Setup) -> bool:
    """DeepSpeed's ZeRO on one device."""
    return setup.sharding.startswith("zero") and setup.master_weights and setup.lora is None


def _graphs(setup: Setup) -> str:
    """torchtitan (since May 2024) and torchtune compile blocks; others the model, which the hooks of sharding
    break up."""
    whole = setup.code == "titan" and setup.older(2024, 6)
    if setup.code not in ("thunder", "timm", "litgpt") and not whole:
        return "blocks"
    return "model" if setup.ranks["dp"] == 1 else "parts"


def _sharding(setup: Setup) -> list[Use]:
    if setup.ranks["dp"] == 1 and setup.ranks["cp"] == 1 and not _alone(setup):
        return []
    if setup.lora is not None and setup.lora.base and setup.sharding == "zero3":
        raise UserError("how the ranks share a 4-bit base is not expressed")
    if setup.sharding in ("fsdp1", "fsdp2"):
        units, reshard = _groups(setup)
        options: dict[str, Any] = {
            "precision": "bf16" if setup.parameters == "float32" and setup.compute != "float32" else "as-is",
            "reshard": setup.reshard and reshard,
            "units": units,
            "prefetch": 1,
            "replicas": setup.replicas,
            "sync": "every",
            "offload": "parameters" in setup.offload,
        }
        return [use("fsdp2", **options)]
    if setup.sharding == "ddp":
        mib = 256 if setup.code == "thunder" else 25  # the benchmark's own default; torch's
        return [use("ddp", bucket_mib=mib, bucket_view=False, sync="every")]
    if setup.sharding in ("zero1", "zero2", "zero3"):
        return [_zero(setup)]
    raise UserError("how the data-parallel ranks share the model is not in the row")


def _groups(setup: Setup) -> tuple[str, KnobValue]:
    """(what is gathered together, what is freed after forward). torch before June 2025 and FSDP1 never freed
    what lies beside the blocks; torchtitan keeps the last block (parallelize_llama.py), and since July 2025
    the embedding, the blocks, and norm and head are groups, of which the last is kept."""
    if setup.code == "thunder":
        return "parts", True
    if setup.code == "titan":
        return "blocks" if setup.older(2025, 8) else "ends", "not-last"
    old = setup.sharding == "fsdp1" or setup.older(2025, 6)
    return "blocks", "blocks" if old else True


def _zero(setup: Setup) -> Use:
    """DeepSpeed's defaults; through the Hugging Face Trainer, the sizes that its "auto" stands for
    (transformers/integrations/deepspeed.py)."""
    place = "parameters" if "parameters" in setup.offload else "optimizer" if setup.offload else "none"
    options: dict[str, Any] = {
        "stage": int(setup.sharding[-1]),
        "offload": place,
        "precision": "fp32" if setup.compute == "float32" else "bf16",
    }
    if setup.sharding == "zero3" and setup.arch is not None and setup.code in HUGGING_FACE_CODES:
        width = setup.arch.hidden
        options["reduce_bucket_elements"] = width * width
        options["prefetch_elements"] = int(0.9 * width * width)
        options["persist_elements"] = 10 * width
    return use("zero", **options)


_FEW_BLOCKS = 4
_ON_THE_LINE = 0.002
_PARTS = 4  # of a phase's span: a peak lies near its start or its end


def predict(setup: Setup) -> Prediction:
    """Raises UserError with the reason where the row cannot be expressed."""
    if setup.scope == "loss_only":
        raise UserError("a loss alone is no step")
    if setup.low_precision not in ("", "float8"):
        raise UserError(f"products in {setup.low_precision} are not expressed")
    if setup.low_precision_weights == "not stated":
        raise UserError("whether weights stay gathered in 8 or in 16 bits is not in the row")
    if setup.code == "megatron" or as_megatron(setup):
        arch = known(setup)
        needed(setup)
        plan = _recomputed(setup)
        traces = [deep_trace(job, plan, device="cuda") for job in rank_jobs(setup, arch)]
        return max((of_trace(setup, t) for t in traces), key=lambda p: p.allocated_bytes)
    for name in ("pp", "ep"):
        if setup.ranks[name] > 1:
            raise UserError(f"{name} {setup.ranks[name]} is not expressed yet")
    return _of(setup, plan_of(setup))


def as_megatron(setup: Setup) -> bool:
    """Whether another code base cuts its model as Megatron does: stages of a pipeline, experts, or parts of
    layers, whose replicas at most share the optimizer's states."""
    if setup.arch is None or setup.lora is not None or setup.sharding not in ("", "ddp", "zero1", "zero2"):
        return False
    cut = max(setup.ranks["pp"], setup.ranks["ep"]) > 1
    return cut or (setup.ranks["tp"] > 1 and setup.ranks["dp"] > 1)


def _of(setup: Setup, plan: Plan) -> Prediction:
    if _is_line(setup, plan) and (found := _on_a_line(setup, plan)) is not None:
        return found
    return of_trace(setup, traced(setup, plan))


_KEPT: dict[
    tuple[str, Plan, int], Trace
] = {}  # of the row at hand: memory and time are read from the same traces


def forget() -> None:
    _KEPT.clear()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Traces made meanwhile are let go of."""
    before = dict(_KEPT)
    try:
        yield
    finally:
        _KEPT.clear()
        _KEPT.update(before)


def traced(setup: Setup, plan: Plan, layers: int = 0) -> Trace:
    """Of the model with so many blocks; 0: with all of its own."""
    key = (repr(setup), plan, layers)
    if key not in _KEPT:
        update = setup.scope == "train_step" or setup.code == "nnscaler"
        options: dict[str, Any] = {"device": "cuda", "max_micro_batches": 2, "update": update}
        job = job_of(_with_layers(setup, layers) if layers else setup)
        with mock.patch.object(ZeroTwo, "copies_part", not _is_older_deepspeed(setup)):
            _KEPT[key] = trace(job, plan, **options) if layers else deep_trace(job, plan, **options)
    return _KEPT[key]


def _is_older_deepspeed(setup: Setup) -> bool:
    """Whether it is from before 0.18.3, the first that copies a part on the card to offload its state."""
    return setup.engine == "deepspeed" and setup.older(2025, 12)


def traces_of(setup: Setup, plan: Plan) -> list[tuple[float, Trace]]:
    """(times, trace) whose sum is the whole: one, or two on the line where blocks are extrapolated."""
    if not _is_line(setup, plan):
        return [(1.0, traced(setup, plan))]
    times = (_count(setup) - _FEW_BLOCKS) / _period(plan)
    few, more = (traced(setup, plan, _FEW_BLOCKS + i * _period(plan)) for i in range(2))
    return [(1.0 - times, few), (times, more)]


def _is_line(setup: Setup, plan: Plan) -> bool:
    """Whether only peaks are extrapolated: where blocks have no events of their own that could be repeated
    (one compiled graph over all of them, the Evoformer's two streams), or their freeing is not in the step
    they were made in. The allocator's replay wants every event."""
    compiled = plan.get("compile")
    whole = compiled is not None and compiled.settings["scope"] == "model"
    replayed = setup.measured is not None and setup.measured.kind in ("reserved", "device", "resident")
    held = setup.lora is not None and setup.lora.keeps_input
    wanted = whole or setup.code in STACKS or (not replayed and (compiled is not None or held))
    return wanted and _count(setup) > _FEW_BLOCKS + 2 * _period(plan)


def _period(plan: Plan) -> int:
    recompute = plan.get("activation-checkpointing")
    return int(recompute.settings["every"]) if recompute else 1


def _count(setup: Setup) -> int:
    return setup.layers


def _on_a_line(setup: Setup, plan: Plan) -> Prediction | None:
    """Peaks grow by as much with every further period of blocks; None where a third depth says otherwise."""
    card, period = card_of(setup), _period(plan)
    found = [traced(setup, plan, _FEW_BLOCKS + i * period) for i in range(3)]
    seen = [with_workspaces(t, card) if card else t for t in found]
    few, more, most = map(_tops, seen)
    times = (_count(setup) - _FEW_BLOCKS) / period
    whole = {key: int(few[key] + times * (more[key] - few[key])) for key in few}
    where = max(whole, key=lambda key: whole[key])
    if abs((2 * more[where] - few[where]) / most[where] - 1) > _ON_THE_LINE:
        return None
    allocated = _allocated(seen[-1], whole[where])
    reserved = Interval(
        value=allocated.value, low=allocated.low, high=allocated.high * ASSUMED_RESERVED_RATIO
    )
    ranges = _ranges(allocated, reserved, _beside(setup, card, found[-1]))
    return Prediction(allocated_bytes=whole[where], phase=where[0], ranges=ranges)


def _with_layers(setup: Setup, count: int) -> Setup:
    arch = dataclasses.replace(setup.arch, layers=count) if setup.arch else None
    return dataclasses.replace(setup, arch=arch, layers=count)


def _tops(traced: Trace) -> dict[tuple[str, int], int]:
    """Highest live bytes in each part of each phase of the last step."""
    clock, live = levels(traced)
    tops: dict[tuple[str, int], int] = {}
    for span in traced.spans:
        if span.phase is Phase.SETUP or span.step != traced.steps - 1:
            continue
        edges = [span.start + (span.end - span.start) * i // _PARTS for i in range(_PARTS + 1)]
        for part, (start, end) in enumerate(itertools.pairwise(edges)):
            first, last = clock.searchsorted((start, end))
            key = (str(span.phase), part)
            tops[key] = max(tops.get(key, 0), int(live[max(0, first - 1) : last].max(initial=0)))
    return tops


def of_trace(setup: Setup, traced: Trace) -> Prediction:
    """Of a whole trace: the allocator can be replayed, and what lies beside it added."""
    card = card_of(setup)
    seen = with_workspaces(traced, card) if card else traced
    tops = _tops(seen)
    where = max(tops, key=lambda key: tops[key])
    allocated = _allocated(seen, tops[where])
    reserved, beside = _reserved(setup, seen, allocated), _beside(setup, card, traced)
    return Prediction(
        allocated_bytes=tops[where],
        phase=where[0],
        resident_bytes=_resident(seen),
        reserved_bytes=int(reserved.value),
        device_bytes=int(reserved.value + beside.value) if card and beside else None,
        ranges=_ranges(allocated, reserved, beside),
    )


def _allocated(seen: Trace, peak_bytes: int) -> Interval:
    """As memfit's answers give it, around the last step's peak. What kernels may take inside keeps its bytes
    where the trace has fewer blocks than the model."""
    found, _ = allocated_interval(seen, memory_profile(seen, Calibration()), Calibration())
    around = interval_around(peak_bytes, MEMORY_RATIO)
    low = min(around.low, peak_bytes * found.low / found.value)
    return Interval(value=peak_bytes, low=low, high=max(around.high, peak_bytes + found.high - found.value))


_UNKNOWN_CARD = Device(name="unknown", kind="cuda", memory_bytes=Fact(value=math.inf, source="", date=""))


def _reserved(setup: Setup, seen: Trace, allocated: Interval) -> Interval:
    """Around the replay under the row's own setting of the allocator. Its interval, which takes more replays,
    is made only where it is compared."""
    compared = setup.measured is not None and setup.measured.kind in ("reserved", "device", "unstated")
    around = (
        footprint(seen, allocated, Machine(name="", device=_UNKNOWN_CARD)).reserved_bytes
        if compared
        else None
    )
    if around is not None and not setup.expandable_segments:
        return around
    settings = Settings(expandable_segments=setup.expandable_segments)
    value = replay(seen.allocations, settings).reserved_peak_bytes
    low, high = (around.low, around.high) if around else (value, value)
    return Interval(value=value, low=min(value, low), high=max(value, high))


_ALL_KERNELS_BYTES = 2**30  # loaded at once before CUDA 11.7 (catalog/libraries.toml, kernels_bytes)


def _beside(setup: Setup, card: Device | None, traced: Trace) -> Interval | None:
    """Memory outside of the allocator; None where the catalog does not know it. Of an unknown card: up to the
    largest of the catalog. A source may have measured its empty context. Before CUDA 11.7, which torch has
    since 1.13 (October 2022), a process held all kernels of its libraries."""
    if card is None:
        known = [device_overhead(device(name)).total_bytes for name in device_names()]
        return Interval(value=0, low=0, high=max(total.high for total in known if total))
    groups = traced.communicators or [(k, n) for k, n in setup.ranks.items() if k != "vp"]
    if setup.context_bytes is not None:
        code = interval_of(card.kernels_bytes)  # of products, which an empty process has not loaded
        own = float(setup.context_bytes)
        context = Interval(value=own, low=own, high=own + (code.high if code else 0.0))
        return total_interval((context, *(nccl_bytes(card, ranks) for _, ranks in groups if ranks > 1)))
    total = device_overhead(card, groups).total_bytes
    if total is None or not setup.older(2022, 11):
        return total
    return dataclasses.replace(total, high=total.high + _ALL_KERNELS_BYTES)


def _ranges(
    allocated: Interval, reserved: Interval, beside: Interval | None
) -> dict[str, tuple[float, float]]:
    """Memory of which the source does not say what it counts is anything from the live tensors to the
    device's memory."""
    device_memory = total_interval((reserved, beside)) or reserved
    kinds = {"allocated": allocated, "reserved": reserved, "device": device_memory}
    found = {kind: (i.low / i.value, i.high / i.value) for kind, i in kinds.items()}
    found["unstated"] = (allocated.low / allocated.value, device_memory.high / allocated.value)
    return {**found, "resident": (1 - MEMORY_RATIO, 1 + MEMORY_RATIO)}


def _resident(traced: Trace) -> int:
    """Made in the last step's forward and alive when it ends."""
    span = next(s for s in traced.spans if s.phase is Phase.FORWARD and s.step == traced.steps - 1)
    return sum(
        a.size_bytes
        for a in traced.allocations
        if span.start <= a.start < span.end and (a.end is None or a.end >= span.end)
    )


def card_of(setup: Setup) -> Device | None:
    """None: the source does not say, or the catalog has no such card."""
    with contextlib.suppress(UserError):
        return device(setup.gpu) if setup.gpu else None
    return None


def _recomputed(setup: Setup) -> Plan:
    full = use("activation-checkpointing", every=1)
    return Plan(uses=(full,) if setup.recompute == "full" else ())
