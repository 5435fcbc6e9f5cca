"""The classes that define a technique, and the workbench: the training step under construction, which
techniques change."""

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
WeightedLoss = Callable[[Any, Any, float], "torch.Tensor"]  # arguments: model, micro-batch, share


class RunsPipeline(Protocol):
    """Runs the pipeline stages of one rank for a training step.

    ``micro_batches`` is the number of pieces into which the training step cuts each micro-batch of gradient
    accumulation. ``ending`` holds the modules inside the blocks of a stage from the start of that stage's
    last backward of the step until the next backward of any stage begins. Otherwise it is empty.
    """

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
        """Run forward and backward of all pieces. Return the sum of their weighted losses, which is the same
        on every stage.

        ``weighted`` returns the loss of a piece times its share. ``mark`` is called with each phase that
        begins (forward or backward). ``last`` says that the optimizer's step comes next, so that gradients
        are reduced over ranks.
        """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """A technique's setting. Its value is one of ``choices`` if there are any, else text that matches
    ``pattern`` as a whole if that is set, else an integer of at least ``minimum``. ``needs`` maps single
    values to the package that they require. ``doc`` is the help text."""

    name: str
    default: KnobValue
    doc: str
    choices: tuple[KnobValue, ...] = ()
    minimum: int = 1
    pattern: re.Pattern[str] | None = None
    needs: Mapping[KnobValue, str] = dataclasses.field(default_factory=dict)

    @property
    def allowed(self) -> str:
        """The allowed values as text: the choices separated by commas, the pattern, or the least integer."""
        if self.choices:
            return ", ".join(str(c) for c in self.choices)
        if self.pattern is not None:
            return f"text that matches {self.pattern.pattern}"
        return f"an integer of at least {self.minimum}"

    def accepts(self, value: object) -> bool:
        """Return whether ``value`` is allowed. A value that equals a choice must also have its type, and True
        and False are not integers."""
        if self.choices:
            return any(value == c and type(value) is type(c) for c in self.choices)
        if self.pattern is not None:
            return isinstance(value, str) and self.pattern.fullmatch(value) is not None
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.minimum


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Facts about the job and the machine from which a technique proposes settings to the search."""

    batch_size: int  # of one rank
    block_count: int
    has_head: bool
    vocabulary: int  # output size of the head; 0 if there is no head
    device: str
    ranks: int = 1
    half: str = "bfloat16"  # the half precision in which the device multiplies
    linears: bool = True  # the blocks have linear layers, to which adapters can be added
    scalars: bool = False  # the model has parameters without dimensions
    slices: bool = False  # some module allocates much inside and can be cut into independent slices
    least_part: int = 1  # number of samples in the smallest micro-batch
    clipped: bool = False  # gradients are clipped by their total norm
    adamw: bool = True  # the job's optimizer is AdamW with the job's hyperparameters

    @property
    def parts(self) -> tuple[int, ...]:
        """Numbers of equal micro-batches into which a rank's samples can be split so that each has at least
        ``least_part`` samples. 1 is always included."""
        most_parts = max(1, self.batch_size // self.least_part)
        return tuple(n for n in range(1, most_parts + 1) if self.batch_size % n == 0)

    @property
    def refused(self) -> frozenset[str]:
        """Names of the techniques that a search does not propose for the job: fsdp2 if the model has
        parameters without dimensions, optimizer-in-backward if gradients are clipped by their total norm, and
        other implementations of AdamW if the job's optimizer is another one."""
        reasons = {
            "fsdp2": self.scalars,
            "optimizer-in-backward": self.clipped,
            **dict.fromkeys(("adamw-8bit", "adamw-4bit", "adamw-fused", "adamw-single"), not self.adamw),
        }
        return frozenset(name for name, is_refused in reasons.items() if is_refused)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Technique:
    """A memory-saving technique.

    - ``effect`` says how the technique may change the numbers that training computes.
    - ``apply`` changes the workbench. Techniques of smaller ``order`` are applied first.
    - ``settings(space)`` gives the knob settings worth searching, in addition to leaving the technique out.
      Knobs that they omit have their default values.
    - ``slot``: a plan has at most one technique of each slot, except the slot "".
    - ``needs``: packages required beyond memfit's own.
    - ``forbids``: names of techniques or slots with which it cannot be combined.
    - ``unsearched``: names of techniques with which only users combine it, not the search.
    - ``devices``: kinds of device for which the search proposes it.
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
    # Reads what the technique must know about the plain model, before any technique changes it.
    look: Callable[[Workbench], None] = lambda bench: None

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages that this technique requires and that are not installed."""
        return tuple(p for p in self.needs if importlib.util.find_spec(p) is None)

    def lacks(self, settings: Mapping[str, KnobValue]) -> tuple[str, ...]:
        """Return the packages that the technique or these settings require and that are not installed."""
        packages = (k.needs[settings[k.name]] for k in self.knobs if settings.get(k.name) in k.needs)
        return (*self.missing, *(p for p in packages if importlib.util.find_spec(p) is None))


class OptimizerLike(Protocol):
    """The interface of an optimizer that the training step uses."""

    def step(self) -> Any: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
    @property
    def state(self) -> Any: ...


MakeOptimizer = Callable[[list["torch.nn.Parameter"]], OptimizerLike]
Context = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(kw_only=True)
class Workbench:
    """The training step under construction. Techniques change it in their order.

    - ``device`` says whose kernels run ("cpu" or "cuda"), not where tensors are: a prediction for CUDA is
      traced on fake CPU tensors.
    - ``make_optimizer`` is called with the trainable parameters once all techniques are applied.
    - ``forward_contexts`` surround the forward and loss of each micro-batch.
    - Each of ``before_micro_batch`` is called with whether the micro-batch is the last of the step; with a
      ``pipeline``, before each backward.
    - ``call`` is what the job's loss gets as its model, or None for the model itself.
    - ``first_part(n)`` returns the first of n equal parts of the job's first batch.
    - ``pipeline`` runs forward and backward if the plan has pipeline stages; otherwise it is None.
    - ``ddp`` is DDP's wrapper of the model, or None without DDP.
    - ``counted_elsewhere`` holds the names of tied parameters whose gradient the rank of another pipeline
      stage counts in the gradient norm.
    - ``closers`` are called when the step is closed.
    - ``on_gradient``, ``on_ddp``, ``on_offload``, ``on_kept`` and ``place`` are callbacks that the tracer
      sets.
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
    # Names of parameters that differ between data-parallel ranks. Their gradients are not averaged.
    own_parameters: set[str] = dataclasses.field(default_factory=set)
    # Names of parameters whose rows are in the order of tensor ranks, with the number of parts fused in each.
    fused_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    # Cuts a batch along its sequence, one part per context rank. `loss_terms` counts a part's labels.
    slices: Callable[[Any], list[Any]] | None = None
    islands: Mapping[str, torch.nn.Module] = dataclasses.field(default_factory=dict)  # computed in float32
    fixed_counts: Mapping[Any, frozenset[int]] = dataclasses.field(default_factory=dict)
    loss_terms: Callable[[Any], int | None] = lambda part: None
    # Set by the tracer: called with each parameter whose gradient is ready.
    on_gradient: Callable[[torch.nn.Parameter], None] | None = None
    closers: list[Callable[[], None]] = dataclasses.field(default_factory=list)
    # Set by the tracer: called with DDP's wrapper before its first step.
    on_ddp: Callable[[Any], None] | None = None
    # Set by the tracer: called with the bytes that leave memory and that come back.
    on_offload: Callable[[int, int], None] | None = None
    # Set by the tracer: called with a "parameter" or "gradient" that replaces the model's own.
    on_kept: Callable[[torch.Tensor, str], None] = lambda tensor, category: None
    # Set by the tracer: places new tensors in "host" memory, in a stream's pool, or ("") with the model.
    place: Callable[[str], contextlib.AbstractContextManager[Any]] = lambda name: contextlib.nullcontext()
    gradients_on: str = ""  # a place, as for `place`
    parameters_on: str = ""
    grad_norm: Callable[[], torch.Tensor] | None = None  # set if gradients are not in the parameters

    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]
