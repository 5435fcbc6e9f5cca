"""Predicted against measured peaks, a matrix of jobs and techniques; the truth is the counting allocator."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import re

import pytest
import torch
from scratch_memory import probed
from torch import nn
from torch.nn import functional

from memfit.cost.memory import memory_profile
from memfit.jobs.registry import load, names
from memfit.jobs.training_step import TrainingStep
from memfit.planner.recompute_budget import choose_tensors
from memfit.runtime.counting_allocator import CountingAllocator, available
from memfit.techniques.registry import TECHNIQUES, make_use, technique
from memfit.trace.tracer import trace
from memfit.types.job import Job, JobRef
from memfit.types.plan import Plan, Use, use
from memfit.types.trace import Phase

pytestmark = pytest.mark.skipif(available() is not None, reason=f"no counting allocator: {available()}")

WORST_RATIO = 0.005


class _Wide(nn.Module):
    """Few tokens, many parameters: what optimizers, adapters and 4-bit weights are for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 256)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(3)]
        )
        self.head = nn.Linear(256, 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _wide_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return {
        "x": torch.randn(8, 16, generator=generator),
        "y": torch.randint(0, 2048, (8,), generator=generator),
    }


def _wide_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"])


WIDE = Job(
    name="wide", build_model=_Wide, make_batch=_wide_batch, loss=_wide_loss, batch_size=8, blocks="blocks"
)


class _Words(nn.Module):
    """A vocabulary far wider than the model: what the chunked loss is for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4096, 32)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(2)])
        self.head = nn.Linear(32, 4096)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _words_batch(step: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 4096, (8, 65), generator=torch.Generator().manual_seed(1000 * seed + step))


def _words_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.reshape(-1, 4096), tokens[:, 1:].reshape(-1))


WORDS = Job(
    name="words", build_model=_Words, make_batch=_words_batch, loss=_words_loss, batch_size=8, blocks="blocks"
)


class _Windows(nn.Module):
    """Results of unfold and fold that are smaller than their input lie in storages as large as the input."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Conv2d(3, 8, 1), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        for _ in range(3):
            x = functional.fold(functional.unfold(x.tanh(), 3, padding=1), 64, 3, padding=1).sin()
        return self.head(functional.unfold(x, 2, stride=4).sin().mean(2))


WINDOWS = Job(
    name="windows",
    build_model=_Windows,
    make_batch=lambda step, seed: torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(step)),
    loss=lambda model, x: functional.cross_entropy(model(x), torch.arange(8)),
    batch_size=8,
)


def _built_in(spec: str, batch: int) -> Job:
    return dataclasses.replace(load(JobRef(spec=spec, batch=batch)), steps=2)


def _molecules() -> Job:
    pytest.importorskip("chemicals", reason="not installed: chemicals")
    return _built_in("molecules", 16)


JOBS = {
    "wide": lambda: WIDE,
    "words": lambda: WORDS,
    "windows": lambda: WINDOWS,
    "protein-ss": lambda: _built_in("protein-ss", 8),
    "protein-lm": lambda: _built_in("protein-lm", 4),
    "char-lm": lambda: _built_in("char-lm", 8),
    "alphafold2": lambda: dataclasses.replace(
        load(JobRef(spec="alphafold2", batch=1, dimensions={"crop": 32})), steps=2
    ),
    "molecules": _molecules,
    "genome": lambda: _built_in("genome", 4),
    "potential": lambda: _built_in("potential", 8),
    "weather": lambda: _built_in("weather", 4),
    "segmentation3d": lambda: _built_in("segmentation3d", 4),
}
SLICES = use("chunking", parts=0, mib=0)
ACCUMULATE = use("gradient-accumulation", micro_batches=4)
AUTOCAST = use("bf16-autocast")
FLOAT16 = use("fp16-autocast")
MASTER = use("bf16-parameters", rounding="master")
STOCHASTIC = use("bf16-parameters", rounding="stochastic")
FULL = use("activation-checkpointing", every=1)
SECOND = use("activation-checkpointing", every=2)
ATTENTION = use("selective-checkpointing", keep="attention")
MATMUL = use("selective-checkpointing", keep="matmul")
CHUNKED = use("chunked-cross-entropy", chunks=4)
SMALL_ADAM = use("adamw-8bit")
IN_BACKWARD = use("optimizer-in-backward")
LORA, QLORA = use("lora", rank=4), use("qlora", rank=4)
DORA = use("lora", rank=4, dora=True)
EIGHT_BITS = use("float8-linear", scaling="tensorwise")
DISK = use("activation-offload", to="disk", minimum_kib=4)


def budget(mib: int) -> Use:
    return make_use("optimal-checkpointing", {"budget_mib": mib})


MATRIX: list[tuple[str, tuple[Use, ...]]] = [
    *((name, ()) for name in JOBS),
    *(
        ("protein-ss", (u,))
        for u in (ACCUMULATE, AUTOCAST, FLOAT16, MASTER, FULL, SECOND, ATTENTION, MATMUL, DISK)
    ),
    ("protein-ss", (AUTOCAST, FULL, SMALL_ADAM)),
    ("protein-ss", (ACCUMULATE, AUTOCAST, MATMUL)),
    ("protein-ss", (EIGHT_BITS, AUTOCAST)),
    ("char-lm", (EIGHT_BITS, MASTER, FULL)),
    ("protein-ss", (use("gradient-accumulation", micro_batches=8), AUTOCAST, FULL, SLICES)),
    *(("words", (u,)) for u in (CHUNKED, ACCUMULATE)),
    ("words", (CHUNKED, AUTOCAST)),
    *(
        ("wide", (u,))
        for u in (
            SMALL_ADAM,
            use("adafactor"),
            use("sgd"),
            IN_BACKWARD,
            LORA,
            DORA,
            QLORA,
            MASTER,
            STOCHASTIC,
        )
    ),
    ("wide", (IN_BACKWARD, SMALL_ADAM)),
    *(("protein-lm", (u,)) for u in (FULL, AUTOCAST)),
    ("protein-lm", (FLOAT16, FULL, ACCUMULATE)),
    ("protein-lm", (ACCUMULATE, FULL, AUTOCAST)),
    *(("char-lm", (u,)) for u in (ACCUMULATE, FULL, AUTOCAST)),
    ("char-lm", (AUTOCAST, MATMUL, SMALL_ADAM)),
    *(("protein-ss", (budget(n),)) for n in (40, 60)),
    ("protein-ss", (budget(20), ACCUMULATE, AUTOCAST)),
    ("char-lm", (budget(45), AUTOCAST)),
    *(("alphafold2", u) for u in ((AUTOCAST, SLICES, FULL), (MASTER, MATMUL), (DISK,))),
    *(("molecules", u) for u in ((AUTOCAST,), (MASTER, FULL), (ACCUMULATE, MATMUL))),
    *(("genome", u) for u in ((AUTOCAST,), (FULL,), (MASTER, ACCUMULATE))),
    *(("weather", u) for u in ((AUTOCAST,), (FULL,), (SLICES,), (MASTER, ACCUMULATE), (MATMUL, DISK))),
    *(("segmentation3d", u) for u in ((AUTOCAST,), (FULL,), (MASTER, FULL), (DISK,), (FULL, SLICES))),
    *(("potential", u) for u in ((AUTOCAST,), (FULL,), (MATMUL,), (MASTER, FULL, ACCUMULATE), (DISK,))),
]


GROUP = "rank=16, update_proj_gap=200, scale=0.25, proj_type='std'"
IMPORTED = {  # class -> settings; those of other packages than torch are measured where these are installed
    "torch.optim:Muon": {"others": "adamw"},
    "torch.optim:RAdam": {},  # takes more from its sixth step on
    "torch.optim:ASGD": {},
    "torch.optim:RMSprop": {"arguments": "momentum=0.9, centered=True"},
    "lion_pytorch:Lion": {},
    "adam_mini:Adam_mini": {"arguments": "dim=256, n_heads=4, verbose=False"},
    "galore_torch:GaLoreAdamW": {"arguments": "no_deprecation_warning=True", "matrices": GROUP},
    "pytorch_optimizer:SOAP": {},
}
MATRIX += [("wide", (make_use("optimizer", {"path": p, **s}),)) for p, s in IMPORTED.items()]


@pytest.fixture(scope="module")
def counter() -> CountingAllocator:
    torch.set_num_threads(1)
    counting = CountingAllocator()
    counting.install()
    return counting


def _missing(uses: tuple[Use, ...]) -> str:
    paths = [str(u.settings["path"]) for u in uses if u.technique == "optimizer"]
    imported = [p for path in paths if importlib.util.find_spec(p := re.split("[.:]", path)[0]) is None]
    return ", ".join([*(p for u in uses for p in technique(u.technique).missing), *imported])


@functools.cache
def job_of(name: str) -> Job:
    return JOBS[name]()


@functools.cache
def planned(name: str, uses: tuple[Use, ...]) -> Plan:
    return choose_tensors(job_of(name), Plan(uses=uses))


@functools.cache
def measured(name: str, uses: tuple[Use, ...], counter: CountingAllocator) -> dict[str, int]:
    """Highest live bytes of each phase over two real steps, or eight with an optimizer by import path, whose
    update may change after some steps; "peak" over everything."""
    job, plan = job_of(name), planned(name, uses)
    gc.collect()
    base, peaks, now = counter.live_bytes(), {}, ["setup"]

    def turn(phase: str) -> None:
        peaks[now[0]] = max(peaks.get(now[0], 0), counter.peak_bytes() - base)
        counter.reset_peak()
        now[0] = phase

    counter.reset_peak()
    torch.manual_seed(0)
    step = TrainingStep(job, plan)
    for index in range(8 if "optimizer" in plan else 2):
        turn("between")
        batch = job.make_batch(index, 0)
        turn("between")
        step.run(batch, lambda phase: turn(str(phase)))
        turn("between")
        del batch
    step.close()
    peaks["peak"] = max(peaks.values())
    return peaks


@pytest.mark.parametrize(
    ("name", "uses"), MATRIX, ids=lambda v: v if isinstance(v, str) else Plan(uses=v).label
)
def test_predicted_peak_is_measured_peak(
    name: str, uses: tuple[Use, ...], counter: CountingAllocator
) -> None:
    if missing := _missing(uses):
        pytest.skip(f"not installed: {missing}")
    traced = trace(job_of(name), planned(name, uses))
    profile = memory_profile(traced, probed(traced, counter))
    truth = measured(name, uses, counter)
    assert profile.peak_bytes == pytest.approx(truth["peak"], rel=WORST_RATIO)
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER):
        assert profile.phase_peak_bytes[phase] == pytest.approx(truth[phase], rel=WORST_RATIO), phase


LOWERS = {
    "gradient-accumulation": ("protein-ss", ACCUMULATE),
    "bf16-autocast": ("protein-ss", AUTOCAST),
    "fp16-autocast": ("protein-ss", FLOAT16),
    "bf16-parameters": ("protein-ss", MASTER),
    "activation-checkpointing": ("protein-ss", FULL),
    "selective-checkpointing": ("protein-ss", MATMUL),
    "optimal-checkpointing": ("protein-ss", budget(40)),
    "chunked-cross-entropy": ("words", CHUNKED),
    "chunking": ("alphafold2", SLICES),
    "adamw-8bit": ("wide", SMALL_ADAM),
    "adafactor": ("wide", use("adafactor")),
    "sgd": ("wide", use("sgd")),
    "optimizer": ("wide", make_use("optimizer", {"path": "torch.optim:Muon", "others": "adamw"})),
    "optimizer-in-backward": ("wide", IN_BACKWARD),
    "lora": ("wide", LORA),
    "qlora": ("wide", QLORA),
    "activation-offload": ("protein-ss", DISK),
    "adamw-fused": ("wide", make_use("adamw-fused", {})),
}
# Not measured here: compiled kernels and 8-bit products, which a CPU emulates in 32 bits; paging and updates
# of lists of tensors, which only a GPU has; torchao's 4-bit step, whose temporaries outweigh what it saves on
# such small models; and techniques of several ranks, which have test files of their own.
PARALLEL = {"tensor-parallel", "context-parallel", "axial-parallel", "expert-parallel", "pipeline"}
RANKED = {"ddp", "fsdp2", "zero", "sharded-ddp"} | PARALLEL
ELSEWHERE = {"compile", "float8-linear", "adamw-paged", "adamw-single", "adamw-4bit"} | RANKED


def test_every_technique_is_measured_here_or_tested_elsewhere() -> None:
    assert set(TECHNIQUES) == set(LOWERS) | ELSEWHERE


@pytest.mark.parametrize("name", LOWERS)
def test_every_technique_lowers_a_peak_somewhere(name: str, counter: CountingAllocator) -> None:
    job_name, used = LOWERS[name]
    if missing := _missing((used,)):
        pytest.skip(f"not installed: {missing}")
    plain = measured(job_name, (), counter)["peak"]
    assert measured(job_name, (used,), counter)["peak"] < 0.97 * plain


def test_every_built_in_job_is_among_those_whose_prediction_is_measured() -> None:
    assert set(names()) <= JOBS.keys()
