"""What a monitor observed of a prepared model, of its optimizer and of one training step.

All of it is values: nothing here refers to a model, an optimizer or a process group. Blocks are given by
their index, bytes and elements are those of this rank unless it is said otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

_MOST = 0.75  # fraction of a block's elements; backward stops recomputing once it has what it needs

Figures = Mapping[str, list[float]]  # parameter name -> numbers of a fingerprint


# -- the model and the optimizer --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObservedParameter:
    """One parameter of the model, as this rank sees it.

    - ``shape``: of the whole parameter, also if it is freed.
    - ``is_trained``: whether it requires gradients.
    - ``elements``: of the parameter as it is now; 0 if it is freed, those of all ranks if it is a DTensor.
    - ``whole_elements``: before data-parallel sharding; under tensor parallelism, of this rank's part.
    - ``local_elements``: those in the memory of this rank.
    - ``shard_bytes``, ``shard_device``: bytes of what this rank keeps of it, and the kind of device that
      holds them, such as "cuda".
    - ``blocks``: indices of the blocks that contain it; empty outside the blocks.
    - ``is_fp32_module``: whether it belongs to a module that is to stay in float32.
    - ``has_mesh``: whether it is a DTensor.
    - ``is_tensor_sharded``: whether tensor parallelism shards it; None if that is unknown, as of tensors that
      are neither DTensors nor marked by Megatron.
    - ``is_freed_between_uses``: whether ZeRO 3 frees it between uses, unless it is small.
    - ``has_gradient``: whether it got a gradient in the step.
    - ``in_graph``, ``in_compiled_graph``: whether its gradient comes from any autograd graph, or from a
      compiled one.
    - ``norm``: of the part on this rank; None if it was not measured or is not floating-point.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_trained: bool
    elements: int
    whole_elements: int
    local_elements: int
    shard_bytes: int
    shard_device: str
    blocks: tuple[int, ...] = ()
    is_fp32_module: bool = False
    has_mesh: bool = False
    is_tensor_sharded: bool | None = None
    is_freed_between_uses: bool = False
    has_gradient: bool = False
    in_graph: bool = False
    in_compiled_graph: bool = False
    norm: float | None = None


def part_elements(params: Iterable[ObservedParameter], model_elements: int | None) -> int:
    """Return the number of elements of ``params`` before data-parallel sharding: the sum of their
    ``whole_elements``. If one of them is freed and its size is unknown (0 elements, and not freed by ZeRO 3),
    return the larger of this sum and ``model_elements``, the number of elements of the whole model, if that
    is not None."""
    params = list(params)
    elements = sum(p.whole_elements for p in params)
    is_freed = any(not p.elements and not p.is_freed_between_uses for p in params)
    return max(elements, model_elements or 0) if is_freed else elements


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObservedLinear:
    """A linear layer. ``class_name``: the name of its module's class, such as "Float8Linear"."""

    in_features: int
    out_features: int
    class_name: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """A tensor of an optimizer's state that is not a scalar, as far as it is on this rank.

    - ``address``: equal for state tensors that are the same memory.
    - ``code_bytes``: the bytes that are in elements of one byte each, as the codes of 8-bit and 4-bit
      optimizers are.
    - ``device``: the kind of its device, such as "cuda".
    - ``is_parameter``: whether it is the parameter itself.
    """

    address: tuple[int, ...]
    elements: int
    size_bytes: int
    code_bytes: int
    device: str
    is_parameter: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObservedState:
    """The state that an optimizer keeps for one key, mostly a parameter.

    ``shape``, ``element_bytes`` and ``size_bytes`` (on this rank) are those of the parameter. If the key is
    not a tensor, ``shape`` is None and the others are 0. ``is_embedding``: whether the key is the weight of
    an nn.Embedding. ``tensors``: the tensors of the state that are not scalars."""

    shape: tuple[int, ...] | None
    element_bytes: int
    size_bytes: int
    is_embedding: bool
    tensors: tuple[StateTensor, ...]


# -- the step ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockActivity:
    """What the repeated blocks did. Blocks are given by their index, layers (modules inside a block) by their
    id.

    - ``ran``: block -> (layer that ran in forward -> elements of the layer's parameters).
    - ``again``: the same for layers that ran again in backward.
    - ``passed``: blocks through which gradients pass, because inputs or parameters of a layer require them.
    - ``autocast``: pairs (block, dtype of autocast such as "torch.bfloat16", or "off") of the layers with
      floating-point parameters that ran in forward.
    - ``computed``: dtype -> elements of floating-point parameters with which layers ran in forward, added up
      over all calls and blocks.
    - ``undivided``: blocks that contain no modules. If recomputation calls their forward directly, no hook
      sees it.

    Modules that are to stay in float32 are left out of ``autocast`` and ``computed``.
    """

    ran: Mapping[int, Mapping[int, int]] = dataclasses.field(default_factory=dict)
    again: Mapping[int, Mapping[int, int]] = dataclasses.field(default_factory=dict)
    passed: frozenset[int] = frozenset()
    autocast: frozenset[tuple[int, str]] = frozenset()
    computed: Mapping[torch.dtype, int] = dataclasses.field(default_factory=dict)
    undivided: frozenset[int] = frozenset()

    def recomputed(self) -> set[int]:
        """Return the blocks whose layers that ran again in backward have at least 75 % of the elements of
        those that ran in forward. In blocks without parameters, layers are counted instead of elements."""
        shares = {
            i: _weight(self.again.get(i, {})) / max(_weight(elements), 1) for i, elements in self.ran.items()
        }
        return {i for i, share in shares.items() if share >= _MOST}

    def under_autocast(self, dtype: torch.dtype) -> set[int]:
        """Return the blocks of which at least one layer with parameters ran under autocast to ``dtype``."""
        return {i for i, kind in self.autocast if kind == str(dtype)}


def _weight(elements_by_layer: Mapping[int, int]) -> int:
    return sum(elements_by_layer.values()) or len(elements_by_layer)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensors:
    """What autograd kept for backward at the beginning of the backward passes of a step. Only the first 16
    are inspected, and numbers and lists are added up over these.

    - ``backwards``: number of backward passes, those after the 16th included, without those inside another.
    - ``device``: kind of device of the loss, such as "cuda"; "" if there was no backward.
    - ``resident_bytes``: bytes of each storage kept for backward on that device, without those of parameters
      and buffers. ``contiguous_bytes``: the same, only of storages that contain a contiguous saved tensor.
    - ``offloaded``: number of saved tensors that are not on that device, because a saved-tensor hook has
      moved or replaced them. ``unsized``: how many of them have an unknown number of bytes.
      ``offloaded_bytes``: bytes of the others.
    - ``packed``: number of saved tensors in whose place a hook has stored something that is not a tensor.
      Those of torch's checkpointing are left out.
    - ``unread``: number of saved tensors that this version of torch does not let one read (torch 2.5).
    - ``rows``: last dimension -> most rows (elements divided by it) of a saved tensor on that device that has
      at least two dimensions and is no parameter or buffer.
    """

    backwards: int = 0
    device: str = ""
    resident_bytes: tuple[int, ...] = ()
    contiguous_bytes: tuple[int, ...] = ()
    offloaded: int = 0
    offloaded_bytes: int = 0
    unsized: int = 0
    packed: int = 0
    unread: int = 0
    rows: Mapping[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CrossRankReads:
    """Whether some tried block reads the parts of a sample that other ranks hold (``reached``), and the
    number of tried blocks that read other positions of the rank's own part, but no other rank's
    (``local_only``)."""

    reached: bool = False
    local_only: int = 0


# -- whether the step trains ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerGroup:
    """A parameter group of a torch optimizer, as it was at the update, or as it is now if no update was
    observed.

    ``names``: those of the model's trained parameters in it. ``rate``: its learning rate; ``initial_rate``:
    the one that a scheduler of torch multiplies; ``default_rate``: the one with which the optimizer was made.
    A rate is None if there is none."""

    names: frozenset[str]
    rate: float | None
    initial_rate: float | None = None
    default_rate: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObservedOptimizer:
    """What an optimizer holds on this rank.

    ``parameters``: names of the trained parameters that are in its groups, or that share memory with a tensor
    in them. ``foreign``: number of its tensors that require gradients and are no parameters of the model,
    such as copies in float32. ``foreign_changed``: how many of these the step changed; None without a step.
    ``unsharded``: how many of these are plain tensors with the whole shape of a sharded parameter that is not
    in ``parameters``. ``groups``: the parameter groups of torch's optimizers."""

    parameters: frozenset[str] = frozenset()
    foreign: int = 0
    foreign_changed: int | None = None
    unsharded: int = 0
    groups: tuple[OptimizerGroup, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightFigures:
    """What a step did to the trained parameters on one rank. All names are those of trained parameters.

    - ``optimizer``: None if it has no parameter groups.
    - ``compared``: parameters whose bits were compared before and after the step; None without a step.
      ``changed``: those that differ. ``not_finite``: those with a value that is not finite after the step.
    - ``gradients``: the largest absolute value of the gradients that arrived; None: an earlier hook had taken
      the gradient away. ``gradients_at_update``: the same when the optimizer stepped; 0 if there was none.
    - ``were_zero``: for parameters of two dimensions or more of which this rank held a part before the step,
      whether it had only zeros.
    - ``updates``: number of steps of torch's optimizers; None: not counted.
    - ``ran``: parameters of blocks whose own module ran; None: not observed.
    - ``masters``: parameters of which the optimizer updated a copy -> whether they are equal to it now."""

    optimizer: ObservedOptimizer | None = None
    compared: frozenset[str] | None = None
    changed: frozenset[str] = frozenset()
    not_finite: frozenset[str] = frozenset()
    gradients: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    gradients_at_update: Mapping[str, float] = dataclasses.field(default_factory=dict)
    were_zero: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    updates: int | None = None
    ran: frozenset[str] | None = None
    masters: Mapping[str, bool] = dataclasses.field(default_factory=dict)


# -- what is compared between ranks -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputDigests:
    """What the model received in the first 16 forward passes of a step. ``digests`` holds one digest per
    pass, of all its input tensors. ``several`` says whether the inputs contained more than one distinct
    sample, in one pass or in different ones: two ranks may receive the same sample by chance, but not the
    same two."""

    digests: tuple[str, ...] = ()
    several: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PassOrder:
    """The order in which a rank ran forwards (F), backwards (B) and the weights' parts of backwards (W), as
    ``letters``, for example "FFBB"; "" if none were observed. ``is_staged``: whether these are the calls of
    torch's pipeline stages. Else they are the model's forward passes and calls of backward (F and B only)."""

    letters: str = ""
    is_staged: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpdateNorms:
    """The norms of the gradients that the updates received.

    - ``limits``: the maximum norms with which torch's clipping was called.
    - ``is_observed``: whether an update with gradients was observed.
    - ``squared_norm``: of all gradients on this rank.
    - ``squared_norm_share``: what this rank adds to the squared norm of all ranks' gradients. Gradients that
      n ranks hold equally count 1/n. The sum over the ranks is the squared norm.
    """

    limits: frozenset[float] = frozenset()
    is_observed: bool = False
    squared_norm: float = 0.0
    squared_norm_share: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GradientFigures:
    """Fingerprints of the gradients on one rank. All mappings have parameter names as keys.

    - ``local``: of the gradient that this rank's backward passes made, before any reduction over ranks,
      followed by the sum of its squares. Both are added up over the passes. Under tensor parallelism, only of
      parameters that it shards: the gradient of another may be only this rank's term of a sum.
    - ``backward``, ``before``, ``after``: of what this rank holds of the gradient after the last backward,
      and before and after the optimizer's last step.
    - ``began``: whether gradients of an earlier pass existed when the first backward began.
    - ``waiting``: whether FSDP2 had not reduced some gradients when the optimizer stepped last.
    - ``has_user_hooks``: whether hooks of the user may change gradients.
    """

    local: Figures = dataclasses.field(default_factory=dict)
    backward: Figures = dataclasses.field(default_factory=dict)
    before: Figures = dataclasses.field(default_factory=dict)
    after: Figures = dataclasses.field(default_factory=dict)
    began: bool = False
    waiting: bool = False
    has_user_hooks: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankObservation:
    """What one rank observed that is compared with other ranks. A field is empty if the plan requires no
    comparison of it.

    - ``coordinate``: dimension of the plan's mesh -> the rank's index along it.
    - ``held_elements``: elements of parameters in the rank's memory. ``part_elements``: elements of the same
      parameters before data-parallel sharding.
    - ``norms``: name of a trained parameter -> norm of its part on the rank. ``matrix_norms``: of all
      parameters with at least two dimensions, in the model's order; only under tensor parallelism.
    - ``tensor_sharded``: names of the parameters that tensor parallelism shards; None if that is unknown.
    - ``learned``: names of the trained parameters that got a gradient.
    - ``block_inputs``: sums and norms of the inputs of the modules of the first block (`of_inputs`).
      ``block_outputs``: fingerprint and norm of each output of the last block (`of_output`).
    - ``losses``: the sum of the elements of each tensor at which a backward starts: a loss, or what a
      pipeline stage passes on.
    """

    coordinate: Mapping[str, int]
    held_elements: int = 0
    part_elements: int = 0
    norms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    matrix_norms: tuple[float, ...] = ()
    tensor_sharded: frozenset[str] | None = None
    learned: frozenset[str] = frozenset()
    block_inputs: tuple[float, ...] = ()
    block_outputs: tuple[tuple[float, float], ...] = ()
    losses: tuple[float, ...] = ()
    inputs: InputDigests = InputDigests()
    order: PassOrder = PassOrder()
    update: UpdateNorms = UpdateNorms()
    gradients: GradientFigures = dataclasses.field(default_factory=GradientFigures)
    weights: WeightFigures = dataclasses.field(default_factory=WeightFigures)

    def other_coordinates(self, *dimensions: str) -> tuple[int, ...]:
        """Return the rank's coordinates along all dimensions of the plan's mesh except ``dimensions``, in the
        mesh's order. Two ranks have equal ones if they differ only along ``dimensions``."""
        return tuple(v for name, v in self.coordinate.items() if name not in dimensions)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """What checks compare with the plan. What is not in ``ranks`` is of this rank.

    ``ranks``: what each rank observed, in the order of ranks; ``rank``: the index of this one.

    Given by the caller of the monitor (None means unknown unless it is said otherwise):

    - ``model_elements``: elements of the model's parameters before any sharding.
    - ``micro_batches``: micro-batches of the observed step; None if they are the plan's.
    - ``clip``: the largest gradient norm that the update should receive; 0 means no clipping.
    - ``norm_before_clipping``: the norm of all ranks' gradients before any clipping.
    - ``plain_dtypes``: dtypes of the parameters of the model without a plan.
    - ``plain_runs``: autocast dtype (None: no autocast) -> what the blocks of the model without a plan did in
      a step under it, for the runs that checks asked for and that did not fail.

    Of the model and the optimizer:

    - ``parameters``: in the model's order; ``block_count``: number of repeated blocks, 0 if none were found.
    - ``head``: the output layer, None if it was not found or the plan does not need it.
    - ``other_linears``: torch's linear layers other than ``head``; ``block_linears``: those in blocks.
    - ``frozen_linears``: linear layers in blocks whose weight is not trained, whatever its number of bits or
      its class.
    - ``has_dropout``: whether some module drops values in training.
    - ``fsdp_groups``: for each parameter group of FSDP2, block -> number of parameters; the key -1 is for
      parameters outside the blocks.
    - ``states``: one for each key of the optimizer's state.
    - ``update_kernels``: how torch's AdamW updates: "fused", "foreach" or "single". Empty without a torch
      optimizer, or if the plan has neither adamw-fused nor adamw-single.
    - ``optimizer_classes``: the classes of the innermost optimizers, as MODULE:CLASS.
    - ``offload_policy``: which of "parameters" and "optimizer" the settings of FSDP2 or of the ZeRO optimizer
      move to the host; None if there is no such object, or if the plan has neither fsdp2 nor zero.

    Of the step:

    - ``activity``: what the blocks did; ``saved``: what autograd kept; ``reads``: whether blocks read other
      ranks' parts of a sample.
    - ``forwards``: number of forward passes of the model; ``passes``: number of backward passes for each
      optimizer step.
    - ``gradient_elements``: elements of gradients on this rank before the first update; None if no update was
      observed.
    - ``arrived_gradients``: how often a parameter's gradient was accumulated in backward;
      ``backward_gradient_elements``: most elements of gradients that this rank held then.
    - ``gathered_blocks``: blocks that FSDP2 had gathered when the first backward began; None if not observed.
    """

    rank: int
    ranks: tuple[RankObservation, ...]

    model_elements: int | None = None
    micro_batches: int | None = None
    clip: float | None = None
    norm_before_clipping: float | None = None
    plain_dtypes: frozenset[torch.dtype] | None = None
    plain_runs: Mapping[torch.dtype | None, BlockActivity] = dataclasses.field(default_factory=dict)

    parameters: tuple[ObservedParameter, ...] = ()
    block_count: int = 0
    head: ObservedLinear | None = None
    other_linears: tuple[ObservedLinear, ...] = ()
    block_linears: tuple[ObservedLinear, ...] = ()
    frozen_linears: tuple[ObservedLinear, ...] = ()
    has_dropout: bool = False
    fsdp_groups: tuple[Mapping[int, int], ...] = ()
    states: tuple[ObservedState, ...] = ()
    update_kernels: frozenset[str] = frozenset()
    optimizer_classes: frozenset[str] = frozenset()
    offload_policy: frozenset[str] | None = None

    activity: BlockActivity = dataclasses.field(default_factory=BlockActivity)
    saved: SavedTensors = dataclasses.field(default_factory=SavedTensors)
    reads: CrossRankReads = CrossRankReads()
    forwards: int = 0
    passes: tuple[int, ...] = ()
    gradient_elements: int | None = None
    arrived_gradients: int = 0
    backward_gradient_elements: int = 0
    gathered_blocks: tuple[int, ...] | None = None

    @property
    def this_rank(self) -> RankObservation:
        return self.ranks[self.rank]

    @property
    def has_step(self) -> bool:
        """Whether a training step was observed: a forward pass of the model or of a block, or a backward
        pass."""
        return bool(self.activity.ran or self.forwards or self.saved.backwards)

    @property
    def trained(self) -> tuple[ObservedParameter, ...]:
        return tuple(p for p in self.parameters if p.is_trained)

    @property
    def block_parameters(self) -> tuple[tuple[ObservedParameter, ...], ...]:
        """The parameters of each block, in the order of the blocks."""
        return tuple(tuple(p for p in self.parameters if i in p.blocks) for i in range(self.block_count))

    def part_elements(self, params: Iterable[ObservedParameter]) -> int:
        """Return the number of elements of ``params`` before data-parallel sharding: the function
        `part_elements` with this object's ``model_elements``."""
        return part_elements(params, self.model_elements)
