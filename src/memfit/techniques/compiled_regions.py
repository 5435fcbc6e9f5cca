"""Modules that torch.compile would compile, as pairs of graphs (forward and backward) that run kernel by
kernel. Fused kernels allocate their results as compiled code would, but compute nothing."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

from memfit.techniques.synthetic_kernel import kernel, read_bytes
from memfit.types.device_kind import HOST

_ATEN: Any = torch.ops.aten
_UNFUSED = frozenset(
    {
        _ATEN.mm,
        _ATEN.addmm,
        _ATEN.bmm,
        _ATEN.baddbmm,
        _ATEN.convolution,
        _ATEN.convolution_backward,
        _ATEN._scaled_dot_product_flash_attention,
        _ATEN._scaled_dot_product_flash_attention_backward,
        _ATEN._scaled_dot_product_efficient_attention,
        _ATEN._scaled_dot_product_efficient_attention_backward,
        _ATEN._scaled_dot_product_cudnn_attention,
        _ATEN._scaled_dot_product_cudnn_attention_backward,
        _ATEN._scaled_dot_product_flash_attention_for_cpu,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
        _ATEN._scaled_mm,
        _ATEN.sort,
        _ATEN.topk,
        _ATEN._grouped_mm,
    }
)
_VIEWS = (_ATEN.reshape, _ATEN._unsafe_view)
_REDUCTIONS = frozenset(
    {
        _ATEN.sum,
        _ATEN.mean,
        _ATEN.amax,
        _ATEN.amin,
        _ATEN.var_mean,
        _ATEN.max,
        _ATEN.min,
        _ATEN.argmax,
        _ATEN.any,
    }
)


class Region:
    """Calls a module through a `GraphPair`, its forward and backward, in which fused operators compute no
    values. It is used in traces only. Where gradients are disabled, it calls the module's own forward.

    ``graphs`` is a dict that all regions of one model share: it holds the pairs made so far. ``kind`` is the
    same number for modules that do the same. Two calls of modules of one kind share a pair if they are alike:

    - All tensors (parameters, buffers and arguments) have equal shapes, strides, dtypes and requires_grad.
    - Other arguments are equal if they are numbers, texts, None, dtypes, devices or sizes, and the same
      object otherwise.
    - The attributes of those types in the modules have changed alike since the regions were made.
    - Autocast for the device of their tensors is on for both or off for both.

    ``recompute`` is set if operators inside the compiled module are checkpointed, else None. It returns a new
    predicate, which is called with forward's operators in their order and says of each whether its result is
    kept for backward.
    """

    def __init__(self, module: torch.nn.Module, graphs: dict[Any, Any], kind: int) -> None:
        self.module, self.graphs, self.kind, self.inner = module, graphs, kind, module.forward
        self.attributes = _plain_attributes(module)
        self.recompute: Callable[[], Callable[[Any], bool]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [*state.values(), *(leaves[i] for i in places)]
        device_type = tensors[0].device.type if tensors else HOST
        key = (
            self.kind,
            frozenset(_plain_attributes(self.module).items() - self.attributes.items()),
            tuple(state),
            repr(spec),
            tuple(map(_traits, [*state.values(), *leaves])),
            torch.is_autocast_enabled(device_type),
        )
        if key not in self.graphs:
            call = self._functional(tuple(state), leaves, places, spec)
            others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
            pair = GraphPair(call, tensors, range(len(state)), self.recompute)
            self.graphs[key] = pair, others  # kept alive, so that their ids stay unique
        pair, _ = self.graphs[key]
        outs = _Run.apply(pair, *tensors)  # type: ignore[no-untyped-call]
        return outs[0] if pair.single else outs

    def _functional(self, names: tuple[str, ...], leaves: list[Any], places: list[int], spec: Any) -> Any:
        from torch.nn.utils.stateless import _reparametrize_module

        module, inner = self.module, self.inner

        def call(*tensors: torch.Tensor) -> Any:
            new_leaves = list(leaves)
            for place, tensor in zip(places, tensors[len(names) :], strict=True):
                new_leaves[place] = tensor
            args, kwargs = _pytree.tree_unflatten(new_leaves, spec)
            # The module itself is not called: its hooks (FSDP's) are outside the compiled region.
            with _reparametrize_module(module, dict(zip(names, tensors, strict=False))):
                return inner(*args, **kwargs)

        return call


_PLAIN = bool | int | float | str | None | torch.dtype | torch.device | torch.Size


def _traits(value: Any) -> tuple[Any, ...]:
    """Return those properties of an argument on which its graph depends: of a tensor (shape, strides, dtype,
    requires_grad); of a number, text, None, dtype, device or size (type, value); of any other object (type,
    id)."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.requires_grad)
    return (type(value), value if isinstance(value, _PLAIN) else id(value))


def _plain_attributes(module: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """Return (name of the submodule, "" for the module itself; attribute) -> value, for those attributes of
    the module and its submodules that are numbers, texts, None, dtypes, devices or sizes."""
    return {
        (name, attribute): value
        for name, submodule in module.named_modules()
        for attribute, value in vars(submodule).items()
        if isinstance(value, _PLAIN)
    }


class GraphPair:
    """Forward and backward of the function ``call``, each as a schedule of kernels (`Schedule`), for
    arguments like the examples ``tensors``, of which only shapes, strides, dtypes and requires_grad matter.
    ``static``: indices of the arguments that stay alive anyway (parameters, buffers), so that it costs
    nothing to keep them for backward. ``recompute`` is as in `Region`."""

    def __init__(
        self,
        call: Callable[..., Any],
        tensors: list[torch.Tensor],
        static: Sequence[int],
        recompute: Callable[[], Callable[[Any], bool]] | None = None,
    ) -> None:
        joint, copies, self.single, self.outputs, forward_names = _joint(call, tensors)
        if recompute is not None:
            _tag(joint, forward_names, recompute())
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        with _disable_current_modes():
            forward, backward = min_cut_rematerialization_partition(
                joint, copies, num_fwd_outputs=self.outputs, static_lifetime_input_indices=[*static]
            )
        self.forward, self.backward = Schedule(forward.graph), Schedule(backward.graph)


def _tag(joint: Any, names: set[str], keeps: Callable[[Any], bool]) -> None:
    """Mark the nodes of forward (``names``) in the joint graph as torch.compile does for the policies of
    torch.utils.checkpoint. The result of an operator for which ``keeps`` is true must be saved for backward.
    The partitioner recomputes all others where it can."""
    from torch.utils.checkpoint import CheckpointPolicy

    for node in joint.graph.nodes:
        if node.op == "call_function" and node.name in names:
            if node.target is operator.getitem:
                node.meta["recompute"] = node.args[0].meta["recompute"]
            elif keeps(node.target):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            else:
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["ac_graph_id"] = 1


def _joint(
    call: Callable[..., Any], tensors: list[torch.Tensor]
) -> tuple[Any, list[Any], bool, int, set[str]]:
    """Trace the joint graph of forward and backward of ``call``, on fake tensors of the shapes, strides,
    dtypes and requires_grad of ``tensors``. Active dispatch modes are off meanwhile. Return the graph, the
    fake tensors, whether ``call`` returns a single tensor and not a sequence, the number of tensors it
    returns, and the names of forward's nodes."""
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    single, count = False, 0
    names, copy_outputs = set[str](), False  # outputs may be views of inputs

    def flat(*inputs: torch.Tensor) -> tuple[Any, ...]:
        nonlocal single, count
        outs = call(*inputs)
        if (mode := get_proxy_mode()) is not None:
            names.update(n.name for n in mode.tracer.graph.nodes)
        single = isinstance(outs, torch.Tensor)
        results = (outs,) if single else tuple(outs)
        count = len(results)
        return tuple(o.clone() for o in results) if copy_outputs else results

    with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True):
        copies = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).requires_grad_(t.requires_grad)
            for t in tensors
        ]

        def exported() -> Any:
            return aot_export_joint_simple(
                flat, tuple(copies), trace_joint=True, decompositions=select_decomp_table()
            )

        try:
            joint = exported()
        except RuntimeError as error:
            if "outputs that alias" not in str(error):
                raise
            copy_outputs = True
            joint = _without_last_copies(exported(), count)
    _drop_checks(joint.graph)
    return joint, copies, single, count, names


def _drop_checks(graph: fx.Graph) -> None:
    """Remove the nodes that check the dtype of a cast's input, which export adds. A compiler does not see
    them, and they would keep the input alive."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _without_last_copies(joint: Any, outputs: int) -> Any:
    """Remove the copies of forward's outputs that were made for export, and return ``joint``. Forward's
    outputs are the first ``outputs`` results of the graph. torch.compile returns views as views, without
    copies."""
    output_node = next(n for n in joint.graph.nodes if n.op == "output")
    results = list(output_node.args[0])
    results[:outputs] = (
        n.args[0] if n.target is torch.ops.aten.clone.default else n for n in results[:outputs]
    )
    output_node.args = (results,)
    joint.graph.eliminate_dead_code()
    joint.recompile()
    return joint


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: GraphPair, *tensors: torch.Tensor) -> Any:
        results = pair.forward.run(list(tensors))
        outs, saved = results[: pair.outputs], results[pair.outputs :]
        ctx.pair, ctx.other = pair, [None if isinstance(s, torch.Tensor) else s for s in saved]
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is None:  # freed one by one in backward
            ctx.kept = saved
        else:
            ctx.kept = None
            ctx.save_for_backward(*(s for s in saved if isinstance(s, torch.Tensor)))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        saved_values = ctx.kept
        if saved_values is None:
            tensors = iter(ctx.saved_tensors)
            saved_values = [next(tensors) if constant is None else constant for constant in ctx.other]
        ctx.kept = None
        inputs = [*saved_values, *grads]
        del saved_values, grads
        return None, *ctx.pair.backward.run(inputs)


@dataclasses.dataclass(slots=True)
class _Kernel:
    """One step of a `Schedule`. If ``node`` is set, it is one operator or view, called as it is, and
    ``outputs`` is empty. If ``node`` is None, it is a group of fused operators, of whose values only
    ``outputs`` are allocated. ``inputs`` are the values that the step reads."""

    node: fx.Node | None
    inputs: list[fx.Node]
    outputs: list[fx.Node]


class Schedule:
    """A graph's kernels in the order in which they run. Operators that a compiler does not fuse
    (`_is_unfused`) keep the graph's order. Just before each of them run the fused kernels and views on which
    it depends and that have not run yet. Those on which only the graph's results depend run at the end.
    Kernels on which neither depends are left out."""

    def __init__(self, graph: fx.Graph) -> None:
        self.placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.result: Any = next(n for n in graph.nodes if n.op == "output").args[0]
        self.attributes = {
            n: getattr(graph.owning_module, n.target) for n in graph.nodes if n.op == "get_attr"
        }
        groups = _groups(graph)
        self.kernels = _ordered(graph, groups)
        self.uses = Counter(n for k in self.kernels for n in k.inputs)
        self.uses.update(n for n in self.result if isinstance(n, fx.Node))

    def run(self, inputs: list[Any]) -> list[Any]:
        """Run the kernels on ``inputs``, one for each placeholder, and return the graph's results in order.
        Fused groups allocate their outputs but compute nothing. ``inputs`` is emptied, and every value is
        freed when it is not needed again."""
        values: dict[fx.Node, Any] = dict(zip(self.placeholders, inputs, strict=True))
        inputs.clear()
        values.update(self.attributes)
        reads_left = Counter(self.uses)
        for node in [n for n in values if not reads_left[n]]:
            del values[node]
        for kernel_call in self.kernels:
            if kernel_call.node is not None:
                values[kernel_call.node] = _call(kernel_call.node, values)
                _release(kernel_call.inputs, reads_left, values)
            else:
                _fused(kernel_call, reads_left, values)
            if kernel_call.node is not None and not reads_left[kernel_call.node]:
                del values[kernel_call.node]
        return [values[n] if isinstance(n, fx.Node) else n for n in self.result]


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _fused(group: _Kernel, reads_left: Counter[fx.Node], values: dict[fx.Node, Any]) -> None:
    """Allocate the outputs of a fused group and report the group as one kernel; nothing is computed. Before
    that, free for each output an input of the same size, if there is one, over which a compiler would write
    the output: one that is not needed later and is not a placeholder of the graph."""
    output_counts = Counter(_meta_bytes(n) for n in group.outputs)
    inputs = dict.fromkeys(group.inputs)  # in a fixed order, so that equal graphs run alike
    reads = read_bytes(values.get(n) for n in inputs)
    last_uses = [n for n in inputs if reads_left[n] == group.inputs.count(n)]
    for node in last_uses:
        value = values.get(node)
        size = value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else -1
        if output_counts[size] and node.op != "placeholder":
            output_counts[size] -= 1
            values[node] = None
    for node in group.outputs:
        value = node.meta["val"]
        values[node] = torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype)
    kernel([values[n] for n in group.outputs], reads)
    _release(group.inputs, reads_left, values)


def _meta_bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.element_size())


def _release(nodes: list[fx.Node], reads_left: Counter[fx.Node], values: dict[fx.Node, Any]) -> None:
    for node in nodes:
        reads_left[node] -= 1
        if reads_left[node] <= 0:
            values.pop(node, None)


# -- from a graph to kernels ----------------------------------------------------------------------------


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _is_unfused(node: fx.Node) -> bool:
    """Return whether the node calls an operator that a compiler runs as it is and does not fuse with others:
    a matrix product, convolution, fused attention, sort, topk or collective."""
    return _packet(node) in _UNFUSED or getattr(node.target, "namespace", "") == "_c10d_functional"


def _is_ungrouped(node: fx.Node) -> bool:
    """Return whether the node belongs to no fused group: whether it is an operator that is not fused
    (`_is_unfused`), a view, an item of the result of one of these, or no call of an operator."""
    if node.target is operator.getitem:
        return _is_ungrouped(node.all_input_nodes[0])
    if node.op != "call_function" or _is_unfused(node):
        return True
    return bool(getattr(node.target, "is_view", False)) or _packet(node) in _VIEWS


def _levels(calls: list[fx.Node]) -> dict[fx.Node, int]:
    """Return the level of each node: the largest number of operators that are not fused (`_is_unfused`) on a
    path of the graph that leads to the node, itself not counted. Only nodes of one level are fused with each
    other. A fused node that is not a reduction and is read only by fused nodes is raised to the lowest level
    of these readers, if that is higher."""
    level: dict[fx.Node, int] = {}
    for node in calls:
        earlier_levels = [level[i] + _is_unfused(i) for i in node.all_input_nodes if i in level]
        level[node] = max(earlier_levels, default=0)
    for node in reversed(calls):
        if _is_ungrouped(node) or _packet(node) in _REDUCTIONS:
            continue
        users = [u for u in node.users if u.op == "call_function"]
        if users and len(users) == len(node.users) and not any(_is_ungrouped(u) for u in users):
            level[node] = max(level[node], min(level[u] for u in users))
    return level


def _from_unfused(node: fx.Node) -> bool:
    return _is_unfused(node) or (node.target is operator.getitem and _is_unfused(node.all_input_nodes[0]))


def _groups(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the group of each fused node, as a number that is the same for all nodes of the group. Nodes of
    one level form a group if they are connected, directly or through views."""
    calls = [n for n in graph.nodes if n.op == "call_function"]
    level = _levels(calls)
    parent: dict[fx.Node, fx.Node] = {n: n for n in calls if not _from_unfused(n)}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in parent:
        for source in node.all_input_nodes:
            if source in parent and level[source] == level[node]:
                parent[root(node)] = root(source)
    number = {n: i for i, n in enumerate(calls)}
    return {n: number[root(n)] for n in parent if not _is_ungrouped(n)}


def _ordered(graph: fx.Graph, groups: dict[fx.Node, int]) -> list[_Kernel]:
    members: dict[int, list[fx.Node]] = {}
    for node, group in groups.items():
        members.setdefault(group, []).append(node)
    kernels: list[_Kernel] = []
    emitted_keys: set[Any] = set()

    def inputs_of(group: int) -> list[fx.Node]:
        group_nodes = set(members[group])
        sources = {i: None for n in members[group] for i in _sources(n, group_nodes, groups)}
        return list(sources)

    def emit(node: fx.Node) -> None:
        key: Any = groups.get(node, node)
        if node.op != "call_function" or key in emitted_keys:
            return
        emitted_keys.add(key)
        inputs = inputs_of(key) if node in groups else list(node.all_input_nodes)
        for source in inputs:
            emit(source)
        if node not in groups:
            kernels.append(_Kernel(node=node, inputs=inputs, outputs=[]))
            return
        outputs = [n for n in members[key] if _is_needed_outside(n, key, groups)]
        kernels.append(_Kernel(node=None, inputs=inputs, outputs=outputs))

    for node in graph.nodes:
        if node.op == "call_function" and _is_unfused(node):
            emit(node)
    output = next(n for n in graph.nodes if n.op == "output")
    for node in output.all_input_nodes:
        emit(node)
    return kernels


def _sources(node: fx.Node, group_nodes: set[fx.Node], groups: dict[fx.Node, int]) -> list[fx.Node]:
    """Return the nodes that a fused node reads from outside its group. Views of values inside the group count
    as inside."""
    sources = []
    for source in node.all_input_nodes:
        base = source
        while (
            base.op == "call_function"
            and base not in groups
            and _is_ungrouped(base)
            and not _from_unfused(base)
        ):
            base = base.all_input_nodes[0]
        if base not in group_nodes:
            sources.append(source)
    return sources


def _is_needed_outside(node: fx.Node, group: int, groups: dict[fx.Node, int]) -> bool:
    """Return whether the value of a node of the group is needed outside the group: whether a node outside
    reads it, or the graph returns it, directly or through views. For a fused node with several results,
    return False: each result has a node of its own, for which this function is called, too."""
    if node in groups and not isinstance(node.meta.get("val"), torch.Tensor):
        return False  # its items leave one by one; the items of a view (split) are all of it
    for user in node.users:
        if user in groups:
            leaves_group = groups[user] != group
        else:
            leaves_group = (
                user.op == "output" or _from_unfused(user) or _is_needed_outside(user, group, groups)
            )
        if leaves_group:
            return True
    return False
