"""A plan as an edit of the user's own training script, in the idiom of the script's library.

Hugging Face's TrainingArguments get keyword arguments, Accelerate's Accelerator and Lightning's Trainer too,
and a loop of plain PyTorch gets the lines of ``memfit.apply``. The script is only read.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from memfit.export import trainer
from memfit.export.batch_counts import BatchCounts
from memfit.export.loop_edit import apply_lines, edit_loop, loop_lines
from memfit.export.loop_update import loaded_names
from memfit.export.script_steps import loss_terms_step, step_text
from memfit.export.source_edits import Replacement, Source, literal, name_of, source_of
from memfit.export.training_loop import sets_precision, with_conditions, wrappers
from memfit.files.read import MOST_SOURCE_BYTES, read_text
from memfit.techniques.base import JobFacts
from memfit.techniques.precision import WITHOUT_LOSS_SCALE, clash_with_loss_scale
from memfit.techniques.rank_mesh import layout, split_batch
from memfit.techniques.registry import TECHNIQUES, make_plain_plan, technique
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan

_ARGUMENTS = frozenset({"TrainingArguments", "Seq2SeqTrainingArguments"})
# Classes of trl that derive from TrainingArguments and have other defaults.
_DERIVED = frozenset(
    {"SFTConfig", "DPOConfig", "KTOConfig", "ORPOConfig", "CPOConfig", "RewardConfig", "GRPOConfig"}
)
_DEFAULTS = {
    "bf16": False,
    "fp16": False,
    "gradient_checkpointing": False,
    "gradient_accumulation_steps": 1,
    "optim": "adamw_torch",
}
_BATCH, _STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"
_BY_LAUNCH = frozenset({"ddp", "fsdp2", "zero"})
_UNDIVIDED_LOSS = (
    "if forward of the model takes **kwargs and its loss ignores num_items_in_batch, as BERT's heads do, the "
    "Trainer adds up the losses of the micro-batches in place of averaging them, and the gradients become as "
    "many times as large: set model.accepts_loss_kwargs = False before the Trainer is made"
)
_LOADER_ARGUMENTS = ("dataset", "batch_size", "shuffle")  # in the order of DataLoader's


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScriptDiff:
    """An edit of a script. ``diff``: the unified diff, for ``patch -p0``; "" if nothing changes or the script
    cannot be edited. ``reason``: why it cannot be edited, "" if it can. ``lines``: if it cannot, the lines to
    insert by hand. ``remarks``: what the user should know of the edit, one text each."""

    diff: str
    reason: str = ""
    lines: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def read_script(path: Path) -> Source:
    """Return the source of the script ``path``. Raises UserError if it cannot be read, is too large or is not
    Python."""
    return Source(path.as_posix(), read_text(path, most_bytes=MOST_SOURCE_BYTES))


def script_diff(
    source: Source,
    plan: Plan,
    *,
    batch_size: int,
    structure: Mapping[str, Any] = {},
    job: Job | None = None,
    keeps_enabled: bool = False,
    on_host: bool = False,
    own_micro_batches: int = 1,
) -> ScriptDiff:
    """Return the edit of the script that makes it train with ``plan``. ``batch_size``: samples of a whole
    step, for which the plan was made. ``structure``: the job's fields that say where things are in the model,
    such as blocks, name -> value. ``keeps_enabled``: precision, checkpointing and compilation that the
    script's TrainingArguments enable stay on, as for a plan that was searched for the step of this script;
    otherwise those that the plan lacks are switched off. ``on_host``: the plan is for a processor, on which
    TrainingArguments refuse 16-bit precision without use_cpu. ``own_micro_batches``: in how many the script's
    own loop splits the batch of a step, as far as known.

    A script whose form cannot be edited gets a reason and lines to insert by hand. Techniques that Accelerate
    or Lightning does not apply are in the remarks. If the parts of the batch of ``job`` have different
    numbers of loss terms, an edited loop passes ``loss_terms`` to memfit.apply, which the user must define;
    for the Trainer this is a remark.

    Raises UserError if TrainingArguments cannot express the plan, if a plain loop clips gradients or scales
    its loss with a GradScaler although a technique forbids it, if the script's batch cannot be split into
    equal micro-batches, and if Accelerate or Lightning would weight parts with different numbers of loss
    terms alike."""
    calls = source.calls(_ARGUMENTS | _DERIVED)
    is_trainer = _uses_trainer(source)
    weights = loss_terms_step(job, plan, trainer=is_trainer) if job is not None else None
    by_hand = (weights.text,) if weights is not None else ()
    if calls:
        values = _trainer_arguments(plan, batch_size, keeps_enabled=keeps_enabled, on_host=on_host)
        edit = _trainer_diff(source, calls, plan, batch_size, values)
        return dataclasses.replace(edit, remarks=(*edit.remarks, *by_hand))
    if is_trainer:
        values = _trainer_arguments(plan, batch_size, keeps_enabled=keeps_enabled, on_host=on_host)
        lines = tuple(f"{k}={source_of(v)}" for k, v in values.items())
        reason = "the script takes its TrainingArguments from elsewhere, such as the command line"
        return ScriptDiff(diff="", reason=reason, lines=lines, remarks=by_hand)
    for library, is_used in ((_ACCELERATE, True), (_LIGHTNING, _imports_lightning(source))):
        if is_used and (calls := source.calls(frozenset({library.call}))):
            if weights is not None:
                raise UserError(
                    f"{library.name} weights all parts of a batch (micro-batches, ranks) alike, but those of "
                    f"the job have different numbers of loss terms; the script would have to {weights.text}",
                    hint="use a plan that does not split the batch, such as that of `memfit plan --without "
                    "gradient-accumulation` on one rank; or let the script weight its losses, and use "
                    f"`memfit export --script` with --script-applies {weights.name}",
                )
            return _library_diff(source, calls, plan, library, batch_size)
    clashing = [use.technique for use in plan.uses if _needs_no_clipping(use.technique)]
    if clashing and _always_clips(source):
        without = " ".join(f"--without {name}" for name in clashing)
        raise UserError(
            f"{source.path} clips gradients, which cannot be combined with {', '.join(clashing)}",
            hint=f"`memfit plan {without}` finds a plan without them",
        )
    scaled = () if sets_precision(plan) else clash_with_loss_scale(plan)
    if scaled and _always_scales_loss(source):
        without = " ".join(f"--without {name}" for name in scaled)
        raise UserError(
            f"{source.path} scales its loss with a GradScaler, which cannot be combined with "
            f"{', '.join(scaled)}",
            hint=f"`memfit plan {without}` finds a plan without them",
        )
    terms = "loss_terms" if weights is not None else ""
    define = ("define loss_terms(batch), which returns how many terms the loss of a batch averages",)
    try:
        samples = batch_size // layout(plan).data
        text, remarks = edit_loop(
            source, plan, structure, samples, loss_terms=terms, own_micro_batches=own_micro_batches
        )
    except UserError as error:
        further = {"loss_terms": terms, **_own_arguments(source, plan)}
        model, optimizer = _model_and_optimizer(source)
        lines = (
            "import memfit",
            *apply_lines(plan, model, optimizer, structure, further=further),
            *loop_lines("batch", samples, optimizer=optimizer),
        )
        return ScriptDiff(diff="", reason=error.given, lines=lines, remarks=define if terms else ())
    return ScriptDiff(diff=_diff_to(source, text), remarks=(*(define if terms else ()), *remarks))


def trains_plainly(source: Source, ranks: int) -> bool:
    """Return whether the script as it is makes plain training of ``ranks`` ranks: on one, if it uses
    DistributedDataParallel, or if its library does that. Others do not average gradients over the ranks."""
    libraries = frozenset({_ACCELERATE.call} | ({_LIGHTNING.call} if _imports_lightning(source) else set()))
    return (
        ranks == 1
        or _uses_trainer(source)
        or bool(source.calls(libraries))
        or any(name == "DistributedDataParallel" for name, _, _ in wrappers(source))
    )


def why_no_edit(source: Source, ranks: int) -> str:
    """Return why the script cannot be edited for plain training on ``ranks`` ranks, and so for no other plan
    of as many; "" if it can, or if that depends on the plan."""
    try:
        return script_diff(source, make_plain_plan(ranks), batch_size=ranks).reason
    except UserError:
        return ""


def inexpressible(source: Source) -> tuple[tuple[str, ...], str]:
    """Return (the names of the techniques that cannot be applied to the script, whatever their settings; why
    not, in words); ((), "") if there are none. A search leaves them out, so that what it recommends can be
    printed as an edit."""
    if _uses_trainer(source):
        return _others(trainer.TECHNIQUES), "TrainingArguments cannot express them"
    for library, is_used in ((_ACCELERATE, True), (_LIGHTNING, _imports_lightning(source))):
        if is_used and source.calls(frozenset({library.call})):
            own = {*library.precision, "gradient-accumulation"} | _BY_LAUNCH
            return _others(own), f"{library.name} does not apply them"
    clips, scales = _always_clips(source), _always_scales_loss(source)
    names = [n for n in TECHNIQUES if clips and _needs_no_clipping(n)]
    names += [n for n in WITHOUT_LOSS_SCALE if scales and n not in names]
    reasons = ["clips gradients"] * clips + ["scales its loss with a GradScaler"] * scales
    return tuple(names), f"the script {' and '.join(reasons)}" if reasons else ""


def _uses_trainer(source: Source) -> bool:
    return bool(source.calls(_ARGUMENTS | _DERIVED)) or any(
        _mentions(source, name) for name in ("TrainingArguments", "HfArgumentParser")
    )


def _others(names: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in TECHNIQUES if name not in names)


def _always_clips(source: Source) -> bool:
    """Return whether the script clips gradients under no condition. Where one decides, such as an argument
    of the script, the edited script passes the norm to memfit.apply, which refuses it with such a plan."""
    nodes = with_conditions(source.tree, is_conditional=False)
    return any(
        isinstance(node, ast.Call) and name_of(node.func) == "clip_grad_norm_" and not is_conditional
        for node, is_conditional in nodes
    )


def _own_arguments(source: Source, plan: Plan) -> dict[str, str]:
    """Return the source of memfit.apply's arguments clip and scaler for a script that clips gradients or has
    a GradScaler which the plan does not replace: a literal norm and the script's variable, or else "..." for
    the user to fill in."""
    arguments = dict[str, str]()
    if clips := source.calls(frozenset({"clip_grad_norm_"})):
        norms = {source.of(c.args[1]) for c in clips if len(c.args) > 1 and literal(c.args[1]) is not None}
        arguments["clip"] = norms.pop() if len(norms) == len(clips) == 1 else "..."
    if not sets_precision(plan) and (scalers := source.calls(frozenset({"GradScaler"}))):
        names = [name for name, value in _assignments(source) if value in scalers]
        arguments["scaler"] = names[0] if len(names) == len(scalers) == 1 else "..."
    return arguments


def _model_and_optimizer(source: Source) -> tuple[str, str]:
    """Return the variables (MODEL, OPTIMIZER) of the script's only assignment of the form ``OPTIMIZER =
    NAME(MODEL.parameters(), ...)`` whose variable the script steps. If there is none or more than one, MODEL
    is the only one whose parameters() the script calls, and OPTIMIZER the only one that it steps and whose
    gradients it sets to zero; "model" and "optimizer" without."""
    calls = [
        n for n in ast.walk(source.tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    ]
    methods = ("step", "zero_grad", "parameters")
    calls_of = {name: [c for c in calls if name_of(c.func) == name] for name in methods}
    owners = {name: {source.of(c.func.value) for c in calls_of[name]} for name in methods}  # type: ignore[attr-defined]
    stepped = owners["step"] | {source.of(a) for c in calls_of["step"] for a in c.args}
    pairs = set[tuple[str, str]]()
    for name, value in _assignments(source):
        argument = value.args[0] if isinstance(value, ast.Call) and value.args else None
        parameters = argument.func if isinstance(argument, ast.Call) else None
        is_model = isinstance(parameters, ast.Attribute) and parameters.attr == "parameters"
        if is_model and name in stepped:
            pairs.add((source.of(parameters.value), name))  # type: ignore[union-attr]
    if len(pairs) == 1:
        return pairs.pop()
    models, optimizers = owners["parameters"], stepped & owners["zero_grad"]
    return (
        models.pop() if len(models) == 1 else "model",
        optimizers.pop() if len(optimizers) == 1 else "optimizer",
    )


def _assignments(source: Source) -> Iterator[tuple[str, ast.expr]]:
    """Yield (variable or attribute, value) for each assignment to a single one."""
    for node in (n for n in ast.walk(source.tree) if isinstance(n, ast.Assign) and len(n.targets) == 1):
        if isinstance(target := node.targets[0], ast.Name | ast.Attribute):
            yield source.of(target), node.value


def _always_scales_loss(source: Source) -> bool:
    """Return whether the script makes an enabled GradScaler under no condition. Where one decides, such as
    ``enabled=`` with an argument of the script, memfit.apply refuses an enabled one in the edited script."""
    calls = [
        node
        for node, is_conditional in with_conditions(source.tree, is_conditional=False)
        if isinstance(node, ast.Call) and name_of(node.func) == "GradScaler" and not is_conditional
    ]
    options = [{k.arg: k.value for k in call.keywords} for call in calls]
    return any(literal(o.get("enabled", ast.Constant(True))) is True for o in options)


def _needs_no_clipping(name: str) -> bool:
    """Return whether the technique ``name`` is excluded for jobs that clip gradients, and only for these."""
    facts = JobFacts(batch_size=1, block_count=0, vocabulary=0, device_kind=HOST)
    excluded = technique(name).excluded
    return excluded(dataclasses.replace(facts, clips_gradients=True)) and not excluded(facts)


def _diff_to(source: Source, text: str) -> str:
    """Return the unified diff from ``source`` to ``text``. Raises SyntaxError if ``text`` is not Python."""
    ast.parse(text)
    return source.diff(text)


def _mentions(source: Source, name: str) -> bool:
    return any(name_of(n) == name for n in ast.walk(source.tree) if isinstance(n, ast.Name | ast.Attribute))


# -- Hugging Face's Trainer -----------------------------------------------------------------------


def _trainer_diff(
    source: Source, calls: list[ast.Call], plan: Plan, batch_size: int, values: Mapping[str, Any]
) -> ScriptDiff:
    """Return the edit of ``calls`` of TrainingArguments. ``values``: the arguments that the plan decides.
    Raises UserError as `_batch_source` does."""
    call = calls[0]
    has_unpacked = any(k.arg is None for k in call.keywords)
    if len(calls) > 1 or has_unpacked:
        lines = tuple(f"{k}={source_of(v)}" for k, v in values.items())
        what = f"{len(calls)} calls of" if len(calls) > 1 else "a call with ** of"
        return ScriptDiff(diff="", reason=f"the script has {what} {name_of(call.func)}", lines=lines)
    remarks = [f"start it with torchrun --nproc-per-node {plan.ranks}"] if plan.ranks > 1 else []
    if "zero" in plan:
        remarks.append("deepspeed.json is written by `memfit export --to trainer --engine deepspeed`")
    sources = {name: source_of(value) for name, value in values.items()}
    sources[_BATCH], remark = _batch_source(source, call, plan, batch_size)
    remarks += [remark] if remark else []
    remarks += _batch_remarks(source, plan, call)
    present = {k.arg for k in call.keywords}
    keeps_defaults = name_of(call.func) in _ARGUMENTS
    changed_arguments = {
        name: text
        for name, text in sources.items()
        if name in present or not keeps_defaults or _DEFAULTS.get(name, ...) != values[name]
    }
    if _BATCH not in present and sources[_BATCH] == "8" and keeps_defaults:
        del changed_arguments[_BATCH]
    text = source.replaced(source.with_keywords(call, changed_arguments))
    return ScriptDiff(diff=_diff_to(source, text), remarks=tuple(remarks))


def _trainer_arguments(plan: Plan, batch_size: int, *, keeps_enabled: bool, on_host: bool) -> dict[str, Any]:
    """Return the TrainingArguments that the plan decides, name -> value. Those that stay as the script has
    them, such as output_dir and max_grad_norm, are left out. ``keeps_enabled`` and ``on_host`` are as in
    `script_diff`. Raises UserError if TrainingArguments cannot express the plan, and as
    `trainer.training_arguments` does."""
    if reasons := tuple(trainer.why_not(plan)):
        raise UserError(
            f"TrainingArguments cannot express this plan: {'; '.join(reasons)}",
            hint="`memfit plan --without TECHNIQUE` finds a plan without one of these techniques; or change "
            "their settings in the plan file",
        )
    values = trainer.training_arguments(plan, batch_size=batch_size, deepspeed="zero" in plan)
    own = () if any(use.technique in trainer.OPTIMIZERS for use in plan.uses) else ("optim",)
    kept = {
        "output_dir",
        "max_grad_norm",
        *own,
        *(k for k, v in values.items() if keeps_enabled and v is False),
    }
    cpu = {"use_cpu": True} if on_host and (values["bf16"] or values["fp16"]) else {}
    return {**{k: v for k, v in values.items() if k not in kept}, **cpu}


def _batch_source(source: Source, call: ast.Call, plan: Plan, batch_size: int) -> tuple[str, str]:
    """Return (the source of the batch size of one device and micro-batch; a remark, "" if there is none).
    With one rank, the batch of a whole step stays as the script has it, if ``call`` states it; otherwise
    ``batch_size`` is divided. Raises UserError if the script's batch cannot be split equally."""
    steps = plan.micro_batches
    share = layout(plan).data * steps
    arguments = {k.arg: k.value for k in call.keywords}
    batch, old_steps = arguments.get(_BATCH), arguments.get(_STEPS)
    if batch is None or plan.ranks > 1:
        return str(batch_size // share), ""
    text, whole = _micro_batch(source, batch, old_steps, steps)
    if whole is None:
        return text, f"the plan was made for a batch of {batch_size}: give the script that, too"
    differs = f"the plan was made for a batch of {batch_size}, but the script trains with {whole}"
    return text, differs if whole != batch_size else ""


def _micro_batch(
    source: Source, batch: ast.expr, old_steps: ast.expr | None, steps: int
) -> tuple[str, int | None]:
    """Return (the source of the number of samples of one of ``steps`` micro-batches; the samples of a whole
    step, None if the script has no number for them). So far, the script trains with ``old_steps`` (None: 1)
    micro-batches of ``batch`` samples. Raises UserError if the whole cannot be split into equal parts."""
    size, count = literal(batch), 1 if old_steps is None else literal(old_steps)
    if isinstance(size, int) and isinstance(count, int):
        whole = size * count
        if whole % steps:
            raise UserError(
                f"the script's batch of {whole} samples cannot be split into {steps} equal micro-batches",
                hint=f"change the script's batch to a multiple of {steps} samples",
            )
        return str(whole // steps), whole
    product = " * ".join(source.of(part) for part in (batch, old_steps) if part is not None)
    return (product if steps == 1 else f"{product} // {steps}"), None


def _batch_remarks(source: Source, plan: Plan, call: ast.Call) -> Iterator[str]:
    """Yield what to check if ``call`` states another number of micro-batches than the plan has; else
    nothing."""
    old_steps = next((literal(k.value) for k in call.keywords if k.arg == _STEPS), 1)
    if old_steps != plan.micro_batches:
        yield _UNDIVIDED_LOSS
    lines = [
        n.lineno
        for n in ast.walk(source.tree)
        if isinstance(n, ast.Attribute) and n.attr in {_BATCH, "train_batch_size"}
    ]
    if lines and old_steps != plan.micro_batches:
        yield (
            f"line {lines[0]} reads {_BATCH}, which is now that of one of {plan.micro_batches} "
            "micro-batches: check what it counts, such as the steps of a schedule"
        )


# -- Accelerate and Lightning ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Library:
    """How a library that runs the training step takes a plan: as keyword arguments of the class ``call``.
    ``precision``: technique -> (keyword, value). ``steps``: keyword for the number of micro-batches.
    ``accumulates``: the name that a script must contain for the library to accumulate gradients; "": none.
    ``launch``: a sentence that says where techniques of several ranks are given."""

    name: str
    call: str
    precision: Mapping[str, tuple[str, str]]
    steps: str
    accumulates: str
    launch: str


_ACCELERATE = _Library(
    name="Accelerate",
    call="Accelerator",
    precision={
        "bf16-autocast": ("mixed_precision", "bf16"),
        "fp16-autocast": ("mixed_precision", "fp16"),
    },
    steps=_STEPS,
    accumulates="accumulate",
    launch="`memfit export --engine accelerate` writes accelerate.yaml for `accelerate launch`",
)
_LIGHTNING = _Library(
    name="Lightning",
    call="Trainer",
    precision={
        "bf16-autocast": ("precision", "bf16-mixed"),
        "fp16-autocast": ("precision", "16-mixed"),
    },
    steps="accumulate_grad_batches",
    accumulates="",
    launch="Lightning takes several ranks as Trainer(devices=..., strategy=...), which is left to you",
)


def _imports_lightning(source: Source) -> bool:
    modules = [n.module or "" for n in ast.walk(source.tree) if isinstance(n, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(source.tree) if isinstance(n, ast.Import) for a in n.names]
    return any(m.partition(".")[0] in {"lightning", "pytorch_lightning"} for m in modules)


def _library_diff(
    source: Source, calls: list[ast.Call], plan: Plan, library: _Library, batch_size: int
) -> ScriptDiff:
    values: dict[str, Any] = dict(argument for name, argument in library.precision.items() if name in plan)
    changes: list[Replacement] = []
    steps, reason, counted = plan.micro_batches, "", list[str]()
    accumulates = any(k.arg == library.steps and literal(k.value) != 1 for c in calls for k in c.keywords)
    if steps > 1 or accumulates:
        values[library.steps] = steps
        changes, counted, reason = _smaller_batches(source, calls, steps, library)
    if any(k.arg is None for call in calls for k in call.keywords):
        reason = f"the script has a call of {library.call} with **"
    own = {*library.precision, "gradient-accumulation"}
    others = [u for u in plan.uses if u.technique not in own | _BY_LAUNCH]
    remarks = [f"{library.name} does not apply {use.technique}: {step_text(use, plan)}" for use in others]
    if any(use.technique in _BY_LAUNCH for use in plan.uses):
        remarks.append(library.launch)
    remarks += counted
    sources = {name: source_of(value) for name, value in values.items()}
    if reason:
        samples = split_batch(plan, batch_size)
        lines = [
            f"DataLoader(..., batch_size={samples})  # {_parts_text(plan, batch_size)}",
            f"{library.call}({', '.join(f'{k}={v}' for k, v in sources.items())})",
        ]
        if steps > 1 and library is _ACCELERATE and not _mentions(source, library.accumulates):
            lines.append("with accelerator.accumulate(model):  # around the step")
        return ScriptDiff(diff="", reason=reason, lines=tuple(lines), remarks=tuple(remarks))
    for call in calls:  # those of several branches
        changes += source.with_keywords(call, sources)
    return ScriptDiff(diff=_diff_to(source, source.replaced(changes)), remarks=tuple(remarks))


def _parts_text(plan: Plan, batch_size: int) -> str:
    """Return in words which part of the samples of a step a DataLoader gives at once, such as "one of 2 ranks
    x 4 micro-batches of 64 samples"; "all samples of a step" with one rank and micro-batch."""
    counts = ((layout(plan).data, "ranks"), (plan.micro_batches, "micro-batches"))
    parts = [f"{count} {name}" for count, name in counts if count > 1]
    return f"one of {' x '.join(parts)} of {batch_size} samples" if parts else "all samples of a step"


def _is_manual(source: Source) -> bool:
    """Return whether the script sets Lightning's ``automatic_optimization`` to False."""
    assigned = [n for n in ast.walk(source.tree) if isinstance(n, ast.Assign) and literal(n.value) is False]
    return any(name_of(target) == "automatic_optimization" for n in assigned for target in n.targets)


def _smaller_batches(
    source: Source, calls: list[ast.Call], steps: int, library: _Library
) -> tuple[list[Replacement], list[str], str]:
    """Return (the edits that make the batch of the training DataLoader one of ``steps`` micro-batches, and
    adapt schedules to it; remarks on what else the user should check; why the script cannot be edited so, ""
    if it can). ``calls``: those of the library's class, which may state a number of micro-batches already.
    Raises UserError if the script's batch cannot be split into ``steps`` equal parts."""
    if library.accumulates and not _mentions(source, library.accumulates):
        reason = "the loop has no `with accelerator.accumulate(model):`, which gradient accumulation needs"
        return [], [], reason
    if library is _LIGHTNING and _is_manual(source):
        return [], [], "the module optimizes manually, for which Lightning accumulates no gradients"
    loaders = _training_loaders(source)
    size = _loader_argument(loaders[0], "batch_size") if len(loaders) == 1 else None
    if size is None:
        return [], [], "the script does not show the batch size of its training DataLoader"
    stated = [next((k.value for k in call.keywords if k.arg == library.steps), None) for call in calls]
    if len({None if node is None else source.of(node) for node in stated}) > 1:
        return [], [], f"the calls of {library.call} differ in {library.steps}"
    text, _ = _micro_batch(source, size, stated[0], steps)
    counts = BatchCounts(source, loaders[0], steps, stated[0])
    edit = Replacement(start=source.start(size), end=source.end(size), text=text)
    return [edit, *counts.changes], counts.remarks, ""


def _training_loaders(source: Source) -> list[ast.Call]:
    """Return the calls of DataLoader that may make the one for training: of several, those that shuffle if
    any do; if these are several or none, the only one assigned to a variable that the loop with backward
    runs over."""
    every = source.calls(frozenset({"DataLoader"}))
    loaders = [call for call in every if literal(_loader_argument(call, "shuffle")) is True] or every
    if len(loaders) == 1:
        return loaders
    runs_over = {
        name
        for loop in ast.walk(source.tree)
        if isinstance(loop, ast.For)
        and any(isinstance(n, ast.Call) and name_of(n.func) == "backward" for n in ast.walk(loop))
        for name in loaded_names(loop.iter)
    }
    variables = dict(_assignments(source))
    assigned = [call for call in loaders if any(variables.get(name) is call for name in runs_over)]
    return assigned if len(assigned) == 1 else loaders


def _loader_argument(call: ast.Call, name: str) -> ast.expr | None:
    """Return the argument ``name`` of a call of DataLoader, given by keyword or by position; None if it is
    not given, or if ``*`` hides the positions."""
    place = _LOADER_ARGUMENTS.index(name)
    by_position = call.args[place] if place < len(call.args) else None
    if any(isinstance(a, ast.Starred) for a in call.args[: place + 1]):
        return None
    return next((k.value for k in call.keywords if k.arg == name), by_position)
