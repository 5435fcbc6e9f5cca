"""Any installed torch optimizer by its import path, such as ``torch.optim:Muon`` or ``lion_pytorch:Lion``.

It is traced and run as it is. Only how its parameters and settings are passed is decided here.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from memfit.model.blocks import child_prefix, find_blocks
from memfit.techniques.base import MakeOptimizer, OptimizerLike
from memfit.types.errors import (
    OUT_OF_MEMORY_TEXTS,
    MemfitError,
    UserError,
    first_line,
    first_names,
    suggest,
)
from memfit.types.job import OptimizerChoice

if TYPE_CHECKING:
    import torch

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
ALLOWED_PATH = "PACKAGE.MODULE:CLASS of an installed torch.optim.Optimizer, such as torch.optim:Muon"
_ABOUT_SHAPES = re.compile(r"\b2-?D\b|ndim|dimension|matri", re.IGNORECASE)
_MOST_NAMES = 20
_FROM_THE_JOB = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def optimizer_class(path: str) -> type[torch.optim.Optimizer]:
    """Return the class at ``path``, which is PACKAGE.MODULE:CLASS. Importing the module runs it. Raises
    UserError if the path has another form, if the import raises ImportError, or if the module has no such
    attribute or it is not a subclass of torch.optim.Optimizer, which itself is refused, too. Other errors of
    the import are raised unchanged."""
    import torch

    if not PATH.fullmatch(path):
        raise UserError(f"the optimizer {path!r} is not an import path", allowed=ALLOWED_PATH)
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = module_name.partition(".")[0]
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == package
        raise UserError(
            f"the optimizer {path} cannot be imported: {first_line(error)[:200]}",
            allowed=ALLOWED_PATH,
            hint=f"install the package that provides the module {package}" if is_missing else "",
        ) from error
    kinds = {
        n: v
        for n, v in vars(module).items()
        if isinstance(v, type) and issubclass(v, torch.optim.Optimizer) and v is not torch.optim.Optimizer
    }
    if name in kinds:
        return kinds[name]
    attribute = getattr(module, name, None)
    does_not_exist_or_is_no_optimizer = (
        "does not exist" if attribute is None else "is not a subclass of torch.optim.Optimizer"
    )
    optimizers_there = first_names(sorted(kinds), _MOST_NAMES) or "none"
    raise UserError(
        f"the optimizer {path} {does_not_exist_or_is_no_optimizer}",
        allowed=f"the optimizers in {module_name}: {optimizers_there}",
        hint=suggest(name, kinds),
    )


def parse_arguments(text: str, what: str) -> dict[str, Any]:
    """Return the keyword arguments in ``text``, such as ``lr=0.02, betas=(0.9, 0.95)``, whose values are
    Python literals; {} for empty text. Raises UserError for any other text, also if a name is given twice.
    The error begins with ``what``, the name of the setting."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError(text)
        arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
        if len(arguments) < len(call.keywords):  # a name is given twice, or **
            raise ValueError(text)
        return arguments
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(
            f"{what} is {text!r}, which cannot be read as keyword arguments",
            allowed="NAME=VALUE, NAME=VALUE with Python literals and each name once, such as lr=0.02, "
            "betas=(0.9, 0.95)",
        ) from error


def needs_names(choice: OptimizerChoice) -> bool:
    """Return whether the optimizer can only be made from the model's parameters with their names: its class
    takes named parameters, or matrices of the blocks are treated apart from other parameters. False for
    memfit's own names of optimizers, such as "adamw", and for a user-defined optimizer (``make``). Raises
    UserError for an import path or an argument that is wrong."""
    if choice.make is not None or ":" not in choice.name:
        return False
    takes_names = _arguments(optimizer_class(choice.name), choice)[1]
    return takes_names or bool(choice.matrices) or choice.others == "adamw"


def imported_optimizer(
    choice: OptimizerChoice,
    make_adamw: MakeOptimizer,
    model: torch.nn.Module | None = None,
    blocks: str | None = None,
) -> MakeOptimizer:
    """Return a function that makes the optimizer at the import path ``choice.name`` of a list of parameters.

    The optimizer gets ``choice.arguments``, and the learning rate and weight decay of ``choice`` if its class
    has parameters ``lr`` and ``weight_decay`` that the arguments do not set. A class whose first parameter
    begins with "named" gets pairs of name and parameter, any other class gets parameters. With
    ``choice.matrices``, the matrices of the repeated blocks of ``model`` are a parameter group of their own
    with these settings. With ``choice.others`` = "adamw", the optimizer gets only these matrices, and
    ``make_adamw`` is called with all other parameters. ``blocks`` is ``Job.blocks``, the path of the blocks.

    Raises UserError at once if there is no such class, if it has no parameter of the name of an argument, or
    if the blocks are needed and not found. The returned function raises UserError if names or blocks are
    needed but it gets other parameters than those of ``model``, such as copies of them. Errors of the class
    and of the optimizer's step become UserErrors, except those of a lack of memory.
    """
    kind = optimizer_class(choice.name)
    arguments, takes_names = _arguments(kind, choice)
    selects = bool(choice.matrices) or choice.others == "adamw"
    prefix = ""
    if selects and model is not None:
        prefix = child_prefix(find_blocks(model, blocks)[0])

    def construct(groups: list[dict[str, Any]]) -> OptimizerLike:
        groups = [group for group in groups if group["params"]]
        plain = len(groups) == 1 and len(groups[0]) == 1
        call = functools.partial(kind, groups[0]["params"] if plain else groups, **arguments)
        with contextlib.redirect_stdout(sys.stderr):  # some print what they do with each parameter
            optimizer: Any = _with_user_errors(call, choice)()
        optimizer.step = _with_user_errors(optimizer.step, choice)
        return optimizer  # type: ignore[no-any-return]

    def make(params: list[torch.nn.Parameter]) -> OptimizerLike:
        names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
        if (selects or takes_names) and any(id(p) not in names for p in params):
            raise UserError(
                f"the optimizer {choice.name} needs the names of the model's parameters, but the plan "
                "updates copies of them",
                allowed="a plan without bf16-parameters and zero",
                hint="or another optimizer",
            )
        matrices = [p for p in params if selects and p.dim() == 2 and names[id(p)].startswith(prefix)]
        ids = set(map(id, matrices))
        others = [p for p in params if id(p) not in ids]

        def listed(selected: list[torch.nn.Parameter]) -> list[Any]:
            return [(names[id(p)], p) for p in selected] if takes_names else selected

        own = {"params": listed(matrices), **(choice.matrices or {})}
        if choice.others != "adamw":
            return construct([{"params": listed(others)}, own])
        parts = {"matrices": construct([own])} if matrices else {}
        if others:
            parts["others"] = make_adamw(others)
        return SeparateOptimizers(parts) if len(parts) > 1 else next(iter(parts.values()))

    return make


def _arguments(kind: type[Any], choice: OptimizerChoice) -> tuple[dict[str, Any], bool]:
    """Return (the keyword arguments for the optimizer class ``kind``, whether its first parameter takes pairs
    of name and parameter). Raises UserError if the class has no parameter of the name of an argument."""
    parameters = list(inspect.signature(kind).parameters.values())
    first, accepted = parameters[0].name if parameters else "", {p.name for p in parameters[1:]}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in choice.arguments:
        if name not in accepted and not takes_any:
            raise UserError(
                f"the optimizer {choice.name} has no argument {name!r}",
                allowed=", ".join(p.name for p in parameters[1:]) or "none",
                hint=suggest(name, accepted),
            )
    own = {name: getattr(choice, field) for name, field in _FROM_THE_JOB.items() if name in accepted}
    return {**own, **choice.arguments}, first.startswith("named")


def _with_user_errors(function: Callable[..., Any], choice: OptimizerChoice) -> Callable[..., Any]:
    """Return ``function`` with its errors turned into UserErrors that name the optimizer and the first line
    of the error. memfit's own errors, and those of a lack of memory, are raised unchanged."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            is_own = isinstance(error, MemfitError) or type(error).__module__.startswith("memfit.")
            no_memory = isinstance(error, MemoryError) or any(t in str(error) for t in OUT_OF_MEMORY_TEXTS)
            if is_own or no_memory:
                raise
            message = first_line(error)[:200]
            is_about_shapes = choice.others != "adamw" and _ABOUT_SHAPES.search(message)
            raise UserError(
                f"the optimizer {choice.name} raised {type(error).__name__}: {message}",
                hint="set others=adamw, with which it gets only the matrices of the repeated blocks, and "
                "AdamW updates the other parameters"
                if is_about_shapes
                else "",
            ) from error

    return call


class SeparateOptimizers:
    """Several optimizers, each with parameters of its own, used as one. ``optimizers``: them by name, such as
    "matrices" and "others". ``state`` is the union of their states."""

    def __init__(self, optimizers: Mapping[str, OptimizerLike]) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=set_to_none)

    @property
    def state(self) -> dict[Any, Any]:
        return {key: value for o in self.optimizers.values() for key, value in o.state.items()}
