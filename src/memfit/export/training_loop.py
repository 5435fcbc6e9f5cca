"""Find the training loop of plain PyTorch in a script, for `export.loop_edit`.

These forms are recognized: a statement list in a loop with ``LOSS.backward()`` and, after it,
``OPTIMIZER.step()``, before which the model is called; the same with a GradScaler; an ``if`` with both; a
loop of micro-batches with backward, after which the step follows; and a function that makes one step. In
methods, model, optimizer and the like may be attributes of ``self`` (`export.self_variables`). All else is
refused with the reason.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

from memfit.export.loop_update import (
    FUNCTIONS,
    LOOPS,
    LoopPlace,
    Statements,
    Update,
    assignment,
    find_place,
    find_update,
    lists_of,
    loaded_names,
    must_be_on_lines,
    stored_names,
    targets_of,
)
from memfit.export.self_variables import class_of, is_of_self, with_self_variables
from memfit.export.source_edits import Source, name_of, number_lines
from memfit.export.step_counters import step_counters
from memfit.export.step_exits import must_end_each_step
from memfit.types.errors import UserError
from memfit.types.plan import Plan

# What shards or replaces the model, so that a plan cannot be applied to it any more.
_IN_THE_WAY = frozenset({"no_sync", "FullyShardedDataParallel", "fully_shard", "get_peft_model"})
_WRAPPERS = frozenset({"DataParallel", "DistributedDataParallel", "torch.compile"})
_NO_FORWARD = frozenset({"train", "eval", "to", "zero_grad", "parameters", "named_parameters"})
_USUAL = frozenset({"model", "net", "network"})  # names of models
_NO_GRADIENTS = frozenset({"no_grad", "inference_mode"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoopSetup:
    """Where the plan is applied: after the statement ``after`` or, if that is None, before ``before``.
    ``model``, ``optimizer``, ``scaler``: the names of these variables there; ``scaler``, the GradScaler of
    the loop, is "" without one and if the plan's autocast replaces it. ``clip``: source of the norm to which
    gradients are clipped, in the variables there; "" if they are not clipped. ``moved``: statements to move
    to before that place, such as the one that makes the GradScaler. ``fit``: the variable of the
    `Fit`, which the script does not use otherwise. ``is_global``: the place is in a function and the loop in
    another one, so that ``fit`` must be a global variable. ``remarks``: what the user should know, one text
    each."""

    model: str
    optimizer: str
    scaler: str
    clip: str
    moved: tuple[ast.stmt, ...]
    fit: str
    after: ast.stmt | None
    before: ast.stmt | None
    is_global: bool
    remarks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A training loop. ``body``: the statement list that contains backward; ``forward``, ``backward``:
    indices in it of the first statement that calls the model and of the one that runs backward. ``loop``: the
    innermost loop around it. ``autocast``: the statement ``with autocast(...)`` of the forward pass that the
    plan's autocast replaces, None without. ``prefetch``: statements between forward and backward that load
    the next batch. ``counters``: statements there that count steps, if the plan has micro-batches and the
    script none. ``batch``: the variables that hold the batch. ``own_accumulation``: the script accumulates
    gradients itself."""

    body: Statements
    forward: int
    backward: int
    update: Update
    loop: Any
    autocast: ast.With | None
    prefetch: tuple[ast.stmt, ...]
    counters: tuple[ast.stmt, ...]
    batch: tuple[str, ...]
    own_accumulation: bool
    setup: LoopSetup


def find_loop(source: Source, plan: Plan) -> Loop:
    """Return the training loop of the script. Raises UserError, whose ``given`` is the reason, if there is
    none of a form that can be edited safely for ``plan``. The reason names all obstacles (`_obstacles`) and
    the first other one."""
    if applied := {
        c.lineno for c in source.calls(frozenset({"apply"})) if ast.unparse(c.func) == "memfit.apply"
    }:
        raise UserError(
            f"the script applies a plan already ({number_lines(applied)}): change the plan there, or begin "
            "with the script without memfit's lines"
        )
    reasons = [*_obstacles(source, plan)]
    try:
        loop = _find_loop(source, plan)
    except UserError as error:
        reasons.append(error.given)
    if reasons:
        raise UserError("; ".join(reasons))
    return loop


def _find_loop(source: Source, plan: Plan) -> Loop:
    """Return what `find_loop` does. Raises UserError with the first reason; obstacles do not count."""
    place = find_place(source)
    update = find_update(source, place)
    for body in (place.body, update.step_body):
        must_be_on_lines(body)
    model = _model(source, _scope(source, place), place.body[: place.index], update.optimizer)
    callers = {model, *_callers(source, model)}
    forward = next((i for i, s in enumerate(place.body[: place.index]) if calls(s, callers)), None)
    if forward is None:
        raise UserError(f"in the loop, no statement before backward calls the model {model}")
    forward = next((i for i, s in enumerate(place.body[:forward]) if _has_no_gradients(s)), forward)
    if any(_spans_text(s) for s in place.body[forward : place.index]):
        raise UserError(
            "the forward pass, which the edit indents, contains a string literal of several lines, which "
            "that would change: assign it to a variable before the loop"
        )
    must_end_each_step(source, place, update, forward)
    autocast = _autocast(source, place, forward) if sets_precision(plan) else None
    batch, prefetch = _batch(place, forward, callers)
    own_accumulation = update.step_body is not place.body
    counts = plan.micro_batches > 1 and not own_accumulation
    return Loop(
        body=place.body,
        forward=forward,
        backward=place.index,
        update=update,
        loop=place.loop,
        autocast=autocast,
        prefetch=prefetch,
        counters=step_counters(place.body[forward : place.index], (*batch, update.loss)) if counts else (),
        batch=batch,
        own_accumulation=own_accumulation,
        setup=_setup(source, place, update, model, scaler="" if sets_precision(plan) else update.scaler),
    )


def sets_precision(plan: Plan) -> bool:
    """Return whether the plan has an autocast, which replaces autocast and GradScaler of the script."""
    return "bf16-autocast" in plan or "fp16-autocast" in plan


# -- what cannot stay -----------------------------------------------------------------------------


def _obstacles(source: Source, plan: Plan) -> Iterator[str]:
    """Yield what the script uses that the plan replaces or must be applied before, and what a script of
    several ranks lacks, one text each. Imports that nothing uses do not count."""
    lines = _lines_of_uses(source)
    wrapping = lines.get("DistributedDataParallel", set()) | lines.get("DDP", set())
    if plan.ranks > 1 and wrapping:
        yield (
            f"the script uses DistributedDataParallel ({number_lines(wrapping)}): take its lines out of the "
            "script first, because a plan of several ranks applies or replaces it"
        )
    wrapped = {name for name, is_conditional, _ in wrappers(source) if not is_conditional}
    wrapped -= {"DistributedDataParallel"} if plan.ranks > 1 else set()  # named already
    if in_the_way := sorted(lines.keys() & _IN_THE_WAY | wrapped):
        yield (
            f"the script uses {', '.join(in_the_way)}: the plan either replaces this or must be applied "
            "before it"
        )
    missing = [name for name in ("init_process_group", "DistributedSampler") if name not in lines]
    if plan.ranks > 1 and missing:
        yield (
            f"the plan has {plan.ranks} ranks, for which the script must use both init_process_group and "
            f"DistributedSampler, but it lacks {' and '.join(missing)}"
        )


def _lines_of_uses(source: Source) -> dict[str, set[int]]:
    """Return name -> the lines on which the script uses it as a variable or attribute. A name that an import
    changes counts as the original one."""
    imports = [n for n in ast.walk(source.tree) if isinstance(n, ast.ImportFrom)]
    aliases = {alias.asname: alias.name for n in imports for alias in n.names if alias.asname}
    lines: dict[str, set[int]] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = name_of(node)
            lines.setdefault(aliases.get(name, name), set()).add(node.lineno)
    return lines


def wrappers(source: Source) -> Iterator[tuple[str, bool, int]]:
    """Yield (name, whether it runs only under a condition, line) for each call of DataParallel,
    DistributedDataParallel or torch.compile, also under another name of an import."""
    aliases = {
        a.asname: a.name for n in ast.walk(source.tree) if isinstance(n, ast.ImportFrom) for a in n.names
    }
    for node, is_conditional in with_conditions(source.tree, is_conditional=False):
        if isinstance(node, ast.Call):
            name = aliases.get(name_of(node.func), name_of(node.func))
            name = "torch.compile" if ast.unparse(node.func) == "torch.compile" else name
            if name in _WRAPPERS:
                yield name, is_conditional, node.lineno


def with_conditions(node: ast.AST, *, is_conditional: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield (node, whether it runs only under a condition of an ``if``) for ``node`` and all nodes below it.
    A test of ``__name__`` does not count. ``is_conditional``: whether ``node`` itself is under a
    condition."""
    yield node, is_conditional
    branches = isinstance(node, ast.If | ast.IfExp) and "__name__" not in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        yield from with_conditions(child, is_conditional=is_conditional or branches)


# -- model and batch ------------------------------------------------------------------------------


def _scope(source: Source, place: LoopPlace) -> Statements:
    """Return the statements in which the loop's variables are set and used: those of its function or, in a
    method, of all methods of its class."""
    owner = class_of(source, place.function)
    if owner is None:
        return place.scope
    return [s for method in owner.body if isinstance(method, FUNCTIONS) for s in method.body]


def _model(source: Source, scope: Statements, before: Statements, optimizer: str) -> str:
    """Return the variable of the model: X of ``X.parameters()`` in the assignment to the optimizer, or else
    the only variable that ``before``, the loop's statements before backward, call and whose train, eval,
    parameters or state_dict ``scope`` uses, or that has a usual name of models. Raises UserError if there is
    not exactly one."""
    assigned = assignment(scope, optimizer)
    owners = {
        n.func.value.id
        for n in (ast.walk(assigned) if assigned is not None else ())
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)
        and n.func.attr in {"parameters", "named_parameters"}
        and isinstance(n.func.value, ast.Name)
    }

    def is_called(name: str) -> bool:
        return any(calls(s, {name, *_callers(source, name)}) for s in before)

    is_argument = is_of_self(optimizer) and before and not any(map(is_called, owners))
    if not owners or is_argument:
        uses = {
            n.value.id
            for s in scope
            for n in ast.walk(s)
            if isinstance(n, ast.Attribute)
            and n.attr in {"train", "eval", "parameters", "state_dict"}
            and isinstance(n.value, ast.Name)
        }
        owners = set(filter(is_called, uses))
    if not owners:
        owners = {name for name in _called(before) if name.rpartition(".")[2] in _USUAL}
    if len(owners) != 1:
        raise UserError(
            "the script does not show which variable is the model: the optimizer must be assigned with the "
            "parameters() of one variable"
        )
    return owners.pop()


def _called(statements: Statements) -> set[str]:
    """Return the variables that the statements call."""
    calls_of = (n for n in _nodes(statements) if isinstance(n, ast.Call))
    return {n.func.id for n in calls_of if isinstance(n.func, ast.Name)}


def _callers(source: Source, model: str) -> set[str]:
    """Return the functions and methods that call the variable ``model``, themselves or through others, as the
    script names them. Those that run without gradients, such as an evaluation, do not count."""
    functions = [n for n in ast.walk(source.tree) if isinstance(n, FUNCTIONS)]
    bodies = {f"self.{f.name}" if class_of(source, f) is not None else f.name: f for f in functions}
    names = {model}
    while True:
        more = {
            name
            for name, function in bodies.items()
            if name not in names
            and not names & {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
            and not any(name_of(n) in _NO_GRADIENTS for n in ast.walk(function) if isinstance(n, ast.expr))
            and any(calls(s, names) for s in function.body)
        }
        if not more:
            return names - {model}
        names |= more


def calls(statement: ast.stmt, names: set[str]) -> bool:
    """Return whether the statement calls one of the variables ``names`` or a method of it, or passes it to a
    call as a positional argument. The methods train, eval, to, zero_grad, parameters and named_parameters do
    not count."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Call):
            target = node.func
            if isinstance(target, ast.Name) and target.id in names:
                return True
            is_method = isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)
            if is_method and target.value.id in names and target.attr not in _NO_FORWARD:  # type: ignore[attr-defined]
                return True
            if any(isinstance(a, ast.Name) and a.id in names for a in node.args):
                return True  # such as compute_loss(model, batch)
    return False


def _has_no_gradients(statement: ast.stmt) -> bool:
    """Return whether the statement is ``with torch.no_grad():`` or the like. Before the model's call, what it
    runs, such as a teacher, is a part of the forward pass."""
    return isinstance(statement, ast.With) and any(
        isinstance(n, ast.expr) and name_of(n) in _NO_GRADIENTS
        for item in statement.items
        for n in ast.walk(item.context_expr)
    )


def _spans_text(statement: ast.stmt) -> bool:
    """Return whether the statement contains a string literal of several lines."""
    return any(
        isinstance(n, ast.Constant | ast.JoinedStr)
        and n.end_lineno != n.lineno
        and isinstance(getattr(n, "value", ""), str | bytes)
        for n in ast.walk(statement)
    )


def _autocast(source: Source, place: LoopPlace, forward: int) -> ast.With | None:
    """Return the statement ``with autocast(...):`` between forward and backward, None if there is none.
    Raises UserError if there are several, or if the script uses autocast in another place that the loop may
    reach."""
    withs = [s for s in place.body[forward : place.index] if isinstance(s, ast.With)]
    matches = [s for s in withs if len(s.items) == 1 and _casts(source, s.items[0].context_expr)]
    if len(matches) > 1:
        raise UserError(f"the forward pass has {len(matches)} autocast contexts; at most one can be replaced")
    known: set[int] = set()
    if matches:
        context = matches[0].items[0].context_expr
        known |= {id(n) for n in ast.walk(context)}
        if isinstance(context, ast.Name):
            known |= {id(n) for a in _assignments(source, context.id) for n in ast.walk(a)}
    called = {name_of(n.func) for n in _nodes(place.body) if isinstance(n, ast.Call)}
    for function in ast.walk(source.tree):
        if isinstance(function, FUNCTIONS) and function is not place.function:
            is_method = class_of(source, function) not in (None, class_of(source, place.function))
            holds_loop = any(n is place.loop for n in ast.walk(function))
            if function.name not in called and not is_method and not holds_loop:  # such as an evaluation
                known |= {id(n) for n in ast.walk(function)}
    for node in ast.walk(source.tree):
        is_name = isinstance(node, ast.Name | ast.Attribute) and name_of(node) == "autocast"
        if is_name and id(node) not in known:
            line = cast(ast.expr, node).lineno
            raise UserError(
                f"the script uses autocast in line {line}, not as a `with` block of the loop's forward pass"
            )
    return matches[0] if matches else None


def _nodes(statements: Statements) -> Iterator[ast.AST]:
    for statement in statements:
        yield from ast.walk(statement)


def _casts(source: Source, context: ast.expr) -> bool:
    if isinstance(context, ast.Name):
        return any("autocast" in ast.unparse(a) for a in _assignments(source, context.id))
    return isinstance(context, ast.Call) and name_of(context.func) == "autocast"


def _assignments(source: Source, name: str) -> list[ast.Assign]:
    return [
        n
        for n in ast.walk(source.tree)
        if isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in n.targets)
    ]


def _batch(place: LoopPlace, forward: int, callers: set[str]) -> tuple[tuple[str, ...], tuple[ast.stmt, ...]]:
    """Return (the variables that each step of the loop sets and forward reads; the statements between forward
    and backward that only load the next batch into them). ``callers``: the model and what calls it. Of a
    function that makes one step, its parameters are set, too, unless forward calls them. Raises UserError if
    there is no such variable."""
    bound: list[str] = stored_names(place.loop.target) if isinstance(place.loop, ast.For) else []
    if place.loop is place.function and place.function is not None:
        parameters = [a.arg for a in (*place.function.args.posonlyargs, *place.function.args.args)]
        bound += [n for n in parameters if n not in {"self", *callers, *_called(place.body)}]
    for statement in place.body[:forward]:
        bound += [n for n in stored_names(statement) if n not in bound]
    between = place.body[forward : place.index]
    computed = {n for s in between if calls(s, callers) for n in stored_names(s)}
    prefetch = [s for s in between if _loads_next(s, between, computed, callers)]
    bound += [n for s in prefetch for n in stored_names(s) if n not in bound]
    read = {n for s in between if s not in prefetch for n in loaded_names(s)}
    names = tuple(n for n in dict.fromkeys(bound) if n in read)
    if not names:
        raise UserError(
            "the script does not show which variables hold the batch: the forward pass reads none that each "
            "step of the loop sets"
        )
    return names, tuple(prefetch)


def _loads_next(statement: ast.stmt, between: Statements, computed: set[str], callers: set[str]) -> bool:
    """Return whether ``statement``, one of ``between``, only loads the next batch: an assignment to variables
    that earlier statements of ``between`` read and do not set, and that later ones do not read, from
    variables that are not in ``computed``, which calls of the model set."""
    if not isinstance(statement, ast.Assign) or calls(statement, callers):
        return False
    index, names = between.index(statement), set(stored_names(statement))
    earlier = {n for s in between[:index] for n in loaded_names(s)} - {
        n for s in between[:index] for n in stored_names(s)
    }
    later = {n for s in between[index + 1 :] for n in loaded_names(s)}
    return bool(names) and names <= earlier and not names & later and not loaded_names(statement) & computed


# -- where the plan is applied --------------------------------------------------------------------


def _setup(source: Source, place: LoopPlace, update: Update, model: str, *, scaler: str) -> LoopSetup:
    """Return where and with what variables the plan is applied: after the last assignment to the optimizer,
    to the GradScaler ``scaler`` ("": none) or to a variable of the clipping norm (`_moved`); or if there is
    none to the optimizer in the statement list around the loop, before the loop. Raises UserError if the
    script does not show where the optimizer is made, if it makes it in another loop than the model, or again
    in the training loop, if it changes the model between that and the loop, if the function that makes it
    calls backward outside a loop, and as `_moved` and `_clip` do.
    """
    loop_optimizer, model = (_attribute_of(place, name) for name in (update.optimizer, model))
    names = {loop_optimizer: loop_optimizer, model: model}
    user: ast.AST = place.loop
    statements, arguments = place.scope, dict[str, ast.expr]()
    if not any(loop_optimizer in stored_names(s) for s in place.scope):
        statements, user, arguments = _caller(source, place, loop_optimizer, model)
        for name in list(names):
            argument = arguments.get(name)
            names[name] = argument.id if isinstance(argument, ast.Name) else name
    elif place.loop is place.function:
        raise UserError(
            "backward is called outside a loop, in the function that makes the optimizer: make the optimizer "
            "outside this function, or call backward in a loop"
        )
    optimizer = names[loop_optimizer]
    if not (model in arguments or statements is place.scope or is_of_self(model)):
        names[model] = _model(source, statements, [], optimizer)
    statements, at = _innermost(statements, user, optimizer)
    _must_be_made_once(source, statements, at, optimizer, names[model])
    scaler = _scaler(source, place, scaler, None if user is place.loop else arguments, statements[:at])
    made = {optimizer, scaler} if any(optimizer in stored_names(s) for s in statements[:at]) else set()
    if is_of_self(names[model]) and made:
        made.add(names[model])
    clip = _clip(place, update, arguments if user is not place.loop else None, statements[at:])
    if made and clip:
        made |= loaded_names(with_self_variables(ast.parse(clip)))
    after = next((s for s in reversed(statements[:at]) if made & _defined_names(s)), None)
    moved = _moved(statements[:at], after, optimizer, made)
    if moved:
        after = next(s for s in reversed(statements[:at]) if optimizer in stored_names(s))
    between = statements[statements.index(after) + 1 : at] if after is not None else []
    remarks = _model_changes([s for s in between if s not in moved], names[model], optimizer)
    return LoopSetup(
        model=names[model],
        optimizer=optimizer,
        scaler=scaler,
        clip=clip,
        moved=moved,
        fit=_free_variable(source, optimizer),
        after=after,
        before=None if after is not None else statements[at],
        is_global=user is not place.loop and statements is not source.tree.body and not is_of_self(optimizer),
        remarks=tuple(remarks),
    )


def _model_changes(between: Statements, model: str, optimizer: str) -> Iterator[str]:
    """Yield a remark for each ``if`` of ``between``, the statements from where the plan is applied to the
    loop, that changes the model. Raises UserError for another statement that does."""
    for statement in between:
        changes = model in stored_names(statement) or f"{model}.to(" in ast.unparse(statement)
        if changes and not isinstance(statement, (ast.If, *FUNCTIONS)):
            raise UserError(
                f"line {statement.lineno} assigns {model} or moves it with .to() after the script has made "
                f"{optimizer}: it must do so before"
            )
        if changes and isinstance(statement, ast.If):
            yield (
                f"if {ast.unparse(statement.test)[:60]}, the script changes {model} after the plan is "
                "applied, for which the plan was not made"
            )


def _attribute_of(place: LoopPlace, name: str) -> str:
    """Return the attribute "self.X" of which the variable ``name`` is another name in the loop's function,
    set before the loop and nowhere else; ``name`` if there is none."""
    values = []
    for statement in place.scope:
        for node in ast.walk(statement):
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in stored_names(node):
                values += [dict(_pairs(node)).get(name)]
    (value,) = values if len(values) == 1 else (None,)
    if not (isinstance(value, ast.Name) and is_of_self(value.id)):
        return name
    is_set_here = any(value.id in stored_names(s) for s in place.scope)
    return name if is_set_here else value.id


def _pairs(assigned: ast.Assign | ast.AnnAssign) -> Iterator[tuple[str, ast.expr]]:
    """Yield (variable, value) for the variables that the assignment sets, also for those of a tuple."""
    for target in targets_of(assigned):
        if isinstance(target, ast.Tuple) and isinstance(assigned.value, ast.Tuple):
            yield from (
                (t.id, v)
                for t, v in zip(target.elts, assigned.value.elts, strict=False)
                if isinstance(t, ast.Name)
            )
        elif isinstance(target, ast.Name) and assigned.value is not None:
            yield target.id, assigned.value


def _moved(
    statements: Statements, after: ast.stmt | None, optimizer: str, made: set[str]
) -> tuple[ast.stmt, ...]:
    """Return those of ``statements`` that must move to behind the one that makes the optimizer: those up to
    ``after`` that set the other variables ``made`` (GradScaler, model, norm of clipping), if one before uses
    the optimizer, as a learning-rate scheduler does, of which a plan may need another one. Return () if none
    uses it, or if ``after`` is None. Raises UserError if they cannot be moved, since they need what is set
    between."""
    if after is None:
        return ()
    last = statements.index(after)
    first = max((i for i, s in enumerate(statements) if optimizer in stored_names(s)), default=last)
    between = [s for s in statements[first + 1 : last] if not isinstance(s, (*FUNCTIONS, ast.ClassDef))]
    user = next((s for s in between if optimizer in loaded_names(s)), None)
    if user is None:
        return ()
    moved = tuple(s for s in statements[first + 1 : last + 1] if made & _defined_names(s))
    others = {n for s in statements[first + 1 : last] if s not in moved for n in _defined_names(s)}
    if all(made >= _defined_names(s) and not others & loaded_names(s) for s in moved):
        return moved
    raise UserError(
        f"line {user.lineno} uses {optimizer}, which the plan may replace, before line {after.lineno}, after "
        f"which it is applied: move line {after.lineno} to before line {user.lineno}"
    )


def _free_variable(source: Source, optimizer: str) -> str:
    """Return the variable of the `Fit`, an attribute of ``self`` if the optimizer is one: "fit", unless the
    script uses that name already."""
    used = {name_of(n) for n in ast.walk(source.tree) if isinstance(n, ast.Name | ast.Attribute)}
    used |= {n.name for n in ast.walk(source.tree) if isinstance(n, (*FUNCTIONS, ast.alias))}
    name = "plan_fit" if "fit" in used else "fit"
    return f"self.{name}" if is_of_self(optimizer) else name


def _must_be_made_once(source: Source, statements: Statements, at: int, optimizer: str, model: str) -> None:
    """Raise UserError if the loop ``statements[at]`` makes the optimizer again, or if ``statements`` are in a
    loop and make the optimizer, but not the model."""
    if again := [s for s in statements[at : at + 1] if optimizer in stored_names(s)]:
        raise UserError(f"the loop in line {again[0].lineno} makes {optimizer} again")
    loops = (n for n in ast.walk(source.tree) if isinstance(n, LOOPS))
    is_repeated = any(n is statements[0] for loop in loops for n in _nodes(loop.body))
    if is_repeated and not any(model in stored_names(s) for s in statements[:at]):
        raise UserError(
            f"the script makes {optimizer} in a loop, but {model} before it: it must make both in the loop, "
            "or both before it"
        )


def _scaler(
    source: Source,
    place: LoopPlace,
    scaler: str,
    arguments: dict[str, ast.expr] | None,
    before: Statements,
) -> str:
    """Return the variable of the loop's GradScaler ``scaler`` at the place where the plan is applied, after
    the statements ``before``; "" if there is none. ``arguments``: those of the loop's function there, None if
    the loop is in the same scope. Raises UserError if the script does not show the variable."""
    if not scaler or arguments is None:
        return scaler
    function = place.function
    if function is not None and scaler in {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}:
        argument = arguments.get(scaler, ast.Constant(None))
        if isinstance(argument, ast.Constant):
            return ""
        if isinstance(argument, ast.Name):
            return argument.id
    elif any(scaler in stored_names(s) for s in (*before, *source.tree.body)):
        return scaler
    raise UserError(
        f"the script does not show the GradScaler {scaler} where it makes the optimizer: it must be a "
        "variable there, or of the module"
    )


def _caller(
    source: Source, place: LoopPlace, optimizer: str, model: str
) -> tuple[Statements, ast.AST, dict[str, ast.expr]]:
    """Return (the statements of the function or module that makes the optimizer; the call there of the
    function with the loop, an empty ``pass`` if there is none; the arguments of that call, by parameter).
    Raises UserError if not exactly one function or module makes the optimizer, and as `_maker` does."""
    if is_of_self(optimizer):
        return _maker(source, place, optimizer, model)
    functions = [n for n in ast.walk(source.tree) if isinstance(n, FUNCTIONS)]
    scopes = [source.tree.body, *(f.body for f in functions)]
    calls_of_loop = [
        (scope, node, _arguments(place.function, node))
        for scope in scopes
        for node in _outside_functions(scope)
        if place.function is not None
        and isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == place.function.name
    ]
    makers = [
        (scope, node, arguments)
        for scope, node, arguments in calls_of_loop
        if isinstance(argument := arguments.get(optimizer), ast.Name)
        and any(argument.id in stored_names(s) for s in scope)
    ]
    if len(makers) == 1:
        return makers[0]
    visible = [s for s in scopes if any(optimizer in stored_names(statement) for statement in s)]
    making = [s for s in visible if "parameters()" in ast.unparse(ast.Module(body=s, type_ignores=[]))]
    if len(making) != 1:
        raise UserError(
            f"the script does not show where {optimizer} is made: exactly one function, or the module, must "
            "assign it and call parameters()"
        )
    node = next((n for scope, n, _ in calls_of_loop if scope is making[0]), None)
    return making[0], node or ast.Pass(), {}


def _maker(
    source: Source, place: LoopPlace, optimizer: str, model: str
) -> tuple[Statements, ast.AST, dict[str, ast.expr]]:
    """Return what `_caller` does for the attribute ``optimizer`` of ``self``: the method of the loop's class
    that sets it. If that is ``__init__`` with an argument which its caller also uses for something else, as
    for a scheduler, return the caller, the call of the class there, and its arguments by attribute. Raises
    UserError if not exactly one method sets the optimizer, and if the model is no such argument."""
    owner = class_of(source, place.function)
    methods = [m for m in owner.body if isinstance(m, FUNCTIONS)] if owner is not None else []
    makers = [m for m in methods if assignment(m.body, optimizer) is not None]
    if owner is None or len(makers) != 1:
        raise UserError(
            f"the script does not show where {optimizer} is made: exactly one method of the loop's class "
            "must assign it once, and not inside an if or a loop"
        )
    (maker,) = makers
    parameters = {a.arg for a in maker.args.args}
    pairs = [pair for s in maker.body if isinstance(s, ast.Assign | ast.AnnAssign) for pair in _pairs(s)]
    passed = {n: v.id for n, v in pairs if isinstance(v, ast.Name) and v.id in parameters}
    if maker.name == "__init__" and optimizer in passed:
        functions = [n for n in ast.walk(source.tree) if isinstance(n, FUNCTIONS)]
        for scope in (source.tree.body, *(f.body for f in functions)):
            for call in _outside_functions(scope):
                if not (isinstance(call, ast.Call) and name_of(call.func) == owner.name):
                    continue
                by_parameter = _arguments(maker, call)
                arguments = {n: by_parameter[p] for n, p in passed.items() if p in by_parameter}
                argument = arguments.get(optimizer)
                if not (isinstance(argument, ast.Name) and _is_used_outside(scope, argument.id, call)):
                    continue
                if not isinstance(arguments.get(model), ast.Name):
                    raise UserError(
                        f"the script makes {argument.id} and uses it before {owner.name} changes or makes "
                        f"the model {model}: {owner.name} must get the model as it is"
                    )
                return scope, call, arguments
    name = f"self.{place.function.name}" if place.function is not None else ""
    inside = (n for s in maker.body for n in ast.walk(s) if isinstance(n, ast.Call))
    user = next((n for n in inside if isinstance(n.func, ast.Name) and n.func.id == name), None)
    return maker.body, user or ast.Pass(), {}


def _is_used_outside(scope: Statements, name: str, call: ast.Call) -> bool:
    """Return whether ``scope`` reads the variable ``name`` outside the arguments of ``call``."""
    inside = {id(n) for n in ast.walk(call)}
    return any(
        isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) and id(n) not in inside
        for s in scope
        for n in ast.walk(s)
    )


def _arguments(function: Any, call: ast.Call) -> dict[str, ast.expr]:
    names = [a.arg for a in function.args.posonlyargs + function.args.args if a.arg != "self"]
    positional = dict(zip(names, call.args, strict=False))
    return positional | {k.arg: k.value for k in call.keywords if k.arg is not None}


def _outside_functions(statements: Statements) -> Iterator[ast.AST]:
    """Yield the nodes of ``statements``, without the functions that these define and all that is inside."""
    waiting: list[ast.AST] = [*statements]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, FUNCTIONS):
            yield node
            waiting += ast.iter_child_nodes(node)


def _defined_names(statement: ast.stmt) -> set[str]:
    names = {*stored_names(statement)}
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        names.add(statement.name)
    if isinstance(statement, ast.Import | ast.ImportFrom):
        names |= {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    return names


def _innermost(statements: Statements, user: ast.AST, optimizer: str) -> tuple[Statements, int]:
    """Return (the innermost statement list that makes the optimizer and holds ``user``; the index there of
    the statement with ``user``, or the list's length if it holds none). The body of a loop is such a list
    only if the optimizer is not made before the loop."""
    at = next((i for i, s in enumerate(statements) if any(n is user for n in ast.walk(s))), None)
    if at is None:
        return statements, len(statements)
    is_made = any(optimizer in stored_names(s) for s in statements[:at])
    if optimizer in stored_names(statements[at]) and not (is_made and isinstance(statements[at], LOOPS)):
        for inner in lists_of(statements[at]):
            if any(n is user for n in _nodes(inner)):
                return _innermost(inner, user, optimizer)
    return statements, at


def _clip(place: LoopPlace, update: Update, arguments: dict[str, ast.expr] | None, later: Statements) -> str:
    """Return the source of the argument ``clip`` of memfit.apply: the norm to which the loop clips, "NORM if
    CONDITION else None" under a condition, in the variables of the place where the plan is applied; "" if the
    loop does not clip. ``arguments``: those with which that place calls the loop's function, by parameter;
    None if the loop is in the same scope. ``later``: the statements that follow there. Raises UserError if
    norm or condition contains a call, or a variable that changes in the loop or is not known there."""
    if update.clip is None:
        return ""
    own = {n for s in (later if arguments is None else place.scope) for n in stored_names(s)}
    stored = {
        ast.unparse(t)
        for s in place.scope
        for t in ast.walk(s)
        if isinstance(t, ast.Attribute) and isinstance(t.ctx, ast.Store)
    }
    parameters = set[str]()
    if arguments is not None and place.function is not None:
        parameters = {n.arg for n in ast.walk(place.function.args) if isinstance(n, ast.arg)}
        if update.optimizer in arguments:  # the call is the one of the loop's function
            arguments = {**_constant_defaults(place.function), **arguments}
    text = []
    for node in (update.clip, update.condition):
        if node is None:
            continue
        if any(isinstance(n, ast.Call) or ast.unparse(n) in stored for n in ast.walk(node)):
            raise UserError(
                f"between backward and step, the script clips gradients depending on {ast.unparse(node)}, "
                "which may change in the loop"
            )
        for name in loaded_names(node):
            argument = None if arguments is None else arguments.get(name)
            if name in own or (name in parameters and not isinstance(argument, ast.Name | ast.Constant)):
                raise UserError(
                    f"between backward and step, the script clips gradients depending on {name}, which "
                    "changes in the loop or is not known where the plan is applied"
                )
        text.append(_rename_variables(node, arguments or {}))
    return text[0] if len(text) == 1 else f"{text[0]} if {text[1]} else None"


def _constant_defaults(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, ast.expr]:
    """Return the default values of the function's parameters that are constants, by name."""
    places = [*function.args.posonlyargs, *function.args.args]
    defaults = function.args.defaults
    pairs = [*zip(places[len(places) - len(defaults) :], defaults, strict=True)]
    pairs += [(a, d) for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if d]
    return {a.arg: default for a, default in pairs if isinstance(default, ast.Constant)}


def _rename_variables(node: ast.expr, arguments: dict[str, ast.expr]) -> str:
    class Rename(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.expr:
            return arguments.get(name.id, name)

    return ast.unparse(Rename().visit(ast.parse(ast.unparse(node), mode="eval").body))
