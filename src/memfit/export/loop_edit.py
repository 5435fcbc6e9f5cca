"""Edit a training loop of plain PyTorch so that ``memfit.apply`` applies a plan in it.

Only loops of this form are edited: one statement list with ``LOSS.backward()`` and, after it,
``OPTIMIZER.step()``, before which the model is called. All else is refused with the reason.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from memfit.export.source_edits import Source, literal, name_of, source_of
from memfit.techniques.registry import make_use
from memfit.types.errors import UserError
from memfit.types.plan import Plan, Use

# What a plan does itself, or what must see the model before a plan changes it.
_IN_THE_WAY = frozenset(
    {
        "GradScaler",
        "autocast",
        "no_sync",
        "DataParallel",
        "FullyShardedDataParallel",
        "fully_shard",
        "get_peft_model",
    }
)
_NEED_EXAMPLE = frozenset({"chunking", "tensor-parallel", "context-parallel"})
_NO_FORWARD = frozenset({"train", "eval", "to", "zero_grad", "parameters", "named_parameters"})
_FEW = 2  # settings of a technique that are all written
_LOOPS = (ast.For, ast.While)
Statements = list[ast.stmt]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A training loop. ``body``: the statements with backward and step. ``forward``, ``backward``, ``step``:
    indices in it of the first statement that calls the model, of the backward and of the optimizer's step.
    ``model``, ``optimizer``, ``loss``: names of variables. ``loop``: the innermost loop. ``scope``: the
    statements of the function or module that holds it. ``setup``: those of the one in which the optimizer is
    made, which may be the same. ``clip``: source of the norm to which gradients are clipped, "" if they are
    not. ``removed``: statements that the plan's step replaces."""

    body: Statements
    forward: int
    backward: int
    step: int
    model: str
    optimizer: str
    loss: str
    loop: Any
    scope: Statements
    setup: Statements
    clip: str
    removed: tuple[ast.stmt, ...]


def apply_lines(
    plan: Plan, model: str, optimizer: str, structure: Mapping[str, Any], *, clip: str = "", batch: str = ""
) -> list[str]:
    """Return the lines that apply ``plan`` to the variables ``model`` and ``optimizer``. ``structure``: the
    fields of the job that say where things are in the model. ``clip``, ``batch``: sources of these
    arguments, "" for none."""
    arguments = [_plan_source(plan), model, optimizer]
    arguments += [f"{name}={source_of(value)}" for name, value in structure.items()]
    arguments += [f"{name}={value}" for name, value in (("clip", clip), ("batch", batch)) if value]
    one_line = f"fit = memfit.apply({', '.join(arguments)})"
    lines = [one_line]
    if len(one_line) > 96:
        lines = ["fit = memfit.apply(", *(f"    {argument}," for argument in arguments), ")"]
    return [*lines, f"{model}, {optimizer} = fit.model, fit.optimizer"]


def loop_lines(batch: str, loss: str = "loss") -> list[str]:
    """Return the lines of a step in a loop, for a person to insert."""
    return [
        f"for {batch} in fit.split({batch}):",
        "    with fit.forward():",
        f"        {loss} = ...  # forward and loss, as before",
        f"    fit.backward({loss})  # in place of {loss}.backward()",
        "fit.step()  # in place of optimizer.step(); it frees the gradients, too",
    ]


def edit_loop(source: Source, plan: Plan, structure: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return (the text of the edited script; remarks for the user). ``structure`` is as in `apply_lines`.
    Raises UserError, whose ``given`` is the reason, if the script has no loop that can be edited safely."""
    loop = _find(source, plan)
    lines = list(source.lines)
    names = _batch_names(loop)
    if plan.get("gradient-accumulation") is not None:
        _must_split_alike(source, loop, names)
    statements = loop.body
    indent = source.indent(statements[loop.backward].lineno)
    unit = indent[len(source.indent(loop.loop.lineno)) :] or "    "
    targets = ", ".join(names)
    argument = targets if len(names) == 1 else f"({targets})"
    first, last = statements[loop.forward].lineno, statements[loop.backward].lineno
    removed_lines = {i for s in loop.removed for i in range(s.lineno, _end(s) + 1)}
    block = [f"{indent}for {targets} in fit.split({argument}):\n", f"{indent}{unit}with fit.forward():\n"]
    for number in range(first, last):
        if number not in removed_lines:
            line = lines[number - 1]
            block.append(f"{unit}{unit}{line}" if line.strip() else line)
    while not block[-1].strip():
        block.pop()
    block.append(f"{indent}{unit}fit.backward({loop.loss})\n")
    edits: dict[tuple[int, int], list[str]] = {(first, _end(statements[loop.backward])): block}
    step = statements[loop.step]
    edits[step.lineno, _end(step)] = [f"{indent}fit.step()\n"]
    for statement in loop.removed:
        if not first <= statement.lineno < last:
            edits[statement.lineno, _end(statement)] = []
    place, place_indent = _place(source, loop)
    setup_model = loop.model if loop.setup is loop.scope else _model(loop.setup, [], loop.optimizer)
    example = f"next(iter({source.of(_iterable(loop))}))" if _needs_example(plan) else ""
    setup = apply_lines(plan, setup_model, loop.optimizer, structure, clip=loop.clip, batch=example)
    if loop.setup is not loop.scope and loop.setup is not source.tree.body:
        setup.insert(0, "global fit")
    edits[place, place - 1] = [f"{place_indent}{line}\n" for line in setup]
    if not any(_imports_memfit(s) for s in source.tree.body):
        import_line = _import_line(source)
        edits.setdefault((import_line, import_line - 1), []).insert(0, "import memfit\n")
    for (start, end), new_lines in sorted(edits.items(), reverse=True):
        lines[start - 1 : end] = new_lines
    return "".join(lines), tuple(_remarks(loop, plan, names))


def _needs_example(plan: Plan) -> bool:
    return any(use.technique in _NEED_EXAMPLE for use in plan.uses)


def _plan_source(plan: Plan) -> str:
    techniques = {use.technique: _settings(use) for use in plan.uses}
    return source_of(techniques if plan.ranks == 1 else {"ranks": plan.ranks, "techniques": techniques})


def _settings(use: Use) -> Mapping[str, Any]:
    """Return the settings, without the default ones of a technique that has many."""
    defaults = make_use(use.technique, {}).settings
    keeps_all = len(defaults) <= _FEW
    return {name: value for name, value in use.settings.items() if keeps_all or defaults[name] != value}


def _remarks(loop: Loop, plan: Plan, names: list[str]) -> Iterator[str]:
    if plan.get("gradient-accumulation") is not None:
        used = {n.id for s in loop.body[loop.backward + 1 :] for n in ast.walk(s) if isinstance(n, ast.Name)}
        if shown := sorted(used & {loop.loss, *names}):
            yield f"after fit.split, {', '.join(shown)} is that of the last micro-batch: check what you log"
        yield "the loss must be a mean over the samples; for a mean over other terms, give loss_terms="
    if plan.ranks > 1:
        yield f"start it with torchrun --nproc-per-node {plan.ranks}"
    if _needs_example(plan):
        yield "the plan looks at a run of the model on an example batch; give loss= if the model has none"


# -- finding the loop -----------------------------------------------------------------------------


def _find(source: Source, plan: Plan) -> Loop:
    names = {name_of(n) for n in ast.walk(source.tree) if isinstance(n, ast.Name | ast.Attribute)}
    names |= {n.name for n in ast.walk(source.tree) if isinstance(n, ast.alias)}
    compiles = any(
        ast.unparse(n) == "torch.compile" for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)
    )
    if in_the_way := sorted(names & _IN_THE_WAY | ({"torch.compile"} if compiles else set())):
        raise UserError(
            f"the script uses {', '.join(in_the_way)}, which the plan replaces or must come before"
        )
    if plan.ranks > 1 and not {"init_process_group", "DistributedSampler"} <= names:
        raise UserError(
            f"the plan has {plan.ranks} ranks, but the script has no init_process_group with a "
            "DistributedSampler"
        )
    if "DistributedDataParallel" in names or "DDP" in names:
        raise UserError("the script wraps the model in DistributedDataParallel, which a plan applies itself")
    backwards = [
        n for n in ast.walk(source.tree) if isinstance(n, ast.Call) and name_of(n.func) == "backward"
    ]
    if len(backwards) != 1:
        raise UserError(f"the script calls backward {len(backwards)} times, not once")
    for scope, loop, body in _bodies(source.tree.body, source.tree.body, None):
        for index, statement in enumerate(body):
            if isinstance(statement, ast.Expr) and statement.value is backwards[0]:
                return _loop(source, scope, loop, body, index)
    raise UserError("backward is not a statement of its own in a loop")


def _bodies(
    statements: Statements, scope: Statements, loop: Any
) -> Iterator[tuple[Statements, Any, Statements]]:
    """Yield (statements of the function or module, innermost loop, statements) for each statement list."""
    if loop is not None:
        yield scope, loop, statements
    for statement in statements:
        is_function = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
        for field in ("body", "orelse", "finalbody"):
            inner = getattr(statement, field, None)
            if isinstance(inner, list):
                inner_loop = None if is_function else statement if isinstance(statement, _LOOPS) else loop
                yield from _bodies(inner, inner if is_function else scope, inner_loop)


def _loop(source: Source, scope: Statements, loop: Any, body: Statements, backward: int) -> Loop:
    call: Any = body[backward].value  # type: ignore[attr-defined]
    if not isinstance(call.func.value, ast.Name) or call.args or call.keywords:
        raise UserError("backward is not called as LOSS.backward() on a variable")
    steps = [i for i, s in enumerate(body) if i > backward and _method(s, "step") is not None]
    optimizer, step = next(
        ((name, i) for i in steps if _is_optimizer(scope, body, name := str(_method(body[i], "step")))),
        ("", 0),
    )
    if not optimizer:
        raise UserError("no OPTIMIZER.step() follows backward in the same block")
    clip, removed = "", [s for s in body if _method(s, "zero_grad") is not None]
    for statement in body[backward + 1 : step]:
        text = ast.unparse(statement)
        if (norm := _clip_norm(statement)) is not None:
            clip = norm
            removed.append(statement)
        elif ".grad" in text or "clip_grad" in text or "unscale" in text:
            raise UserError(f"between backward and step, the script changes gradients: {text[:60]}")
    model = _model(scope, body[:backward], optimizer)
    forward = next((i for i, s in enumerate(body[:backward]) if _calls(s, model)), None)
    if forward is None:
        raise UserError(f"no statement before backward calls the model {model}")
    one_line = [s.lineno for s in body] + [_end(s) + 0.5 for s in body]
    if sorted(one_line) != [x for s in body for x in (s.lineno, _end(s) + 0.5)]:
        raise UserError("several statements of the loop are on one line")
    if any(_spans_text(s) for s in body[forward:backward]):
        raise UserError("the forward pass contains a text of several lines, which cannot be indented")
    return Loop(
        body=body,
        forward=forward,
        backward=backward,
        step=step,
        model=model,
        optimizer=optimizer,
        loss=call.func.value.id,
        loop=loop,
        scope=scope,
        setup=_setup(source, scope, optimizer),
        clip=clip,
        removed=tuple(removed),
    )


def _method(statement: ast.stmt, name: str) -> str | None:
    """Return X if the statement is ``X.name()`` of a variable X; with arguments only for zero_grad."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == name):
        return None
    has_arguments = bool(call.args or call.keywords) and name != "zero_grad"
    return call.func.value.id if isinstance(call.func.value, ast.Name) and not has_arguments else None


def _is_optimizer(scope: Statements, body: Statements, name: str) -> bool:
    """Return whether the variable is an optimizer: it is one by its name, it is made with parameters(), or
    the loop calls its zero_grad."""
    assignment = _assignment(scope, name)
    has_parameters = assignment is not None and "parameters()" in ast.unparse(assignment)
    zeroes = any(_method(s, "zero_grad") == name for s in body)
    return has_parameters or zeroes or name in {"opt", "optim"} or "optimizer" in name


def _assignment(scope: Statements, name: str) -> Any:
    """Return the only assignment to the variable among the statements, else None."""
    assignments = [
        s
        for s in scope
        if isinstance(s, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in s.targets)
    ]
    return assignments[0] if len(assignments) == 1 else None


def _clip_norm(statement: ast.stmt) -> str | None:
    """Return the source of the constant norm in ``clip_grad_norm_(model.parameters(), NORM)``, else None."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or name_of(call.func) != "clip_grad_norm_":
        return None
    norms = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "max_norm")]
    others = len(call.args) > 2 or any(k.arg != "max_norm" for k in call.keywords)
    return (
        ast.unparse(norms[0])
        if len(norms) == 1 and not others and isinstance(norms[0], ast.Constant)
        else None
    )


def _model(scope: Statements, before: Statements, optimizer: str) -> str:
    """Return the name of the model: X of ``X.parameters()`` in the assignment to the optimizer, or else the
    only variable called in the loop that is also moved, trained or evaluated in the scope."""
    assignment = _assignment(scope, optimizer)
    owners = {
        n.func.value.id
        for n in (ast.walk(assignment) if assignment is not None else ())
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)
        and n.func.attr in {"parameters", "named_parameters"}
        and isinstance(n.func.value, ast.Name)
    }
    if not owners:
        uses = {
            n.value.id
            for s in scope
            for n in ast.walk(s)
            if isinstance(n, ast.Attribute)
            and n.attr in {"train", "eval", "parameters", "state_dict"}
            and isinstance(n.value, ast.Name)
        }
        owners = {name for name in uses if any(_calls(s, name) for s in before)}
    if len(owners) != 1:
        raise UserError("the script does not show which variable is the model")
    return owners.pop()


def _calls(statement: ast.stmt, model: str) -> bool:
    """Return whether the statement calls the model or a method of it, or passes it to a function. Methods
    that set its mode, device or gradients do not count."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Call):
            target = node.func
            if isinstance(target, ast.Name) and target.id == model:
                return True
            is_method = isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)
            if is_method and target.value.id == model and target.attr not in _NO_FORWARD:  # type: ignore[attr-defined]
                return True
            if any(isinstance(a, ast.Name) and a.id == model for a in node.args):
                return True  # such as compute_loss(model, batch)
    return False


def _spans_text(statement: ast.stmt) -> bool:
    texts = [
        n for n in ast.walk(statement) if isinstance(n, ast.Constant) and isinstance(n.value, str | bytes)
    ]
    joined = [n for n in ast.walk(statement) if isinstance(n, ast.JoinedStr)]
    return any(n.end_lineno != n.lineno for n in [*texts, *joined])


def _end(statement: ast.stmt) -> int:
    return statement.end_lineno or statement.lineno


def _batch_names(loop: Loop) -> list[str]:
    """Return the variables that each step of the loop sets and forward reads: the batch."""
    bound: list[str] = _stored(loop.loop.target) if isinstance(loop.loop, ast.For) else []
    for statement in loop.body[: loop.forward]:
        bound += [n for n in _stored(statement) if n not in bound]
    read = {
        n.id
        for s in loop.body[loop.forward : loop.backward]
        for n in ast.walk(s)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    }
    names = [n for n in dict.fromkeys(bound) if n in read]
    if not names:
        raise UserError("the script does not show which variables hold the batch")
    return names


def _must_split_alike(source: Source, loop: Loop, names: list[str]) -> None:
    """Raise UserError if the loop, or a function that it calls, has a loss that is a sum, or if one of the
    variables of the batch is computed from another one that forward reads, too: the number of samples, for
    example, is not that of a micro-batch."""
    statements: list[ast.AST] = [*loop.body[: loop.backward]]
    calls = {name_of(n.func) for s in statements for n in ast.walk(s) if isinstance(n, ast.Call)}
    statements += [n for n in ast.walk(source.tree) if isinstance(n, ast.FunctionDef) and n.name in calls]
    keywords = [n for s in statements for n in ast.walk(s) if isinstance(n, ast.keyword)]
    if any(k.arg == "reduction" and literal(k.value) == "sum" for k in keywords):
        raise UserError(
            'the script has a loss with reduction="sum", but micro-batches are parts of a mean over the batch'
        )
    for statement in loop.body[: loop.forward]:
        stored = _stored(statement)
        loaded = {
            n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        }
        if sources := sorted((loaded - set(stored)) & set(names)):
            computed_names = ", ".join(n for n in stored if n in names)
            if computed_names:
                raise UserError(
                    f"the loop computes {computed_names} from {', '.join(sources)} before the model runs, "
                    "and the model uses both, so they cannot be split into micro-batches alike"
                )


def _stored(node: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _iterable(loop: Loop) -> ast.expr:
    node = loop.loop.iter if isinstance(loop.loop, ast.For) else None
    if isinstance(node, ast.Call) and name_of(node.func) in {"enumerate", "tqdm"} and node.args:
        node = node.args[0]
    if not isinstance(node, ast.Name):
        raise UserError("the plan needs an example batch, but the script does not show its DataLoader")
    return node


# -- where the lines go ---------------------------------------------------------------------------


def _setup(source: Source, scope: Statements, optimizer: str) -> Statements:
    """Return the statements of the function or module that makes the optimizer: ``scope``, or else the only
    one that assigns X.parameters() of a model to a variable of that name."""
    if any(optimizer in _stored(s) for s in scope if not isinstance(s, ast.FunctionDef)):
        return scope
    functions = [n.body for n in ast.walk(source.tree) if isinstance(n, ast.FunctionDef)]
    scopes = [
        statements
        for statements in [source.tree.body, *functions]
        if (assignment := _assignment(statements, optimizer)) is not None
        and "parameters()" in ast.unparse(assignment)
    ]
    if len(scopes) != 1:
        raise UserError(f"the script does not show where {optimizer} is made")
    return scopes[0]


def _place(source: Source, loop: Loop) -> tuple[int, str]:
    """Return (the line before which the plan is applied, its indentation): after the optimizer is made, or
    before the outermost loop if that is made in a branch. Raises UserError if the model changes
    afterwards."""
    is_same_scope = loop.setup is loop.scope
    outermost = next(s for s in loop.scope if s.lineno <= loop.loop.lineno <= _end(s))
    assignment = _assignment(loop.setup, loop.optimizer)
    if assignment is None or (is_same_scope and assignment.lineno > outermost.lineno):
        return outermost.lineno, source.indent(outermost.lineno)
    model = loop.model if is_same_scope else _model(loop.setup, [], loop.optimizer)
    for statement in loop.setup:
        follows = statement.lineno > assignment.lineno and not (
            is_same_scope and statement.lineno >= outermost.lineno
        )
        changes = model in _stored(statement) or f"{model}.to(" in ast.unparse(statement)
        if follows and changes and not isinstance(statement, ast.FunctionDef):
            raise UserError(f"the script changes {model} after it makes {loop.optimizer}")
    return _end(assignment) + 1, source.indent(assignment.lineno)


def _imports_memfit(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Import) and any(
        a.name == "memfit" and not a.asname for a in statement.names
    )


def _import_line(source: Source) -> int:
    """Return the line before which to import memfit: after the last import at the top of the script."""
    imports = [s for s in source.tree.body if isinstance(s, ast.Import | ast.ImportFrom)]
    return _end(imports[-1]) + 1 if imports else 1
