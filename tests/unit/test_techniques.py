"""The table of techniques, plans as files, and what each technique does to the numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import VOCABULARY, WIDTH, Words, regression, words
from torch import nn
from torch.testing import assert_close

from memfit.cost.memory import memory_profile
from memfit.jobs.registry import load
from memfit.jobs.training_step import TrainingStep
from memfit.model.blocks import find_blocks, find_head
from memfit.planner.plan_space import plans
from memfit.planner.request import job_facts
from memfit.techniques.base import JobFacts, Knob, Workbench
from memfit.techniques.offload import DiskSpool, HostCopies, Spool, SpooledTensor
from memfit.techniques.optimizers import default_optimizer
from memfit.techniques.parallel.data_parallel import WrappedModel
from memfit.techniques.plan_file import parse_plan, plan_text, read_plan
from memfit.techniques.precision import MasterWeights
from memfit.techniques.registry import (
    TECHNIQUES,
    check,
    conflict,
    effect_of,
    make_use,
    ordered_uses,
    technique,
    without,
)
from memfit.trace.tracer import trace
from memfit.types.device_kind import device_kind
from memfit.types.errors import UserError
from memfit.types.job import JobRef, OptimizerChoice
from memfit.types.machine import Calibration
from memfit.types.plan import EffectClass, Plan, Use, use

FACTS = JobFacts(batch_size=8, block_count=3, vocabulary=VOCABULARY, device_kind="cpu")


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


# --- the table


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("bf16-autocas", {}, "did you mean 'bf16-autocast'?"),
        ("zzz", {}, "allowed: gradient-accumulation"),
        ("activation-checkpointing", {"evry": 1}, "did you mean 'every'?"),
        ("bf16-autocast", {"every": 1}, "allowed: none"),
        ("activation-checkpointing", {"every": 0}, "an integer of at least 1"),
        ("gradient-accumulation", {"micro_batches": 1}, "an integer of at least 2"),
        ("gradient-accumulation", {"micro_batches": True}, "an integer of at least 2"),
        ("gradient-accumulation", {"micro_batches": 2.0}, "an integer of at least 2"),
        ("selective-checkpointing", {"keep": "everything"}, "allowed: attention, matmul"),
    ],
)
def test_an_invalid_name_or_setting_is_refused_with_the_allowed_ones(
    name: str, settings: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        make_use(name, settings)


def test_omitted_settings_have_their_defaults() -> None:
    assert make_use("activation-offload", {"to": "host"}).settings == {"to": "host", "minimum_kib": 64}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("bf16-autocast", "bf16-parameters"),  # the same slot
        ("activation-checkpointing", "selective-checkpointing"),
        ("gradient-accumulation", "optimizer-in-backward"),  # forbidden by name
        ("qlora", "bf16-parameters"),
        ("chunked-cross-entropy", "lora"),
    ],
)
def test_conflicting_techniques_are_refused_in_either_order(one: str, other: str) -> None:
    for names in ((one, other), (other, one)):
        plan = Plan(uses=tuple(make_use(n, {}) for n in names))
        clash = conflict(plan)
        assert clash is not None
        assert one in clash
        assert other in clash
        with pytest.raises(UserError, match="take one of these techniques out"):
            check(plan)


@pytest.mark.parametrize(
    ("vocabulary", "clashes"), [("whole", False), ("gathered", True), ("parallel-loss", True)]
)
def test_a_chunked_cross_entropy_needs_a_whole_head(vocabulary: str, clashes: bool) -> None:
    uses = make_use("tensor-parallel", {"vocabulary": vocabulary}), make_use("chunked-cross-entropy", {})
    for plan in (Plan(uses=uses, ranks=2), Plan(uses=uses[::-1], ranks=2)):
        reason = conflict(plan)
        assert ("splits it unless its vocabulary is whole" in (reason or "")) is clashes


def test_a_technique_conflicts_with_every_technique_it_forbids() -> None:
    for found in TECHNIQUES.values():
        for name in found.forbids:
            pair = Plan(uses=(make_use(found.name, {}), make_use(name, {})))
            assert conflict(pair), f"{found.name} forbids {name}, which is no technique's name"


def test_a_missing_package_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert technique("adamw-8bit").missing == ("bitsandbytes",)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check(Plan(uses=(use("adamw-8bit"),)))


def test_the_effect_class_of_a_plan_is_that_of_its_strongest_technique() -> None:
    assert effect_of(Plan()) is EffectClass.E0
    assert effect_of(Plan(uses=(use("sgd"), use("bf16-autocast")))) is EffectClass.E3


def test_techniques_are_applied_in_a_fixed_order_not_in_the_plans() -> None:
    names = ("bf16-autocast", "activation-checkpointing", "lora")
    plan = Plan(uses=tuple(make_use(n, {}) for n in names))
    assert [t.name for t, _ in ordered_uses(plan)] == ["lora", "activation-checkpointing", "bf16-autocast"]


@pytest.mark.parametrize("name", ["ddp", "zero", "sgd"])
def test_a_plan_without_a_technique_that_it_lacks_is_the_same_plan(name: str) -> None:
    plan = Plan(uses=(make_use("fsdp2", {}),), ranks=2)
    assert without(plan, name) == plan
    assert without(plan, "fsdp2") == Plan(uses=(make_use("ddp", {}),), ranks=2)


def test_every_proposed_setting_is_valid_user_input() -> None:
    for found in TECHNIQUES.values():
        for device in ("cpu", "cuda"):
            facts = JobFacts(batch_size=8, block_count=5, vocabulary=1000, device_kind=device)
            for settings in found.settings(facts):
                assert make_use(found.name, settings).settings == settings


def test_techniques_that_do_not_apply_to_the_job_are_not_proposed() -> None:
    bare = JobFacts(batch_size=1, block_count=0, vocabulary=0, device_kind="cpu")
    proposed = {t.name for t in TECHNIQUES.values() if list(t.settings(bare))}
    assert not proposed & {
        "gradient-accumulation",
        "activation-checkpointing",
        "selective-checkpointing",
        "chunked-cross-entropy",
        "lora",
        "qlora",
    }
    assert [s["micro_batches"] for s in technique("gradient-accumulation").settings(FACTS)] == [2, 4, 8]


class _TwoStacks(nn.Module):
    """An encoder and a decoder with blocks of one class, and a stack of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.decoder = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.heads = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8) for _ in range(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.encoder, *self.decoder):
            x = block(x)
        return self.heads[0](x)  # type: ignore[no-any-return]


def test_selective_checkpointing_keeps_its_tensors_on_the_device_when_activations_are_offloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.utils import checkpoint as module

    keeps_hooks_out: list[bool | None] = []
    checkpoint = module.checkpoint

    def with_option(
        *args: Any, respect_saved_tensors_hooks: bool | None = None, context_fn: Any, use_reentrant: bool
    ) -> Any:
        """Stand for torch.utils.checkpoint.checkpoint of torch 2.15, which warns where the option is None."""
        keeps_hooks_out.append(respect_saved_tensors_hooks)
        return checkpoint(*args, context_fn=context_fn, use_reentrant=use_reentrant)

    plan = Plan(uses=(use("selective-checkpointing", keep="matmul"), make_use("activation-offload", {})))
    job = words(2)
    with contextlib.closing(TrainingStep(job, plan)) as step:
        step.run(job.make_batch(0, 0))  # torch's own: pytest turns a warning into an error
    monkeypatch.setattr(module, "checkpoint", with_option)
    with contextlib.closing(TrainingStep(job, plan)) as step:
        step.run(job.make_batch(0, 0))
    assert set(keeps_hooks_out) == {False}


@pytest.mark.parametrize(("more", "every", "again"), [((), 1, 5), (("heads",), 1, 6), (("heads",), 2, 4)])
def test_checkpointing_wraps_the_blocks_of_every_stack(more: tuple[str, ...], every: int, again: int) -> None:
    job = dataclasses.replace(
        words(2),
        build_model=_TwoStacks,
        blocks=None,
        more_blocks=more,
        head=None,
        loss_terms=None,
        make_batch=lambda step, seed: torch.randn(2, 3, 8),
        loss=lambda model, x: model(x).square().mean(),
    )
    step = TrainingStep(job, Plan(uses=(use("activation-checkpointing", every=every),)))
    stacks = (*step.model.encoder, *step.model.decoder, *step.model.heads)  # type: ignore[misc]
    assert sum("forward" in vars(block) for block in stacks) == again
    step.run(job.make_batch(0, 0))


def test_adapters_are_not_proposed_to_blocks_without_linear_layers() -> None:
    volumes = load(JobRef(spec="segmentation3d", batch=1))
    facts = job_facts(volumes, "cpu")
    assert facts.block_count
    assert not list(technique("lora").settings(facts))
    with pytest.raises(UserError, match="linear layers"):
        trace(volumes, Plan(uses=(make_use("lora", {}),)))


# --- plans as files


def settings_of(name: str) -> st.SearchStrategy[dict[str, object]]:
    def values(knob: Knob) -> st.SearchStrategy[object]:
        if knob.pattern is not None:
            texts = ("", "none", "0badcafe:3-9,12", "torch.optim:Muon", "lr=0.1, betas=(0.9, 0.99)")
            return st.sampled_from([text for text in texts if knob.accepts(text)])
        return st.sampled_from(knob.choices) if knob.choices else st.integers(knob.minimum, 10**6)

    return st.fixed_dictionaries({k.name: values(k) for k in technique(name).knobs})


INSTALLED = [n for n in TECHNIQUES if not technique(n).missing]
# Plain data: beartype checks a dataclass made inside a strategy, and draws random numbers of its own.
DRAWN = st.lists(st.sampled_from(INSTALLED), unique=True).flatmap(
    lambda names: st.fixed_dictionaries({n: settings_of(n) for n in names})
)


@given(DRAWN, st.text(max_size=20))
def test_law_a_plan_written_and_read_is_the_same_plan(drawn: dict[str, dict[str, object]], note: str) -> None:
    import yaml

    plan = Plan(uses=tuple(make_use(name, settings) for name, settings in drawn.items()))
    assume(conflict(plan) is None)
    assert parse_plan(yaml.safe_load(plan_text(plan, note=note)), what="plan") == plan


def test_a_plan_file_is_read_with_defaults(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("note: mine\ntechniques:\n  bf16-autocast:\n  activation-checkpointing: {every: 2}\n")
    expected = Plan(uses=(use("bf16-autocast"), use("activation-checkpointing", every=2)))
    assert read_plan(path) == expected
    path.write_text("techniques:\n")
    assert read_plan(path) == Plan()


def test_all_mistakes_of_a_plan_file_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("technique: {}\ntechniques: {bf16: {}, activation-checkpointing: {evry: 2}, sgd: 3}\n")
    with pytest.raises(UserError) as told:
        read_plan(path)
    for part in ("'technique'", "did you mean 'techniques'", "'bf16'", "'evry'", "the technique sgd are 3"):
        assert part in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "does not contain a mapping"),
        ("techniques: [sgd]\n", "techniques is not a mapping"),
        ("techniques: {sgd: [\n", "is not valid YAML"),
        ("techniques: {sgd: {}, adafactor: {}}\n", "both are of the kind optimizer"),
    ],
)
def test_an_invalid_plan_file_is_refused_with_the_reason(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_plan(path)


def test_a_missing_plan_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read "):
        read_plan(tmp_path / "none.yaml")


# --- what techniques do to the numbers


def trained(*uses: Use, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of some real steps, dropout and padding included, and the weights they lead to."""
    torch.manual_seed(0)
    step = TrainingStep(words(), Plan(uses=uses))
    losses = [float(step.run(step.job.make_batch(i, 0))[0]) for i in range(steps)]
    weights = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    step.close()
    return losses, weights


@pytest.mark.parametrize(
    "used",
    [
        use("activation-checkpointing", every=1),
        use("activation-checkpointing", every=2),
        use("selective-checkpointing", keep="attention"),
        use("selective-checkpointing", keep="matmul"),
        use("activation-offload", to="disk", minimum_kib=1),
        use("activation-offload", to="host", minimum_kib=1),
        use("optimizer-in-backward"),
    ],
    ids=lambda u: Plan(uses=(u,)).label,
)
def test_exact_techniques_are_bitwise_equal_to_plain_training(used: Use) -> None:
    losses, weights = trained(used)
    plain_losses, plain_weights = trained()
    assert technique(used.technique).effect is EffectClass.E0
    assert losses == plain_losses
    assert all(torch.equal(weights[n], plain_weights[n]) for n in plain_weights)


def test_chunked_cross_entropy_changes_results_only_by_rounding() -> None:
    losses, weights = trained(use("chunked-cross-entropy", chunks=3))
    plain_losses, plain_weights = trained()
    assert losses == pytest.approx(plain_losses, rel=1e-6)
    assert_close(weights, plain_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "used",
    [
        use("bf16-autocast"),
        use("bf16-parameters", rounding="master"),
        pytest.param(use("bf16-parameters", rounding="stochastic"), marks=needs("torchao")),
        pytest.param(use("adamw-8bit"), marks=needs("bitsandbytes")),
    ],
    ids=lambda u: Plan(uses=(u,)).label,
)
def test_lower_precision_keeps_losses_within_two_percent(used: Use) -> None:
    losses, _ = trained(used)
    plain, _ = trained()
    assert losses == pytest.approx(plain, rel=0.02)
    if used.technique != "adamw-8bit":  # tensors this small keep their state in 32 bits
        assert losses != plain


@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_another_optimizer_has_the_same_first_loss_and_different_later_ones(name: str) -> None:
    losses, _ = trained(use(name))
    plain, _ = trained()
    assert losses[0] == plain[0]
    assert losses[1:] != plain[1:]


@pytest.mark.parametrize("name", ["lora", pytest.param("qlora", marks=needs("bitsandbytes"))])
@needs("peft")
def test_adapters_freeze_the_blocks_and_train_the_rest(name: str) -> None:
    torch.manual_seed(0)
    step = TrainingStep(words(), Plan(uses=(use(name, rank=2),)))
    trainable = {n for n, p in step.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    for index in range(2):  # the second matrix of a pair starts at zero: the first learns a step later
        step.run(step.job.make_batch(index, 0))
    changed = {n for n, p in step.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trainable
    assert all("lora_" in n or not n.startswith("blocks.") for n in trainable)
    # rank 2 beside each of 3 x (16 -> 64 -> 16), then embedding and head with bias
    assert sum(before[n].numel() for n in trainable) == 3 * 2 * 2 * (16 + 64) + 512 * 16 + 512 * 17


@needs("peft")
def test_dora_trains_the_norms_of_rows_too_and_starts_as_the_plain_model() -> None:
    torch.manual_seed(0)
    step = TrainingStep(words(), Plan(uses=(make_use("lora", {"rank": 2, "dora": True}),)))
    norms = {n: p for n, p in step.model.named_parameters() if "lora_magnitude_vector" in n}
    assert sum(p.numel() for p in norms.values()) == 3 * (64 + 16)
    before = {n: p.detach().clone() for n, p in norms.items()}
    loss = float(step.run(step.job.make_batch(0, 0))[0])
    torch.manual_seed(0)
    plain = TrainingStep(words(), Plan(uses=(make_use("lora", {"rank": 2}),)))
    assert loss == pytest.approx(float(plain.run(plain.job.make_batch(0, 0))[0]), rel=1e-3)
    assert not any(torch.equal(p, before[n]) for n, p in norms.items())


@needs("peft")
def test_adapters_reach_the_blocks_of_a_model_that_is_itself_the_sequence_of_blocks() -> None:
    job = dataclasses.replace(
        regression(),
        build_model=lambda: nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))),
        make_batch=lambda step, seed: (torch.ones(32, 8), torch.zeros(32, 8)),
    )
    assert job_facts(job, "cpu").has_linear_layers
    step = TrainingStep(job, Plan(uses=(make_use("lora", {"rank": 2}),)))
    trainable = {n: p.numel() for n, p in step.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in trainable)
    assert sum(trainable.values()) == 2 * 2 * (8 + 8)
    step.run(job.make_batch(0, 0))


@needs("bitsandbytes")
def test_nf4_linear_takes_half_a_byte_per_weight_and_stays_accurate() -> None:
    from memfit.techniques.nf4 import Nf4Linear

    torch.manual_seed(0)
    dense = nn.Linear(256, 128)
    small = Nf4Linear(dense)
    x = torch.randn(64, 256, requires_grad=True)
    out, truth = small(x), dense(x)
    error = (out - truth).detach()
    assert small.packed.numel() * small.packed.element_size() == 256 * 128 // 2
    # NormalFloat's levels lie about 0.1 standard deviations apart in the middle
    assert float(error.norm() / truth.detach().norm()) < 0.15
    (slope,) = torch.autograd.grad(out.sum(), x)
    (true_slope,) = torch.autograd.grad(truth.sum(), x)
    assert float((slope - true_slope).norm() / true_slope.norm()) < 0.15
    with torch.autocast("cpu", torch.bfloat16):
        assert small(x).dtype == torch.bfloat16
    assert Nf4Linear(nn.Linear(64, 64, bias=False))(torch.ones(1, 64)).shape == (1, 64)


@needs("peft")
@needs("bitsandbytes")
def test_qlora_quantizes_on_the_host_and_moves_only_small_weights_to_an_accelerator() -> None:
    job = dataclasses.replace(
        regression(),
        build_model=lambda: nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(8))),
        make_batch=lambda step, seed: (torch.ones(4, 512), torch.zeros(4, 512)),
    )
    traced = trace(job, Plan(uses=(use("qlora", rank=2),)), device="cuda")
    peak_bytes = memory_profile(traced, Calibration()).phase_peak_bytes
    weights = 8 * 512 * 512
    small_bytes = weights // 2 + weights // 64 * 4  # half a byte, and one float32 for 64 weights
    assert small_bytes <= peak_bytes["setup"] < 1.2 * small_bytes < 4 * weights
    assert peak_bytes["forward"] > small_bytes


@needs("bitsandbytes")
def test_the_scales_of_an_nf4_linear_move_with_its_weights_and_keep_their_dtype() -> None:
    from memfit.techniques.nf4 import Nf4Linear

    small = Nf4Linear(nn.Linear(64, 64)).to(torch.bfloat16)
    assert small.absmax.dtype == torch.float32
    small.to("meta")
    assert small.state.absmax is small.absmax
    assert {small.packed.device.type, small.absmax.device.type, small.state.code.device.type} == {"meta"}
    assert set(small.state_dict()) == {"packed", "bias"}


def test_a_tensor_at_the_former_address_of_a_parameter_is_offloaded() -> None:
    """ZeRO 3 gives parameters other storages in forward, and an activation may get a freed address."""
    step = TrainingStep(words(), Plan(uses=(use("activation-offload", to="disk", minimum_kib=1),)))
    away = next(c.__self__ for c in step.bench.forward_contexts)  # type: ignore[attr-defined]
    param, kept = next(step.bench.model.parameters()), torch.ones(4096)
    with away.hooks():
        assert isinstance(away._pack(param.detach()), torch.Tensor)
        away.resident[kept.untyped_storage()._cdata] = param  # as it was before the parameter moved
        assert not isinstance(away._pack(kept), torch.Tensor)
    step.close()


def test_offload_writes_what_backward_needs_and_leaves_no_file(tmp_path: Path, monkeypatch: Any) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    step = TrainingStep(words(), Plan(uses=(use("activation-offload", to="disk", minimum_kib=1),)))
    moved: list[tuple[int, int]] = []
    step.bench.on_offload = lambda out, back: moved.append((out, back))
    step.run(step.job.make_batch(0, 0))
    assert (8 * 12 * 64 * 4,) * 2 in moved  # the wide activation inside a block
    assert min(back for _, back in moved) >= 1024
    assert list(tmp_path.rglob("*/*")) == []
    step.close()
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_saved_twice_is_offloaded_once_unless_it_changed_in_place() -> None:
    step = TrainingStep(words(), Plan())
    bench = step.bench
    moved: list[tuple[int, int]] = []
    bench.on_offload = lambda out, back: moved.append((out, back))
    for away in (DiskSpool(bench, 0), HostCopies(bench, 0)):
        moved.clear()
        kept = torch.arange(24.0).reshape(2, 3, 4)
        with away.hooks():
            packed = [away._pack(kept), away._pack(kept.view(6, 4))]
            with torch.no_grad():
                kept += 1
            packed.append(away._pack(kept))
        assert moved == [(96, 96), (0, 96), (96, 96)]
        first, flat, later = map(away._unpack, packed)
        assert torch.equal(first, kept - 1)
        assert torch.equal(flat, first.view(6, 4))
        assert torch.equal(later, kept)
        assert first.data_ptr() != flat.data_ptr()
    step.close()


def test_a_spool_reuses_free_space_before_it_grows(tmp_path: Path, monkeypatch: Any) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = Spool()
    first, second = (
        SpooledTensor(torch.ones(1000), spool),
        SpooledTensor(torch.zeros(1000, dtype=torch.bfloat16), spool),
    )
    place = first.place
    assert first.back().sum() == 1000
    del first
    third = SpooledTensor(torch.full((1000,), 3.0), spool)
    assert third.place == place
    assert second.back().sum() == 0
    assert list(tmp_path.iterdir()) == []  # the file has no name, so it is gone however the process ends
    spool.close()


def test_a_spool_completes_partial_reads_and_writes(tmp_path: Path) -> None:
    class Halting(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:700])

        def readinto(self, data: Any) -> int:
            return super().readinto(data[:900]) or 0

    spool = Spool()
    spool._file._file = Halting(tmp_path / "spool", "w+")
    parked = SpooledTensor(torch.arange(999.0), spool)
    assert torch.equal(parked.back(), torch.arange(999.0))
    spool._file._file.truncate(100)
    with pytest.raises(OSError, match="truncated"):
        parked.back()
    spool.close()


def test_master_weights_keep_updates_that_bfloat16_would_lose() -> None:
    """1 - 100 x 1e-3 = 0.9; in bfloat16 alone 1 - 0.001 rounds back to 1 each time."""

    def sgd(params: list[nn.Parameter]) -> torch.optim.SGD:
        return torch.optim.SGD(params, lr=1e-3)

    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    frozen = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = MasterWeights([weight, frozen], sgd)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        masters.step()
        masters.zero_grad()
    assert weight.grad is None
    assert_close(weight, torch.full((4,), 0.9, dtype=torch.bfloat16), rtol=0, atol=0)
    assert torch.equal(frozen, torch.ones_like(frozen))
    assert all(state["master"].dtype == torch.float32 for state in masters.state.values())


def test_a_bfloat16_model_accepts_float32_inputs() -> None:
    torch.manual_seed(0)
    step = TrainingStep(regression(), Plan(uses=(use("bf16-parameters", rounding="master"),)))
    loss, _ = step.run(step.job.make_batch(0, 0))
    assert torch.isfinite(loss)
    assert not step.model._forward_pre_hooks


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adafactor"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plain_training_uses_the_optimizer_of_the_job(name: str, device: str) -> None:
    make = default_optimizer(OptimizerChoice(name=name, learning_rate=0.5), device_kind(device))
    made: Any = make([nn.Parameter(torch.ones(2))])
    assert type(made).__name__.lower() == name
    assert made.param_groups[0]["lr"] == 0.5
    if name != "adafactor":
        assert made.param_groups[0]["foreach"] is (device == "cuda")


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(UserError, match="allowed: adamw, adam, sgd, adafactor"):
        default_optimizer(OptimizerChoice(name="lion"), device_kind("cpu"))


# --- where blocks and head are


def test_blocks_are_found_automatically_or_at_a_given_path() -> None:
    path, blocks = find_blocks(Words())
    assert (path, len(blocks)) == ("blocks", 3)
    assert find_blocks(Words(), "blocks.0.inner")[0] == "blocks.0.inner"


def test_missing_blocks_and_a_wrong_path_are_user_errors() -> None:
    with pytest.raises(UserError, match="no repeated blocks"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"no blocks at 'layers': .*; allowed: .*, such as blocks;"):
        find_blocks(Words(), "layers")
    with pytest.raises(UserError, match="no blocks at 'head'"):
        find_blocks(Words(), "head")
    with pytest.raises(UserError, match="children are the blocks; correct the path"):
        find_blocks(nn.Linear(2, 2), "layers")


def test_the_head_is_found_by_path_by_output_embeddings_or_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(2, 3)  # a common name of heads
            self.projection = nn.Linear(2, 3)

        def get_output_embeddings(self) -> nn.Linear:
            return self.projection

    assert find_head(Words(), "head")[0] == "head"
    assert find_head(Words())[1].in_features == WIDTH
    assert find_head(Named())[0] == "projection"
    with pytest.raises(UserError, match=r"no nn\.Linear at 'embed'"):
        find_head(Words(), "embed")
    with pytest.raises(UserError, match="no output projection"):
        find_head(nn.Sequential(nn.Linear(2, 2)))


def test_the_chunked_head_returns_logits_in_evaluation() -> None:
    job, model = words(), Words()
    bench = Workbench(
        job=job,
        model=model,
        device=device_kind("cpu"),
        make_optimizer=default_optimizer(job.optimizer, device_kind("cpu")),
    )
    technique("chunked-cross-entropy").apply(bench, {"chunks": 2})
    technique("activation-checkpointing").apply(bench, {"every": 1})
    model.eval()
    assert isinstance(model(job.make_batch(0, 0)["tokens"]), torch.Tensor)


def test_a_setting_whose_package_is_missing_is_neither_proposed_nor_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A single value of a setting may need a package that the technique itself does not need."""
    found = importlib.util.find_spec
    without = lambda name, *more: None if name == "torchao" else found(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    narrow = TECHNIQUES["bf16-parameters"]
    assert narrow.lacks({"rounding": "stochastic"}) == ("torchao",)
    assert not narrow.lacks({"rounding": "master"})
    facts = JobFacts(batch_size=8, block_count=4, vocabulary=64, device_kind="cuda")
    proposed = {u for plan in plans(facts, [narrow]) for u in plan.uses}
    assert [u.settings["rounding"] for u in proposed] == ["master"]
    with pytest.raises(UserError, match=r"rounding=stochastic\) needs torchao, which is not installed"):
        check(Plan(uses=(make_use("bf16-parameters", {"rounding": "stochastic"}),)))


def test_a_loss_reads_the_models_own_attributes_through_its_wrapper() -> None:
    model = nn.Linear(2, 2)
    model.inner, model.wrapped, model.module = nn.ReLU(), nn.GELU(), nn.Tanh()
    wrapped = WrappedModel(nn.Sequential(model, nn.Flatten(0)), model)
    assert all(getattr(wrapped, name) is getattr(model, name) for name in ("inner", "wrapped", "module"))
    assert wrapped(torch.ones(3, 2)).shape == (6,)
