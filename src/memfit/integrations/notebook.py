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
    "the cell has a forward pass, loss.backward() and optimizer.step(), as a training loop has them"
)
_CELL: Final = "<cell>"


def register(shell: Any) -> None:
    """Add the cell magic ``%%memfit`` to the IPython shell ``shell``."""
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
        raise UserError(f"%%memfit {line}", allowed=_USAGE)
    return {_OPTIONS[name]: value for name, value in zip(words[::2], words[1::2], strict=True)}


def predict_cell(
    cell: str, namespace: Mapping[str, Any], machine: str | None = None, plan: str | None = None
) -> Prediction:
    """Return the prediction of the training step that the Python text ``cell`` defines in the notebook's
    ``namespace``. ``machine`` and ``plan`` are as in `memfit.estimate`.

    The cell calls ``backward`` and an optimizer's ``step`` once each. Of loops around them, the first turn is
    predicted, with the first batch of a loader, which is read. Nothing else of the cell is run on real
    tensors; optimizers, schedulers and gradient scalers are left alone. Raises UserError for a cell that
    defines no such step, and as `memfit.estimate` does.
    """
    try:
        tree = ast.parse(cell)
    except SyntaxError as error:
        raise UserError(f"the cell is not Python: {error.msg} in line {error.lineno}") from error
    values = dict(namespace)
    step = _ToHost(values).visit(tree)
    body, loss = _until_backward(step.body, values)
    names = _names_read(body, values)
    models = {name: values[name] for name in names if _has_parameters(values[name])}
    if not models:
        raise UserError("the cell uses no model of the notebook", hint=_HINT)
    model = next(iter(models.values())) if len(models) == 1 else torch.nn.ModuleDict(models)
    batch = {name: values[name] for name in names if name not in models and _is_batch(values[name])}
    run = _compile(body, loss, names, values)

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
    """Replaces names of devices by the host's in a cell, and devices among the values that it uses: the
    trace runs on fake tensors of the host, whatever device is predicted."""

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
    """Return whether ``text`` names a device that is not the host, such as that of ``cuda:1``."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        return False
    return kind not in (HOST, "meta")


def _until_backward(body: list[ast.stmt], values: dict[str, Any]) -> tuple[list[ast.stmt], ast.expr]:
    """Return the statements of ``body`` up to the call of ``backward``, and the loss on which it is called.
    The call, in whatever ``with`` or ``if``, becomes a ``return`` of the loss. Of loops around it the first
    turn remains, and ``values`` gets the loop variables of that turn."""
    calls = [node for part in body for node in ast.walk(part) if _calls(node, "backward")]
    if len(calls) != 1:
        raise UserError(f"the cell of %%memfit calls backward {len(calls)} times", allowed="once", hint=_HINT)
    call = calls[0]
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    owner = values.get(call.func.value.id) if isinstance(call.func.value, ast.Name) else None
    # the loss is the argument of an accelerator's backward
    loss = call.args[0] if call.args and owner is not None else call.func.value
    return list(_first_turns(body, call, loss, values)), loss


def _first_turns(
    body: list[ast.stmt], call: ast.Call, loss: ast.expr, values: dict[str, Any]
) -> Iterator[ast.stmt]:
    for part in body:
        if not any(node is call for node in ast.walk(part)):
            yield part
            continue
        if isinstance(part, ast.For):
            _take_first(part, values)
            yield from _first_turns(part.body, call, loss, values)
        elif isinstance(part, ast.Expr) and part.value is call:
            yield ast.copy_location(ast.Return(loss), part)
        elif isinstance(part, ast.With | ast.If):
            part.body = list(_first_turns(part.body, call, loss, values))
            yield part
        else:
            raise UserError(
                f"line {part.lineno} of the cell calls backward inside {type(part).__name__.lower()}",
                allowed="loops with for, with and if around it",
            )
        return


def _take_first(loop: ast.For, values: dict[str, Any]) -> None:
    """Set the targets of ``loop`` in ``values`` to what its first turn would give them. Random numbers of
    torch are as before, afterwards."""
    turn = ast.For(loop.target, loop.iter, [ast.Break()], [])
    code = compile(ast.fix_missing_locations(ast.Module([turn], [])), _CELL, "exec")
    with torch.random.fork_rng(devices=[]):
        run_user_code(
            lambda: exec(code, values), f"the first turn of the loop in line {loop.lineno} of the cell"
        )


def _compile(
    body: list[ast.stmt], loss: ast.expr, names: list[str], values: dict[str, Any]
) -> Callable[..., Any]:
    """Return the function of ``names`` that does what ``body`` does and returns the loss."""
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
    """Stands for an optimizer, scheduler or scaler before ``backward``: every method does nothing and returns
    its argument, as ``scaler.scale(loss)`` does."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *values, **_: values[0] if values else None


def _protect(value: Any) -> Any:
    """Return ``value``, or if the step could change it, a stand-in (`_Nothing`) or a shallow copy."""
    changed = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
    if isinstance(value, changed):
        return _Nothing()
    return copy.copy(value) if isinstance(value, list | dict | set) else value


def _calls(node: ast.AST, method: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method


def _optimizer(tree: ast.AST, values: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Return the only optimizer whose ``step`` the cell calls, also as ``scaler.step(optimizer)``."""
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
            allowed="one, as NAME.step() or SCALER.step(NAME)",
            hint=_HINT,
        )
    return next(iter(optimizers.values()))


def _clip(tree: ast.AST, values: Mapping[str, Any]) -> float | None:
    """Return the largest gradient norm of ``clip_grad_norm_`` in the cell, or None without it."""
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
                f"line {node.lineno} of the cell: the largest norm is no number that can be read",
                allowed="a number, or a name of the notebook that holds one",
            )
    return None
