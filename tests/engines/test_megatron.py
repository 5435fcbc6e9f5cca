"""Megatron-core: losses of one process, memory to the byte, and its trainer's arguments."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from memfit.cost.memory import memory_profile
from memfit.engines.megatron import CONFIG, ENGINE, arguments, parse
from memfit.engines.megatron.gpt import check_cut, read, sizes
from memfit.engines.registry import ready_engine, render
from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.runtime.child_process import run
from memfit.runtime.ranks import run_ranks
from memfit.techniques.registry import make_use
from memfit.trace.tracer import trace, use_step
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.launch import RunSpec
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.result import Measurement, OutcomeKind
from memfit.types.trace import Category
from memfit.worker.train import step_maker

pytestmark = pytest.mark.usefixtures("forked_workers")
installed = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)

SIZE = GptSize(layers=2, width=96, heads=4, length=48, vocabulary=321, batch_size=4)
STEPS = 20


def _build(tied: bool) -> Gpt:
    model = Gpt(SIZE)
    if tied:
        model.head.weight = model.embed.weight
    return model


def _batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    shape = (SIZE.batch_size, SIZE.length + 1)
    tokens = torch.randint(0, SIZE.vocabulary, shape, generator=torch.Generator().manual_seed(step))
    return {"tokens": tokens[:, :-1].contiguous(), "next": tokens[:, 1:].contiguous()}


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["next"].flatten())


def _job(tied: bool) -> Job:
    return Job(
        name="gpt",
        build_model=lambda: _build(tied),
        make_batch=_batch,
        loss=_loss,
        batch_size=4,
        loss_terms=lambda part: int(part["next"].numel()),
        blocks="blocks",
        head="head",
    )


gpt, tied = _job(tied=False), _job(tied=True)


def _plan(ranks: int, **uses: dict[str, Any]) -> Plan:
    return Plan(ranks=ranks, uses=tuple(make_use(n.replace("_", "-"), k) for n, k in uses.items()))


def _spec(plan: Plan, attribute: str = "gpt", **more: Any) -> RunSpec:
    return RunSpec(
        name="x",
        role="run",
        job=JobRef(spec=f"{__file__}:{attribute}"),
        plan=plan,
        seed=0,
        steps=STEPS,
        threads=1,
        evaluate=False,
        **more,
    )


@functools.cache
def _trained(plan: Plan, attribute: str, engine: str = "megatron") -> tuple[Measurement, ...]:
    config = render(_spec(plan, attribute, engine=engine))
    ranks = run_ranks(config) if plan.ranks > 1 else (run(config, on_event=lambda event: None),)
    assert [r.outcome for r in ranks] == [OutcomeKind.OK] * plan.ranks, ranks[0].reason
    return ranks


_TENSOR = {"vocabulary": "gathered"}
PLANS = {
    "tensor": (_plan(2, tensor_parallel=_TENSOR), "gpt"),
    "sequence": (
        _plan(2, tensor_parallel={**_TENSOR, "sequence": True}, activation_checkpointing={}),
        "tied",
    ),
    "data": (
        _plan(2, ddp={"bucket_mib": 1, "sync": "last"}, gradient_accumulation={"micro_batches": 2}),
        "gpt",
    ),
    "alone": (_plan(1), "gpt"),
}


@pytest.mark.quick_cases("tensor", "data")
@installed
@pytest.mark.parametrize("name", PLANS)
def test_losses_match_one_process_and_memory_matches_the_prediction(name: str) -> None:
    plan, attribute = PLANS[name]
    reference = _trained(_plan(1), attribute, "native")[0]
    ranks = _trained(plan, attribute)
    losses = [statistics.fmean(parts) for parts in zip(*(r.losses for r in ranks), strict=True)]
    assert losses == pytest.approx(reference.losses, rel=1e-6)
    assert ranks[0].grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
    with use_step(step_maker("megatron", None)):
        for rank, measured in enumerate(ranks):
            traced = trace(globals()[attribute], plan, rank=rank)
            found = memory_profile(traced, Calibration())
            assert measured.peak_bytes == pytest.approx(found.peak_bytes, rel=2e-3)


@installed
def test_the_gradient_buffer_of_megatron_changes_the_predicted_peak() -> None:
    plan = _plan(1)
    native = memory_profile(trace(gpt, plan), Calibration())
    with use_step(step_maker("megatron", None)):
        own = memory_profile(trace(gpt, plan), Calibration())
    assert own.peak_bytes != native.peak_bytes  # its buffer of all gradients is never freed


@installed
def test_on_a_gpu_the_gradient_buffer_is_as_large_as_the_parameters() -> None:
    with use_step(step_maker("megatron", None)):
        traced = trace(gpt, _plan(2, tensor_parallel=_TENSOR), device="cuda")
    kept = dict.fromkeys((Category.PARAMETER, Category.GRADIENT), 0)
    for made in traced.allocations:
        if made.end is None and made.category in kept:
            kept[made.category] += made.requested_bytes
    assert kept[Category.GRADIENT] == pytest.approx(kept[Category.PARAMETER], rel=0.01)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (_plan(2, tensor_parallel={}), "vocabulary must be 'gathered'"),
        (_plan(1, activation_checkpointing={"every": 2}), "every must be 1"),
        (_plan(2, zero={"stage": 3}), "stage must be 1"),
        (_plan(2, fsdp2={}), "replicas must be all"),
        (_plan(2, ddp={}, gradient_accumulation={"micro_batches": 2}), "sync must be 'last'"),
        (_plan(1, bf16_autocast={}), "bf16-autocast is not supported by megatron"),
    ],
)
def test_an_unsupported_plan_is_refused_with_the_reason(plan: Plan, why: str) -> None:
    assert why in "; ".join(ENGINE.refusals(plan))


@pytest.mark.parametrize("plan", [_plan(2, pipeline={}), _plan(2, zero={"stage": 1})])
def test_a_plan_that_requires_cuda_is_not_run_without_it(plan: Plan) -> None:
    assert ENGINE.refusals(plan) == ()
    with pytest.raises(UserError, match="requires CUDA"):
        ready_engine("megatron", plan)


def _eps(model: Gpt) -> None:
    model.norm.eps = 1e-6


def _frozen(model: Gpt) -> None:
    model.embed.weight.requires_grad = False


def _adapter(model: Gpt) -> None:
    model.blocks[1].widen = nn.Sequential(nn.Linear(96, 384))


@pytest.mark.parametrize(
    ("change", "what"),
    [(_eps, "different eps"), (_frozen, "frozen"), (_adapter, r"blocks\.1\.widen, a Sequential")],
)
def test_a_model_that_megatron_cannot_express_is_refused_with_the_difference(
    change: Callable[[Gpt], None], what: str
) -> None:
    model = Gpt(SIZE)
    change(model)
    with pytest.raises(UserError, match=what):
        read(model)


def test_heads_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(UserError, match="number of heads of 4 evenly over 3 tensor-parallel ranks"):
        check_cut(read(Gpt(SIZE)), 3)


@installed
@pytest.mark.parametrize(
    ("name", "line", "instead"),
    [
        ("tensor", "--tensor-model-parallel-size 2\n", "--tensor-model-parallel-size 1\n"),
        ("sequence", "--sequence-parallel\n", ""),
    ],
)
def test_tensor_parallelism_that_is_not_applied_is_reported(name: str, line: str, instead: str) -> None:
    plan, attribute = PLANS[name]
    launch = render(_spec(plan, attribute, engine="megatron"))
    text = launch.files[CONFIG]
    assert line in text
    whole = text.replace(line, instead)
    ranks = run_ranks(dataclasses.replace(launch, files={**launch.files, CONFIG: whole}))
    assert all(r.outcome is OutcomeKind.FAILED and "tensor-parallel" in r.reason for r in ranks), ranks[
        0
    ].reason


def test_a_model_of_another_class_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="the job's model, which is a Linear"):
        read(nn.Linear(2, 2))


# --- the trainer's arguments


def _arguments(plan: Plan, **more: Any) -> dict[str, str]:
    given = sizes(read(Gpt(dataclasses.replace(SIZE, layers=8))))
    spec = _spec(plan, engine="megatron", sizes=given, batch_size=64, **more)
    text = render(spec).files[CONFIG]
    assert parse(text) == arguments(spec)
    return parse(text)


RENDERED = {
    "tensor and sequence": (
        _plan(2, tensor_parallel={**_TENSOR, "sequence": True}, activation_checkpointing={}),
        {
            "tensor-model-parallel-size": "2",
            "sequence-parallel": "",
            "recompute-granularity": "full",
            "recompute-method": "uniform",
            "micro-batch-size": "64",
            "num-layers": "8",
        },
    ),
    "interleaved": (
        _plan(4, pipeline={"stages": 2, "schedule": "interleaved", "virtual": 2, "micro_batches": 8}, ddp={}),
        {
            "pipeline-model-parallel-size": "2",
            "num-layers-per-virtual-pipeline-stage": "2",
            "micro-batch-size": "4",
            "global-batch-size": "64",
            "overlap-grad-reduce": "",
            "ddp-bucket-size": str(25 * 2**18),
        },
    ),
    "distributed optimizer": (
        _plan(4, zero={"stage": 1, "precision": "bf16"}, gradient_accumulation={"micro_batches": 4}),
        {"use-distributed-optimizer": "", "bf16": "", "micro-batch-size": "4"},
    ),
    "context": (_plan(2, context_parallel={"degree": 2}), {"context-parallel-size": "2"}),
}


@pytest.mark.parametrize("name", RENDERED)
def test_the_trainer_arguments_follow_the_plan(name: str) -> None:
    plan, wanted = RENDERED[name]
    assert ENGINE.refusals(plan) == ()
    assert wanted.items() <= _arguments(plan).items()


# The trainer's parser reads them in test_megatron_parser.py; these are
# the configurations of the package that its options become.
_DDP = {
    "overlap-grad-reduce": "overlap_grad_reduce",
    "ddp-bucket-size": "bucket_size",
    "use-distributed-optimizer": "use_distributed_optimizer",
}
_TRAINERS_OWN = {
    "seq-length",
    "max-position-embeddings",
    "vocab-size",
    "position-embedding-type",
    "micro-batch-size",
    "global-batch-size",
    "optimizer",
    "train-iters",
    "seed",
    "clip-grad",
    "make-vocab-size-divisible-by",
    "untie-embeddings-and-output-weights",
}
_OTHERWISE = {
    "norm-epsilon": "layernorm_epsilon",
    "no-bias-gelu-fusion": "bias_activation_fusion",
    "disable-bias-linear": "add_bias_linear",
    "num-layers-per-virtual-pipeline-stage": "virtual_pipeline_model_parallel_size",
}


@installed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RENDERED)
def test_every_argument_is_a_field_of_the_megatron_configurations(name: str) -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {f.name for f in dataclasses.fields(TransformerConfig)}
    data_parallel = {f.name for f in dataclasses.fields(DistributedDataParallelConfig)}
    for option in _arguments(RENDERED[name][0]):
        if option in _DDP:
            assert _DDP[option] in data_parallel
        elif option not in _TRAINERS_OWN:
            assert _OTHERWISE.get(option, option.replace("-", "_")) in fields, option
