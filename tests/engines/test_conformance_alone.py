"""What the conformance check reports in one process: techniques not applied, and what it cannot observe."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import child_ranks
import pytest
import torch
from torch import nn

from memfit.api import conform
from memfit.conformance.autograd_graph import GraphProbe
from memfit.conformance.distributed_checks import offloaded_states
from memfit.conformance.monitor import Monitor
from memfit.conformance.registry import COVERED
from memfit.conformance.snapshot import update_kernels
from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.jobs.training_step import TrainingStep
from memfit.planner.recompute_budget import choose_tensors
from memfit.techniques.offload import SpooledTensor
from memfit.techniques.registry import TECHNIQUES, make_use
from memfit.types.conformance import NotConforming
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan

SIZE = GptSize(layers=3, width=64, heads=4, length=32, vocabulary=320, batch_size=4)


def _batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 320, (4, 33), generator=torch.Generator().manual_seed(1000 * seed + step))
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


JOB = Job(name="gpt", build_model=lambda: Gpt(SIZE), make_batch=_batch, loss=_loss, batch_size=4)


def _told(plan: Plan, job: Job = JOB) -> str:
    torch.manual_seed(0)
    return child_ranks.told(TrainingStep(job, plan), sum(p.numel() for p in Gpt(SIZE).parameters()))


def _plan(name: str, **settings: Any) -> Plan:
    return Plan(uses=(make_use(name, settings),))


PLANS = {
    "activation-offload": _plan("activation-offload", minimum_kib=4),
    "chunked-cross-entropy": _plan("chunked-cross-entropy"),
    "float8-linear": _plan("float8-linear"),
    "lora": _plan("lora"),
    "qlora": _plan("qlora"),
    "adamw-8bit": _plan("adamw-8bit"),
    "adamw-4bit": _plan("adamw-4bit"),
    "adamw-paged": _plan("adamw-paged"),
    "adamw-fused": _plan("adamw-fused"),
    "adafactor": _plan("adafactor"),
    "sgd": _plan("sgd"),
    "optimizer": _plan("optimizer", path="torch.optim:RAdam"),
    "optimizer-in-backward": _plan("optimizer-in-backward"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_technique_that_is_not_applied_is_reported(name: str) -> None:
    if missing := TECHNIQUES[name].missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    honest = _told(PLANS[name])
    assert honest.startswith("fine: as planned"), honest
    assert name in honest.partition("; not checked")[0]
    with mock.patch.object(TrainingStep, "carried", frozenset({name})):
        sabotaged = _told(PLANS[name])
    assert sabotaged.startswith("the plan was not applied"), sabotaged
    assert name in sabotaged


def test_offload_that_keeps_a_copy_in_memory_is_reported() -> None:
    """The hooks are active, but no tensor leaves memory."""
    with mock.patch("memfit.techniques.offload.SpooledTensor", lambda tensor, spool: Kept(tensor)):
        told = _told(PLANS["activation-offload"])
    assert "activation-offload: planned saved tensors of 4 KiB or more go to disk, found 0 offloaded" in told


class Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.copy = tensor.detach().clone().view(-1)

    def back(self) -> torch.Tensor:
        return self.copy


def test_host_offload_is_not_checked_if_the_step_runs_on_the_host() -> None:
    told = _told(_plan("activation-offload", to="host", minimum_kib=4))
    assert "as planned" in told
    assert "activation-offload: the step runs in host memory" in told.partition("not checked")[2]


def test_attention_maps_as_wide_as_the_vocabulary_are_not_taken_for_logits() -> None:
    """Length and vocabulary are equal, and attention keeps a number for every position of every head."""
    size = dataclasses.replace(SIZE, vocabulary=256, length=256)

    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 256, (4, 257), generator=torch.Generator().manual_seed(step))
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}

    job = Job(**{**_fields(JOB), "build_model": lambda: Gpt(size), "make_batch": batch})
    told = child_ranks.told(
        TrainingStep(job, PLANS["chunked-cross-entropy"]), sum(p.numel() for p in Gpt(size).parameters())
    )
    assert told.startswith("fine: as planned"), told


def test_logits_that_the_loss_computes_itself_are_reported() -> None:
    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(batch["input_ids"]).flatten(0, 1)
        return nn.functional.nll_loss(logits.log_softmax(-1), batch["labels"].flatten())

    told = _told(PLANS["chunked-cross-entropy"], Job(**{**_fields(JOB), "loss": loss}))
    assert "chunked-cross-entropy: planned no logits of 320 classes kept for backward, found 128 rows" in told


def _fields(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in ("name", "build_model", "make_batch", "loss", "batch_size")}


def test_adamw_single_that_runs_as_foreach_is_reported() -> None:
    plan = _plan("adamw-single")
    assert "fine: as planned" in _told(plan)
    step = TrainingStep(JOB, plan)
    step.optimizer.param_groups[0]["foreach"] = True  # type: ignore[attr-defined]
    told = child_ranks.told(step, 0)
    assert "adamw-single: planned a single update, found foreach" in told


def test_qlora_with_unquantised_weights_is_reported() -> None:
    if TECHNIQUES["qlora"].missing:
        pytest.skip("peft and bitsandbytes are not installed")
    with mock.patch("memfit.techniques.nf4.Nf4Linear", lambda linear: linear):
        assert "qlora: frozen weights: planned in 4 bits" in _told(PLANS["qlora"])


def test_tensors_that_are_not_recomputed_are_reported() -> None:
    plan = choose_tensors(JOB, _plan("optimal-checkpointing", budget_mib=4))
    assert plan.uses[0].settings["dropped"] != "none"
    assert "optimal-checkpointing" in _told(plan).partition("not checked")[0]
    with mock.patch("memfit.techniques.recompute.optimal._without", return_value=contextlib.nullcontext()):
        assert "optimal-checkpointing: planned tensors that backward recomputes, found 0" in _told(plan)


@pytest.fixture
def quick_compiler() -> Any:
    """torch's own graphs without the C++ compiler."""
    quick = functools.partial(torch.compile, backend="aot_eager")
    with mock.patch.object(torch, "compile", quick):
        yield
    torch._dynamo.reset()


def _never() -> Any:
    return mock.patch.object(torch, "compile", lambda forward: forward)


def _first_only() -> Any:
    compiled: list[Any] = []
    plain = torch.compile

    def once(forward: Any) -> Any:
        if compiled:
            return forward
        compiled.append(forward)
        return plain(forward)

    return mock.patch.object(torch, "compile", once)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, on loading its compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler reads it and hides the warning
@pytest.mark.parametrize(
    ("scope", "sabotage", "found"),
    [
        ("blocks", _never, "blocks 0, 1, 2 compiled, found none"),
        ("blocks", _first_only, "blocks 0, 1, 2 compiled, found 0"),
        ("blocks", lambda: torch.compiler.set_stance("force_eager"), "found none"),
        ("model", _never, "the whole model compiled, found none"),
    ],
)
def test_blocks_or_models_that_are_not_compiled_are_reported(
    scope: str, sabotage: Callable[[], Any], found: str, quick_compiler: None
) -> None:
    plan = _plan("compile", scope=scope)
    honest = _told(plan)
    assert honest.startswith("fine: as planned"), honest
    assert "compile" in honest.partition("; not checked")[0]
    with sabotage():
        told = _told(plan)
    assert "compile: planned" in told, told
    assert found in told


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_blocks_of_torch_classes_are_recognised(quick_compiler: None) -> None:
    def build() -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)]
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*blocks))

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"]).square().mean()  # type: ignore[no-any-return]

    own = Job(
        name="own", build_model=build, make_batch=lambda *_: {"x": torch.ones(4, 8)}, loss=loss, batch_size=4
    )
    told = _told(_plan("compile"), own)
    assert told.startswith("fine: as planned"), told
    assert "compile" in told.partition("; not checked")[0]


def test_every_technique_but_chunking_is_checked() -> None:
    assert set(TECHNIQUES) >= COVERED
    assert set(TECHNIQUES) - COVERED == {"chunking"}


def test_reading_the_autograd_graph_restores_torch_functions() -> None:
    model = nn.Linear(4, 4)
    plain = torch.autograd.backward
    with GraphProbe(model) as graph:
        model(torch.ones(2, 4)).square().sum().backward()
    assert (graph.backwards, graph.offloaded) == (1, 0)
    assert torch.autograd.backward is plain


def _on_a_device(around: Any) -> None:
    """A step on torch's meta device, which like an accelerator is not the host's memory."""
    model = nn.Sequential(nn.Linear(64, 64, device="meta"), nn.Tanh(), nn.Linear(64, 64, device="meta"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        with around:
            loss = model(torch.ones(64, 64, device="meta")).square().sum()
        loss.backward()
        optimizer.step()

    plan = {"activation-offload": {"to": "host", "minimum_kib": 1}}
    assert "activation-offload" in conform(model, optimizer, plan, step=step).checked


def test_host_offload_from_an_accelerator_is_checked() -> None:
    hooks = torch.autograd.graph.saved_tensors_hooks
    _on_a_device(hooks(lambda t: torch.zeros(t.shape), lambda t: t.to("meta")))
    with pytest.raises(NotConforming, match=r"go to host, found 0 offloaded, [1-9]\d* not offloaded"):
        _on_a_device(hooks(lambda t: (t,), lambda t: t[0]))


@pytest.mark.parametrize("planned", ["none", "optimizer", "parameters"])
@pytest.mark.parametrize("found", ["none", "optimizer", "parameters"])
def test_devices_of_parameters_and_states_show_whether_they_are_offloaded(planned: str, found: str) -> None:
    model = nn.Linear(64, 64, bias=False, device="cpu" if found == "parameters" else "meta")
    state = torch.zeros(64, 64, device="meta" if found == "none" else "cpu")
    optimizer = SimpleNamespace(state={model.weight: {"exp_avg": state}}, step=lambda: None)
    stage = 1 if planned != "parameters" else 3
    plan = _plan("zero", stage=stage, offload=planned, persist_elements=1)
    watch = Monitor(model, optimizer, plan)
    watch.graph.device = "meta"
    findings = list(offloaded_states(plan, watch.observe()))
    assert [f.wrong for f in findings] == [planned != found]


def test_disk_offload_by_user_hooks_conforms_and_save_on_cpu_is_reported() -> None:
    """`save_on_cpu` keeps its copies in the memory where this process computes."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = {"activation-offload": {"to": "disk", "minimum_kib": 1}}

    def step(around: Any) -> None:
        with around:
            loss = model(torch.ones(64, 64)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.raises(NotConforming, match=r"activation-offload: planned .* found 0 offloaded"):
        conform(model, optimizer, plan, step=lambda: step(torch.autograd.graph.save_on_cpu()))
    numpy_copies = torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy)
    assert not conform(model, optimizer, plan, step=lambda: step(numpy_copies)).differences


def _contrastive(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():  # an unrelated forward pass in between
        model(batch["input_ids"].flip(0))
    one, other = model(batch["input_ids"]), model(batch["input_ids"].flip(1))
    return _loss(lambda _: one, batch) + (one.mean() - other.mean()).square()


@pytest.mark.parametrize(
    "plan", [Plan(), _plan("gradient-accumulation", micro_batches=2), _plan("activation-checkpointing")]
)
def test_a_loss_that_calls_the_model_several_times_conforms(plan: Plan) -> None:
    told = _told(plan, Job(**{**_fields(JOB), "loss": _contrastive}))
    assert told.startswith("fine: as planned"), told


@pytest.mark.parametrize("updates", [1, 3])
def test_an_optimizer_that_evaluates_a_step_several_times_conforms(updates: int) -> None:
    model = Gpt(SIZE)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=updates)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _loss(model, _batch(0, 0))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    assert conform(model, optimizer, {}, step=lambda: optimizer.step(closure)).checked


class _Wide(nn.Module):
    """A block whose norm the model itself keeps in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.norm(x.float())
        return self.inner(x.to(self.inner.weight.dtype))


@pytest.mark.parametrize("name", ["bf16-autocast", "bf16-parameters"])
@pytest.mark.parametrize("off", [False, True])
def test_layers_that_the_model_keeps_in_float32_do_not_affect_the_precision_check(
    name: str, off: bool
) -> None:
    model = nn.Sequential(*(_Wide(64) for _ in range(3)))
    if name == "bf16-parameters" and not off:
        model.to(torch.bfloat16)
        for block in model:
            block.norm.float()  # type: ignore[union-attr,operator]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16-autocast" and not off):
            loss = model(torch.randn(4, 64)).float().square().mean()
        loss.backward()
        optimizer.step()

    told = pytest.raises(NotConforming, match=name) if off else contextlib.nullcontext()
    with told:
        conform(model, optimizer, {name: {}}, step=step)


@pytest.mark.parametrize("name", ["activation-offload", "chunked-cross-entropy"])
def test_techniques_are_not_checked_if_torch_hides_saved_tensors(name: str) -> None:
    with mock.patch("memfit.conformance.autograd_graph._raw", return_value=[object()]):
        told = _told(PLANS[name])
    assert told.startswith("fine: as planned")
    assert name in told.partition("; not checked")[2]


@pytest.mark.parametrize(
    "plan", [{"fsdp2": {}}, "ddp", "fsdp2: {}", {"techniques": {"context-parallel": {}}}], ids=str
)
def test_a_plan_for_several_ranks_in_one_process_is_reported(plan: Any) -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    with pytest.raises(NotConforming, match=r"ranks: planned several, for .*, found a world size of 1"):
        conform(model, torch.optim.SGD(model.parameters()), plan)
    alone = {"ranks": 1, "techniques": {"fsdp2": {}}}
    assert "ranks" in conform(model, torch.optim.SGD(model.parameters()), alone).checked


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"step": 5}, "the argument step is not a function: 5; allowed: a function without arguments"),
        ({"step": lambda batch: batch}, "step cannot be called without arguments: missing .*'batch'"),
        ({"model": [1]}, "the argument model is a list; allowed: a torch.nn.Module"),
        ({"optimizer": "adamw"}, "the argument optimizer is or contains a str"),
        ({"model": nn.LazyLinear(4)}, "the model has a lazy module"),
        ({"clip": "1"}, "the argument clip is not a gradient norm: '1'"),
    ],
)
def test_invalid_arguments_of_conform_are_user_errors(changed: dict[str, Any], told: str) -> None:
    model = nn.Linear(8, 8)
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "plan": {}, **changed}
    with pytest.raises(UserError, match=told):
        conform(**given)


@pytest.mark.parametrize("keeps", [lambda i: i % 2, lambda i: i % 3], ids=["half", "two thirds"])
def test_offload_that_keeps_part_of_the_tensors_is_reported(keeps: Callable[[int], int]) -> None:
    count = iter(range(1000))

    def some(tensor: torch.Tensor, spool: Any) -> Any:
        return Kept(tensor) if keeps(next(count)) else SpooledTensor(tensor, spool)

    with mock.patch("memfit.techniques.offload.SpooledTensor", some):
        told = _told(PLANS["activation-offload"])
    assert "activation-offload: planned saved tensors of 4 KiB or more go to disk, found" in told


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_offload_of_only_half_of_the_parameters_is_reported(share: float) -> None:
    """FSDP2 on an accelerator, which torch's meta device stands for."""
    count = int(8 * share)
    model = nn.Sequential(
        *[nn.Linear(64, 64, bias=False, device="cpu" if i < count else "meta") for i in range(8)]
    )
    state = {p: {"exp_avg": torch.zeros(64, 64)} for p in model.parameters()}
    plan = _plan("fsdp2", offload=True)
    watch = Monitor(model, SimpleNamespace(state=state, step=lambda: None), plan)
    watch.graph.device = "meta"
    findings = list(offloaded_states(plan, watch.observe()))
    assert [f.wrong for f in findings] == [share < 1]


def test_an_error_while_listening_begins_leaves_nothing_patched() -> None:
    model, backward = nn.Linear(8, 8), torch.autograd.backward
    monitor = Monitor(model, torch.optim.SGD(model.parameters()), Plan())
    with (
        mock.patch.object(monitor.weights, "_prepared", None),
        pytest.raises(AttributeError),
        monitor,
    ):
        raise AssertionError("the weights cannot be read")
    assert torch.autograd.backward is backward


def test_the_kernels_of_several_optimizers_are_read_from_a_list_or_a_mapping() -> None:
    param = nn.Parameter(torch.ones(2, 2))
    optimizers = [torch.optim.AdamW([param], fused=True), torch.optim.AdamW([param], foreach=True)]
    for several in (optimizers, dict(enumerate(optimizers))):
        assert update_kernels(SimpleNamespace(optimizers=several)) == {"fused", "foreach"}
