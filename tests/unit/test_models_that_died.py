"""Models whose estimate once failed: compiled submodules, batches that are objects, values that only a run
has. Each estimate is compared with the counting allocator's peak of a plain training loop."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import memfit
from memfit.model.batch_objects import batch_length, split
from memfit.planner.plan_space import plans, usable
from memfit.planner.request import job_facts
from memfit.runtime.counting_allocator import CountingAllocator, available
from memfit.techniques.registry import conflict, make_use, proposable
from memfit.trace.tracer import trace
from memfit.types.errors import UserError, first_line
from memfit.types.job import Job
from memfit.types.plan import Accuracy, Plan

counted = pytest.mark.skipif(available() is not None, reason=f"no counting allocator: {available()}")
Loss = Callable[[Any, Any], torch.Tensor]


def squares(model: Any, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()  # type: ignore[no-any-return]


def peak_bytes(build: Callable[[], nn.Module], batch: Any, loss: Loss, make: Any = torch.optim.AdamW) -> int:
    """Measured highest live bytes of three plain training steps."""
    counter = CountingAllocator()
    counter.install()
    gc.collect()
    before = counter.live_bytes()
    torch.manual_seed(0)
    model = build()
    held = copy.deepcopy(batch)  # the caller's batch existed before counting began
    optimizer = make(model.parameters())
    counter.reset_peak()
    for _ in range(3):
        loss(model, held).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return counter.peak_bytes() - before


def holds(
    build: Callable[[], nn.Module], batch: Any, loss: Loss = squares, make: Any = torch.optim.AdamW
) -> Any:
    """The estimate of a model in memory, whose interval must hold the truth."""
    torch.manual_seed(0)
    found = memfit.estimate(build(), batch, loss=loss, optimizer=make)
    truth, room = peak_bytes(build, batch, loss, make), found.allocated_bytes
    assert room.low <= truth <= room.high, f"{truth} not in {room.low:.0f} to {room.high:.0f}"
    return found


# -- compiled submodules --------------------------------------------------------------------------


class Compiled(nn.Module):
    """A layer whose product is TorchScript, as code generators make it."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.product = nn.Linear(64, 64), scripted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(self.outer(x))  # type: ignore[no-any-return]


class Pickled(Compiled):
    """Carries its TorchScript in pickles and copies as the bytes of its file."""

    def __getstate__(self) -> dict[str, Any]:
        file, state = io.BytesIO(), {**self.__dict__, "_modules": {"outer": self.outer}}
        torch.jit.save(self.product, file)
        return {**state, "product_file": file.getvalue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file = io.BytesIO(state.pop("product_file"))
        super().__setstate__(state)
        self.product = torch.jit.load(file)


def scripted() -> Any:
    layer = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return torch.jit.trace(layer, torch.zeros(2, 64), check_trace=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@counted
@pytest.mark.parametrize("kind", [Compiled, Pickled])
def test_a_torchscript_submodule_is_copied_and_left_as_it_was(kind: type[Compiled]) -> None:
    model, x = kind(), torch.rand(512, 64)
    before = pickle.dumps([p.tolist() for p in model.parameters()])
    memfit.estimate(model, x, loss=squares)
    assert all(p.grad is None for p in model.parameters())
    assert pickle.dumps([p.tolist() for p in model.parameters()]) == before
    found = holds(kind, x)
    assert sum(p.numel() for p in model.parameters()) * 4 <= found.by_category["parameter"]


# -- forces ---------------------------------------------------------------------------------------


class Forces(nn.Module):
    """Energies whose gradient by positions is trained too; building compares two constants."""

    def __init__(self) -> None:
        super().__init__()
        assert torch.equal(torch.eye(3), torch.eye(3)), "as libraries check their constants"
        self.layers = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        positions = positions.detach().requires_grad_()
        energy = self.layers(positions).sum()
        (forces,) = torch.autograd.grad(energy, positions, create_graph=True)
        return torch.cat([energy[None], forces.flatten()])


@counted
def test_the_interval_holds_a_step_with_forces_by_autograd_inside() -> None:
    holds(Forces, torch.rand(256, 3))
    assert memfit.estimate(Forces, torch.rand(256, 3), loss=squares).allocated_bytes.value > 0


# -- batches that are objects ---------------------------------------------------------------------


class Graphs:
    """A batch as in graph libraries: the tensors are in an inner store, and the batch counts graphs."""

    def __init__(self, sizes: list[int]) -> None:
        self.store = {"x": torch.rand(sum(sizes), 32), "batch": torch.repeat_interleave(torch.tensor(sizes))}
        self.sizes, self.parent = sizes, self

    num_graphs = property(lambda self: len(self.sizes))

    def to(self, device: str) -> Graphs:
        return self

    def __call__(self) -> None:
        raise AssertionError("a batch is no function that makes one")

    def to_data_list(self) -> list[torch.Tensor]:
        return list(self.store["x"].split(self.sizes))

    @classmethod
    def from_data_list(cls, graphs: list[torch.Tensor]) -> Graphs:
        made = cls([len(g) for g in graphs])
        made.store["x"] = torch.cat(graphs)
        return made


class Padded:
    """Images and their mask, without a method that splits them."""

    def __init__(self) -> None:
        self.tensors, self.mask = torch.rand(8, 32), torch.ones(8, dtype=torch.bool)

    def to(self, device: str) -> Padded:
        return self


class OnGraphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 4))

    def forward(self, graphs: Graphs) -> torch.Tensor:
        out = self.layers(graphs.store["x"])
        return out.new_zeros(graphs.num_graphs, 4).index_add(0, graphs.store["batch"], out)


@counted
def test_an_object_with_tensors_inside_is_a_batch() -> None:
    graphs = Graphs([30, 10, 20, 40])
    x = graphs.store["x"]
    found = holds(OnGraphs, graphs)
    assert found.job.batch_size == batch_length(graphs) == 4
    assert graphs.store["x"] is x
    assert type(x) is torch.Tensor
    assert batch_length({"images": Padded()}) == 8


def test_a_batch_of_graphs_is_split_into_graphs_and_other_objects_are_refused() -> None:
    parts = split(Graphs([30, 10, 20, 40]), 2)
    assert [part.sizes for part in parts] == [[30, 10], [20, 40]]
    plan = {"gradient-accumulation": {"micro_batches": 2}}
    whole, halves = (memfit.estimate(OnGraphs, Graphs([25] * 4), loss=squares, plan=p) for p in (None, plan))
    assert halves.allocated_bytes.value < whole.allocated_bytes.value
    with pytest.raises(UserError, match="Padded cannot be split into 2 parts, such as micro-batches;"):
        split(Padded(), 2)
    with pytest.raises(UserError, match="contains no tensor"):
        batch_length(object())


# -- values that only a run has -------------------------------------------------------------------


class Experts(nn.Module):
    """A mixture of experts, each called with the tokens that chose it."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(64, experts)
        layers = (nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)) for _ in range(experts))
        self.experts = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, which = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, which, None])
        return out


@counted
def test_experts_are_assumed_to_share_tokens_evenly_and_the_interval_allows_other_routes() -> None:
    holds(Experts, torch.rand(512, 64))  # with routes that are computed from the weights
    found = memfit.estimate(Experts, torch.rand(512, 64), loss=squares, probe=False)
    shares = [a for a in found.estimate.guesses if a.startswith("nonzero gave")]
    assert len(shares) >= 4
    assert all(200 < int(a.split()[2]) < 312 for a in shares)
    assert found.allocated_bytes.high > 1.05 * found.allocated_bytes.value  # all tokens to two experts
    assert "values at test_models_that_died.py" in found.estimate.guesses[-1]
    assert found.estimate == memfit.estimate(Experts, torch.rand(512, 64), loss=squares, probe=False).estimate


class Detector(nn.Module):
    """Matches queries with targets outside torch, as detection losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 4))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        boxes = self.layers(batch["x"])
        with torch.no_grad():
            costs = torch.cdist(boxes, batch["boxes"], p=1).cpu()
            pairs = [linear_sum_assignment(cost) for cost in costs]
            assert len(costs.tolist()) == len(pairs)
        found = zip(boxes, batch["boxes"], pairs, strict=True)
        picked = [b[torch.as_tensor(i)] - t[torch.as_tensor(j)] for b, t, (i, j) in found]
        return torch.cat(picked)


@counted
def test_a_matching_outside_torch_reads_assumed_values() -> None:
    batch = {"x": torch.rand(8, 100, 32), "boxes": torch.rand(8, 10, 4)}
    found = holds(Detector, batch, squares)
    assert any("numpy gave assumed values at test_models_that_died.py:" in a for a in found.estimate.guesses)


class Augmented(nn.Module):
    """Chooses one of several sizes at random, drops layers at random, and samples rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.sizes = (200, 300, 400)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[: self.sizes[torch.randint(0, len(self.sizes), (1,)).item()]]  # type: ignore[index]
        x = x[: self.sizes[int(torch.empty(1).uniform_(0, len(self.sizes)).item())]]
        for layer in self.layers:
            if torch.rand([]) >= 0.2:
                x = layer(x).tanh()
        order = torch.randperm(len(x))
        best = x.detach().square().sum(1).argmax()
        return x[order[:100]] + x[order[int(best)]] + x[torch.nonzero(order < 10)].sum()


@counted
def test_the_interval_holds_every_random_draw_and_the_random_state_is_restored() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = memfit.estimate(Augmented, torch.rand(500, 64, generator=torch.Generator()), loss=squares)
    room = found.allocated_bytes
    for seed in range(6):
        torch.manual_seed(seed)
        truth = peak_bytes(Augmented, torch.rand(500, 64), squares)
        assert room.low <= truth <= room.high
    assert room.high < 2 * room.value
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


class Dropping(nn.Module):
    """Drops one layer in fifty, as large speech and translation models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if torch.rand([]) >= 0.02:
                x = x + layer(x).tanh()
        return x


@counted
def test_layers_that_are_rarely_dropped_are_kept_in_the_expected_peak() -> None:
    batch = torch.rand(500, 64)
    found = holds(Dropping, batch)

    def kept(model: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in model.layers:
            x = x + layer(x).tanh()
        return x.square().mean()

    assert found.allocated_bytes.value == pytest.approx(peak_bytes(Dropping, batch, kept), rel=0.01)


# -- sparse gradients, impossible plans -----------------------------------------------------------


@counted
@pytest.mark.parametrize(("words", "width", "batch"), [(4000, 32, (32, 8)), (9000, 96, (64, 16))])
def test_the_interval_holds_training_with_sparse_gradients(
    words: int, width: int, batch: tuple[int, int]
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(words, width, sparse=True), nn.Flatten(1))

    tokens = torch.randint(0, words, batch, generator=torch.Generator().manual_seed(0))
    holds(build, tokens, squares, lambda params: torch.optim.SparseAdam(list(params)))


@counted
def test_sgd_with_sparse_gradients_takes_no_more_than_estimated() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(4000, 32, sparse=True), nn.Flatten(1))

    tokens = torch.randint(0, 4000, (32, 8), generator=torch.Generator().manual_seed(0))
    high_bytes = memfit.estimate(build(), tokens, loss=squares, optimizer="sgd").allocated_bytes.high
    assert high_bytes / 1.2 < peak_bytes(build, tokens, squares, torch.optim.SGD) <= high_bytes


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_adapters_recomputed_under_zero_3_are_refused_in_one_line() -> None:
    plan: dict[str, Any] = {"zero": {"stage": 3}, "lora": {}, "activation-checkpointing": {}}
    with pytest.raises(UserError, match="zero of stage 3 has freed the frozen weights of lora") as told:
        memfit.estimate(Blocks, torch.rand(8, 64), loss=squares, plan={"ranks": 2, "techniques": plan})
    assert "\n" not in str(told.value)


class NarrowBlocks(Blocks):
    """A base that is stored in bfloat16, beside which peft keeps adapters in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.to(torch.bfloat16)


@pytest.mark.parametrize("model", [Blocks, NarrowBlocks])
def test_float32_adapters_under_fsdp2_multiply_in_bfloat16_with_autocast(model: type[nn.Module]) -> None:
    def products(**techniques: dict[str, Any]) -> set[str]:
        uses = {"fsdp2": {}, "lora": {}} | {k.replace("_", "-"): v for k, v in techniques.items()}
        found = memfit.estimate(
            model, torch.rand(8, 64), loss=squares, plan={"ranks": 2, "techniques": uses}, probe=False
        )
        ops = trace(found.job, found.plan).ops
        return {o.dtype for o in ops if o.op in ("aten.mm.default", "aten.addmm.default")}

    assert "float32" in products()
    assert products(bf16_autocast={}) == products(fsdp2={"precision": "bf16"}) == {"bfloat16"}


def test_autocast_with_fsdp2_is_allowed_in_a_plan_but_never_searched() -> None:
    both = Plan(uses=(make_use("fsdp2", {}), make_use("bf16-autocast", {})), ranks=8)
    assert conflict(both) is None
    assert not proposable(both)
    job = Job(
        name="m", build_model=Blocks, make_batch=lambda *_: torch.rand(8, 64), loss=squares, batch_size=8
    )
    techniques, _ = usable(facts := job_facts(job, "cuda", 2), Accuracy.ROUNDING)
    searched = list(plans(facts, techniques))
    assert any(p.get("fsdp2") for p in searched)
    assert any(p.get("bf16-autocast") for p in searched)
    assert not any(p.get("fsdp2") and p.get("bf16-autocast") for p in searched)


class OnlyHere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise LookupError("no rule for this\nand more")


def test_errors_of_torch_are_reported_without_its_advice_on_debugging() -> None:
    fake = "Unexpected fake buffer _tensor_constant0"
    advice = "Enable TORCH_FAKE_TENSOR_DEBUG=1 to get creation stack traces on fake tensors."
    assert first_line(AssertionError(f"{fake} {advice}")) == fake
    logs = "To diagnose recompilation issues, set TORCH_LOGS=recompiles."
    assert first_line(RuntimeError(f"limit reached. {logs}")) == "limit reached"
    assert first_line(RuntimeError("TORCH_LOGS=x is wrong. Use y")) == "TORCH_LOGS=x is wrong. Use y"


def test_a_failure_on_fake_tensors_is_reported_with_its_first_line() -> None:
    with pytest.raises(
        UserError, match="fake tensors, which have shapes but no data: LookupError: no rule for this;"
    ):
        memfit.estimate(
            Blocks, torch.rand(8, 64), loss=lambda m, x: squares(lambda y: OnlyHere.apply(m(y)), x)
        )


# -- modules and tensors of other kinds ----------------------------------------------------------------------


def _layers() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_modules_that_torch_jit_traced_are_predicted_whole_and_as_parts() -> None:
    batch = torch.randn(128, 64)
    traced = torch.jit.trace(_layers(), torch.randn(2, 64))
    whole = memfit.estimate(traced, batch, machine="this:cpu").allocated_bytes
    scripted = memfit.estimate(torch.jit.script(_layers()), batch, machine="this:cpu").allocated_bytes
    assert whole == scripted
    part = nn.Sequential(torch.jit.trace(nn.Linear(64, 256), torch.randn(2, 64)), nn.Linear(256, 1))
    plain = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 1))
    peaks = [memfit.estimate(m, batch, machine="this:cpu").allocated_bytes.value for m in (part, plain)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


def _jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(5, 64), torch.randn(9, 64)], layout=torch.jagged)


def _of_jagged(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch[0]).values().square().mean()


def _makes_jagged(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    rows = torch.nested.nested_tensor([batch[:2], batch[2:]], layout=torch.jagged)
    return model(rows).values().square().mean()


def _of_sparse_inputs(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return torch.sparse.mm(batch.to_sparse(), model.weight).square().mean()


LINKS = torch.eye(50).to_sparse()


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("links", LINKS)
        self.inner = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.links @ self.inner(x)


@pytest.mark.parametrize(
    ("model", "batch", "loss", "message"),
    [
        (lambda: nn.Linear(64, 64), (_jagged(),), _of_jagged, "nested tensor"),
        (lambda: nn.Linear(64, 64), torch.randn(8, 64), _makes_jagged, "nested tensor"),
        (nn.Sequential(nn.LazyLinear(8)), torch.randn(8, 64), None, "lazy module"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d(affine=False)), torch.randn(8, 64), None, "lazy module"),
        (Graph(), torch.randn(50, 64), None, "sparse_coo tensor that it did not make by"),
        (Graph, torch.randn(50, 64), None, "sparse_coo tensor that it did not make by"),
        (
            nn.Linear(64, 64),
            torch.randn(8, 64),
            _of_sparse_inputs,
            "makes a sparse tensor by aten._to_sparse",
        ),
    ],
    ids=[
        "jagged batch",
        "jagged in the loss",
        "lazy",
        "lazy buffers",
        "sparse buffer",
        "built sparse buffer",
        "converted",
    ],
)
def test_tensors_that_cannot_be_traced_are_refused_in_one_line(
    model: Any, batch: Any, loss: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        memfit.estimate(model, batch, loss=loss, machine="this:cpu")
    assert "\n" not in str(caught.value)
    assert "allowed" in str(caught.value)


class PaddedByBuffers(nn.Module):
    """Padding from numbers in buffers, as in transformers' EncodecModel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 7, stride=2)
        self.register_buffer("stride", torch.tensor(2), persistent=False)
        self.register_buffer("padding", torch.tensor(7) - self.stride, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = torch.ceil((x.shape[-1] - 7 + self.padding) / self.stride + 1).to(torch.int64) - 1
        more = frames * self.stride + 7 - self.padding - x.shape[-1]
        return self.conv(nn.functional.pad(x, (self.padding, more)))


class LoopsOfABuffer(nn.Module):
    """As many passes as a buffer says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)
        self.register_buffer("loops", torch.tensor(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(int(self.loops)):
            x = self.inner(x).tanh()
        return x


@counted
@pytest.mark.parametrize("given", ["a model", "a function"])
@pytest.mark.parametrize("model", [PaddedByBuffers, LoopsOfABuffer])
def test_numbers_in_buffers_have_their_values(model: type[nn.Module], given: str) -> None:
    """A reported case: estimates of EncodecModel died, as every number in its buffers was taken for 1."""
    x = torch.randn(256, 4, 32)
    asked = memfit.estimate(model() if given == "a model" else model, x, loss=squares)
    assert asked.allocated_bytes.value == pytest.approx(peak_bytes(model, x, squares), rel=0.02)
