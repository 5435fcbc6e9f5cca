"""Find a model's repeated blocks and its head."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memfit.types.errors import UserError

if TYPE_CHECKING:
    import torch

_MODULES_OWN = frozenset(
    {
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_backward_pre_hooks",
        "_backward_hooks",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_compiled_call_impl",
    }
)
_DEEPEST = 12
_PLAIN = (bool, int, float, str, type(None))
_Path = tuple[str, str, tuple[int, ...]]  # name of a module, of its attribute, positions of nested parts
_HEAD_NAMES = ("lm_head", "head", "decoder", "classifier", "output")


def find_blocks(model: torch.nn.Module, path: str | None = None) -> tuple[str, list[torch.nn.Module]]:
    """Return (module path, blocks in order).

    With ``path``, the blocks are all children of the module there. If it is None, they are the members of a
    ModuleList or Sequential with two or more members, all of one class: the one with the most elements of
    parameters and, of equal ones, with the most members. Raises UserError if no module or no children are at
    ``path``, or if no repeated blocks are found."""
    if path is not None:
        return path, _children_at(model, path)
    candidates = [(name, list(m.children())) for name, m in model.named_modules() if _repeats(m)]
    if not candidates:
        raise UserError(
            "no repeated blocks found in the model",
            allowed="an nn.ModuleList or nn.Sequential of two or more modules of one class",
            hint="set Job(blocks=...) to the path of a module whose children are the blocks; memfit.apply "
            "takes the same argument",
        )
    return max(
        candidates, key=lambda pair: (sum(p.numel() for b in pair[1] for p in b.parameters()), len(pair[1]))
    )


def find_stacks(
    model: torch.nn.Module, path: str | None = None, more: Sequence[str] = ()
) -> dict[str, list[torch.nn.Module]]:
    """Return the stacks of blocks of a model, module path -> blocks, in this order: the blocks of
    `find_blocks`; the children of the modules at the paths ``more``; and other ModuleLists or Sequentials of
    repeated blocks, neither inside nor around these, whose members are of the class of the first block or,
    like it, are checkpointing layers of Hugging Face. An example of the last is an encoder's stack beside a
    decoder's. Raises UserError as `find_blocks` does, also for the paths ``more``."""
    main_path, blocks = find_blocks(model, path)
    stacks = {main_path: blocks} | {name: _children_at(model, name) for name in more}
    kinds = {kind for kind in type(blocks[0]).__mro__ if kind.__name__ == "GradientCheckpointingLayer"}
    kinds.add(type(blocks[0]))
    for name, module in model.named_modules():
        overlaps = any(
            name.startswith(child_prefix(s)) or f"{s}.".startswith(child_prefix(name)) for s in stacks
        )
        children = list(module.children())
        if not overlaps and _repeats(module) and isinstance(children[0], tuple(kinds)):
            stacks[name] = children
    return stacks


def child_prefix(path: str) -> str:
    """Return what the names of all modules inside the module at ``path`` begin with: "layers." for "layers",
    and nothing for "", the path of the model itself."""
    return f"{path}." if path else ""


def is_within(name: str, path: str) -> bool:
    """Return whether ``name`` is the module at ``path`` or one inside it. ``path`` is not that of the model
    itself, ""."""
    return name == path or name.startswith(f"{path}.")


def _repeats(module: torch.nn.Module) -> bool:
    import torch

    children = list(module.children())
    container = isinstance(module, torch.nn.ModuleList | torch.nn.Sequential)
    return container and len(children) > 1 and len({_kind(c) for c in children}) == 1


def _kind(module: torch.nn.Module) -> type:
    """Return the module's class, for wrappers (checkpoint_wrapper, torch.compile) that of the module inside,
    and without the mixin that fully_shard adds."""
    for name in ("_checkpoint_wrapped_module", "_orig_mod"):
        module = dict(module._modules).get(name) or module
    kind = type(module)
    while any(base.__name__ == "FSDPModule" for base in kind.__bases__):
        kind = kind.__bases__[-1]
    return kind


def equal_blocks(blocks: Sequence[torch.nn.Module]) -> list[int]:
    """Return an index for each block: that of an earlier block with which it is equal and does the same, or
    its own.

    Of a group of equal blocks, the first two have their own index, and all later ones have that of the
    second. The first is not used for the others because it may receive inputs that no other gets. If any two
    blocks share a parameter, all blocks have their own index."""
    indices: list[int] = []
    groups: dict[object, list[int]] = {}
    params = [p for b in blocks for p in b.parameters()]
    no_shared_parameters = len({id(p) for p in params}) == len(params)
    for index, (block, attributes) in enumerate(zip(blocks, _compared_attributes(blocks), strict=True)):
        group = groups.setdefault(_looks(block, attributes) if no_shared_parameters else index, [])
        group.append(index)
        indices.append(group[1] if len(group) > 1 else index)
    return indices


def attribute_period(blocks: Sequence[torch.nn.Module], *, first: int = 0) -> int:
    """Return after how many blocks the numbers, bools and strings in the attributes of the blocks' modules
    repeat: 1 if all blocks have the same, 2 if every other block has the same, and the number of compared
    blocks if they do not repeat. Compared are the blocks from the index ``first`` on, at least one. Integers
    that only number the blocks count as the same (`_compared_attributes`)."""
    attributes = _compared_attributes(blocks)[first:]
    plain = [{p: v for p, v in a.items() if isinstance(v, _PLAIN)} for a in attributes]
    return next(n for n in range(1, len(plain) + 1) if all(map(operator.eq, plain, plain[n:])))


def _looks(block: torch.nn.Module, attributes: Mapping[_Path, object]) -> tuple[object, ...]:
    """Return a key that is equal for blocks whose modules have the same names, classes and numbers of forward
    hooks, whose parameters and buffers have the same names, classes, shapes and dtypes, and whose
    ``attributes`` are equal."""
    modules = (
        (name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in block.named_modules()
    )
    tensors = (
        (name, type(t), tuple(t.shape), t.dtype)
        for name, t in (*block.named_parameters(), *block.named_buffers())
    )
    return *modules, *tensors, frozenset(attributes.items())


def _compared_attributes(blocks: Sequence[torch.nn.Module]) -> list[dict[_Path, object]]:
    """Return, for each block, those of its `_attributes` that are equal in blocks that do the same.

    Attributes that only number the blocks are left out: integers that are 0 in the first block, 1 in the
    second and so on, unless the code of their modules may compute with them (`_may_compute`)."""
    attributes = [_attributes(b) for b in blocks]
    kinds = {(name, type(m)) for b in blocks for name, m in b.named_modules()}

    def is_number_of_block(path: _Path) -> bool:
        module_name, attribute, positions = path
        return (
            not positions
            and all(type(a.get(path)) is int and a[path] == i for i, a in enumerate(attributes))
            and not any(_may_compute(kind, attribute) for name, kind in kinds if name == module_name)
        )

    return [{p: v for p, v in a.items() if not is_number_of_block(p)} for a in attributes]


def _attributes(block: torch.nn.Module) -> dict[_Path, object]:
    """Return the attributes of the block's modules, except torch's own, in a form that can be compared
    between blocks. A value with parts (`_parts`), such as a list, is represented by its type, and each part
    has a path of its own. Other objects are represented by a tuple: modules of the block by (their name,),
    the rest by (their id,)."""
    modules = {id(m): name for name, m in block.named_modules()}
    attributes: dict[_Path, object] = {}

    def add(path: _Path, value: object) -> None:
        module_name, attribute, positions = path
        is_whole = isinstance(value, _PLAIN) or len(positions) == _DEEPEST
        parts = None if is_whole else _parts(value)
        if isinstance(value, _PLAIN):
            attributes[path] = value
        elif parts is None:
            attributes[path] = (modules.get(id(value), id(value)),)
        else:
            attributes[path] = type(value)
            for position, part in enumerate(parts):
                add((module_name, attribute, (*positions, position)), part)

    for module_name, module in block.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _MODULES_OWN:
                add((module_name, attribute, ()), value)
    return attributes


def _may_compute(kind: type, name: str) -> bool:
    """Return whether modules of the class ``kind`` may compute with their attribute ``name``, apart from
    ``__init__`` (`_computes`)."""
    import torch

    bases = [b for b in kind.__mro__ if b not in (torch.nn.Module, object)]
    members = (getattr(m, "fget", m) for b in bases for key, m in vars(b).items() if key != "__init__")
    return any(_computes(m, name) for m in members if isinstance(m, types.FunctionType))


@functools.cache
def _computes(method: types.FunctionType, name: str) -> bool:
    """Return whether the code of a method reads an attribute ``name`` for anything but these, in which the
    value decides nothing: a comparison with ``is``, a formatted string, and an argument or a key of an object
    that is neither the method's own nor global, as in ``cache.update(x, self.layer)`` and
    ``states[self.layer]``. True if the method has no source code."""
    function: Any = inspect.unwrap(method)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return True
    not_local = {*function.__globals__, *function.__builtins__, *function.__code__.co_varnames[:1]}
    allowed: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            arguments = (*node.args, *(k.value for k in node.keywords))
            allowed |= {id(a) for a in arguments if _first_name(node.func) not in not_local}
        elif isinstance(node, ast.Subscript) and _first_name(node.value) not in not_local:
            allowed.add(id(node.slice))
        elif isinstance(node, ast.Compare) and all(isinstance(o, ast.Is | ast.IsNot) for o in node.ops):
            allowed |= {id(node.left), *map(id, node.comparators)}
        elif isinstance(node, ast.FormattedValue):
            allowed.add(id(node.value))
    reads = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))
    return any(n.attr == name and id(n) not in allowed for n in reads)


def _first_name(node: ast.expr) -> str:
    """Return the variable with which an expression such as ``cache.layers[0].keys`` begins, "" if it does not
    begin with one."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _parts(value: Any) -> Iterable[Any] | None:
    """Return the parts by which a list, tuple, dict, function, method or partial can be compared, such as a
    function's code, defaults and closure. Return None for other values."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, types.FunctionType):
        cells = (c for c in value.__closure__ or () if c != types.CellType())  # skip empty cells
        return value.__code__, value.__defaults__, value.__kwdefaults__, *(c.cell_contents for c in cells)
    return None


def _children_at(model: torch.nn.Module, path: str) -> list[torch.nn.Module]:
    try:
        children = list(model.get_submodule(path).children())
    except AttributeError:
        children = []
    if not children:
        paths = ", ".join(name for name, module in model.named_modules() if _repeats(module))
        such_as_these_paths = f", such as {paths}" if paths else ""
        raise UserError(
            f"no blocks at {path!r}: the model has no module with this path, or that module has no children",
            allowed=f"the path of a module whose children are the blocks{such_as_these_paths}",
            hint="correct the path in Job(blocks=...) or Job(more_blocks=...), or in the same argument of "
            "memfit.apply",
        )
    return children


def find_head(model: torch.nn.Module, path: str | None = None) -> tuple[str, torch.nn.Linear]:
    """Return (module path, Linear) of the projection to the vocabulary or classes.

    This is the module at ``path``. If that is None, it is the Linear that the model's
    ``get_output_embeddings()`` returns (Hugging Face) or, without that, the first Linear named lm_head, head,
    decoder, classifier or output that is a child of the model or of one of its children. Raises UserError if
    there is none, or if the module at ``path`` is not a Linear."""
    import torch

    modules = dict(model.named_modules())
    if path is not None:
        head = modules.get(path)
        if not isinstance(head, torch.nn.Linear):
            raise UserError(
                f"the model has no nn.Linear at {path!r}, the path of Job(head=...)",
                hint="set Job(head=...) to the path of the nn.Linear that projects to the vocabulary or "
                "classes; memfit.apply takes the same argument",
            )
        return path, head
    output_embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {name: m for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    embedding_names = [name for name, linear in linears.items() if linear is output_embeddings]
    common_names = [n for n in linears if n.rpartition(".")[2] in _HEAD_NAMES and n.count(".") <= 1]
    if names := embedding_names or common_names:
        return names[0], linears[names[0]]
    raise UserError(
        "no output projection to the vocabulary or classes found in the model, but chunked-cross-entropy, "
        "and tensor-parallel with a split vocabulary, need one",
        allowed="an nn.Linear that the model's get_output_embeddings() returns, or one that is called "
        f"{', '.join(_HEAD_NAMES[:-1])} or {_HEAD_NAMES[-1]} and is a child of the model or of a child of it",
        hint="set Job(head=...) to the path of the nn.Linear that projects to the vocabulary or classes; "
        "memfit.apply takes the same argument",
    )
