"""Find what a training loop of plain PyTorch does from backward to the optimizer's step."""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from memfit.export.source_edits import Source, name_of
from memfit.types.errors import UserError

LOOPS = (ast.For, ast.While)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Statements = list[ast.stmt]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What a training loop does from backward to the optimizer's step. ``loss``, ``optimizer``: names of
    variables. ``backward``, ``step``: the statements that run them; both are the same ``if`` if its branches
    do. ``step_body``: the statement list that contains ``step``. ``clip``: the norm to which gradients are
    clipped, None if they are not; ``condition``: the condition under which they are, None: always.
    ``norm``: the variable to which the loop assigns what clip_grad_norm_ returns, "" without. ``removed``:
    further statements that the plan's own step replaces. ``scaler``: the variable of the GradScaler, ""
    without."""

    loss: str
    optimizer: str
    backward: ast.stmt
    step: ast.stmt
    step_body: Statements
    clip: ast.expr | None
    condition: ast.expr | None
    norm: str
    removed: tuple[ast.stmt, ...]
    scaler: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoopPlace:
    """The place of a statement in a loop of a script: ``body[index]``. `find_place` returns that of the
    statement which runs backward. ``body``: a statement list inside ``loop``, the innermost loop around it,
    or the function if that makes one step and has no loop around it. ``function``: the innermost function
    around the loop, None at the top of the module. ``scope``: the statements of that function or of the
    module."""

    function: ast.FunctionDef | ast.AsyncFunctionDef | None
    scope: Statements
    loop: Any
    body: Statements
    index: int


def find_place(source: Source) -> LoopPlace:
    """Return where the script runs backward: its only call, as a statement in a loop or in a function, or its
    only two, in the two branches of one ``if`` there. Raises UserError if there is no such place."""
    count = sum(isinstance(n, ast.Call) and name_of(n.func) == "backward" for n in ast.walk(source.tree))
    functions = [n for n in ast.walk(source.tree) if isinstance(n, FUNCTIONS)]
    in_functions = (p for f in functions for p in places(f.body, f, f.body, f))
    for place in itertools.chain(places(source.tree.body, None, source.tree.body, None), in_functions):
        if count == 1 and _is_backward(place.body[place.index]):
            return place
        if count == 2 and _branches(place.body[place.index]) is not None:
            return place
    if count != 1:
        raise UserError(
            f"the script calls backward {count} times, not once (or once in each branch of one if)"
        )
    raise UserError("backward is not called in a statement of its own inside a loop or a function")


def places(statements: Statements, function: Any, scope: Statements, loop: Any) -> Iterator[LoopPlace]:
    """Yield the place of each statement that is in a loop, also of those inside compound statements.
    ``function``, ``scope`` and ``loop`` are those around ``statements``, as in `LoopPlace`; ``loop`` is None
    outside loops."""
    for index, statement in enumerate(statements):
        if loop is not None:
            yield LoopPlace(function=function, scope=scope, loop=loop, body=statements, index=index)
        is_function = isinstance(statement, FUNCTIONS)
        for inner in lists_of(statement):
            if is_function:
                yield from places(inner, statement, inner, None)
            else:
                yield from places(inner, function, scope, statement if isinstance(statement, LOOPS) else loop)


def lists_of(statement: ast.AST) -> list[Statements]:
    """Return the statement lists of a compound statement that are not empty: its body, else, finally, and
    those of its handlers and cases. Return [] for a simple statement."""
    fields = [getattr(statement, name, None) for name in ("body", "orelse", "finalbody")]
    fields += [h.body for name in ("handlers", "cases") for h in getattr(statement, name, [])]
    return [f for f in fields if isinstance(f, list) and f]


def _is_backward(statement: ast.stmt) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and name_of(call.func) == "backward"


def _branches(statement: ast.stmt) -> tuple[Statements, Statements] | None:
    """Return the two branches of the statement if it is an ``if`` and both run backward, else None."""
    if isinstance(statement, ast.If) and all(
        any(_is_backward(s) for s in branch) for branch in (statement.body, statement.orelse)
    ):
        return statement.body, statement.orelse
    return None


def find_update(source: Source, place: LoopPlace) -> Update:
    """Return what the loop does from the backward at ``place`` to the step. Raises UserError if backward has
    another form than LOSS.backward() or SCALER.scale(LOSS).backward(), if no step follows or only under a
    condition, if the loop steps another optimizer, too, if gradients change between in another way than by
    one clipping of the whole model, if two branches contain further statements or differ in more than a
    GradScaler, or if a GradScaler is also used elsewhere."""
    statement = place.body[place.index]
    if place.function is not None and _is_closure(source, place.function.name):
        raise UserError(
            "the script passes a closure to the optimizer's step, which memfit.apply cannot call: put its "
            "statements into the loop, and call step without arguments"
        )
    if (branches := _branches(statement)) is not None:
        first, last = (_sequence(place, branch, is_whole=True) for branch in branches)
        keys = [(u.loss, u.optimizer, u.norm, *map(_text, (u.clip, u.condition))) for u in (first, last)]
        if keys[0] != keys[1]:
            raise UserError("the two branches of an if that run backward differ in more than a GradScaler")
        zeroed = [s for s in place.body if _method(s, "zero_grad") is not None]
        update = dataclasses.replace(
            first,
            backward=statement,
            step=statement,
            step_body=place.body,
            removed=tuple(zeroed),
            scaler=first.scaler or last.scaler,
        )
    else:
        update = _sequence(place, place.body[place.index :], is_whole=False)
    spans = [(s.lineno, end(s)) for s in (update.backward, update.step, *update.removed)]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and name_of(node.func) in {"unscale_", "scale"}:
            is_own = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
            if is_own and not any(a <= node.lineno <= b for a, b in spans):
                raise UserError(
                    f"line {node.lineno} calls {name_of(node.func)}, as of a GradScaler, outside the "
                    "statements from backward to the optimizer's step"
                )
    return update


def _is_closure(source: Source, name: str) -> bool:
    """Return whether the script passes the function ``name`` to a method called step."""
    steps = (n for n in ast.walk(source.tree) if isinstance(n, ast.Call) and name_of(n.func) == "step")
    return any(isinstance(a, ast.Name) and a.id == name for c in steps for a in c.args)


def _text(node: ast.expr | None) -> str:
    return "" if node is None else ast.unparse(node)


_NO_STEP = (
    "no OPTIMIZER.step() follows backward in its block, or follows an inner for loop whose last statement is "
    "backward"
)


def _sequence(place: LoopPlace, statements: Statements, *, is_whole: bool) -> Update:
    """Return the update that begins with the first backward of ``statements``. ``is_whole``: the statements
    are a branch, which must contain nothing else. Otherwise the step may also follow the loop of
    micro-batches, and calls of zero_grad are among ``removed``. Raises UserError as `find_update` does."""
    index = next(i for i, s in enumerate(statements) if _is_backward(s))
    loss, scaler = _loss(statements[index])
    rest, step_body = statements[index + 1 :], place.body
    if not is_whole:
        _must_step_always(place, rest, scaler)
    if not is_whole and _step_index(place, rest, scaler) is None and (parent := _parent(place)) is not None:
        step_body, position = parent
        if rest:
            raise UserError(_NO_STEP)
        rest = step_body[position + 1 :]
    if (step := _step_index(place, rest, scaler)) is None:
        raise UserError(_NO_STEP)
    clip, condition, norm, removed = _gradient_changes(rest[:step], scaler)
    removed += [s for s in rest[step + 1 :] if scaler and _method(s, "update") == scaler]
    if is_whole and len(removed) + 2 != len(statements):
        raise UserError(
            "a branch of an if that runs backward has statements other than backward, clipping of gradients, "
            "the optimizer's step and calls of the GradScaler: move those before or behind the if"
        )
    if not is_whole:
        bodies = [place.body] if step_body is place.body else [place.body, step_body]
        _must_be_only(str(_stepped_optimizer(rest[step], scaler)), bodies, scaler)
        removed += [s for body in bodies for s in body if _method(s, "zero_grad") is not None]
    return Update(
        loss=loss,
        optimizer=str(_stepped_optimizer(rest[step], scaler)),
        backward=statements[index],
        step=rest[step],
        step_body=step_body,
        clip=clip,
        condition=condition,
        norm=norm,
        removed=tuple(removed),
        scaler=scaler,
    )


def _must_step_always(place: LoopPlace, statements: Statements, scaler: str) -> None:
    """Raise UserError if the loop makes the optimizer's step in an ``if`` among ``statements``."""
    for statement in (s for s in statements if isinstance(s, ast.If)):
        if _step_index(place, [s for inner in lists_of(statement) for s in inner], scaler) is not None:
            raise UserError(
                f"line {statement.lineno} makes the optimizer's step only under a condition, as a script "
                "does that accumulates gradients itself. Let each iteration take all samples of a step and "
                "make the step; the plan then splits them"
            )


def _changes_gradients(statement: ast.stmt) -> bool:
    text = ast.unparse(statement)
    return ".grad" in text or "clip_grad" in text or "unscale" in text


def _loss(statement: ast.stmt) -> tuple[str, str]:
    """Return the variables (loss, GradScaler or "") of the statement ``LOSS.backward()`` or
    ``SCALER.scale(LOSS).backward()``. Raises UserError for any other form."""
    call: Any = statement.value  # type: ignore[attr-defined]
    target = call.func.value if isinstance(call.func, ast.Attribute) else None
    if not (call.args or call.keywords):
        if isinstance(target, ast.Name):
            return target.id, ""
        if isinstance(target, ast.Call) and isinstance(target.func, ast.Attribute):
            owner, arguments = target.func.value, [*target.args, *target.keywords]
            is_scaled = target.func.attr == "scale" and isinstance(owner, ast.Name) and len(arguments) == 1
            if is_scaled and isinstance(arguments[0], ast.Name):
                return arguments[0].id, owner.id  # type: ignore[attr-defined]
    raise UserError(
        "backward is called neither as LOSS.backward() nor as SCALER.scale(LOSS).backward() on variables "
        "without further arguments"
    )


def _parent(place: LoopPlace) -> tuple[Statements, int] | None:
    """Return (the statement list that contains the loop of ``place``; its index there). Return None if that
    loop is not a ``for``, or is not inside another loop of the same function."""
    for outer in places(place.scope, place.function, place.scope, None):
        if outer.body[outer.index] is place.loop and isinstance(place.loop, ast.For):
            return outer.body, outer.index
    return None


def _step_index(place: LoopPlace, statements: Statements, scaler: str) -> int | None:
    names = [
        (i, name) for i, s in enumerate(statements) if (name := _stepped_optimizer(s, scaler)) is not None
    ]
    return next((i for i, name in names if scaler or _is_optimizer(place, name)), None)


def _stepped_optimizer(statement: ast.stmt, scaler: str) -> str | None:
    """Return the variable X if the statement is ``X.step()``, or with a ``scaler``, ``SCALER.step(X)``; else
    None."""
    if not scaler:
        return _method(statement, "step")
    if _method(statement, "step", arguments=1) != scaler:
        return None
    argument = statement.value.args[0]  # type: ignore[attr-defined]
    return argument.id if isinstance(argument, ast.Name) else None


def _method(statement: ast.stmt, name: str, *, arguments: int = 0) -> str | None:
    """Return the variable X if the statement calls the method, as ``X.name(...)``, with exactly ``arguments``
    positional arguments and no others; zero_grad may have any. Return None for any other statement."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == name):
        return None
    fits = name == "zero_grad" or (len(call.args) == arguments and not call.keywords)
    return call.func.value.id if isinstance(call.func.value, ast.Name) and fits else None


def _is_optimizer(place: LoopPlace, name: str) -> bool:
    """Return whether the variable ``name`` is an optimizer: it is called opt or optim or contains
    "optimizer", its assignment calls parameters(), or the loop calls its zero_grad."""
    assigned = assignment(place.scope, name)
    has_parameters = assigned is not None and "parameters()" in ast.unparse(assigned)
    zeroes = any(_method(s, "zero_grad") == name for s in place.body)
    return has_parameters or zeroes or name.rpartition(".")[2] in {"opt", "optim"} or "optimizer" in name


def _gradient_changes(
    statements: Statements, scaler: str
) -> tuple[ast.expr | None, ast.expr | None, str, list[ast.stmt]]:
    """Return (the norm to which the ``statements`` between backward and step clip, the condition under which
    they do, the variable that gets what the clipping returns, the statements that the plan's step replaces);
    the first two are None if there is no clipping or no condition, the variable is then "". Raises UserError
    for a second clipping, for other changes of gradients, and if the variable is read before the step, which
    returns it."""
    clip = condition = None
    norm = ""
    removed: list[ast.stmt] = []
    for statement in statements:
        if (clipping := _clipping(statement, scaler)) is not None:
            if clip is not None:
                raise UserError(
                    "between backward and step, the script clips gradients twice: keep one of them"
                )
            clip, condition, norm = clipping
            removed.append(statement)
        elif norm and norm in loaded_names(statement):
            raise UserError(
                f"line {statement.lineno} reads {norm}, the norm of the gradients, before the optimizer's "
                "step, but fit.step() clips, updates and then returns that norm: move what reads it behind "
                "the step, or take it out"
            )
        elif scaler and _method(statement, "unscale_", arguments=1) == scaler:
            removed.append(statement)
        elif _changes_gradients(statement):
            text = ast.unparse(statement)
            raise UserError(
                "between backward and step, the script changes gradients other than by "
                f"clip_grad_norm_(MODEL.parameters(), NORM): {text[:60]}"
            )
    return clip, condition, norm, removed


def _must_be_only(optimizer: str, bodies: list[Statements], scaler: str) -> None:
    """Raise UserError if ``bodies``, the loop's statement lists, both step an optimizer other than
    ``optimizer`` and call its zero_grad."""
    statements = [s for body in bodies for s in body]
    stepped = {_stepped_optimizer(s, scaler) for s in statements} - {None, optimizer}
    if others := sorted(map(str, stepped & {_method(s, "zero_grad") for s in statements})):
        raise UserError(
            f"the loop steps two optimizers, {optimizer} and {others[0]}; only loops with one are edited"
        )


def _clipping(statement: ast.stmt, scaler: str) -> tuple[ast.expr, ast.expr | None, str] | None:
    """Return (the norm; the condition, None without; the variable X, "" without) if the statement is
    ``clip_grad_norm_(model.parameters(), NORM)``, an ``if`` without else around it, or an assignment of it to
    X. Return None for any other statement."""
    if isinstance(statement, ast.If) and not statement.orelse:
        inner = [s for s in statement.body if not (scaler and _method(s, "unscale_", arguments=1) == scaler)]
        norm = _norm(inner[0]) if len(inner) == 1 and isinstance(inner[0], ast.Expr) else None
        return None if norm is None else (norm, statement.test, "")
    norm = _norm(statement)
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    variable = targets[0].id if targets and isinstance(targets[0], ast.Name) else ""
    return None if norm is None or len(targets) > bool(variable) else (norm, None, variable)


def _norm(statement: ast.stmt) -> ast.expr | None:
    """Return NORM, a constant, variable or attribute, if the statement is
    ``clip_grad_norm_(model.parameters(), NORM)`` without further arguments, or an assignment of it; else
    None."""
    call = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
    if not isinstance(call, ast.Call) or name_of(call.func) != "clip_grad_norm_":
        return None
    norms = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "max_norm")]
    others = len(call.args) > 2 or any(k.arg != "max_norm" for k in call.keywords)
    is_whole = bool(call.args) and _is_whole_model(call.args[0])
    is_simple = is_whole and len(norms) == 1 and isinstance(norms[0], ast.Constant | ast.Name | ast.Attribute)
    return norms[0] if is_simple and not others else None


def _is_whole_model(node: ast.expr) -> bool:
    """Return whether ``node`` is ``X.parameters()`` of a variable or ``X.module.parameters()``. Other
    attributes are taken for parts of a model."""
    if not (isinstance(node, ast.Call) and not node.args and isinstance(node.func, ast.Attribute)):
        return False
    model = node.func.value
    is_wrapped = isinstance(model, ast.Attribute) and model.attr == "module"
    return node.func.attr == "parameters" and (is_wrapped or isinstance(model, ast.Name))


def must_be_on_lines(body: Statements) -> None:
    """Raise UserError, which names the line, if two statements of ``body`` share one."""
    shared = next((b.lineno for a, b in itertools.pairwise(body) if end(a) >= b.lineno), None)
    if shared is not None:
        raise UserError(
            f"line {shared} has several statements of the loop behind the head of a block: put each on a "
            "line of its own"
        )


# -- names and lines ------------------------------------------------------------------------------


def assignment(scope: Statements, name: str) -> Any:
    """Return the assignment ``NAME = ...`` among the statements ``scope``, not inside compound ones, of a
    value other than None. Return None if there is none or more than one."""
    assignments = [
        s
        for s in scope
        if isinstance(s, ast.Assign | ast.AnnAssign)
        and any(isinstance(t, ast.Name) and t.id == name for t in targets_of(s))
        and s.value is not None
        and not (isinstance(s.value, ast.Constant) and s.value.value is None)
    ]
    return assignments[0] if len(assignments) == 1 else None


def targets_of(statement: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return statement.targets if isinstance(statement, ast.Assign) else [statement.target]


def stored_names(node: ast.AST) -> list[str]:
    """Return the variables to which the node assigns, in order, a variable as often as it is assigned. Those
    inside functions that the node defines do not count."""
    if isinstance(node, (*FUNCTIONS, ast.Lambda)):
        return []
    own = [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
    return own + [n for child in ast.iter_child_nodes(node) for n in stored_names(child)]


def loaded_names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def end(statement: ast.stmt) -> int:
    """Return the number of a statement's last line."""
    return statement.end_lineno or statement.lineno
