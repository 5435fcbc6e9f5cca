"""How long a step of a published run takes: its trace played on the catalog's machine; what its source gave.

What differs between code bases and is no part of a trace is told here with where it was read: whose attention
kernel, what float8 casts move, which network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from memfit.catalog.load import network, network_names
from memfit.cost.kernel_model import FULL_SUM
from memfit.cost.op_time import ASSUMED_LINK_BYTES_S, time_model
from memfit.cost.stream_simulator import SimulatedStep, StreamSimulator
from memfit.types.errors import UserError
from memfit.types.machine import Calibration, Device, Fact, Link, Machine
from memfit.types.trace import Category, OpCall, Phase, Trace
from published.layers import kernel
from published.models import HUGGING_FACE_CODES, known, needed
from published.pipelines import Run
from published.predict import EXPRESSED, as_megatron, card_of, plan_of, traces_of
from published.rows import Setup

# FlashAttention's first version and its Triton port: half of the second's speed (Dao 2023, abstract)
TRITON_RATIO = 0.5
LOW_END = 1.0  # how far a node with a power limit is from the catalog's share of products to its low end
_TOKENS = 16384  # of a micro-batch, where a source states none: what its card holds at once


def measured_s(setup: Setup) -> float | None:
    """Of one optimizer step; None where the source gives no speed."""
    speeds = setup.speeds
    samples = setup.micro_batch * setup.micro_batches * setup.ranks["dp"]
    tokens = samples * setup.length / setup.padding_ratio
    devices = math.prod(setup.ranks[k] for k in ("dp", "tp", "pp", "cp"))
    if "step_time_s" in speeds:
        return speeds["step_time_s"]
    if "tok_s_gpu" in speeds and tokens:
        return tokens / devices / speeds["tok_s_gpu"]
    if "tok_s_total" in speeds and tokens:
        return tokens / speeds["tok_s_total"]
    return samples / speeds["samples_s"] if "samples_s" in speeds and samples else None


def timed(setup: Setup) -> Setup:
    """With a micro-batch where the source gives none: speed hardly depends on it. torchtitan cuts a local
    batch into as many parts as there are stages."""
    stages = setup.ranks["pp"]
    if setup.code == "titan" and stages > 1 and setup.micro_batch % stages == 0:
        return dataclasses.replace(setup, micro_batch=setup.micro_batch // stages, micro_batches=stages)
    each = max(1, setup.global_batch // setup.ranks["dp"]) if setup.global_batch else 0
    if setup.micro_batch or not setup.length:
        return setup
    micro = max(1, min(each or _TOKENS, _TOKENS // setup.length))
    return dataclasses.replace(setup, micro_batch=micro, micro_batches=max(1, each // micro))


def predicted(setup: Setup) -> SimulatedStep:
    """Raises UserError with the reason where the row cannot be expressed."""
    card = card_of(setup)
    if card is None:
        raise UserError(f"the catalog has no {setup.gpu}" if setup.gpu else "the GPU is not stated")
    if setup.scope == "loss_only":
        raise UserError("a loss alone is no step")
    if setup.low_precision not in ("", "float8"):
        raise UserError(f"products in {setup.low_precision} are not expressed")
    if by_calls(setup, card):
        needed(setup)
        ranks = math.prod(setup.ranks[k] for k in ("dp", "tp", "pp", "cp"))
        return Run(setup, known(setup), machine_of(setup, card, ranks)).step()
    setup = simpler(setup)
    plan = plan_of(setup)
    traces = traces_of(setup, plan)
    found = on_line(traces, lambda t: play(setup, card, t))
    if "parameters" not in setup.offload:
        return found
    whole = sum(times * t.parameter_count for times, t in traces)
    return dataclasses.replace(found, step_s=max(found.step_s, fetched_s(setup, whole)))


def fetched_s(setup: Setup, parameters: float) -> float:
    """Of a rank's share of the weights that comes from the host, for forward and for backward, and of the
    gradients that go there; beside the work."""
    moved = 2 * parameters / setup.ranks["dp"] * (2 * setup.micro_batches + 1)
    return moved / ASSUMED_LINK_BYTES_S


def simpler(setup: Setup) -> Setup:
    """What memory cannot leave out and time hardly feels: how ZeRO's ranks share a 4-bit base (half a byte of
    each weight is gathered, beside the work), the optimizer's kind, replicas whose kind is not told."""
    if setup.lora is not None and setup.lora.base and setup.sharding == "zero3":
        setup = dataclasses.replace(setup, ranks={**setup.ranks, "dp": 1}, sharding="")
    if setup.optimizer not in EXPRESSED:
        setup = dataclasses.replace(setup, optimizer="adamw")
    return setup if setup.sharding or setup.ranks["dp"] == 1 else dataclasses.replace(setup, sharding="ddp")


def by_calls(setup: Setup, card: Device) -> bool:
    """Whether it is timed from Megatron's calls: its own runs; pipelines and experts of others; GPT with
    fused kernels; and V100, which has no flash attention, where GPT was Megatron's as well."""
    gpt = setup.arch is not None and setup.arch.learned_positions
    old = card.name.startswith("V100") or setup.code == "flash-gpt"
    cut = max(setup.ranks["pp"], setup.ranks["ep"]) > 1 or as_megatron(setup)
    return setup.code == "megatron" or cut or (gpt and old)


def on_line(traces: list[tuple[float, Trace]], one: Callable[[Trace], SimulatedStep]) -> SimulatedStep:
    """The sum of what traces say, each so many times."""
    parts = [(times, one(t)) for times, t in traces]
    keys = {k for _, p in parts for k in p.busy_s}
    return SimulatedStep(
        step_s=sum(n * p.step_s for n, p in parts),
        busy_s={k: sum(n * p.busy_s.get(k, 0.0) for n, p in parts) for k in keys},
        exposed_s=sum(n * p.exposed_s for n, p in parts),
        idle_s=sum(n * p.idle_s for n, p in parts),
    )


def play(setup: Setup, card: Device, trace: Trace) -> SimulatedStep:
    machine = machine_of(setup, card, trace.ranks)
    model = time_model(machine.device, Calibration())
    assert model is not None
    ops = trace.ops
    if setup.compiled and max(setup.ranks["tp"], setup.ranks["cp"]) > 1:  # traced without the compiler
        ops = fused(ops)
    if setup.float8:
        ops = tuple(o for op in ops for o in float8(op, 3 if setup.compiled else 5))
    if setup.compute == "float16":  # sharding's own precision is traced in bfloat16
        ops = tuple(dataclasses.replace(o, dtype=o.dtype.replace("bfloat16", "float16")) for o in ops)
    if setup.tf32:  # products only
        ops = tuple(dataclasses.replace(o, dtype="tf32") if o.flops else o for o in ops)
    if setup.optimizer_kernels == "compiled":
        ops = one_optimizer(trace, ops)
    if setup.ranks["cp"] > 1 and setup.code in HUGGING_FACE_CODES:
        ops = tuple(balanced(o, setup.ranks["cp"]) for o in ops)
    trace = dataclasses.replace(trace, ops=ops)
    apart = setup.ranks["tp"] if "async-tensor" in setup.overlap else 1
    # Asynchronous tensor parallelism hides all but the first of so many parts of each transfer.
    work_factors = {"link": 1 / apart}
    player = StreamSimulator(model=model, machine=machine, members=trace.members, work_factors=work_factors)
    return player.step(trace)


# -- machines -------------------------------------------------------------------------------------------


def machine_of(setup: Setup, card: Device, ranks: int) -> Machine:
    return Machine(
        name=card.name,
        device=with_kernels(setup, card),
        device_count=ranks,
        devices_per_host=setup.devices_per_host,
        network=network_of(setup),
    )


def network_of(setup: Setup) -> Link | None:
    name = setup.interconnect
    if not name or name in network_names():
        return network(name) if name else None
    return Link(name=f"{name} GB/s", bytes_s=Fact(value=float(name) * 1e9, source="the row", date="2026"))


def with_kernels(setup: Setup, card: Device) -> Device:
    """The card with the attention kernels that the source's code calls."""
    ratios = {**card.efficiency_ratio}
    kind = attention_of(setup)
    if setup.power_limited:
        # A node with a power limit: its large products reach the catalog's low end, which SimuMax measured.
        matmul = ratios["matmul"]
        share = 1 + LOW_END * ((matmul.low or matmul.value) / matmul.value - 1)
        for key in [k for k in ratios if k.startswith(("matmul", "attention"))]:
            ratios[key] = dataclasses.replace(ratios[key], value=ratios[key].value * share)
    if kind == "triton":
        for key in ("attention", "attention_backward"):
            ratios[key] = dataclasses.replace(ratios[key], value=ratios[key].value * TRITON_RATIO)
    elif kind and f"attention_{kind}" in ratios:
        ratios["attention"] = ratios[f"attention_{kind}"]
        ratios["attention_backward"] = ratios[f"attention_{kind}_backward"]
    return dataclasses.replace(card, efficiency_ratio=ratios)


def attention_of(setup: Setup) -> str:
    """Empty: torch's flash backend, which is FlashAttention-2. Transformer Engine takes cuDNN's on Hopper and
    later (dot_product_attention/utils.py)."""
    return {"cudnn": "cudnn", "te": "cudnn", "triton": "triton"}.get(setup.attention, "")


def fused(ops: tuple[OpCall, ...]) -> tuple[OpCall, ...]:
    """Pointwise calls in a row as one kernel, which moves as much as the largest of them and what is kept."""
    found: list[OpCall] = []
    chain: list[OpCall] = []
    for op in ops:
        pointwise = (
            op.op.startswith("aten.") and not op.flops and op.phase is not Phase.OPTIMIZER and not op.stream
        )
        if chain and (not pointwise or op.phase is not chain[0].phase):
            found.append(_one(chain))
            chain = []
        (chain if pointwise else found).append(op)
    return (*found, *([_one(chain)] if chain else []))


_KEPT_BESIDE = 1.3


def _one(chain: list[OpCall]) -> OpCall:
    largest = max(chain, key=lambda o: o.moved_bytes)
    made = kernel(largest.moved_bytes * (_KEPT_BESIDE if len(chain) > 1 else 1), dtype=largest.dtype)
    return dataclasses.replace(
        made, phase=chain[0].phase, step=chain[0].step, clock=chain[0].clock, module=chain[0].module
    )


# -- float8 ---------------------------------------------------------------------------------------------


def float8(op: OpCall, cast_bytes: int) -> list[OpCall]:
    """A block's linear product in float8 with the casts of its operands before it; other calls as they are.
    ``cast_bytes``: of an element: read and written in one byte; unless a compiler finds the largest value
    where the element is made, read for that before."""
    if op.op not in ("aten.mm.default", "aten.addmm.default") or not op.module.startswith("blocks"):
        return [op]
    if op.dtype not in ("bfloat16", "float16"):
        return [op]
    elements = op.moved_bytes / 2  # of both operands and the result, in half precision
    cast = dataclasses.replace(
        op,
        op="aten._to_copy.default",
        signature=f'["float8",[{op.signature}],{{}}]',
        flops=0,
        moved_bytes=int(elements * 2 / 3 * cast_bytes),
    )
    flops = op.flops / FULL_SUM if op.phase is Phase.BACKWARD else op.flops
    low = dataclasses.replace(op, dtype="float8_e4m3fn", flops=int(flops), moved_bytes=int(elements * 4 / 3))
    return [cast, low]


def one_optimizer(trace: Trace, ops: tuple[OpCall, ...]) -> tuple[OpCall, ...]:
    """torchao compiles its low-bit optimizers: all of a step's work on a parameter is one kernel."""
    last = trace.steps - 1
    alive = [a for a in trace.allocations if a.end is None]
    states = sum(a.size_bytes for a in alive if a.category is Category.OPTIMIZER_STATE)
    weights = [a.size_bytes for a in alive if a.category is Category.PARAMETER]
    step = [o for o in ops if o.phase is Phase.OPTIMIZER and o.step == last]
    if not step or not weights:
        return ops
    gone = set(map(id, step))
    moved = (3 * sum(weights) + 2 * states) / len(weights)
    one = dataclasses.replace(
        kernel(moved, dtype="float32"),
        op="aten._fused_adamw_.default",
        signature='["one",[],{}]',
        phase=Phase.OPTIMIZER,
        step=last,
        clock=step[0].clock,
    )
    return (*(o for o in ops if id(o) not in gone), *[one] * len(weights))


def balanced(op: OpCall, ranks: int) -> OpCall:
    """Attention of one rank of a sequence dealt out from both ends: half of the square, shared by all ranks.
    The flash-attn package's call, as these traces have it, sees the rank's own part only."""
    return dataclasses.replace(op, flops=op.flops * ranks) if "scaled_dot_product" in op.op else op
