"""``%load_ext memfit`` and ``%%memfit`` in IPython and Jupyter: predict the step that a cell defines.

::

    %load_ext memfit

    %%memfit --on H100-SXM
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()

The cell is not run. What it does before ``backward`` becomes the loss of a step that `memfit.estimate` traces
on fake tensors, with the model, batch and optimizer that the notebook already has.
"""

from __future__ import annotations

import ast
import copy
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch

from memfit.api import Prediction, estimate
from memfit.jobs.user_job import run_user_code
from memfit.model.batch_objects import batch_tensors
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError

_OPTIONS: Final = {"--on": "machine", "--plan": "plan"}
_USAGE: Final = "%%memfit [--on MACHINE] [--plan NAME or FILE.yaml]"
_HINT: Final = (
    "write the forward pass, loss.backward() and optimizer.step() in the cell, as in a training loop"
)
_CELL: Final = "<cell>"


def register(shell: Any) -> None:
    """Add the cell magic ``%%memfit`` to the IPython shell ``shell``. It returns the prediction of the cell's
    step (`predict_cell`), and raises IPython's UsageError where that raises UserError."""
    from IPython.core.error import UsageError

    def memfit(line: str, cell: str) -> Prediction:
        try:
            return predict_cell(shell.transform_cell(cell), shell.user_ns, **_options(line))
        except UserError as error:
            raise UsageError(f"memfit: {error}") from error

    shell.register_magic_function(memfit, magic_kind="cell", magic_name="memfit")


def _options(line: str) -> dict[str, str]:
    try:
        words = shlex.split(line)
    except ValueError:  # a quotation mark is not closed
        words = [line]
    if len(words) % 2 or not set(words[::2]) <= set(_OPTIONS):
        raise UserError(f"%%memfit cannot read its options {line!r}", allowed=_USAGE)
    return {_OPTIONS[name]: value for name, value in zip(words[::2], words[1::2], strict=True)}


def predict_cell(
    cell: str, namespace: Mapping[str, Any], machine: str | None = None, plan: str | None = None
) -> Prediction:
    """Return the prediction of the training step that the Python text ``cell`` defines in the notebook's
    ``namespace``. ``machine`` and ``plan`` are as in `memfit.estimate`.

    The cell must call ``backward`` once, inside nothing but ``for``, ``with`` and ``if``, and ``step`` of one
    optimizer. The model, the optimizer and the loader must be variables of ``namespace``: the loader of a
    loop is read before the rest of the cell, so one that the cell itself makes is not found, and if the
    notebook has another of that name, that one is used.

    Of a loop around ``backward``, the first iteration is predicted; its batch is read from the loader.
    Nothing else of the cell is run on real tensors; optimizers, schedulers and gradient scalers are not
    changed. Raises UserError for a cell that does not define such a step, and as `memfit.estimate` does.
    """
    try:
        tree = ast.parse(cell)
    except SyntaxError as error:
        raise UserError(f"the cell is not Python: {error.msg} in line {error.lineno}") from error
    values = dict(namespace)
    step = _ToHost(values).visit(tree)
    body = _until_backward(step.body, values)
    names = _names_read(body, values)
    models = {name: values[name] for name in names if _has_parameters(values[name])}
    if not models:
        raise UserError(
            "before backward, the cell uses no model of the notebook",
            allowed="a variable that is a torch.nn.Module with parameters, made in an earlier cell",
            hint=_HINT,
        )
    model = next(iter(models.values())) if len(models) == 1 else torch.nn.ModuleDict(models)
    batch = {name: values[name] for name in names if name not in models and _is_batch(values[name])}
    run = _compile(body, names, values)

    def loss_of(model: torch.nn.Module, batch: Mapping[str, Any]) -> Any:
        own = {name: model[name] for name in models} if len(models) > 1 else dict.fromkeys(models, model)  # type: ignore[index]
        return run(**{name: _protect(values[name]) for name in names} | dict(batch) | own)

    return estimate(
        model,
        batch,
        loss=loss_of,
        optimizer=_optimizer(tree, values),
        clip=_clip(tree, values),
        plan=plan,
        machine=machine,
    )


class _ToHost(ast.NodeTransformer):
    """Replaces accelerators by the host: the trace runs on fake tensors of the host, whatever device is
    predicted. In the syntax tree of a cell, it replaces texts such as "cuda:1" and calls such as
    ``x.cuda()``; in ``values``, which it changes when it is created, texts and ``torch.device`` objects."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        for name, value in values.items():
            if isinstance(value, torch.device) or (isinstance(value, str) and _is_device(value)):
                values[name] = type(value)(HOST)

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        is_name = isinstance(node.value, str) and _is_device(node.value)
        return ast.copy_location(ast.Constant(HOST), node) if is_name else node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        if isinstance(node.func, ast.Attribute) and _is_device(node.func.attr):
            node.func.attr, node.args, node.keywords = HOST, [], []  # x.cuda() becomes x.cpu()
        self.generic_visit(node)
        return node


def _is_device(text: str) -> bool:
    """Return whether ``text`` is the name of a device, such as "cuda:1", other than "cpu" and "meta"."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        return False
    return kind not in (HOST, "meta")


def _until_backward(body: list[ast.stmt], values: dict[str, Any]) -> list[ast.stmt]:
    """Return the statements of ``body`` up to the call of ``backward``, which becomes a ``return`` of the
    loss. A ``for`` around the call is replaced by its body, and ``values`` gets its loop variables of the
    first iteration; a ``with`` or ``if`` around the call stays. Raises UserError if the number of calls of
    ``backward`` is not one, and for any other statement around the call."""
    calls = [node for part in body for node in ast.walk(part) if _calls(node, "backward")]
    if len(calls) != 1:
        raise UserError(
            f"the cell of %%memfit calls backward {len(calls)} times",
            allowed="one call in the text of the cell, which may be in a loop",
            hint=_HINT,
        )
    call = calls[0]
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    owner = values.get(call.func.value.id) if isinstance(call.func.value, ast.Name) else None
    # the loss is the argument of an accelerator's backward
    loss = call.args[0] if call.args and owner is not None else call.func.value
    return list(_first_iterations(body, call, loss, values))


def _first_iterations(
    body: list[ast.stmt], call: ast.Call, loss: ast.expr, values: dict[str, Any]
) -> Iterator[ast.stmt]:
    for part in body:
        if not any(node is call for node in ast.walk(part)):
            yield part
            continue
        if isinstance(part, ast.For):
            _take_first(part, values)
            yield from _first_iterations(part.body, call, loss, values)
        elif isinstance(part, ast.Expr) and part.value is call:
            yield ast.copy_location(ast.Return(loss), part)
        elif isinstance(part, ast.With | ast.If):
            part.body = list(_first_iterations(part.body, call, loss, values))
            if isinstance(part, ast.If):
                part.orelse = list(_first_iterations(part.orelse, call, loss, values))
            yield part
        else:
            raise UserError(
                f"line {part.lineno} of the cell calls backward inside {type(part).__name__.lower()}",
                allowed="backward as a statement of its own, inside nothing but `for`, `with` and `if`",
            )
        return


def _take_first(loop: ast.For, values: dict[str, Any]) -> None:
    """Begin ``loop`` with ``values`` as its variables, and set its targets among them to what its first
    iteration gives them; an iterator without items leaves them as they are. The state of torch's random
    number generator is restored. Raises UserError for an error in the loop's iterator."""
    first_iteration = ast.For(loop.target, loop.iter, [ast.Break()], [])
    code = compile(ast.fix_missing_locations(ast.Module([first_iteration], [])), _CELL, "exec")
    with torch.random.fork_rng(devices=[]):
        run_user_code(
            lambda: exec(code, values), f"the first iteration of the loop in line {loop.lineno} of the cell"
        )


def _compile(body: list[ast.stmt], names: list[str], values: dict[str, Any]) -> Callable[..., Any]:
    """Return a function with the body ``body``, which returns the loss, or None if it does not reach its
    ``return``. Its parameters are ``names``, its global variables ``values``."""
    parameters = ast.arguments([], [], None, [ast.arg(name) for name in names], [None] * len(names), None, [])
    function = ast.FunctionDef("_step", parameters, body, [], None, None)
    function.body.append(ast.Return(ast.Constant(None)))
    module = ast.fix_missing_locations(ast.Module([function], []))
    scope = dict(values)
    exec(compile(module, _CELL, "exec"), scope)
    step: Callable[..., Any] = scope["_step"]
    return step


def _names_read(body: list[ast.stmt], values: Mapping[str, Any]) -> list[str]:
    names = (node.id for part in body for node in ast.walk(part) if isinstance(node, ast.Name))
    return [name for name in dict.fromkeys(names) if name in values]


def _has_parameters(value: Any) -> bool:
    return isinstance(value, torch.nn.Module) and any(True for _ in value.parameters())


def _is_batch(value: Any) -> bool:
    if isinstance(value, torch.nn.Module | torch.optim.Optimizer | torch.utils.data.DataLoader | type):
        return False
    return bool(batch_tensors(value))


class _Nothing:
    """Stand-in for an optimizer, scheduler or gradient scaler: every method does nothing and returns its
    first argument, such as the loss of ``scaler.scale(loss)``, or None without arguments."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *values, **_: values[0] if values else None


def _protect(value: Any) -> Any:
    """Return a stand-in (`_Nothing`) for an optimizer, scheduler or gradient scaler, a shallow copy of a
    list, dict or set, and any other value as it is."""
    changed = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
    if isinstance(value, changed):
        return _Nothing()
    return copy.copy(value) if isinstance(value, list | dict | set) else value


def _calls(node: ast.AST, method: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method


def _optimizer(tree: ast.AST, values: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Return the only optimizer of which the cell calls ``step``: as ``optimizer.step()``, as
    ``scaler.step(optimizer)``, or of a wrapper or scheduler with an attribute ``optimizer``. Raises UserError
    for none and for several."""
    optimizers: dict[int, torch.optim.Optimizer] = {}
    for node in ast.walk(tree):
        if not _calls(node, "step"):
            continue
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        for part in (node.func.value, *node.args):
            value = values.get(part.id) if isinstance(part, ast.Name) else None
            value = getattr(value, "optimizer", value) if not isinstance(value, torch.nn.Module) else None
            if isinstance(value, torch.optim.Optimizer):
                optimizers[id(value)] = value
    if len(optimizers) != 1:
        raise UserError(
            f"the cell calls step of {len(optimizers)} optimizers that are variables of the notebook",
            allowed="one optimizer, made in an earlier cell: NAME.step() or SCALER.step(NAME)",
            hint=_HINT,
        )
    return next(iter(optimizers.values()))


def _clip(tree: ast.AST, values: Mapping[str, Any]) -> float | None:
    """Return the largest gradient norm (``max_norm``) of the cell's first call of ``clip_grad_norm_``; None
    if there is none. Raises UserError if it is neither a number nor a variable of the notebook that holds
    one."""
    for node in ast.walk(tree):
        if _calls(node, "clip_grad_norm_") or (
            isinstance(node, ast.Call) and getattr(node.func, "id", "") == "clip_grad_norm_"
        ):
            assert isinstance(node, ast.Call)
            named = [k.value for k in node.keywords if k.arg == "max_norm"]
            for value in (*named, *node.args[1:2]):
                norm = values.get(value.id) if isinstance(value, ast.Name) else getattr(value, "value", None)
                if isinstance(norm, int | float):
                    return float(norm)
            raise UserError(
                f"line {node.lineno} of the cell: the largest norm of clip_grad_norm_ cannot be read",
                allowed="a number, or a variable of an earlier cell that holds one",
            )
    return None
