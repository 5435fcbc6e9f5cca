"""What test_simulated_accelerator.py runs in child processes.

``python simulated_accelerator_scenarios.py FILE SCENARIO...`` calls the functions of these names and writes
what they return as JSON. The process is one of the ranks if torchrun's variables are set.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
import simulated_accelerator

VOCABULARY, WIDTH, LENGTH, BATCH = 64, 32, 16, 4
MIB = 2**20


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        attention = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attention.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(functional.gelu(self.up(self.before_mlp(x)))))


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0, use_reentrant: bool | None = None, blocks: int = 2) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.use_reentrant = use_reentrant  # None: no checkpointing

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            if self.use_reentrant is None:
                x = block(x)
            else:
                random = block.dropout.p > 0  # else no random state, which would count on the CPU
                x = checkpoint(block, x, use_reentrant=self.use_reentrant, preserve_rng_state=random)
        return self.head(self.norm(x))


def batch(index: int, device: str, rows: int = BATCH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(VOCABULARY, (rows, LENGTH + 1), generator=generator).to(device)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def made(device: str, model: Callable[[], nn.Module] = Transformer) -> nn.Module:
    torch.manual_seed(0)
    return model().to(device)


def train(model: nn.Module, device: str, steps: int = 3, **adamw: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **adamw)
    torch.manual_seed(1)  # of dropout, on every device
    losses = []
    for index in range(steps):
        loss = loss_of(model, batch(index, device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def on_both(run: Callable[[str], Any]) -> list[Any]:
    return [run("cpu"), run("sim")]


# -- training ----------------------------------------------------------------------------------------


def training() -> dict[str, list[list[float]]]:
    """Losses on the CPU and on the device, by variant."""
    adamw = {"foreach": {"foreach": True}, "single tensors": {"foreach": False}, "fused": {"fused": True}}
    models: dict[str, dict[str, Any]] = {
        "plain": {},
        "dropout": {"dropout": 0.2},
        "checkpointing": {"use_reentrant": False},
        "reentrant checkpointing": {"use_reentrant": True},
        "dropout and checkpointing": {"dropout": 0.2, "use_reentrant": False},
        "dropout and reentrant checkpointing": {"dropout": 0.2, "use_reentrant": True},
    }

    def run(model: dict[str, Any], **options: Any) -> list[list[float]]:
        return on_both(lambda device: train(made(device, lambda: Transformer(**model)), device, **options))

    return {name: run({"dropout": 0.2}, **options) for name, options in adamw.items()} | {
        name: run(model) for name, model in models.items()
    }


def convolutions() -> list[list[float]]:
    """Losses of a small network of convolutions, on the CPU and on the device."""

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, groups=2, bias=False),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.ConvTranspose2d(8, 4, 2, stride=2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 5),
        )

    def run(device: str) -> list[float]:
        model = made(device, network)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        inputs = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0)).to(device)
        labels = torch.arange(4).to(device)
        losses = []
        for _ in range(3):
            loss = functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return on_both(run)


def operators() -> dict[str, bool]:
    """Whether the device agrees with the CPU, by case. These are what a naive fallback gets wrong."""
    x = torch.arange(24.0).reshape(4, 6)
    z = torch.complex(x, x + 1)

    def out(t: torch.Tensor) -> torch.Tensor:
        result = torch.empty(0, device=t.device)
        torch.cumsum(t, 0, out=result)
        return result

    def written_through_a_view(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t.view(2, 12)[:, ::2].t().mul_(2)
        t.diagonal().zero_()
        t.unfold(0, 2, 2)[0].add_(1)
        return t

    def replaced_storage(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(1, device=t.device).set_(t.t())

    def resized(t: torch.Tensor) -> torch.Tensor:
        return t.clone().resize_(2, 3)

    def put(t: torch.Tensor) -> torch.Tensor:
        return t.clone().index_put_((torch.tensor([0, 1]),), torch.tensor(7.0))  # indices on the host

    cases: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = {
        "out=": (x, out),
        "views": (x, written_through_a_view),
        "set_": (x, replaced_storage),
        "resize_": (x, resized),
        "index_put_": (x, put),
        "index": (x, lambda t: t[torch.tensor([2, 0])]),
        "boolean index": (x, lambda t: t[t > 5]),
        "wrapped number": (x.half(), lambda t: t * 0.1),
        "scalar on the host": (x, lambda t: t + torch.tensor(2.0)),
        "conjugate": (z, lambda t: t.conj() @ t.mT),
        "conjugate copied": (z, lambda t: t.conj().cpu()),
        "negative": (z, lambda t: t.conj().imag.clone()),
        "unique": (x % 5, lambda t: t.unique()),
        "nested lists": (x, lambda t: torch.stack(torch.unbind(t.split(2)[1]))),
        "einsum": (x, lambda t: torch.einsum("ij,kj->ik", t, t)),
        "sort": (x, lambda t: t.sort(descending=True).values),
        "dtype view": (x, lambda t: t.view(torch.int32)),
    }
    return {
        name: torch.equal(run(tensor).cpu(), run(tensor.to("sim")).cpu())
        for name, (tensor, run) in cases.items()
    }


def autocast() -> dict[str, Any]:
    model = made("sim")
    dtypes: dict[str, str] = {}
    names = {"linear": model.head, "norm": model.norm}
    for name, module in names.items():
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: dtypes.__setitem__(name, str(output.dtype))
        )
    x = torch.ones(4, 4, device="sim")
    with torch.autocast("sim", dtype=torch.bfloat16):
        bf16 = loss_of(model, batch(0, "sim"))
        dtypes["softmax"] = str(x.bfloat16().softmax(-1).dtype)
        dtypes["promoted"] = str(torch.tensordot(x.bfloat16(), x).dtype)
    scaler, optimizer = (
        torch.amp.GradScaler("sim", init_scale=2.0**8),
        torch.optim.AdamW(model.parameters(), lr=1e-2),
    )
    losses = []
    for step in range(6):
        with torch.autocast("sim", dtype=torch.float16):
            loss = loss_of(model, batch(0, "sim"))
        scaler.scale(loss).backward()
        if step == 2:
            model.head.weight.grad[0, 0] = math.inf
            before = model.head.weight.detach().clone()
        scaler.step(optimizer)
        if step == 2:
            skipped = torch.equal(before, model.head.weight)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "dtypes": dtypes,
        "bf16": bf16.item(),
        "fp32": loss_of(made("sim"), batch(0, "sim")).item(),
        "fp16": losses,
        "skipped": skipped,
        "scale": scaler.get_scale(),
    }


class _Operators(TorchDispatchMode):
    """Names of the operators that ran, and of those with a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.host: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" for t in tensors):
            self.host.add(str(func))
        self.names.add(str(func))
        return result


def composite_kernels() -> dict[str, bool]:
    """Whether autograd runs the same operators on the device as on the CPU."""
    x = torch.linspace(-2, 2, 64).reshape(1, 8, 8)
    cases: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "layer_norm": lambda t: functional.layer_norm(t, (8,)),
        "group_norm": lambda t: functional.group_norm(t, 2),
        "silu": functional.silu,
        "mish": functional.mish,
        "gelu": functional.gelu,
        "softmax": lambda t: t.softmax(-1),
        "rms_norm": lambda t: functional.rms_norm(t, (8,)),
        "attention": lambda t: functional.scaled_dot_product_attention(t[None], t[None], t[None]),
        "addr": lambda t: torch.addr(t[0], t[0, 0], t[0, 1]),
        "channel_shuffle": lambda t: functional.channel_shuffle(t, 2),
    }

    def operators(run: Callable[[torch.Tensor], torch.Tensor], device: str) -> list[str]:
        tensor = x.clone().to(device).requires_grad_()
        with _Operators() as seen:
            run(tensor).sum().backward()
        return sorted(seen.names)

    return {name: operators(run, "cpu") == operators(run, "sim") for name, run in cases.items()}


def host_tensors_in_a_step() -> list[str]:
    """Operators that a dispatch mode sees with a CPU tensor while a step runs on the device."""
    model = made("sim", lambda: Transformer(dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = batch(0, "sim")
    with _Operators() as operators:
        loss_of(model, tokens).backward()
        optimizer.step()
    return sorted(operators.host)


def fake_tensors() -> dict[str, Any]:
    """A training step on fake tensors of the device."""
    before, operators = torch.accelerator.memory_allocated(), _Operators()
    with FakeTensorMode(), torch.device("sim"), operators:
        model = Transformer(dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        loss = loss_of(model, torch.zeros(BATCH, LENGTH + 1, dtype=torch.long))
        loss.backward()
        optimizer.step()
    return {
        "device": str(loss.device),
        "memory": torch.accelerator.memory_allocated() - before,
        "fused attention": sorted(name for name in operators.names if "flash_attention" in name),
    }


# -- memory ------------------------------------------------------------------------------------------


def sizes() -> dict[str, Any]:
    torch.accelerator.empty_cache()
    start = torch.accelerator.memory_allocated()
    kept = [torch.empty(n, dtype=torch.uint8, device="sim") for n in (1, 512, 513, MIB + 1)]
    allocated = torch.accelerator.memory_allocated() - start
    statistics = torch.accelerator.memory_stats()
    del kept
    freed = torch.accelerator.memory_allocated() - start
    reserved = torch.accelerator.memory_reserved() - start
    free, total = torch.accelerator.get_memory_info()
    torch.accelerator.empty_cache()
    result = {
        "allocated": allocated,
        "requested": statistics["requested_bytes.all.current"],
        "freed": freed,
        "peak": torch.accelerator.max_memory_allocated() - start,
        "reserved": reserved,
        "reserved when emptied": torch.accelerator.memory_reserved() - start,
        "free": free,
        "total": total,
        "capacity": torch.sim.get_device_properties().total_memory,
        "name": torch.sim.get_device_name(),
    }
    torch.accelerator.reset_peak_memory_stats()
    return result | {"reset": torch.accelerator.max_memory_allocated() - start}


@contextlib.contextmanager
def capacity(capacity_bytes: int) -> Iterator[None]:
    before = torch.sim.mem_get_info()[1]
    torch.accelerator.empty_cache()
    torch.sim.set_capacity(capacity_bytes)
    try:
        yield
    finally:
        torch.sim.set_capacity(before)


def failure(run: Callable[[], Any]) -> str:
    """The name of the exception that this raises, or an empty string."""
    try:
        run()
    except Exception as error:  # noqa: BLE001 (the test says which it must be)
        return f"{type(error).__module__}.{type(error).__qualname__}: {error}"
    return ""


def out_of_memory() -> dict[str, Any]:
    model = made("sim")
    live = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    loss = loss_of(model, batch(0, "sim"))
    forward = torch.accelerator.max_memory_allocated()
    loss.backward()
    backward = torch.accelerator.max_memory_allocated()
    del loss
    model.zero_grad()

    def step() -> None:
        loss_of(model, batch(0, "sim")).backward()

    with capacity((live + forward) // 2):
        in_forward = failure(step)
    with capacity((forward + backward) // 2):
        forward_fits = failure(lambda: loss_of(model, batch(0, "sim")))
        in_backward = failure(step)
    model.zero_grad()
    left = torch.accelerator.memory_allocated()
    ooms = torch.accelerator.memory_stats()["num_ooms"]
    torch.sim.set_per_process_memory_fraction((forward + backward) / 2 / torch.sim.mem_get_info()[1])
    limited, fraction = failure(step), torch.sim.get_per_process_memory_fraction()
    torch.sim.set_per_process_memory_fraction(1.0)
    released = failure(step)
    model.zero_grad()
    return {
        "forward": in_forward,
        "forward fits": forward_fits,
        "backward": in_backward,
        "left": left - live,
        "ooms": ooms,
        "limited": limited,
        "fraction": fraction * torch.sim.mem_get_info()[1] - (forward + backward) / 2,
        "released": released,
        "recovered": on_both(lambda device: train(made(device), device)),
        "huge": failure(lambda: torch.empty(2**61, dtype=torch.uint8, device="sim")),
    }


def peak() -> dict[str, dict[str, int]]:
    """Peak memory of two training steps above what the model takes: counted on the CPU, and by the device."""
    from memfit.runtime.counting_allocator import CountingAllocator

    counter = CountingAllocator()
    counter.install()
    models: dict[str, Callable[[], nn.Module]] = {
        "plain": Transformer,
        "checkpointing": lambda: Transformer(use_reentrant=False),
    }

    def on_cpu(model: Callable[[], nn.Module]) -> int:
        built = made("cpu", model)
        start = counter.live_bytes()
        counter.reset_peak()
        train(built, "cpu", steps=2, foreach=False)
        return counter.peak_bytes() - start

    def on_device(model: Callable[[], nn.Module]) -> dict[str, int]:
        built = made("sim", model)
        torch.accelerator.reset_peak_memory_stats()
        start = torch.accelerator.memory_stats()
        train(built, "sim", steps=2, foreach=False)
        end = torch.accelerator.memory_stats()
        keys = {
            "allocated": "allocated_bytes.all",
            "requested": "requested_bytes.all",
            "blocks": "allocation.all",
        }
        return {name: end[f"{key}.peak"] - start[f"{key}.current"] for name, key in keys.items()}

    train(made("cpu"), "cpu")  # what kernels allocate once
    return {name: {"cpu": on_cpu(model), **on_device(model)} for name, model in models.items()}


# -- host memory, streams and events -------------------------------------------------------------------


class _Offload(torch.autograd.graph.saved_tensors_hooks):
    """Saved tensors go to pinned memory on a stream of their own, and return on another one."""

    def __init__(self, *, returns_wait: bool) -> None:
        to_host, to_device = torch.sim.Stream(), torch.sim.Stream()

        def pack(tensor: torch.Tensor) -> Any:
            if tensor.numel() < 256:
                return tensor
            to_host.wait_stream(torch.accelerator.current_stream())
            with torch.sim.stream(to_host):
                kept = torch.empty_like(tensor, device="cpu", pin_memory=True)
                kept.copy_(tensor, non_blocking=True)
            return kept, to_host.record_event()

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            kept, event = packed
            if returns_wait:
                to_device.wait_event(event)
            with torch.sim.stream(to_device):
                tensor = kept.to("sim", non_blocking=True)
            torch.accelerator.current_stream().wait_stream(to_device)
            return tensor

        super().__init__(pack, unpack)


def offload() -> dict[str, Any]:
    from memfit.techniques.offload import DiskSpool

    def gradient(hooks: contextlib.AbstractContextManager[Any]) -> float:
        model = made("sim")
        with hooks:
            loss = loss_of(model, batch(0, "sim"))
        loss.backward()
        return float(sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None))

    source = torch.ones(300, device="sim")

    def read(wait: Callable[[torch.Tensor], Any]) -> float:
        target = torch.empty(300, pin_memory=True)
        target.copy_(source, non_blocking=True)
        wait(target)
        return float(target.sum())

    event = torch.sim.Event()

    def by_event(_: torch.Tensor) -> None:
        event.record()
        event.synchronize()

    def too_early(_: torch.Tensor) -> None:
        torch.sim.Event().synchronize()  # never recorded: waits for nothing

    torch.sim.reset_peak_pinned_memory()
    result: dict[str, Any] = {"plain": gradient(contextlib.nullcontext())}
    result["at once"] = gradient(_Offload(returns_wait=False))
    result["pinned"] = torch.sim.max_pinned_memory()
    result["pinned after"] = torch.sim.pinned_memory()
    with torch.sim.late_copies():
        result["waits"] = gradient(_Offload(returns_wait=True))
        result["does not wait"] = gradient(_Offload(returns_wait=False))
        result["save_on_cpu"] = gradient(torch.autograd.graph.save_on_cpu(pin_memory=True, device_type="sim"))
        result["reads"] = {
            "at once": read(lambda _: None),
            "too early": read(too_early),
            "event": read(by_event),
            "stream": read(lambda _: torch.accelerator.current_stream().synchronize()),
            "device": read(lambda _: torch.accelerator.synchronize()),
            "other stream": read(lambda _: torch.sim.Stream().synchronize()),
            "item": read(lambda _: source.sum().item()),
        }
        target = torch.empty(300, pin_memory=True)
        target.copy_(source)
        result["blocking"] = float(target.sum())
    result["late no more"] = read(lambda _: None)
    offloaded_bytes: list[int] = []
    bench: Any = SimpleNamespace(
        model=nn.Module(), closers=[], on_offload=lambda out, back: offloaded_bytes.append(out)
    )
    result["disk"] = gradient(DiskSpool(bench, 1024).hooks())
    result["bytes on disk"] = sum(offloaded_bytes)
    return result


def streams_and_events() -> dict[str, Any]:
    default = torch.accelerator.current_stream()
    side = torch.sim.Stream(priority=-1)
    start, end = torch.sim.Event(enable_timing=True), torch.Event("sim", enable_timing=True)
    start.record()
    with torch.sim.stream(side):
        inside = torch.accelerator.current_stream() == side
        torch.ones(1000, device="sim").sum()
        end.record()
    side.wait_event(start)
    default.wait_stream(side)
    tensor = torch.ones(1, device="sim")
    tensor.record_stream(side)
    with side:
        entered = torch.accelerator.current_stream() == side
    return {
        "inside": inside,
        "entered": entered,
        "restored": torch.accelerator.current_stream() == default == torch.sim.default_stream(),
        "different": torch.sim.Stream() != side,
        "done": [side.query(), end.query(), torch.sim.Event().query()],
        "milliseconds": start.elapsed_time(end),
    }


def pinned() -> dict[str, Any]:
    from torch.utils.data import DataLoader, TensorDataset

    tensor = torch.empty(1000)
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4, pin_memory=True)
    return {
        "pageable": tensor.is_pinned(),
        "pinned": tensor.pin_memory().is_pinned(),
        "slice": torch.empty(1000, pin_memory=True)[10:20].is_pinned(),
        "loader": [rows.is_pinned() for (rows,) in loader],
    }


# -- the rest of a device --------------------------------------------------------------------------------


def random_numbers() -> dict[str, bool]:
    from memfit.conformance.cross_rank_dependence import _restoring_generators

    torch.manual_seed(3)
    host_state = torch.get_rng_state()
    first = torch.randn(100, device="sim")
    untouched = torch.equal(torch.get_rng_state(), host_state)
    state = torch.sim.get_rng_state()
    second = torch.randn(100, device="sim")
    torch.sim.set_rng_state(state)
    again = torch.randn(100, device="sim")
    with torch.random.fork_rng():
        torch.randn(5, device="sim")
    before_trial = torch.sim.get_rng_state()
    with _restoring_generators({"x": torch.ones(2, device="sim")}):
        torch.randn(5, device="sim")
    after_trial = torch.sim.get_rng_state()
    own = torch.Generator("sim").manual_seed(3)
    by_own = torch.randn(100, device="sim", generator=own)
    torch.manual_seed(3)
    return {
        "host untouched": untouched,
        "moves on": not torch.equal(first, second),
        "restored": torch.equal(second, again),
        "forked": torch.equal(torch.randn(100, device="sim"), first),
        "kept in a trial of a block": torch.equal(after_trial, before_trial),
        "own generator": torch.equal(by_own, first),
        "as the CPU": torch.equal(first.cpu(), torch.randn(100, generator=torch.Generator().manual_seed(3))),
        "permutation": torch.randperm(50, device="sim").sort().values.equal(torch.arange(50, device="sim")),
    }


def save_and_load() -> dict[str, Any]:
    model = made("sim")
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model, batch(0, "sim")).backward()
    optimizer.step()
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)

    def loaded(map_location: Any) -> dict[str, Any]:
        saved.seek(0)
        state = torch.load(saved, map_location=map_location, weights_only=True)
        tensors = [t for t in tree_leaves(state) if isinstance(t, torch.Tensor)]
        original = tree_leaves({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        originals = [t for t in original if isinstance(t, torch.Tensor)]
        return {
            "devices": sorted({str(t.device) for t in tensors if t.dim()}),
            "equal": all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(tensors, originals, strict=True)),
        }

    other = made("sim")
    saved.seek(0)
    other.load_state_dict(torch.load(saved, weights_only=True)["model"])
    return {
        "default": loaded(None),
        "cpu": loaded("cpu"),
        "sim": loaded("sim:0"),
        "copy": loss_of(other, batch(1, "sim")).item() == loss_of(model, batch(1, "sim")).item(),
    }


def module_on_the_device() -> dict[str, bool]:
    model = nn.Linear(3, 3)
    weight = model.weight
    model.to("sim")
    return {
        "same parameter": model.weight is weight and weight.device.type == "sim",
        "accelerator": torch.accelerator.current_accelerator() == torch.device("sim"),
        "module": torch.get_device_module("sim") is torch.sim,
        "methods": torch.ones(2).sim().is_sim and nn.Linear(1, 1).sim().weight.is_sim,
        "deep copy": torch.equal(weight.detach().clone(), copy.deepcopy(weight).detach()),
        "printed": "device='sim:0'" in repr(torch.ones(2, device="sim")),
        "numpy": "TypeError" in failure(lambda: torch.ones(2, device="sim").numpy()),
        "mixed devices": "same device" in failure(lambda: torch.ones(2, device="sim") + torch.ones(2)),
    }


def two_devices() -> dict[str, Any]:
    before = torch.accelerator.memory_allocated(0)
    one = torch.ones(1000, device="sim:1")
    allocated = [torch.accelerator.memory_allocated(0) - before, torch.accelerator.memory_allocated(1)]
    with torch.sim.device(1):
        inside = [torch.sim.current_device(), torch.empty(1, device="sim").device.index]
    return {
        "count": torch.accelerator.device_count(),
        "allocated": allocated,
        "inside": inside,
        "after": torch.sim.current_device(),
        "moved": torch.equal(one.to("sim:0").cpu(), torch.ones(1000)),
        "mixed": failure(lambda: one + torch.ones(1000, device="sim:0")),
        "missing": failure(lambda: torch.empty(1, device="sim:2")),
    }


# -- two ranks -------------------------------------------------------------------------------------------


def _trained_by_ranks(
    wrap: Callable[[nn.Module], nn.Module], *, steps: int = 3
) -> tuple[list[float], nn.Module]:
    """Each rank takes half of every batch. The losses are means over the ranks."""
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = wrap(made("sim"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for index in range(steps):
        rows = batch(index, "sim", 2 * BATCH).chunk(ranks)[rank]
        loss = loss_of(model, rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
    return losses, model


def _trained_alone(steps: int = 3) -> list[float]:
    model = made("sim")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for index in range(steps):
        loss = loss_of(model, batch(index, "sim", 2 * BATCH))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _sharded(model: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("sim", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _tensor_parallel() -> list[list[float]]:
    """The loss and the sum of a gradient of two layers, whole and split over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = made("sim", lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to("sim")
    whole = model(inputs).square().sum()
    whole.backward()
    results = [[whole.item(), model[0].weight.grad.abs().sum().item()]]
    model.zero_grad()
    parallelize_module(model, init_device_mesh("sim", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    split = model(inputs).square().sum()
    split.backward()
    return [*results, [split.item(), model[0].weight.grad.full_tensor().abs().sum().item()]]


def _pipeline(rank: int) -> list[float]:
    """The sum of this stage's gradient, by a pipeline of two stages and by one process."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square().mean()

    stages = made("sim", lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to("sim")
    loss(stages(inputs), inputs).backward()
    alone = stages[rank].weight.grad.abs().sum().item()
    stages.zero_grad()
    stage = PipelineStage(stages[rank], rank, 2, torch.device("sim:0"))
    schedule = Schedule1F1B(stage, 4, loss_fn=loss)
    schedule.step(inputs) if rank == 0 else schedule.step(target=inputs)
    return [stages[rank].weight.grad.abs().sum().item(), alone]


def ranks() -> dict[str, Any]:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group()  # gloo for tensors of the device; the host's have no backend, as with NCCL
    rank = dist.get_rank()
    result: dict[str, Any] = {"alone": _trained_alone()}
    result["ddp"], _ = _trained_by_ranks(DistributedDataParallel)
    result["ddp, views"], _ = _trained_by_ranks(
        lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True)
    )
    result["fsdp2"], sharded = _trained_by_ranks(_sharded)
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    result["full state"] = sorted({str(t.device) for t in full.values()})
    result["full sizes"] = sum(t.numel() for t in full.values())
    result["local devices"] = sorted({p.to_local().device.type for p in sharded.parameters()})
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    result["bf16"], _ = _trained_by_ranks(lambda model: _sharded(model, mp_policy=low))
    result["offloaded"], offloaded = _trained_by_ranks(
        lambda model: _sharded(model, offload_policy=CPUOffloadPolicy())
    )
    result["offloaded devices"] = sorted({p.to_local().device.type for p in offloaded.parameters()})
    result["tensor parallel"] = _tensor_parallel()
    result["pipeline"] = _pipeline(rank)
    gathered = torch.empty(2, device="sim")
    dist.all_gather_into_tensor(gathered, torch.full((1,), float(rank), device="sim"))
    parts = [torch.empty(1, device="sim") for _ in range(2)]
    dist.all_gather(parts, torch.full((1,), float(rank), device="sim"))
    sent = torch.full((1,), 5.0, device="sim")
    dist.broadcast(sent, src=0)
    exchanged = torch.empty(2, device="sim")
    dist.all_to_all_single(exchanged, torch.tensor([rank * 2.0, rank * 2.0 + 1], device="sim"))
    work = dist.all_reduce(sent, async_op=True)
    work.wait()
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    dist.barrier()
    result["gathered"] = [gathered.tolist(), [part.item() for part in parts]]
    result["sent"] = [sent.item(), exchanged.tolist(), objects]
    result["host"] = failure(lambda: dist.all_reduce(torch.ones(1)))
    dist.destroy_process_group()
    return result


def main(file: str, *names: str) -> None:
    simulated_accelerator.activate(devices=2 if "two_devices" in names else 1, capacity_bytes=256 * MIB)
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = globals()[name]()
        except Exception:  # noqa: BLE001 (the test of this scenario shows it)
            results[name] = {"failed": traceback.format_exc()}
    Path(file).write_text(json.dumps(results))
    sys.stderr.flush()
    os._exit(0)  # a thread of gloo that outlives its group may ask for the interpreter's lock as it ends


if __name__ == "__main__":
    main(*sys.argv[1:])
