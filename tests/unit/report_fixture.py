"""A hand-made Poc, as `memfit poc` would find it: numbers a person can check, nothing run."""

from __future__ import annotations

import dataclasses
import math

from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import EffectClass, Plan, use
from memfit.types.result import (
    Cause,
    Choice,
    Effort,
    Estimate,
    Interaction,
    Interval,
    LargestSize,
    Measurement,
    NamedVerdict,
    Offer,
    OutcomeKind,
    PaperRow,
    Poc,
    Reason,
    ReasonKind,
    Reproducibility,
    Run,
    SearchResult,
    Verdict,
    VerdictKind,
)
from memfit.types.units import GIB, MIB
from memfit.types.workload import Workload

PLAIN = Plan()
CHECKPOINTED = Plan(uses=(use("activation-checkpointing", every=1),))
BF16 = Plan(uses=(use("bf16-autocast"),))
BOTH = Plan(uses=(*CHECKPOINTED.uses, *BF16.uses))
RECOMMENDED = BOTH.with_use(use("gradient-accumulation", micro_batches=4))
PEAKS = {PLAIN: 1312 * MIB, CHECKPOINTED: 466 * MIB, BF16: 671 * MIB, BOTH: 318 * MIB, RECOMMENDED: 246 * MIB}
STEPS_S = {PLAIN: 0.60, CHECKPOINTED: 0.81, BF16: 0.52, BOTH: 0.71, RECOMMENDED: 0.78}
METRICS = {PLAIN: 67.2, CHECKPOINTED: 67.2, BF16: 67.0, BOTH: 66.9, RECOMMENDED: 67.3}
SPREAD = 0.42708313  # between seeds, so that the 90 % interval of three pairs is 0.72 to either side
CAP = 328 * MIB
STEP_COUNT = 40


def estimate(plan: Plan, peak: float, step_s: float | None = 0.6) -> Estimate:
    peak_bytes = int(peak)
    return Estimate(
        plan=plan,
        allocated_bytes=Interval(value=peak, low=0.998 * peak, high=1.002 * peak),
        phase_peak_bytes={
            "setup": peak_bytes // 8,
            "forward": int(0.93 * peak),
            "backward": peak_bytes,
            "optimizer": peak_bytes // 2,
        },
        at_peak_bytes={
            "parameter": peak_bytes // 10,
            "gradient": peak_bytes // 10,
            "optimizer_state": peak_bytes // 5,
            "activation": peak_bytes // 2,
            "temporary": peak_bytes // 10,
        },
        by_module_bytes={"encoder.layer.0": peak_bytes // 2, "head": peak_bytes // 4, "": peak_bytes // 4},
        step_s=None if step_s is None else Interval(value=step_s, low=0.9 * step_s, high=1.1 * step_s),
        flops_per_step=123_000_000_000,
        energy_j=None if step_s is None else 25 * step_s,
        energy_boundary="package (modelled: power x time)",
        usd=None if step_s is None else 1.2e-5 * step_s,
        co2_g=None if step_s is None else 2.5e-3 * step_s,
        peak_phase="backward",
        peak_op="aten::mm",
    )


def timeline(peak_bytes: int, points: int = 900, *, teeth: int = 0) -> tuple[int, ...]:
    """Up during forward, down during backward, with a saw for recomputed blocks."""
    rest = peak_bytes / 4

    def at(i: int) -> int:
        x = i / points
        rise = min(x / 0.4, 1.0, max(0.0, (0.95 - x) / 0.55))
        saw = 0.25 * (1 - (x * teeth) % 1.0) if teeth and x > 0.4 else 0.0
        return int(rest + (peak_bytes - rest) * min(1.0, (0.75 if teeth else 1.0) * rise + saw * (rise > 0)))

    return tuple(at(i) for i in range(points))


def losses(seed: int, shift: float = 0.0) -> tuple[float, ...]:
    wave = (0.02 * math.sin(1.7 * i + seed) for i in range(STEP_COUNT))
    return tuple(0.75 + 0.35 * math.exp(-i / 12) + shift + w for i, w in enumerate(wave))


def run(name: str, role: str, plan: Plan, *, seed: int = 0, capped: bool, oom: bool = False) -> Run:
    peak = PEAKS[plan]
    spec = RunSpec(
        name=name,
        role=role,
        job=JobRef(spec="protein-ss"),
        plan=plan,
        seed=seed,
        steps=STEP_COUNT,
        cap_bytes=CAP if capped else None,
        timeline=seed == 0,
    )
    return Run(
        spec=spec,
        predicted_peak_bytes=peak,
        predicted_phase_peak_bytes=estimate(plan, peak).phase_peak_bytes,
        predicted_step_s=1.04 * STEPS_S[plan],
        measurement=_oom() if oom else _done(plan, seed, capped=capped),
    )


def _oom() -> Measurement:
    reason = "can't allocate memory: tried 18.0 MiB in encoder.layer.3 (forward)"
    return Measurement(outcome=OutcomeKind.OOM, reason=reason, limit_kind="RLIMIT_DATA")


def _done(plan: Plan, seed: int, *, capped: bool) -> Measurement:
    peak = int(PEAKS[plan] * 1.0004)
    phases = {k: int(v * 1.0003) for k, v in estimate(plan, PEAKS[plan]).phase_peak_bytes.items()}
    return Measurement(
        outcome=OutcomeKind.OK,
        steps_done=STEP_COUNT,
        peak_bytes=peak,
        peak_source="counting allocator",
        phase_peak_bytes=phases,
        rss_peak_bytes=peak + 400 * MIB,
        footprint_bytes=390 * MIB,
        limit_kind="RLIMIT_DATA" if capped else "",
        process_peak_bytes=int(1.03 * peak),
        overhead_ratio=1.03,
        step_s=(3 * STEPS_S[plan], *(STEPS_S[plan] + 0.01 * (i % 3 - 1) for i in range(STEP_COUNT - 1))),
        losses=losses(seed, 0.0 if plan == PLAIN else 0.004),
        metric=METRICS[plan] + 0.2 * seed + (SPREAD * (seed - 1) if plan == RECOMMENDED else 0.0),
        timeline_bytes=timeline(peak, 900, teeth=0 if plan == PLAIN else 6) if seed == 0 else (),
        weights_digest="5e1f" * 16,
        wall_s=30.0,
    )


def choice(plan: Plan, *reasons: Reason, effect: EffectClass = EffectClass.E2) -> Choice:
    peak = PEAKS[plan]
    return Choice(
        estimate=estimate(plan, peak, STEPS_S[plan]), fits=peak <= CAP, effect=effect, reasons=reasons
    )


def search() -> SearchResult:
    best = choice(
        RECOMMENDED,
        Reason(
            kind=ReasonKind.SAVES,
            technique="activation-checkpointing",
            saved_bytes=310 * MIB,
            time_ratio=1.35,
        ),
        Reason(kind=ReasonKind.SAVES, technique="bf16-autocast", saved_bytes=148 * MIB, time_ratio=0.87),
        Reason(
            kind=ReasonKind.SAVES, technique="gradient-accumulation", saved_bytes=72 * MIB, time_ratio=1.1
        ),
        Reason(
            kind=ReasonKind.LEFT_OUT_SLOWER,
            technique="saved-tensor-offload",
            saved_bytes=30 * MIB,
            time_ratio=2.4,
        ),
        Reason(
            kind=ReasonKind.LEFT_OUT_NOT_NEEDED, technique="adamw-8bit", saved_bytes=20 * MIB, time_ratio=1.02
        ),
        Reason(kind=ReasonKind.LEFT_OUT_ACCURACY, technique="lora", detail="rounding"),
        Reason(kind=ReasonKind.LEFT_OUT_UNAVAILABLE, technique="qlora", detail="bitsandbytes"),
    )
    plain = choice(PLAIN, effect=EffectClass.E0)
    checkpointed = choice(CHECKPOINTED, effect=EffectClass.E0)
    return SearchResult(
        goal="fastest",
        cap_bytes=CAP,
        considered=412,
        baseline=plain,
        frontier=(best, choice(BOTH), checkpointed, choice(BF16), plain),
        recommended=best,
        smallest=best,
    )


def runs() -> tuple[Run, ...]:
    capped = run("baseline, capped", "baseline", PLAIN, capped=True, oom=True)
    pairs = [
        made
        for seed in (0, 1, 2)
        for made in (
            run("baseline", "baseline", PLAIN, seed=seed, capped=False),
            run("recommended", "recommended", RECOMMENDED, seed=seed, capped=True),
        )
    ]
    ablations = [
        run(f"ablation: {plan.label}", "ablation", plan, capped=False) for plan in (BF16, CHECKPOINTED, BOTH)
    ]
    return (capped, *pairs, *ablations)


def interactions() -> tuple[Interaction, ...]:
    def table(quantity: str, values: dict[Plan, float]) -> Interaction:
        return Interaction(
            first="bf16-autocast",
            second="activation-checkpointing",
            quantity=quantity,
            neither=values[PLAIN],
            first_only=values[BF16],
            second_only=values[CHECKPOINTED],
            both=values[BOTH],
        )

    return (
        table("peak_bytes", {p: float(v) for p, v in PEAKS.items()}),
        table("step_s", STEPS_S),
        table("metric", METRICS),
    )


def verdicts() -> tuple[NamedVerdict, ...]:
    paired = Verdict(
        kind=VerdictKind.EQUIVALENT,
        effect=EffectClass.E2,
        test="two one-sided t-tests on paired seeds",
        reason="the 90 % interval lies inside the margin",
        metric="Q3",
        margin=2.0,
        difference=0.1,
        low=-0.62,
        high=0.82,
        pairs=3,
        power=0.93,
        cause=Cause(kind="inside"),
    )
    wide = dataclasses.replace(
        paired,
        kind=VerdictKind.UNDECIDED,
        reason="the interval reaches beyond the margin: 5 seeds would do",
        difference=-0.2,
        low=-2.7,
        high=2.3,
        power=0.41,
        cause=Cause(kind="neither_yet", needed_count=5),
    )
    exact = Verdict(
        kind=VerdictKind.EQUIVALENT,
        effect=EffectClass.E0,
        test="bitwise equality of trained weights",
        reason="SHA-256 digests are equal",
        pairs=3,
        cause=Cause(kind="equal_bits"),
    )
    return (
        NamedVerdict(name="recommended", plan=RECOMMENDED, verdict=paired),
        NamedVerdict(name="ablation: bf16-autocast", plan=BF16, verdict=wide),
        NamedVerdict(name="ablation: activation-checkpointing", plan=CHECKPOINTED, verdict=exact),
    )


def paper() -> tuple[PaperRow, ...]:
    def row(machine: str, memory_gib: float, plain_gib: float, best_gib: float | None) -> PaperRow:
        return PaperRow(
            machine=machine,
            size="ESM-2 3B, 1,024 residues",
            device_memory_bytes=int(memory_gib * GIB),
            plain=estimate(PLAIN, plain_gib * GIB, 1.9),
            plain_fits=plain_gib <= memory_gib,
            recommended=None if best_gib is None else estimate(RECOMMENDED, best_gib * GIB, 2.3),
            note="" if best_gib else "optimizer state alone is 34 GiB",
        )

    return (
        row("H100 80GB", 79.6, 131, 61),
        row("L40S 48GB", 44.7, 131, 43),
        row("RTX 4090", 23.6, 131, None),
    )


def reach() -> tuple[LargestSize, ...]:
    return (
        LargestSize(
            machine="H100 80GB",
            quantity="parameters",
            plain=1.2e9,
            recommended=3.8e9,
            plain_label="ESM-2 1.2B",
            recommended_label="ESM-2 3.8B",
        ),
        LargestSize(machine="H100 80GB", quantity="length", plain=1024, recommended=6144, at_limit=True),
        LargestSize(machine="RTX 4090", quantity="length", plain=None, recommended=1536),
    )


def full_poc() -> Poc:
    return Poc(
        poc_id="2026-03-01-5e1f",
        created="2026-03-01T09:30:00+00:00",
        command="memfit poc protein-ss",
        job_name="protein-ss",
        job_title="Protein secondary structure, three states",
        job_size="tiny",
        data_source="2,500 PDB chains, 30 % identity clusters; CC0",
        parameter_count=7_400_000,
        workload=Workload(
            model="protein-ss", parameter_count=7_400_000, batch_size=24, length=128, length_unit="residues"
        ),
        metric="Q3",
        metric_unit="percentage points",
        metric_naive=38.1,
        metric_naive_name="majority class",
        metric_margin_source="seed-to-seed spread of plain training",
        machine="2-core x86-64 processor, 8 GiB",
        environment={"python": "3.11.9", "torch": "2.13.0", "platform": "Linux x86_64", "threads": "2"},
        cap_bytes=CAP,
        cap_reason="demonstration: a quarter of the baseline's predicted peak",
        search=search(),
        runs=runs(),
        verdicts=verdicts(),
        interactions=interactions(),
        reproducibility=Reproducibility(reproducible=True, detail="seed 0 twice: equal weights"),
        effort=Effort(
            commands=1,
            changed_lines=0,
            packages=21,
            installed_mib=812.4,
            attended_minutes=None,
            failed_attempts=0,
        ),
        step_time_ratio=1.31,
        predicted_timeline_bytes={
            "baseline": timeline(PEAKS[PLAIN], 700),
            "recommended": timeline(PEAKS[RECOMMENDED], 700, teeth=6),
        },
        paper=paper(),
        reach=reach(),
        place="Japan, grid average",
        steps_per_run=STEP_COUNT,
        notes=("Step times were measured beside another busy process.",),
        took_s=431.0,
    )


def minimal_poc() -> Poc:
    """Interrupted before its first run ended: only the search is there."""
    poc = full_poc()
    return dataclasses.replace(
        poc,
        search=dataclasses.replace(search(), recommended=None, frontier=()),
        runs=(),
        verdicts=(),
        interactions=(),
        reproducibility=Reproducibility(reproducible=None),
        step_time_ratio=None,
        predicted_timeline_bytes={},
        paper=(),
        reach=(),
        environment={},
        notes=(),
        metric_naive=None,
        data_source="",
        place="",
        finished=False,
    )


def offers() -> tuple[Offer, ...]:
    """Two small cards that take the recommended plan only, and two larger that take plain training too."""

    def offer(machine: str, plain: bool, fits: bool, step_s: float, watts: float) -> Offer:
        return Offer(
            machine=machine,
            size="paper",
            plan="plain training" if plain else RECOMMENDED.label,
            plain=plain,
            fits=fits,
            memory_bytes=Interval(value=20.0 * GIB, low=19.0 * GIB, high=21.0 * GIB),
            step_s=Interval(value=step_s, low=0.7 * step_s, high=1.3 * step_s),
            power_w=watts,
        )

    return (
        offer("RTX-4090", True, False, 1.0, 500.0),
        offer("RTX-4090", False, True, 1.25, 500.0),
        offer("L4", True, False, 4.0, 150.0),
        offer("L4", False, True, 5.0, 150.0),
        offer("A100-80GB-PCIe", True, True, 0.8, 420.0),
        offer("A100-80GB-PCIe", False, True, 0.9, 420.0),
        offer("H100-PCIe", True, True, 0.5, 600.0),
        offer("H100-PCIe", False, True, 0.55, 600.0),
    )
