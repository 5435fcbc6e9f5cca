"""Find the techniques of a plan that no exported file applies, so that the user's own script must apply
them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from memfit.engines import accelerate
from memfit.engines.registry import ENGINES
from memfit.techniques.rank_mesh import layout
from memfit.techniques.registry import effect_of, splits_batch, technique
from memfit.types.dependence import SampleDependence
from memfit.types.errors import UserError, suggest
from memfit.types.job import Job
from memfit.types.launch import LaunchConfig, RunSpec
from memfit.types.plan import Plan, Use

CLIP = "clipping"  # the name under which a script acknowledges that it clips gradients
LOSS_TERMS = "loss-terms"  # the name under which it acknowledges that it weights losses by their terms
_BATCHES = 4  # whose parts are compared: if all have equally many terms, no weights are needed
_SPLIT = "gradient-accumulation"
_BUCKETS = (
    "Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb={bucket_mib}, "
    "gradient_as_bucket_view={bucket_view})])"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScriptStep:
    """A part of the plan that the user's script must implement itself. ``name``: the technique, "clipping"
    for gradient clipping, or "loss-terms" for the weights of losses. ``text``: what the script must call or
    do, for a person to read."""

    name: str
    text: str


def script_steps(spec: RunSpec) -> tuple[ScriptStep, ...]:
    """Return the steps that the user's script must implement itself because no exported file of the engine
    applies them: techniques, in the plan's order, and last gradient clipping if the run clips. With
    Accelerate, ddp is one of them if its buckets are not those of torch's default, which no file sets."""
    return tuple(_steps(spec))


def loss_terms_step(job: Job, plan: Plan, *, trainer: bool = False) -> ScriptStep | None:
    """Return the step "loss-terms": the user's own training code must weight the loss of each part of a batch
    by its number of loss terms, as memfit does, because libraries weight all parts alike. None if ``plan``
    does not split the batch, if the job has no ``loss_terms``, or if in each of its first four batches, all
    parts have equally many. ``trainer``: whether the Trainer of transformers trains. Errors of the job's
    make_batch and loss_terms are not caught."""
    if job.loss_terms is None or not splits_batch(plan):
        return None
    ranks = layout(plan).data if plan.ranks > 1 else 1
    parts = math.prod(int(u.settings.get("micro_batches", 1)) for u in plan.uses)
    if not any(_terms_differ(job, step, ranks * parts) for step in range(_BATCHES)):
        return None
    factor = "terms / step_terms" if ranks == 1 else f"{ranks} * terms / step_terms"
    text = (
        f"multiply the mean loss of each micro-batch by {factor} before backward; terms is the job's "
        f"loss_terms of the micro-batch, step_terms that of the whole step ({ranks * parts} micro-batches"
        + (f" on {ranks} ranks)" if ranks > 1 else ")")
    )
    if parts > 1:
        library = "the Trainer does" if trainer else "DeepSpeed and Accelerate do"
        text += f"; and by {parts} if the library divides each loss by {parts}, as {library}"
    if trainer:
        text += (
            "; for a model that accepts num_items_in_batch the Trainer does all this itself, if the terms "
            "are the labels other than -100"
        )
    return ScriptStep(name=LOSS_TERMS, text=text)


def dependence_caution(plan: Plan, dependence: SampleDependence | None) -> str | None:
    """Return a line "EFFECT: SENTENCE." if the plan splits a batch whose samples depend on each other, or if
    this was not tested. SENTENCE says so, and EFFECT is the plan's effect class, such as "E3". None if
    samples are independent, or if the plan does not split the batch (``dependence`` is None)."""
    if dependence is None or not dependence.sentence:
        return None
    return f"{effect_of(plan, dependence).label}: {dependence.sentence}."


def _terms_differ(job: Job, step: int, parts: int) -> bool:
    from memfit.model.batch_objects import batch_length, split

    assert job.loss_terms is not None
    batch = job.make_batch(step, 0)
    return len({job.loss_terms(part) for part in split(batch, min(parts, batch_length(batch)))}) > 1


def _steps(spec: RunSpec) -> Iterator[ScriptStep]:
    plan, applied = spec.plan, ENGINES[spec.engine].applied_by_files
    for use in plan.uses:
        if use.technique == "ddp" and spec.engine == "accelerate" and not _has_default_buckets(use):
            yield ScriptStep(name="ddp", text=_BUCKETS.format(**use.settings))
        elif use.technique not in applied and not _by_accelerate(spec, use):
            yield ScriptStep(name=use.technique, text=step_text(use, plan))
    if spec.clip and CLIP not in applied and ("zero" not in plan or spec.engine == "native"):
        call = "accelerator" if spec.engine == "accelerate" else "torch.nn.utils"
        yield ScriptStep(name=CLIP, text=f"{call}.clip_grad_norm_(model.parameters(), {spec.clip:g})")


def step_text(use: Use, plan: Plan) -> str:
    """Return what a script must call or do for the technique ``use`` of ``plan``, for a person to read."""
    settings = dict(use.settings)
    if use.technique == "activation-checkpointing":
        interval = int(settings["every"])
        settings["blocks"] = "every block" if interval == 1 else f"one block of {interval}"
    text = technique(use.technique).script_call.format(**settings)
    if use.technique == "lora" and settings.get("dora"):
        text = f"{text}, with use_dora=True"
    reduces_once = any(plan_use.settings.get("sync") == "last" for plan_use in plan.uses)
    return (
        f"{text}, the only one that reduces gradients" if use.technique == _SPLIT and reduces_once else text
    )


def _has_default_buckets(use: Use) -> bool:
    """Return whether ``use``, of the technique ddp, has the buckets of torch's DDP by default (25 MiB,
    gradients not views of them), with which Accelerate creates it."""
    return (use.settings["bucket_mib"], use.settings["bucket_view"]) == (25, False)


def _by_accelerate(spec: RunSpec, use: Use) -> bool:
    """Return whether Accelerate applies ``use`` for a script: True with the engine accelerate for
    activation-checkpointing of every block under fsdp2 (accelerate.yaml switches it on), and for
    gradient-accumulation under zero (DeepSpeed's file sets it). False for all else."""
    if use.technique == _SPLIT:
        return spec.engine == "accelerate" and "zero" in spec.plan
    every_block = use.technique == "activation-checkpointing" and use.settings["every"] == 1
    return every_block and spec.engine == "accelerate" and "fsdp2" in spec.plan


def check_acknowledged(steps: Sequence[ScriptStep], acknowledged: Sequence[str], *, script: str) -> None:
    """Check that the user declared, with ``--script-applies``, that the script does each of ``steps``:
    ``acknowledged`` must have its name, or "all". Raises UserError for a name in ``acknowledged`` that is
    neither "all" nor one of ``steps``, and with a list of the steps that are not declared. ``script``: the
    file name for the message, or a description."""
    names = [step.name for step in steps]
    for name in acknowledged:
        if name not in (*names, "all"):
            raise UserError(
                f"--script-applies {name}: {name} is not among the parts of the plan that the script must "
                "apply itself",
                allowed=", ".join(("all", *names)),
                hint=suggest(name, names),
            )
    if "all" in acknowledged or not (missing := [s for s in steps if s.name not in acknowledged]):
        return
    steps_text = "; ".join(f"({n}) {s.name}: {s.text}" for n, s in enumerate(missing, 1))
    raise UserError(
        f"no exported file applies these parts of the plan, so {script} must; otherwise it trains a "
        f"different plan from the predicted one: {steps_text}",
        hint=f"when {script} applies them, confirm it with --script-applies {','.join(names)}",
    )


def script_files(config: LaunchConfig) -> Mapping[str, str]:
    """Return the files of the launch for a script of the user, name -> text. They are ``config.files``, with
    one exception: for a plan with fsdp2 and activation-checkpointing of every block on the engine accelerate,
    accelerate.yaml switches the recomputation on, which memfit's worker does itself."""
    import yaml

    checkpointing = config.spec.plan.get("activation-checkpointing")
    if checkpointing is None or not _by_accelerate(config.spec, checkpointing):
        return config.files
    data = yaml.safe_load(config.files[accelerate.CONFIG])
    data["fsdp_config"]["fsdp_activation_checkpointing"] = True
    return {**config.files, accelerate.CONFIG: yaml.safe_dump(data, sort_keys=False)}
