"""The shape every technique has, and the workbench it changes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Protocol

from memfit.techniques.rank_mesh import Layout, World
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch

    from memfit.techniques.loss_scale import LossScale
    from memfit.types.job import Job
    from memfit.types.trace import Phase

Piece = tuple[Any, float]  # a micro-batch and its share of the step's loss
WeightedLoss = Callable[[Any, Any, float], "torch.Tensor"]  # of (model, micro-batch, share)


class RunsPipeline(Protocol):
    """What a training step asks of a pipeline's stages on one rank. ``ending``: what has its last backward of
    the step next."""

    micro_batches: int
    ending: Set[object]

    def run(
        self,
        pieces: Sequence[Piece],
        weighted: WeightedLoss,
        mark: Callable[[Phase], None],
        *,
        last: bool,
    ) -> torch.Tensor:
        """All pieces forward and backward; their weighted losses summed, the same on every stage."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """A technique's setting: a positive integer of any size, one of ``choices``, or text of a ``pattern``.
    ``needs``: packages that single values take, by value."""

    name: str
    default: KnobValue
    doc: str
    choices: tuple[KnobValue, ...] = ()
    minimum: int = 1
    pattern: re.Pattern[str] | None = None
    needs: Mapping[KnobValue, str] = dataclasses.field(default_factory=dict)

    @property
    def allowed(self) -> str:
        if self.choices:
            return ", ".join(str(c) for c in self.choices)
        if self.pattern is not None:
            return f"text like {self.pattern.pattern}"
        return f"an integer of at least {self.minimum}"

    def accepts(self, value: object) -> bool:
        if self.choices:
            return any(value == c and type(value) is type(c) for c in self.choices)
        if self.pattern is not None:
            return isinstance(value, str) and self.pattern.fullmatch(value) is not None
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.minimum


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What the search may try with: the numbers a technique needs to propose settings."""

    batch_size: int  # of one rank
    block_count: int
    has_head: bool
    vocabulary: int  # outputs of the head; 0: no head
    device: str
    ranks: int = 1
    half: str = "bfloat16"  # the half precision that the device multiplies in
    linears: bool = True  # its blocks have linear layers, which adapters go beside
    scalars: bool = False  # it has parameters without dimensions
    slices: bool = False  # some module makes much inside that can be cut into independent slices
    least_part: int = 1  # samples of the smallest micro-batch
    clipped: bool = False  # gradients are clipped by the norm of all of them

    @property
    def parts(self) -> tuple[int, ...]:
        """Numbers of micro-batches that a rank's samples may be cut into, 1 among them."""
        most = max(1, self.batch_size // self.least_part)
        return tuple(n for n in range(1, most + 1) if self.batch_size % n == 0)

    @property
    def refused(self) -> frozenset[str]:
        """Techniques that do not take the job at all."""
        reasons = {"fsdp2": self.scalars, "optimizer-in-backward": self.clipped}
        return frozenset(name for name, refused in reasons.items() if refused)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Technique:
    """``slot``: at most one technique of a slot is in a plan. ``needs``: packages beyond memfit's own.
    ``forbids``: names of techniques or slots it cannot be combined with, ``unsearched``: those that it is
    combined with where a plan asks for both, and not by the search. ``order``: when it is applied.
    ``settings(space)``: the knob settings worth searching, besides leaving the technique out.
    """

    name: str
    summary: str
    effect: EffectClass
    apply: Callable[[Workbench, Mapping[str, KnobValue]], None]
    settings: Callable[[Space], Iterable[Mapping[str, KnobValue]]]
    order: int
    slot: str = ""
    knobs: tuple[Knob, ...] = ()
    needs: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    unsearched: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    # What it must know of the plain model, before any technique changes it.
    look: Callable[[Workbench], None] = lambda bench: None

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages this technique needs that are not installed."""
        return tuple(p for p in self.needs if importlib.util.find_spec(p) is None)

    def lacks(self, settings: Mapping[str, KnobValue]) -> tuple[str, ...]:
        """Packages that it needs with these settings and that are not installed."""
        asked = (k.needs[settings[k.name]] for k in self.knobs if settings.get(k.name) in k.needs)
        return (*self.missing, *(p for p in asked if importlib.util.find_spec(p) is None))


class OptimizerLike(Protocol):
    """What the step needs of an optimizer."""

    def step(self) -> Any: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
    @property
    def state(self) -> Any: ...


MakeOptimizer = Callable[[list["torch.nn.Parameter"]], OptimizerLike]
Context = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(kw_only=True)
class Workbench:
    """The one training step under construction; techniques change it in their order.

    ``device`` says whose kernels run ("cpu" or "cuda"), not where tensors lie: a prediction for CUDA is
    traced on fake CPU tensors. ``forward_contexts`` surround forward and loss of each micro-batch;
    ``before_micro_batch`` is told whether the micro-batch is the step's last. ``call`` is what the job's
    loss gets as its model, where that is not the model itself. ``first_part(n)``: the first of n equal parts
    of a batch. ``pipeline`` runs forward and backward where the plan has stages; ``ddp`` is DDP's wrapper;
    ``counted_elsewhere`` are names of tied parameters whose gradient another stage counts in the norm.
    """

    job: Job
    model: torch.nn.Module
    device: str
    make_optimizer: MakeOptimizer
    world: World = dataclasses.field(default_factory=lambda: World(layout=Layout()))
    call: Any = None
    micro_batches: int = 1
    before_micro_batch: list[Callable[[bool], None]] = dataclasses.field(default_factory=list)
    forward_contexts: list[Context] = dataclasses.field(default_factory=list)
    step_in_backward: bool = False
    loss_scale: LossScale | None = None
    first_part: Callable[[int], Any] = lambda parts: None
    pipeline: RunsPipeline | None = None
    ddp: Any = None
    counted_elsewhere: set[str] = dataclasses.field(default_factory=set)
    # Names of parameters that every data-parallel rank has others of: nothing is averaged there.
    own_parameters: set[str] = dataclasses.field(default_factory=set)
    # Names of parameters whose rows lie in the order of tensor ranks, and how many parts are fused in them.
    fused_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    # A batch cut along its sequence, one part a context rank, and the labels that count in such a part.
    slices: Callable[[Any], list[Any]] | None = None
    islands: Mapping[str, torch.nn.Module] = dataclasses.field(default_factory=dict)  # computed in float32
    fixed_counts: Mapping[Any, frozenset[int]] = dataclasses.field(default_factory=dict)
    loss_terms: Callable[[Any], int | None] = lambda part: None
    on_gradient: Callable[[torch.nn.Parameter], None] | None = None  # the tracer listens here
    closers: list[Callable[[], None]] = dataclasses.field(default_factory=list)
    on_ddp: Callable[[Any], None] | None = None  # and here: DDP's wrapper, before its first step
    on_offload: Callable[[int, int], None] | None = None  # and here: bytes that leave memory, and come back
    # and here: a "parameter" or "gradient" that a technique keeps in the place of the model's own
    on_kept: Callable[[torch.Tensor, str], None] = lambda tensor, category: None
    # and here: tensors made meanwhile lie in "host" memory, in a stream's pool, or ("") where the model is
    place: Callable[[str], contextlib.AbstractContextManager[Any]] = lambda name: contextlib.nullcontext()
    gradients_on: str = ""  # a place too
    parameters_on: str = ""
    grad_norm: Callable[[], torch.Tensor] | None = None  # where gradients are not in the parameters

    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]
