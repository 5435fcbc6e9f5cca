"""DeepSpeed: losses of one process, memory as predicted, and its JSON read by its own parser.

The file is also the program that each rank runs, as importing DeepSpeed takes longer than the training.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from child_ranks import leave, run_children, run_script
from torch import nn
from torch.nn import functional

from memfit.cost.memory import memory_profile
from memfit.engines.deepspeed import CONFIG, ENGINE
from memfit.engines.registry import render
from memfit.jobs.training_step import TrainingStep
from memfit.lint.check import check
from memfit.lint.parse import read
from memfit.runtime.counting_allocator import CountingAllocator, available
from memfit.runtime.gloo import gloo_first
from memfit.techniques.rank_mesh import make_world
from memfit.techniques.registry import make_use
from memfit.trace.tracer import trace
from memfit.types.job import Job, JobRef
from memfit.types.launch import RunSpec
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.trace import Phase
from memfit.worker.train import join_world, step_maker

installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
STEPS, LOSS_RATIO, PEAK_RATIO, LEFT_RATIO = 20, 1e-5, 0.02, 0.05


class Net(nn.Module):
    """Some parameters above what stays whole, some below; one layer reads another's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(37, 130)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(130, 261), nn.SiLU(), nn.Linear(261, 130)) for _ in range(3)]
        )
        self.mix = nn.MultiheadAttention(130, 2, batch_first=True)
        self.head = nn.Linear(130, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x + self.mix(x, x, x, need_weights=False)[0])


def _batch(step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randn(8, 5, 37, generator=generator), torch.randn(8, 5, 8, generator=generator)


JOB = Job(
    name="net",
    build_model=Net,
    make_batch=_batch,
    batch_size=8,
    blocks="blocks",
    loss=lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]),
)
SMALL = {"reduce_bucket_elements": 40_000}
WINDOW = {**SMALL, "persist_elements": 500, "live_elements": 50_000, "prefetch_elements": 35_000}


def _plan(ranks: int = 2, **uses: dict[str, Any]) -> Plan:
    return Plan(ranks=ranks, uses=tuple(make_use(k.replace("_", "-"), v) for k, v in uses.items()))


PARTS = {"micro_batches": 2}
PLANS = {
    "stage 0": _plan(ddp={}),
    "stage 1, overlap, parts": _plan(
        zero={"stage": 1, "overlap": True, **SMALL}, gradient_accumulation=PARTS
    ),
    "stage 2": _plan(zero={"stage": 2, **SMALL}, activation_checkpointing={}),
    "stage 2, offload, parts": _plan(
        zero={"stage": 2, "offload": "optimizer", **SMALL}, gradient_accumulation=PARTS
    ),
    "stage 2, defaults": _plan(zero={}),
    "stage 3, parts": _plan(zero={"stage": 3, **WINDOW}, gradient_accumulation=PARTS),
    "stage 3, offload, bf16": _plan(
        zero={"stage": 3, "precision": "bf16", "offload": "parameters", **WINDOW},
        activation_checkpointing={},
    ),
}
ALONE = {f"stage {stage}": _plan(1, zero={"stage": stage, **WINDOW}) for stage in (1, 2, 3)}


def _spec(plan: Plan) -> RunSpec:
    return RunSpec(
        name="x",
        role="run",
        job=JobRef(spec=f"{__file__}:JOB"),
        plan=plan,
        engine="deepspeed",
        seed=0,
        steps=STEPS,
        threads=1,
        evaluate=False,
        batch_size=8,
    )


# -- the program ----------------------------------------------------------------------------------------


def _rank(folder: Path, ranks: int, target: Path) -> None:
    torch.set_num_threads(1)
    counter = CountingAllocator()
    counter.install()
    plans = PLANS if ranks > 1 else ALONE
    with _joined(ranks) as rank, gloo_first(patient=True) as settle:  # one rank has a group too
        found: dict[str, Any] = {}
        for name, plan in plans.items():
            (folder / f"{name}-{rank}").mkdir()
            for file, text in render(_spec(plan)).files.items():
                (folder / f"{name}-{rank}" / file).write_text(text)
            kind = step_maker("deepspeed", folder / f"{name}-{rank}")
            if not found:
                _train(kind, plan, rank, counter, settle, 1)  # starts threads and fills caches of kernels
            found[name] = _train(kind, plan, rank, counter, settle, STEPS)
    target.write_text(json.dumps(found))


@contextlib.contextmanager
def _joined(ranks: int) -> Iterator[int]:
    if ranks == 1:
        yield 0
        return
    with join_world(_plan(ranks, ddp={})):
        yield torch.distributed.get_rank()


def _train(
    kind: Any, plan: Plan, rank: int, counter: CountingAllocator, settle: Any, steps: int
) -> dict[str, Any]:
    gc.collect()  # frees the previous engine
    base, losses, peaks = counter.live_bytes(), [], {str(p): 0 for p in Phase}
    phase = str(Phase.SETUP)

    def turn(new: Phase | str) -> None:
        nonlocal phase
        peaks[phase] = max(peaks.get(phase, 0), counter.peak_bytes() - base)
        phase = str(new)
        counter.reset_peak()

    torch.manual_seed(0)
    counter.reset_peak()
    step = kind(JOB, plan, world=make_world(plan, rank=rank, device="cpu"))
    settle()
    for index in range(steps):
        part, terms = step.local(JOB.make_batch(index, 0))
        turn("between")
        losses.append(float(step.run(part, turn, terms_per_rank=terms)[0]))
        turn("between")
    step.close()
    return {"losses": losses, "peaks": peaks}


# -- the tests -----------------------------------------------------------------------------------

Found = list[dict[str, Any]]


def _ran(folder: Path, ranks: int) -> Found:
    run_children(
        __file__,
        [[folder, str(ranks), folder / f"{rank}.json"] for rank in range(ranks)],
        env=ENGINE.variables("cpu"),
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    if (why := available()) is not None:
        pytest.skip(f"no counting allocator: {why}")
    return _ran(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    if (why := available()) is not None:
        pytest.skip(f"no counting allocator: {why}")
    return _ran(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def reference() -> list[float]:
    return _losses(Plan())


def _losses(plan: Plan) -> list[float]:
    torch.manual_seed(0)
    step = TrainingStep(JOB, plan)
    try:
        return [float(step.run(JOB.make_batch(index, 0))[0]) for index in range(STEPS)]
    finally:
        step.close()


@installed
@pytest.mark.parametrize("name", PLANS)
def test_two_ranks_have_the_losses_of_one_process(name: str, two: Found, reference: list[float]) -> None:
    losses = [statistics.fmean(parts) for parts in zip(*(of[name]["losses"] for of in two), strict=True)]
    assert losses == pytest.approx(reference, rel=LOSS_RATIO if "bf16" not in name else 2e-2)


@installed
@pytest.mark.parametrize("name", ALONE)
def test_on_one_rank_losses_are_bitwise_equal(name: str, alone: Found, reference: list[float]) -> None:
    """Stage 3 passes attention three tensors instead of one, which then computes three products, and its
    linear layer adds the bias separately: the losses equal those of memfit's zero. Without such attention and
    with torch's linear layer they equal those of plain training (benchmarks/engines.md)."""
    if name == "stage 3":
        assert alone[0][name]["losses"] == pytest.approx(reference, rel=1e-6)
        reference = _losses(ALONE[name])
    assert alone[0][name]["losses"] == reference


@installed
@pytest.mark.parametrize("name", [*PLANS, *(f"{name}, alone" for name in ALONE)])
def test_measured_memory_is_the_predicted_memory(name: str, two: Found, alone: Found) -> None:
    """The peak, and the peak without buckets of fixed size."""
    short = name.removesuffix(", alone")
    plan, ranks = (PLANS[name], two) if name in PLANS else (ALONE[short], alone)
    plan = ENGINE.predicted(plan)
    fixed_bytes = _buckets_bytes(plan)
    for rank, of_rank in enumerate(ranks):
        profile = memory_profile(trace(JOB, plan, rank=rank), Calibration())
        expected = profile.phase_peak_bytes
        measured = {p: v for p, v in of_rank[short]["peaks"].items() if p != "between"}
        assert max(measured.values()) == pytest.approx(profile.peak_bytes, rel=PEAK_RATIO)
        for phase in (Phase.BACKWARD, Phase.OPTIMIZER):
            assert measured[phase] == pytest.approx(expected[phase], rel=PEAK_RATIO)
        left = max(measured.values()) - fixed_bytes
        assert left == pytest.approx(profile.peak_bytes - fixed_bytes, rel=LEFT_RATIO)


def _buckets_bytes(plan: Plan) -> int:
    """Bytes of the buckets that are part of the peak: always in stage 3, otherwise only large ones."""
    used = plan.get("zero")
    assert used is not None
    stage, width = int(used.settings["stage"]), 2 if used.settings["precision"] == "bf16" else 4
    in_the_way = stage == 3 or int(used.settings["reduce_bucket_elements"]) > 10_000_000
    return int(used.settings["reduce_bucket_elements"]) * width if in_the_way else 0


# What DeepSpeed makes of configurations: python THIS CONFIGURATIONS ANSWERS, both JSON objects by test.
_OF_DEEPSPEED = """
import json, sys
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
from memfit.engines.deepspeed.step import import_deepspeed
from memfit.techniques.rank_mesh import join_alone

def settings(config):
    c = DeepSpeedConfig(config)
    z = c.zero_config
    device = lambda o: str(o.device) if o is not None else "none"
    return {
        "stage": int(z.stage), "bucket": z.reduce_bucket_size, "overlap": z.overlap_comm,
        "optimizer": device(z.offload_optimizer), "parameters": device(z.offload_param),
        "prefetch": z.prefetch_bucket_size, "persist": z.param_persistence_threshold,
        "live": z.max_live_parameters, "reuse": z.max_reuse_distance, "bf16": c.bfloat16_config.enabled,
        "parts": c.gradient_accumulation_steps, "batch": c.train_micro_batch_size_per_gpu,
        "clip": c.gradient_clipping, "untested": c.zero_allow_untested_optimizer,
    }

def nvme(config):
    c = DeepSpeedZeroOffloadOptimizerConfig(**config["zero_optimization"]["offload_optimizer"])
    return [str(c.device), c.buffer_count, c.pipeline, str(c.nvme_path)]

def recomputed(config):
    deepspeed, found = import_deepspeed("cpu"), []
    join_alone("cpu")
    asked = {"partition_activations": True, "number_checkpoints": 2}
    for section in ({}, {"activation_checkpointing": asked}):
        calls, model = [], torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        model[0].register_forward_pre_hook(lambda *_: calls.append(1))
        optimizer = torch.optim.AdamW(model.parameters())
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config | section)[0]
        engine.backward(engine(torch.ones(4, 4)).sum())
        read = engine._config.activation_checkpointing_config.partition_activations
        found.append([read, len(calls), deepspeed.checkpointing.is_configured()])
    return found

asked = json.load(open(sys.argv[1]))
json.dump({name: globals()[name](config) for name, config in asked.items()}, open(sys.argv[2], "w"))
"""
_KNOBS = {**WINDOW, "stage": 3, "precision": "bf16", "offload": "parameters", "overlap": True}
_NVME = {"stage": 3, "offload": "parameters", "nvme": "optimizer", "sub_group_elements": 7_000_000}
CONFIGURED = {
    "settings": _plan(2, zero=_KNOBS, gradient_accumulation={"micro_batches": 2}),
    "nvme": _plan(2, zero=_NVME),
    "recomputed": _plan(1, zero={"stage": 2}, activation_checkpointing={}),
}


def _configuration(name: str) -> dict[str, Any]:
    return json.loads(render(_spec(CONFIGURED[name])).files[CONFIG])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def of_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What DeepSpeed makes of the configurations of `CONFIGURED`, by the functions of its program."""
    folder = tmp_path_factory.mktemp("configurations")
    (folder / "asked.json").write_text(json.dumps({name: _configuration(name) for name in CONFIGURED}))
    (folder / "program.py").write_text(_OF_DEEPSPEED)
    env = {**ENGINE.variables("cpu"), "WORLD_SIZE": "1"}
    ended = run_script(*(folder / name for name in ("program.py", "asked.json", "answers.json")), env=env)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads((folder / "answers.json").read_text())  # type: ignore[no-any-return]


@installed
def test_the_deepspeed_parser_reads_the_settings_of_the_plan(of_deepspeed: dict[str, Any]) -> None:
    assert of_deepspeed["settings"] == {
        "stage": 3,
        "bucket": 40_000,
        "overlap": True,
        "optimizer": "cpu",
        "parameters": "cpu",
        "prefetch": 35_000,
        "persist": 500,
        "live": 50_000,
        "reuse": 50_000,
        "bf16": True,
        "parts": 2,
        "batch": 2,
        "clip": 0.0,
        "untested": True,
    }


@installed
def test_the_deepspeed_configuration_of_a_plan_with_nvme_is_read_by_its_parser_and_the_linter(
    of_deepspeed: dict[str, Any], tmp_path: Path
) -> None:
    section = _configuration("nvme")["zero_optimization"]
    assert section["sub_group_size"] == 7_000_000
    assert section["offload_param"]["device"] == "cpu"
    assert of_deepspeed["nvme"] == ["nvme", 4, False, "/local_nvme"]
    (tmp_path / CONFIG).write_text(json.dumps(_configuration("nvme")))
    assert not check(read([tmp_path / CONFIG], ranks=2))


@installed
def test_the_activation_checkpointing_section_is_left_out_as_it_has_no_effect(
    of_deepspeed: dict[str, Any],
) -> None:
    """DeepSpeed accepts the section, but recomputes no layer for it."""
    assert "activation_checkpointing" not in _configuration("recomputed")
    assert of_deepspeed["recomputed"] == [[False, 1, False], [True, 1, False]]


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (_plan(2, fsdp2={}), "fsdp2 is not supported by deepspeed"),
        (_plan(2, ddp={}, gradient_accumulation=PARTS), "sync must be 'last'"),
        (_plan(2, zero={"stage": 0, "precision": "bf16"}), "stage 0 requires precision 'fp32'"),
        (_plan(2, zero={"stage": 3}, chunked_cross_entropy={}), "has freed the head"),
        (_plan(2), "several ranks: DeepSpeed requires zero or ddp"),
    ],
)
def test_an_unsupported_plan_is_refused_with_the_reason(plan: Plan, why: str) -> None:
    assert why in "; ".join(ENGINE.refusals(plan))


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    leave()
