"""Tensor parallelism: each rank holds a slice of the blocks' Linear layers (Shoeybi et al. 2019).

``sequence`` also shards what lies between those layers, norms and residuals, along the sequence (Korthikanti
et al. 2022, arXiv 2205.05198). Which layer is split how comes from ``Job.tensor_parallel``, from Hugging
Face's own plan, or from observing which layer feeds which. All ranks must build the same model. The rows of a
fused query, key and value are reordered by rank.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memfit.model.blocks import child_prefix, find_blocks, find_head, is_within
from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.types.errors import UserError, first_line
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from memfit.model.linear_roles import LinearFlow

_COLWISE, _ROWWISE = "colwise", "rowwise"
_COUNTS_HEADS = re.compile(r"\w*heads?")  # num_heads, n_head, num_key_value_heads, ...


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    mesh = bench.world.sub("tensor")
    if mesh is None:
        return
    path, blocks = find_blocks(bench.model, bench.job.blocks)
    names = [f"{child_prefix(path)}{n}" for n, _ in bench.model.get_submodule(path).named_children()]
    flow, roles = _roles(bench, names)
    _check_split(bench, names, roles, flow, mesh.size())
    _split_heads(bench.model, roles, mesh.size())
    for name, role in roles.items():
        if role == _COLWISE and flow.linears[name].parts > 1:
            fused_linear, parts = bench.model.get_submodule(name), flow.linears[name].parts
            _rows_by_rank(fused_linear, parts, mesh.size())
            bench.fused_rows |= {
                f"{name}.{param_name}": parts for param_name, _ in fused_linear.named_parameters()
            }
    sequence = bool(settings["sequence"])
    styles, gather_arguments = _styles(bench.model, names, flow, roles, sequence)
    for name, style in styles:
        _parallelize(bench.model, name, mesh, style)
    for name, place in gather_arguments.items():
        _gather(bench.model.get_submodule(name), mesh, place)
    if sequence:
        _enter_and_leave(blocks, mesh)
    if settings["vocabulary"] != "whole":
        _split_vocabulary(bench, mesh, parallel_loss=settings["vocabulary"] == "parallel-loss")


def _roles(bench: Workbench, blocks: list[str]) -> tuple[LinearFlow, dict[str, str]]:
    """Return (flow, roles) for the Linears in the blocks, whose paths are ``blocks``. The flow says how
    features pass from one to another, as a run on tensors without values shows. The roles are "colwise" or
    "rowwise" by the names of the Linears to split: those in ``Job(tensor_parallel=...)`` or, without these,
    in the model's own plan (Hugging Face's ``_tp_plan``). If neither gives any, they follow from the flow.

    Raises UserError if no Linear can be split, if the job splits one by columns that no Linear split by rows
    follows, or if the blocks do not run on tensors without values.
    """
    named_roles = _named_roles(
        bench.model, bench.job.tensor_parallel or getattr(bench.model, "_tp_plan", None) or {}
    )
    flow = _observed(bench, blocks, named_roles, 1)
    roles = {}
    for name, linear in flow.linears.items():
        if linear.role == _ROWWISE or (linear.role == _COLWISE and linear.reaches_rows):
            roles[name] = linear.role
        elif linear.role == _COLWISE and bench.job.tensor_parallel:
            raise UserError(
                f"Job.tensor_parallel splits {name} by columns, but no Linear split by rows follows it",
                hint='name the Linear that it feeds too, with the value "rowwise", or leave this one out',
            )
    if not roles:
        raise UserError(
            "tensor-parallel finds no Linear layers to split in the blocks: none that "
            "Job(tensor_parallel=...) or the model names or, without these, none that feeds another",
            hint='name pairs in Job(tensor_parallel={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}); '
            "memfit.apply takes the same argument",
        )
    return flow, roles


def _named_roles(model: torch.nn.Module, patterns: Mapping[str, str]) -> dict[str, str]:
    """Return the name -> role of modules. ``patterns`` maps patterns of names, as in ``fnmatch``, to roles,
    and the first that matches a name decides. Modules that match none, or whose role is neither "colwise" nor
    "rowwise", are left out."""
    roles = {}
    for name, _ in model.named_modules():
        role = next((r for p, r in patterns.items() if fnmatch.fnmatchcase(name, p)), "")
        if role in (_COLWISE, _ROWWISE):
            roles[name] = role
    return roles


# Flows of models of one structure, by the job's loss, which is the same in jobs with fewer blocks or samples.
_SEEN: weakref.WeakKeyDictionary[Any, dict[Any, LinearFlow]] = weakref.WeakKeyDictionary()


def _observed(
    bench: Workbench, blocks: list[str], roles: Mapping[str, str], degree: int, shrink: Any = None
) -> LinearFlow:
    from memfit.model.linear_roles import observe

    key = (tuple(blocks), tuple(roles.items()), degree, _structure(bench.model))
    try:
        flows = _SEEN.setdefault(bench.job.loss, {})
    except TypeError:  # an object without weak references is not cached
        flows = {}
    try:
        if key not in flows:
            flows[key] = observe(bench.job, bench.model, blocks, roles, shrink)
    except (RuntimeError, ValueError, TypeError) as error:
        on_sliced_features_or_no_values = (
            "on a slice of their features" if shrink else "on tensors without values"
        )
        first_line_of_error = first_line(error)
        raise UserError(
            f"tensor-parallel: in a test run {on_sliced_features_or_no_values}, the model raised: "
            f"{first_line_of_error}",
            hint="name the Linear layers to split in Job(tensor_parallel=...); memfit.apply takes the same "
            "argument"
            if shrink
            else "forward must run on tensors without values, such as those of torch's FakeTensorMode",
        ) from error
    return flows[key]


def _structure(model: torch.nn.Module) -> tuple[Any, ...]:
    """Return a key that is equal for models of equal structure. It consists of the names and classes of the
    modules with their attributes that are numbers, bools or texts, such as numbers of heads; of the
    parameters' names, shapes and dtypes; and of the model's config as text."""
    modules = (
        (name, type(m), *((k, v) for k, v in vars(m).items() if type(v) in (int, float, bool, str)))
        for name, m in model.named_modules()
    )
    shapes = ((name, tuple(p.shape), p.dtype) for name, p in model.named_parameters())
    return (*modules, *shapes, str(getattr(model, "config", "")))


def _check_split(
    bench: Workbench, blocks: list[str], roles: Mapping[str, str], flow: LinearFlow, degree: int
) -> None:
    """Raise UserError if the width of a Linear to split, or a number of heads, is not divisible by
    ``degree``; if the blocks do not run with every Linear split; or if a head would be split between ranks.
    (The last would happen silently if code takes the number of heads from elsewhere than an attribute.)"""
    for name, role in roles.items():
        linear: Any = bench.model.get_submodule(name)
        size = linear.out_features // flow.linears[name].parts if role == _COLWISE else linear.in_features
        _must_divide(f"the width of {name}", size, degree)
    _check_config(getattr(bench.model, "config", None), degree)

    def shrink(model: torch.nn.Module) -> None:
        _split_heads(model, roles, degree)
        for name, role in roles.items():
            linear: Any = model.get_submodule(name)
            for param in linear.parameters():
                dim = 0 if role == _COLWISE else 1
                if dim < param.dim():
                    param.data = param.data.narrow(dim, 0, param.shape[dim] // degree)

    split_flow = _observed(bench, blocks, roles, degree, shrink)
    for (name, whole_view), (_, split_view) in zip(flow.views, split_flow.views, strict=False):
        if name in roles and whole_view[-1] != split_view[-1]:
            raise UserError(
                f"tensor-parallel: the output of {name} is viewed with shape {whole_view}, but on "
                f"{degree} ranks as {split_view}: its heads would be split between ranks",
                hint="read the number of heads from an integer attribute of the module whose name ends in "
                "head or heads, such as num_heads: memfit divides it by the ranks",
            )


def _check_config(config: Any, degree: int) -> None:
    for attribute in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, attribute, None)
        if isinstance(heads, int):
            _must_divide(attribute, heads, degree)


def _must_divide(quantity: str, count: int, degree: int) -> None:
    if count % degree:
        raise UserError(
            f"tensor-parallel: {quantity} is {count}, which {degree} ranks cannot share equally",
            allowed=f"a degree that divides {count}",
        )


def _split_heads(model: torch.nn.Module, roles: Mapping[str, str], degree: int) -> None:
    """Divide by ``degree``, in place, the integer attributes that count heads, whose names end in "head" or
    "heads". This is done in all modules that contain a Linear split by columns, at any depth, except the
    model itself. Raises UserError if such a number is not divisible."""
    holders = {name.rpartition(".")[0] for name, role in roles.items() if role == _COLWISE}
    for name, module in model.named_modules():
        if name and any(is_within(holder, name) for holder in holders):
            for attribute, count in list(vars(module).items()):
                if type(count) is int and _COUNTS_HEADS.fullmatch(attribute):
                    _must_divide(f"{name}.{attribute}", count, degree)
                    setattr(module, attribute, count // degree)


def _rows_by_rank(linear: torch.nn.Module, parts: int, degree: int) -> None:
    """Reorder, in place, the rows of a Linear that fuses ``parts`` layers, such as query, key and value, for
    ``degree`` ranks. Before, the rows of each layer are together (q, k, v of all heads). After, those of each
    rank are together: q, k, v of the first rank's heads, then of the second's, and so on."""
    import torch

    with torch.no_grad():
        for param in linear.parameters():
            param.copy_(param.unflatten(0, (parts, degree, -1)).transpose(0, 1).reshape(param.shape))


def _styles(
    model: torch.nn.Module, blocks: list[str], flow: LinearFlow, roles: Mapping[str, str], sequence: bool
) -> tuple[list[tuple[str, Any]], dict[str, int | str]]:
    """Return (module name, style) pairs, with the styles of torch.distributed.tensor.parallel. Also return at
    which modules the sequence must be gathered: the module's name -> the argument, by position or keyword,
    that arrives sharded along it.

    Raises UserError if ``sequence`` is set and a Linear to split does not work on (batch, sequence,
    features). Raises UserError, too, if another module with parameters inside the blocks works on features
    split over the ranks, unless these tensors have four dimensions.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    styles: list[tuple[str, Any]] = []
    gather_arguments: dict[str, int | str] = {}
    activation_layout = Shard(1) if sequence else Replicate()
    for name, role in roles.items():
        if sequence and flow.linears[name].output_dims != 3:
            raise UserError(
                f"the output of {name} is not of shape (batch, sequence, features), as sequence=True of "
                "tensor-parallel needs",
                hint="leave out sequence=True",
            )
        if role == _ROWWISE:
            styles.append((name, RowwiseParallel(output_layouts=activation_layout)))
            continue
        gather_name, argument = flow.gather_at(name)
        if sequence and gather_name != name:
            gather_arguments[gather_name] = argument
        styles.append(
            (name, ColwiseParallel(input_layouts=activation_layout if gather_name == name else Replicate()))
        )
    for name, module in model.named_modules():
        has_parameters = any(True for _ in module.parameters(recurse=False))
        if not has_parameters or name in roles or not any(is_within(name, b) for b in blocks):
            continue
        if name in flow.inside:
            if flow.inside[name] != 4:
                raise UserError(
                    f"tensor-parallel: {name} has parameters and works on features that are split over the "
                    "ranks",
                    allowed="between split Linear layers, only modules without parameters, or ones that "
                    "work on tensors of four dimensions",
                    hint="name other Linear layers to split in Job(tensor_parallel=...); memfit.apply takes "
                    "the same argument",
                )
            styles.append((name, SequenceParallel(sequence_dim=2, use_local_output=True)))
        elif sequence:
            styles.append((name, SequenceParallel(use_local_output=True)))
    return styles, gather_arguments


def _gather(module: torch.nn.Module, mesh: DeviceMesh, argument: int | str) -> None:
    """Make the module gather one ``argument`` (position or keyword) before it runs: a tensor sharded along
    the sequence (dimension 1) becomes a replicated DTensor. The Linears inside then need not gather it each.
    Other arguments are unchanged."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        arguments: Any = dict(enumerate(args)) | kwargs
        shard = DTensor.from_local(arguments[argument], mesh, [Shard(1)], run_check=False)
        arguments[argument] = shard.redistribute(placements=[Replicate()])
        return tuple(arguments[i] for i in range(len(args))), {k: arguments[k] for k in kwargs}

    module.register_forward_pre_hook(enter, with_kwargs=True)


def _parallelize(model: torch.nn.Module, name: str, mesh: DeviceMesh, style: Any) -> None:
    from torch.distributed.tensor.parallel import parallelize_module

    parallelize_module(model.get_submodule(name), mesh, style, src_data_rank=None)


def _enter_and_leave(blocks: list[torch.nn.Module], mesh: DeviceMesh) -> None:
    """Make the first block keep this rank's part, along the sequence (dimension 1), of its first argument.
    Make the last block gather its output, or the first item of a tuple. A forward then raises UserError if
    the length of the sequence is no multiple of the number of ranks."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def to(tensor: torch.Tensor, one: Any, other: Any) -> torch.Tensor:
        moved: Any = DTensor.from_local(tensor, mesh, [one], run_check=False).redistribute(placements=[other])
        local: torch.Tensor = moved.to_local()
        return local

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        key = next(iter(kwargs)) if not args else None
        whole = args[0] if args else kwargs[key]
        _must_divide("the sequence length", whole.shape[1], mesh.size())
        part = to(whole, Replicate(), Shard(1))
        return ((part, *args[1:]), kwargs) if args else (args, {**kwargs, key: part})

    def leave(module: torch.nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (to(out[0], Shard(1), Replicate()), *out[1:])
        return to(out, Shard(1), Replicate())

    blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    blocks[-1].register_forward_hook(leave)


def _split_vocabulary(bench: Workbench, mesh: DeviceMesh, *, parallel_loss: bool) -> None:
    """Split the head by columns, and all embeddings of as many tokens as the head has outputs by rows,
    whether they share the head's weight or not.

    With ``parallel_loss``, the logits stay split, and torch's loss_parallel is active until the step is
    closed. Otherwise the logits are gathered. Raises UserError if there is no head, if the forward method of
    the head is replaced, as that of an island is, or if its number of outputs is no multiple of the number of
    ranks.
    """
    import torch
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
    from torch.distributed.tensor.parallel import loss_parallel as losses

    model = bench.model
    name, head = find_head(model, bench.job.head)
    if "forward" in vars(head):
        raise UserError(
            f"tensor-parallel cannot split the vocabulary of {name}, because the forward method of this "
            "module is replaced, as Job(islands=...) does",
            hint='leave the module out of Job(islands=...), or set vocabulary="whole" of tensor-parallel',
        )
    _must_divide(f"the vocabulary of {name}", head.out_features, mesh.size())
    tables = [
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Embedding) and m.num_embeddings == head.out_features
    ]
    tied_tables = {n for n in tables if model.get_submodule(n).weight is head.weight}
    style = ColwiseParallel(
        output_layouts=Shard(-1) if parallel_loss else Replicate(), use_local_output=not parallel_loss
    )
    _parallelize(model, name, mesh, style)
    for table in tables:
        _parallelize(model, table, mesh, RowwiseParallel(input_layouts=Replicate()))
        if table in tied_tables:
            model.get_submodule(table).weight = head.weight
    if parallel_loss:  # also for backward, which forward's contexts do not cover
        stack = contextlib.ExitStack()
        stack.enter_context(losses())
        bench.closers.append(stack.close)


TECHNIQUE = Technique(
    name="tensor-parallel",
    summary="each rank keeps a slice of every Linear layer of the blocks (Megatron-LM)",
    script_call="torch.distributed.tensor.parallel.parallelize_module over {degree} ranks",
    changes=StepPart.PASSES,
    excluded=lambda facts: facts.needs_parameter_names,
    effect=EffectClass.E1,
    apply=_apply,
    order=45,
    knobs=(
        Knob(name="degree", default=2, doc="number of ranks that share each Linear layer of the blocks"),
        Knob(
            name="sequence",
            default=False,
            doc="whether what lies between the split layers (norms, residuals) is split along the sequence",
            choices=(True, False),
        ),
        Knob(
            name="vocabulary",
            default="whole",
            doc="embedding and head; whole: whole on every rank; gathered: split, with logits gathered; "
            "parallel-loss: split, with the loss computed on split logits",
            choices=("whole", "gathered", "parallel-loss"),
        ),
    ),
    # fsdp2 can be used instead of DDP, with replicas. These optimizers do not support DTensor.
    forbids=("lora", "qlora", "ddp", "zero", "compile", "adamw-8bit", "adamw-paged", "adafactor"),
)
