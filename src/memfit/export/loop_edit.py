"""Edit a training loop of plain PyTorch so that ``memfit.apply`` applies a plan in it.

`export.training_loop` says which loops are edited. Clipping of the loop's own is passed to memfit.apply. So
is a GradScaler, and autocast stays, unless the plan has an autocast, which replaces both.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from typing import Any

from memfit.export.loop_update import (
    Statements,
    end,
    lists_of,
    loaded_names,
    stored_names,
    targets_of,
)
from memfit.export.own_lines import on_own_lines, with_original_lines
from memfit.export.self_variables import source_with_self_variables
from memfit.export.source_edits import Source, literal, name_of, number_lines, source_of
from memfit.export.step_counters import repeated_lines
from memfit.export.training_loop import Loop, LoopSetup, find_loop, wrappers
from memfit.techniques.precision import clash_with_loss_scale
from memfit.techniques.registry import make_use
from memfit.types.errors import UserError
from memfit.types.plan import Plan, Use

_NEED_EXAMPLE = frozenset({"chunking", "tensor-parallel", "context-parallel"})
_MEAN = "the loss must be a mean over the samples; for a mean over other terms, give loss_terms="
_FEW = 2  # settings of a technique that are all written
Edits = dict[tuple[int, int], list[str]]  # (first line, last line) -> the lines that replace them


def apply_lines(
    plan: Plan,
    model: str,
    optimizer: str,
    structure: Mapping[str, Any],
    *,
    further: Mapping[str, str] = {},
    fit: str = "fit",
) -> list[str]:
    """Return the lines of Python that apply ``plan``, with ``memfit.apply``, to the variables ``model`` and
    ``optimizer``. ``structure``: further arguments of it, name -> value, which say where things are in the
    model, such as its blocks. ``further``: the source of its arguments clip, scaler, batch and loss_terms,
    by name; "": not passed. ``fit``: the variable of the `Fit`."""
    arguments = [_plan_source(plan), model, optimizer]
    arguments += [f"{name}={source_of(value)}" for name, value in structure.items()]
    arguments += [f"{name}={value}" for name, value in further.items() if value]
    one_line = f"{fit} = memfit.apply({', '.join(arguments)})"
    lines = [one_line]
    if len(one_line) > 96:
        lines = [f"{fit} = memfit.apply(", *(f"    {argument}," for argument in arguments), ")"]
    return [*lines, f"{model}, {optimizer} = {fit}.model, {fit}.optimizer"]


def loop_lines(batch: str, samples: int, *, optimizer: str) -> list[str]:
    """Return the lines of a training step that uses a plan, for a person to insert into a loop. ``batch``,
    ``optimizer``: variables. ``samples``: samples of a step on one rank, which a comment names."""
    return [
        f"for {batch} in fit.split({batch}):  # of all {samples} samples of a step",
        "    with fit.forward():",
        "        loss = ...  # forward and loss, as before",
        "    fit.backward(loss)  # in place of loss.backward()",
        f"fit.step()  # in place of {optimizer}.step(); it frees the gradients, too",
    ]


def edit_loop(
    source: Source,
    plan: Plan,
    structure: Mapping[str, Any],
    samples: int,
    *,
    loss_terms: str = "",
    own_micro_batches: int = 1,
) -> tuple[str, tuple[str, ...]]:
    """Return (the text of the script with its loop edited to train with ``plan``; remarks for the user).
    ``structure`` is as in `apply_lines`, and ``loss_terms`` the source of that argument; ``samples`` is as in
    `loop_lines`. ``own_micro_batches`` is as in `script_diff`. Raises UserError, whose ``given`` is the
    reason, if the script splits its batch itself, if it has no loop that can be edited safely, if its batch
    cannot be split into micro-batches (`_must_split_alike`), or if the plan needs an example batch and the
    loop shows none."""
    split, numbers = on_own_lines(source_with_self_variables(source))
    try:
        text, remarks = _edit_lines(
            split, plan, structure, samples, loss_terms=loss_terms, own_micro_batches=own_micro_batches
        )
    except UserError as error:
        raise UserError(with_original_lines(error.given, numbers)) from error
    return text, tuple(with_original_lines(remark, numbers) for remark in remarks)


def _edit_lines(
    source: Source,
    plan: Plan,
    structure: Mapping[str, Any],
    samples: int,
    *,
    loss_terms: str,
    own_micro_batches: int,
) -> tuple[str, tuple[str, ...]]:
    """Return what `edit_loop` does for a source whose loop has each statement on a line of its own. Raises
    UserError as that does."""
    source = source_with_self_variables(source)
    loop = find_loop(source, plan)
    own = max(own_micro_batches, _repetitions(loop))
    if loop.own_accumulation and own > 1:
        raise UserError(
            f"the script splits the batch of a step itself, into {own} micro-batches. Let it make one micro-"
            f"batch of all {samples} samples; the plan then splits them"
        )
    if "gradient-accumulation" in plan:
        _must_split_alike(source, loop)
    remarks = list(_remarks(source, loop, plan, samples))
    if "gradient-accumulation" in plan and not loss_terms:
        remarks.append(_MEAN)
    lines = list(source.lines)
    edits = _loop_edits(source, loop)
    example = f"next(iter({source.of(_iterable(loop))}))" if _needs_example(plan) else ""
    setup = apply_lines(
        plan,
        loop.setup.model,
        loop.setup.optimizer,
        structure,
        further={
            "clip": loop.setup.clip,
            "scaler": loop.setup.scaler,
            "batch": example,
            "loss_terms": loss_terms,
        },
        fit=loop.setup.fit,
    )
    if loop.setup.is_global:
        setup.insert(0, f"global {loop.setup.fit}")
    if loop.setup.after is not None:
        place, indent = end(loop.setup.after) + 1, source.indent(loop.setup.after.lineno)
    else:
        assert loop.setup.before is not None
        place, indent = loop.setup.before.lineno, source.indent(loop.setup.before.lineno)
    edits[place, place - 1] = [f"{indent}{line}\n" for line in setup]
    for statement in reversed(loop.setup.moved):
        edits[place, place - 1][:0] = lines[statement.lineno - 1 : end(statement)]
        edits[statement.lineno, end(statement)] = []
    if (import_line := _import_line(source, loop.setup)) is not None:
        edits.setdefault((import_line, import_line - 1), []).insert(0, "import memfit\n")
    for (start, last), new_lines in sorted(edits.items(), reverse=True):
        lines[start - 1 : last] = new_lines
    return "".join(lines), tuple(remarks)


def _repetitions(loop: Loop) -> int:
    """Return N if the loop is ``for ... in range(N)`` with a number; otherwise 1."""
    node = loop.loop.iter if isinstance(loop.loop, ast.For) else None
    is_range = isinstance(node, ast.Call) and name_of(node.func) == "range" and len(node.args) == 1
    count = literal(node.args[0]) if is_range else None  # type: ignore[union-attr]
    return count if isinstance(count, int) else 1


def _import_line(source: Source, setup: LoopSetup) -> int | None:
    """Return the line before which memfit must be imported: after the imports that precede the place where
    the plan is applied, or at the begin of the module if there are none. None if one of them imports it."""
    body, anchor = source.tree.body, setup.after if setup.after is not None else setup.before
    assert anchor is not None
    imports = [s for s in body if isinstance(s, ast.Import | ast.ImportFrom) and s.lineno <= anchor.lineno]
    names = [a for s in imports if isinstance(s, ast.Import) for a in s.names]
    if any(a.name == "memfit" and not a.asname for a in names):
        return None
    if imports:
        return end(imports[-1]) + 1
    first = body[1] if ast.get_docstring(source.tree) is not None and len(body) > 1 else body[0]
    decorators: list[ast.expr] = getattr(first, "decorator_list", [])
    return min([first.lineno, *(d.lineno for d in decorators)])


def _loop_edits(source: Source, loop: Loop) -> Edits:
    """Return the edits of the loop from its forward pass to the optimizer's step: (first line, last line) ->
    the lines that replace these."""
    update, body, fit = loop.update, loop.body, loop.setup.fit
    first, last = body[loop.forward].lineno, update.backward.lineno
    indent = source.indent(last)
    unit = indent[len(source.indent(loop.loop.lineno)) :] or "    "
    targets = ", ".join(loop.batch)
    argument = targets if len(loop.batch) == 1 else f"({targets})"
    block = [f"{indent}for {targets} in {fit}.split({argument}):\n", f"{indent}{unit}with {fit}.forward():\n"]
    after = sorted((*loop.prefetch, *loop.counters), key=lambda s: s.lineno)
    omitted = {i for s in (*update.removed, *after) for i in range(s.lineno, end(s) + 1)}
    dedent, inside = 0, range(0)
    if loop.autocast is not None:
        content = loop.autocast.body[0].lineno
        omitted |= set(range(loop.autocast.lineno, content))
        inside = range(content, end(loop.autocast) + 1)
        dedent = len(source.indent(content)) - len(source.indent(loop.autocast.lineno))
    for number in range(first, last):
        if number not in omitted:
            line = source.lines[number - 1]
            line = line[dedent:] if number in inside and line.strip() else line
            block.append(f"{unit}{unit}{line}" if line.strip() else line)
    comments: list[str] = []  # at the end: they speak of what follows
    while not (text := block[-1].strip()) or text.startswith("#"):
        comments[:0] = [f"{indent}{unit}{text}\n"] if text else []
        block.pop()
    block += [*comments, f"{indent}{unit}{fit}.backward({update.loss})\n"]
    for statement in after:
        block += source.lines[statement.lineno - 1 : end(statement)]
    edits: Edits = {}
    norm = f"{update.norm} = " if update.norm else ""
    step = [f"{source.indent(update.step.lineno)}{norm}{fit}.step()\n"]
    if update.step is update.backward:
        block += step
    else:
        edits[update.step.lineno, end(update.step)] = step
    edits[first, end(update.backward)] = block
    for statement in update.removed:
        if not first <= statement.lineno < last:
            edits[statement.lineno, end(statement)] = []
    return edits


def _needs_example(plan: Plan) -> bool:
    return any(use.technique in _NEED_EXAMPLE for use in plan.uses)


def _plan_source(plan: Plan) -> str:
    techniques = {use.technique: _settings(use) for use in plan.uses}
    return source_of(techniques if plan.ranks == 1 else {"ranks": plan.ranks, "techniques": techniques})


def _settings(use: Use) -> Mapping[str, Any]:
    """Return the settings of a technique that an edit writes, name -> value: all if it has at most two, else
    those that differ from their default."""
    defaults = make_use(use.technique, {}).settings
    keeps_all = len(defaults) <= _FEW
    return {name: value for name, value in use.settings.items() if keeps_all or defaults[name] != value}


def _remarks(source: Source, loop: Loop, plan: Plan, samples: int) -> Iterator[str]:
    yield from loop.setup.remarks
    for name, _, line in wrappers(source):
        yield f"line {line} uses {name} under a condition: start the script so that it does not"
    if loop.autocast is not None or (loop.update.scaler and not loop.setup.scaler):
        yield "the plan's autocast replaces autocast and GradScaler of the script"
    if loop.setup.scaler and (names := clash_with_loss_scale(plan)):
        yield (
            f"{', '.join(names)} cannot be combined with an enabled GradScaler: start the script so that it "
            "is not enabled"
        )
    if loop.own_accumulation:
        yield (
            f"the script's own micro-batches must be one for each step, of all its {samples} samples, which "
            "the DataLoader must give at once: those of the plan replace them, and counts of batches, as for "
            "a learning-rate schedule, change"
        )
    if "gradient-accumulation" in plan:
        yield from _accumulation_remarks(source, loop)
    yield from _saving_remarks(source, plan)
    if plan.ranks > 1:
        yield f"start it with torchrun --nproc-per-node {plan.ranks}"
    if _needs_example(plan):
        yield "the plan looks at a run of the model on an example batch; give loss= if the model has none"


def _saving_remarks(source: Source, plan: Plan) -> Iterator[str]:
    """Yield what else is in the state dicts that the script saves or loads under the plan."""
    calls = (n for n in ast.walk(source.tree) if isinstance(n, ast.Call))
    lines = sorted({n.lineno for n in calls if name_of(n.func) in {"state_dict", "load_state_dict"}})
    if lines and "fsdp2" in plan:
        yield (
            "under fsdp2, a state_dict() holds the parts of one rank only: save and load on all ranks, by "
            f"torch.distributed.checkpoint: {number_lines(lines)}"
        )
    if lines and "bf16-parameters" in plan:
        yield f"with bf16-parameters, the model's state_dict() is in bf16: {number_lines(lines)}"


def _accumulation_remarks(source: Source, loop: Loop) -> Iterator[str]:
    index = loop.body.index(loop.update.backward)
    between, moved = loop.body[loop.forward : index], (*loop.update.removed, *loop.prefetch)
    if loop.counters:
        lines = [s.lineno for s in loop.counters]
        yield f"moved behind the micro-batches, to run once for each step: {number_lines(lines)}"
    repeated = repeated_lines(between, (*moved, *loop.counters), loop.batch)
    if repeated and not loop.own_accumulation:
        yield (
            f"run once for each micro-batch now, so check what they count or log: {number_lines(repeated)}"
        )
    computed = {n for s in _leaves(between) if s not in moved for n in _set_anew(s)}
    used = {n.id for s in loop.body[index + 1 :] for n in ast.walk(s) if isinstance(n, ast.Name)}
    used |= _read_after(source, loop.loop)
    if shown := sorted(used & {loop.update.loss, *loop.batch, *computed}):
        verb = "is that" if len(shown) == 1 else "are those"
        after = f"after {loop.setup.fit}.split"
        yield f"{after}, {', '.join(shown)} {verb} of the last micro-batch: check what you log"


def _read_after(source: Source, loop: ast.AST) -> set[str]:
    """Return the variables that the function or module around ``loop`` reads after it before it sets them."""
    around = [n for n in ast.walk(source.tree) if isinstance(n, ast.FunctionDef) and loop in ast.walk(n)]
    end = getattr(loop, "end_lineno", None) or math.inf
    names = (n for n in ast.walk(around[-1] if around else source.tree) if isinstance(n, ast.Name))
    first: dict[str, ast.Name] = {}
    for name in sorted((n for n in names if n.lineno > end), key=lambda n: (n.lineno, n.col_offset)):
        first.setdefault(name.id, name)
    return {n for n, name in first.items() if isinstance(name.ctx, ast.Load)}


def _set_anew(statement: ast.stmt) -> set[str]:
    """Return the variables that a simple statement sets without reading them."""
    is_sum = isinstance(statement, ast.AugAssign)
    return set() if is_sum else {*stored_names(statement)} - loaded_names(statement)


def _must_split_alike(source: Source, loop: Loop) -> None:
    """Raise UserError if the step's loss would not be the mean of those of its micro-batches: if the loop, or
    a function or object that it calls, has a loss with reduction="sum"; if the loss variable has a value
    before the model is called, to which each micro-batch would add; if gradients change between that call and
    backward, other than by zero_grad; or if the loop computes one variable of the batch from another before
    forward, such as the number of samples."""
    names, loss = list(loop.batch), loop.update.loss
    for statement in loop.body[loop.forward : loop.backward]:
        gradients = (n for n in ast.walk(statement) if isinstance(n, ast.Attribute) and n.attr == "grad")
        if any(name_of(n.value) not in {"autograd", "func"} for n in gradients):
            raise UserError(
                f"line {statement.lineno} changes gradients after the model is called, which each "
                "micro-batch would do: use zero_grad"
            )
    statements: list[ast.AST] = [*loop.body[: loop.backward]]
    calls = {name_of(n.func) for s in statements for n in ast.walk(s) if isinstance(n, ast.Call)}
    for node in ast.walk(source.tree):
        is_called = isinstance(node, ast.FunctionDef) and node.name in calls
        is_made = isinstance(node, ast.Assign | ast.AnnAssign) and calls & {*map(name_of, targets_of(node))}
        statements += [node] if is_called or is_made else []
    keywords = [n for s in statements for n in ast.walk(s) if isinstance(n, ast.keyword)]
    if any(k.arg == "reduction" and literal(k.value) == "sum" for k in keywords):
        raise UserError(
            'the script has a loss with reduction="sum"; with micro-batches, it must be a mean over the batch'
        )
    setters = (s for s in _leaves(loop.body[loop.forward : loop.backward]) if loss in stored_names(s))
    first = next(setters, None)
    if first is not None and (isinstance(first, ast.AugAssign) or loss in loaded_names(first)):
        raise UserError(
            f"line {first.lineno} adds to {loss}, which has a value before the model is called, so that each "
            "micro-batch would add its loss to those of the others: give it its first value after that call"
        )
    for statement in loop.body[: loop.forward]:
        changed = stored_names(statement)
        if sources := sorted((loaded_names(statement) - set(changed)) & set(names)):
            computed_names = ", ".join(n for n in changed if n in names)
            if computed_names:
                raise UserError(
                    f"the loop computes {computed_names} from {', '.join(sources)} before the model is "
                    "called, and the forward pass uses both, so the batch cannot simply be split into "
                    "micro-batches"
                )


def _leaves(statements: Statements) -> Iterator[ast.stmt]:
    """Yield the simple statements in ``statements`` and inside their compound statements, in order. Compound
    statements themselves are not yielded."""
    for statement in statements:
        inner = lists_of(statement)
        yield from (leaf for part in inner for leaf in _leaves(part)) if inner else [statement]


def _iterable(loop: Loop) -> ast.expr:
    node = loop.loop.iter if isinstance(loop.loop, ast.For) else None
    if isinstance(node, ast.Call) and name_of(node.func) in {"enumerate", "tqdm"} and node.args:
        node = node.args[0]
    if not isinstance(node, ast.Name):
        raise UserError(
            "the plan needs an example batch, but the loop does not iterate over a variable that holds the "
            "DataLoader, as `for batch in loader` does, with or without enumerate(...) or tqdm(...)"
        )
    return node
