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
    """One parameter of the model.

    - ``shape``: of the whole parameter, also if it is freed.
    - ``elements``: of the parameter as it is now; 0 if it is freed, those of all ranks if it is a DTensor.
    - ``whole_elements``: before data-parallel sharding; under tensor parallelism, of this rank's part.
    - ``local_elements``: those in the memory of this rank.
    - ``shard_bytes``, ``shard_device``: what this rank keeps of it, and the kind of device that holds this.
    - ``blocks``: the blocks that contain it.
    - ``is_fp32_module``: whether it belongs to a module that is to stay in float32.
    - ``has_mesh``: whether it is a DTensor.
    - ``is_tensor_sharded``: whether tensor parallelism shards it; None if that is unknown.
    - ``is_freed_between_uses``: whether ZeRO 3 frees it between uses.
    - ``has_gradient``: whether it got a gradient in the step.
    - ``in_graph``, ``in_compiled_graph``: whether some graph, or a compiled one, makes its gradient.
    - ``norm``: of the part on this rank; None if it was not measured.
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
    """Return the number of elements of ``params`` before data-parallel sharding. If some of them are freed
    and their sizes are unknown (those of ZeRO 3 are known), return at least ``model_elements``, the number of
    elements of the whole model, if that is known."""
    params = list(params)
    elements = sum(p.whole_elements for p in params)
    is_freed = any(not p.elements and not p.is_freed_between_uses for p in params)
    return max(elements, model_elements or 0) if is_freed else elements


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObservedLinear:
    """A linear layer. ``class_name``: of its module."""

    in_features: int
    out_features: int
    class_name: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """A tensor of an optimizer's state that is not a scalar.

    - ``address``: equal for state tensors that are the same memory.
    - ``code_bytes``: bytes in tensors whose elements have one byte.
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
    """The state that an optimizer keeps for one tensor, mostly a parameter.

    ``shape``, ``element_bytes`` and ``size_bytes`` are those of the tensor; ``shape`` is None if the state is
    kept for something other than a tensor. ``is_embedding``: whether it is the weight of an nn.Embedding.
    """

    shape: tuple[int, ...] | None
    element_bytes: int
    size_bytes: int
    is_embedding: bool
    tensors: tuple[StateTensor, ...]


# -- the step ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockActivity:
    """What the repeated blocks did.

    - ``ran``, ``again``: block -> elements of the parameters of each layer that ran in forward, and of each
      that ran again in backward, by the layer's id.
    - ``passed``: blocks through which gradients pass.
    - ``autocast``: (block, dtype of autocast or "off" while a layer with parameters ran in forward).
    - ``computed``: dtype -> elements of parameters with which layers ran in forward, added up over all calls
      and blocks.
    """

    ran: Mapping[int, Mapping[int, int]] = dataclasses.field(default_factory=dict)
    again: Mapping[int, Mapping[int, int]] = dataclasses.field(default_factory=dict)
    passed: frozenset[int] = frozenset()
    autocast: frozenset[tuple[int, str]] = frozenset()
    computed: Mapping[torch.dtype, int] = dataclasses.field(default_factory=dict)

    def recomputed(self) -> set[int]:
        """Return the blocks of which layers with at least 75 % of the elements that ran in forward ran again
        in backward."""
        shares = {
            i: _weight(self.again.get(i, {})) / max(_weight(elements), 1) for i, elements in self.ran.items()
        }
        return {i for i, share in shares.items() if share >= _MOST}

    def under_autocast(self, dtype: torch.dtype) -> set[int]:
        """Return the blocks of which a layer ran under autocast to ``dtype``."""
        return {i for i, kind in self.autocast if kind == str(dtype)}


def _weight(elements_by_layer: Mapping[int, int]) -> int:
    return sum(elements_by_layer.values()) or len(elements_by_layer)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensors:
    """What autograd kept for backward when backward began.

    - ``backwards``: number of backward passes, without those inside another.
    - ``device``: kind of device of the loss; "" if there was no backward.
    - ``resident_bytes``: bytes of each storage kept for backward on the device of the loss, without
      parameters and buffers; ``contiguous_bytes``: of those with a contiguous tensor.
    - ``offloaded``: number of saved tensors of which a saved-tensor hook left no copy on that device. Their
      bytes are ``offloaded_bytes``, without those of the ``unsized`` among them, whose number of bytes is not
      known.
    - ``packed``: number of saved tensors that hooks have replaced by something else, without those of torch's
      checkpointing.
    - ``unread``: number of saved tensors that this torch does not expose.
    - ``rows``: last dimension -> most rows (elements divided by it) of a saved tensor on that device.
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
    """Whether some block reads other ranks' parts of a sample (``reached``), and the number of blocks that
    read only the rank's part."""

    reached: bool = False
    local_only: int = 0


# -- what is compared between ranks -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputDigests:
    """What the model received. ``digests`` holds one digest per forward pass. ``several`` says whether these
    inputs contained more than one distinct sample: two ranks may receive the same sample by chance, but not
    the same two."""

    digests: tuple[str, ...] = ()
    several: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PassOrder:
    """The order of forwards (F), backwards (B) and the weights' parts of backwards (W), as ``letters``.
    ``is_staged``: whether they are those of torch's pipeline stages, else they are the model's forward passes
    and calls of backward."""

    letters: str = ""
    is_staged: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpdateNorms:
    """The gradients that the updates received.

    - ``limits``: the maximum norms with which torch's clipping was called.
    - ``is_observed``: whether an update with gradients was observed.
    - ``squared_norm``: of the gradients on this rank; ``squared_norm_share``: the terms of this rank in the
      squared norm of all ranks' gradients.
    """

    limits: frozenset[float] = frozenset()
    is_observed: bool = False
    squared_norm: float = 0.0
    squared_norm_share: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GradientFigures:
    """Fingerprints of gradients, by parameter name.

    - ``local``: of the gradient as this rank's backward passes made it, followed by the sum of its squares,
      both added up over the passes. Under tensor parallelism, only of parameters that it shards: the gradient
      of another may be only this rank's term of a sum.
    - ``backward``, ``before``, ``after``: of the gradient that this rank holds after the last backward, and
      before and after the optimizer's last step.
    - ``began``: whether gradients of an earlier pass existed when the first backward began.
    - ``waiting``: whether FSDP2 had not reduced some gradients when the optimizer stepped.
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
    """What one rank observed that is compared with other ranks. What the plan does not compare is empty.

    - ``coordinate``: its index along each dimension of the plan's mesh.
    - ``held_elements``, ``part_elements``: elements of parameters that it holds, and before data-parallel
      sharding.
    - ``norms``: of the trained parameters, by name; ``matrix_norms``: of the matrices, in their order.
    - ``tensor_sharded``: names of the parameters that tensor parallelism shards; None if that is unknown.
    - ``learned``: names of the trained parameters that got a gradient.
    - ``block_inputs``, ``block_outputs``: fingerprints of the first inputs of the first block's modules, and
      of the last block's outputs, each of these with its norm.
    - ``losses``: sums of the tensors at which backward starts: losses, or what a pipeline stage passes on.
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

    def other_coordinates(self, *dimensions: str) -> tuple[int, ...]:
        """Return the rank's coordinates along all dimensions of the plan's mesh except ``dimensions``: equal
        for the ranks that differ from this one only along these."""
        return tuple(v for name, v in self.coordinate.items() if name not in dimensions)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """What checks compare with the plan.

    ``ranks``: what each rank observed, in the order of ranks; ``rank``: the index of this one.

    The caller of the monitor says these. None means unknown.

    - ``model_elements``: elements of the model's parameters before any sharding.
    - ``micro_batches``: micro-batches of the observed step; None if they are the plan's.
    - ``clip``: the largest gradient norm that the update should receive; 0 means no clipping.
    - ``norm_before_clipping``: the norm of all ranks' gradients before any clipping.
    - ``plain_dtypes``: dtypes of the parameters of the model without a plan.
    - ``plain_runs``: what the blocks of that model did in a step under autocast to a dtype (None: without
      autocast), for the runs that checks asked for and that did not fail.

    These are of the model and the optimizer.

    - ``head``: the output layer, None if it was not found; ``other_linears``: the other linear layers.
    - ``block_linears``: linear layers in blocks; ``frozen_linears``: those whose weight is not trained,
      whatever its number of bits or its class.
    - ``has_dropout``: whether some module drops values in training.
    - ``fsdp_groups``: for each parameter group of FSDP2, block -> number of parameters; -1 for parameters
      outside the blocks.
    - ``update_kernels``: how torch's AdamW updates: "fused", "foreach" or "single"; empty without a torch
      optimizer.
    - ``offload_policy``: which of "parameters" and "optimizer" the settings of FSDP2 or of the ZeRO optimizer
      move to the host; None if there is no such object.

    These are of the step.

    - ``activity``: what the blocks did; ``saved``: what autograd kept; ``reads``: of other ranks' parts.
    - ``forwards``: forward passes of the model; ``passes``: backward passes for each optimizer step.
    - ``gradient_elements``: elements of gradients on this rank before the first update; None if no update was
      observed. ``arrived_gradients``: number of gradients that arrived in backward;
      ``backward_gradient_elements``: most elements of gradients held while they arrived.
    - ``gathered_blocks``: blocks that FSDP2 had gathered when backward began; None if not observed.
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
        """Whether a training step was observed."""
        return bool(self.activity.ran or self.forwards or self.saved.backwards)

    @property
    def trained(self) -> tuple[ObservedParameter, ...]:
        return tuple(p for p in self.parameters if p.is_trained)

    @property
    def block_parameters(self) -> tuple[tuple[ObservedParameter, ...], ...]:
        """The parameters of each block."""
        return tuple(tuple(p for p in self.parameters if i in p.blocks) for i in range(self.block_count))

    def part_elements(self, params: Iterable[ObservedParameter]) -> int:
        """Return the number of elements of ``params`` before data-parallel sharding, by `part_elements`."""
        return part_elements(params, self.model_elements)
