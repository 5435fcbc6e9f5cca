"""A Megatron run's step: calls of one micro-batch (layers.py) played, stages put in their pipeline's order,
then gradients reduced, the optimizer's step, weights gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memfit.cost.collectives import collective_s
from memfit.cost.op_time import ASSUMED_LINK_BYTES_S, time_model
from memfit.cost.schedules import simulate
from memfit.cost.stream_simulator import ASSUMED_HOST_BYTES_S, SimulatedStep, StreamSimulator
from memfit.types.machine import Calibration, Machine
from memfit.types.trace import OpCall
from published.arch import Arch
from published.calls import Shape
from published.layers import Calls, kernel, parameters
from published.rows import Setup

_STATE_BYTES = (
    30  # of an element that Adam steps: four float32 read, three and the half-precision copy written
)


def shape_of(setup: Setup, arch: Arch) -> Shape:
    return Shape(
        length=setup.length // setup.ranks["cp"],
        batch=setup.micro_batch,
        tensor=setup.ranks["tp"],
        sequence_parallel=setup.sequence_parallel,
        context=setup.ranks["cp"],
        experts_here=max(1, arch.moe.experts // setup.ranks["ep"]) if arch.moe else 0,
        flash=setup.attention not in ("unfused", "eager"),
        dtype=getattr(torch, setup.compute),
        float8=setup.float8,
        recompute=setup.recompute.startswith("attention"),
    )


class Run:
    def __init__(self, setup: Setup, arch: Arch, machine: Machine) -> None:
        self.setup, self.arch, self.machine = setup, arch, machine
        self.shape = shape_of(setup, arch)
        model = time_model(machine.device, Calibration())
        assert model is not None
        self.player = StreamSimulator(model=model, machine=machine, members={}, blocking=_blocking(setup))
        self.calls = Calls(
            arch=arch,
            shape=self.shape,
            hosts_of=machine.devices_per_host,
            expert=setup.ranks["ep"],
            fork=_fork_bytes(setup),
            overlap="tensor" in setup.overlap,
        )
        self.busy: dict[str, float] = {}

    def play(self, calls: Sequence[OpCall], times: float) -> float:
        """Seconds of one; its work counts so many times."""
        found = self.player.simulate(calls)
        for resource, busy_s in found.busy_s.items():
            self.busy[resource] = self.busy.get(resource, 0.0) + times * busy_s
        return found.step_s

    def step(self) -> SimulatedStep:
        forward, backward = self._stages()
        micros, virtual = self.setup.micro_batches, self.setup.ranks["vp"]
        kind = "interleaved" if virtual > 1 else "1f1b"
        send_s = self._send_s()
        if _sends_wait(self.setup) and send_s:
            # DeepSpeed's engine computes nothing while it receives and sends (runtime/pipe/p2p.py), and what
            # came in parts is made whole: input, in backward output and gradient (runtime/pipe/engine.py).
            once = self.play(self.calls.whole_again(), 3 * micros)
            forward = [x + 2 * send_s + once * (i > 0) for i, x in enumerate(forward)]
            last = len(backward) - 1
            backward = [x + 2 * send_s + 2 * once * (i < last) for i, x in enumerate(backward)]
            send_s = 0.0
        line = simulate(kind, forward, backward, micros, send_s=send_s, virtual=virtual)
        ends = self._update_s(max(b for b in backward) * virtual)
        return SimulatedStep(
            step_s=line.step_s + ends,
            busy_s=self.busy,
            exposed_s=ends,
            idle_s=line.bubble_ratio * line.step_s,
        )

    def _stages(self) -> tuple[list[float], list[float]]:
        """Seconds of a micro-batch, forward and backward, through each stage."""
        arch, calls, count = self.arch, self.calls, self.setup.ranks["pp"] * self.setup.ranks["vp"]
        micros = self.setup.micro_batches
        dense = arch.moe.dense_layers if arch.moe else arch.layers
        per_rank = micros / self.setup.ranks["pp"]
        ahead, back = [], []
        for sparse, layers in ((False, dense), (True, arch.layers - dense)):
            times = layers * per_rank
            one = calls.layer(sparse=sparse)
            full = one if self.setup.recompute == "full" else []
            ahead += [self.play(one, times)] * layers
            back += [self.play([*full, *calls.layer(backward=True, sparse=sparse)], times)] * layers
        each = [arch.layers // count + (i < arch.layers % count) for i in range(count)]
        starts = [sum(each[:i]) for i in range(count)]
        forward = [sum(ahead[s : s + n]) for s, n in zip(starts, each, strict=True)]
        backward = [sum(back[s : s + n]) for s, n in zip(starts, each, strict=True)]
        fused = self.setup.loss == "fused"
        forward[0] += self.play(calls.embedding(), per_rank)
        forward[-1] += self.play(calls.head(fused=fused), per_rank)
        backward[-1] += self.play(calls.head(backward=True, fused=fused), per_rank)
        return forward, backward

    def _send_s(self) -> float:
        """To the next stage; a tensor-parallel rank sends its part, of the rows or of the flat tensor."""
        if self.setup.ranks["pp"] == 1:
            return 0.0
        inside = self.machine.device_count <= self.machine.devices_per_host
        size = 2 * self.shape.whole_rows // self.shape.tensor * self.arch.hidden
        return float(collective_s("send", size, 2, 2 if inside else 1, self.machine))

    def _update_s(self, backward_s: float) -> float:
        setup, arch, shape = self.setup, self.arch, self.shape
        layers = -(-arch.layers // setup.ranks["pp"])
        here = parameters(arch, shape, layers, ends=1.0 if setup.ranks["pp"] > 1 else 2.0 - arch.tied)
        data = setup.ranks["dp"] * setup.ranks["cp"]
        shares = setup.sharding.startswith(("zero", "fsdp"))
        own = here / data if shares else here
        moved = _STATE_BYTES * own + 8 * here  # gradients cleared, and read for their norm
        optimizer = self.play([kernel(moved, dtype="float32")], 1)
        whole = setup.grad_bytes
        if "optimizer" in setup.offload:  # gradients down, Adam on the host's processors, weights up
            on_host = min(data, self.machine.devices_per_host)
            copies_s = (whole + 2) * own / ASSUMED_LINK_BYTES_S
            optimizer = copies_s + _STATE_BYTES * own * on_host / ASSUMED_HOST_BYTES_S
        if data == 1:
            return optimizer
        near = max(1, min(data, self.machine.devices_per_host // shape.tensor))
        if shares:
            reduced = collective_s("reduce_scatter", whole * here, data, near, self.machine)
            gathered = collective_s("all_gather", 2 * here, data, near, self.machine)
        else:
            reduced, gathered = collective_s("all_reduce", whole * here, data, near, self.machine), 0.0
        hidden = backward_s if "data" in setup.overlap else 0.0
        return optimizer + max(0.0, reduced - hidden) + max(0.0, gathered - hidden / 2)


def _sends_wait(setup: Setup) -> bool:
    return setup.engine == "megatron-deepspeed"


def _blocking(setup: Setup) -> bool:
    return setup.launch_blocking


def _fork_bytes(setup: Setup) -> int:
    """Two halves read and one written; its BF16 optimizer reads, adds to float32 and clears besides."""
    if setup.engine != "megatron-deepspeed":
        return 0
    return 18 if setup.compute == "bfloat16" and setup.grad_bytes == 4 else 6
