"""The classes that define a technique, and the workbench: the training step under construction, which
techniques change."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Protocol

from memfit.techniques.rank_mesh import Layout, World
from memfit.types.device_kind import HOST, DeviceKind, device_kind
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

    - ``micro_batches`` is the number of pieces into which the training step cuts each micro-batch of gradient
      accumulation.
    - ``ending`` is set at the start of each backward of a stage: to all modules inside the blocks of that
      stage if it is the stage's last backward of the step, else to the empty set. It keeps that value until
      the next backward, of any stage, starts. Before the first backward it is empty.
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
        """Run forward and backward of all pieces. Return the sum of their weighted losses, a float32 scalar
        that is the same on every rank of the pipeline.

        ``weighted(model, micro-batch, share)`` returns the loss of a piece times its share. ``mark`` is
        called with the phase, forward or backward, whenever one begins. ``last`` says whether the optimizer's
        step comes after this call; if so, gradients of parameters that several ranks use are reduced over
        them.
        """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """A setting of a technique, called ``name``. Its value is one of ``choices`` if there are any; else text
    that matches ``pattern`` from start to end if a pattern is set; else an integer of at least ``minimum``.
    ``needs`` maps those values that require a package to the package's import name. ``doc`` is the help
    text."""

    name: str
    default: KnobValue
    doc: str
    choices: tuple[KnobValue, ...] = ()
    minimum: int = 1
    pattern: re.Pattern[str] | None = None
    needs: Mapping[KnobValue, str] = dataclasses.field(default_factory=dict)

    @property
    def allowed(self) -> str:
        """The allowed values as text: "a, b, c" for choices, "text that matches ..." for a pattern, else "an
        integer of at least 1" or another minimum."""
        if self.choices:
            return ", ".join(str(c) for c in self.choices)
        if self.pattern is not None:
            return f"text that matches {self.pattern.pattern}"
        return f"an integer of at least {self.minimum}"

    def accepts(self, value: object) -> bool:
        """Return whether ``value`` is allowed. A value that equals a choice must also have its type (1 is not
        True). True and False are not accepted as integers."""
        if self.choices:
            return any(value == c and type(value) is type(c) for c in self.choices)
        if self.pattern is not None:
            return isinstance(value, str) and self.pattern.fullmatch(value) is not None
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.minimum


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """Facts about a job on a kind of device, from which ``Technique.settings`` determines the settings that
    the search tries."""

    batch_size: int  # of one rank
    block_count: int
    vocabulary: int  # output size of the head; 0 if there is no head
    device_kind: str  # such as "cpu" or "cuda"
    ranks: int = 1
    half_precision: str = "bfloat16"  # in which the device multiplies
    has_linear_layers: bool = True  # in the blocks, to which adapters can be added
    has_scalar_parameters: bool = False  # parameters without dimensions
    has_slices: bool = False  # some module allocates much inside and can be cut into independent slices
    smallest_micro_batch: int = 1  # its number of samples
    clips_gradients: bool = False  # by their total norm
    optimizer: str = "adamw"  # name of the job's optimizer in lower case; of a class, its own name
    is_adamw: bool = True  # the job's optimizer is AdamW with the job's hyperparameters
    needs_parameter_names: bool = False  # the job's optimizer needs the names of the model's parameters

    @property
    def micro_batch_counts(self) -> tuple[int, ...]:
        """Numbers of equal micro-batches into which a rank's ``batch_size`` samples can be split so that each
        has at least ``smallest_micro_batch`` samples, in ascending order. 1 is always included."""
        most = max(1, self.batch_size // self.smallest_micro_batch)
        return tuple(n for n in range(1, most + 1) if self.batch_size % n == 0)


class StepPart(enum.Flag):
    """The parts of a training step. A sketch, the search's estimate of a plan, is composed from a trace of
    each part under only those techniques that change it (planner/evaluate.py). The sketch computes the effect
    of a technique with ``NONE`` from these traces.
    """

    NONE = 0
    PASSES = enum.auto()  # forward and backward
    UPDATE = enum.auto()  # the optimizer's phase
    BOTH = PASSES | UPDATE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Technique:
    """A memory-saving technique.

    - ``effect`` says how the technique may change the numbers that training computes.
    - ``script_call``: what a user's script must call or do to apply it without memfit, for a person to read.
      ``{knob}`` stands for the value of a setting.
    - ``changes``: the parts of a step in which it changes what is computed or kept.
    - ``apply(bench, settings)`` changes the workbench. Techniques of smaller ``order`` are applied first. It
      raises UserError if the model, the job or the ranks do not suit the technique.
    - ``settings(facts)`` gives the knob settings worth searching for one device, in addition to leaving the
      technique out. Knobs that they omit have their default values. By default there are none.
    - ``slot``: a kind of technique, such as "optimizer". A plan has at most one technique of each slot; "" is
      no slot.
    - ``knobs``: the technique's settings.
    - ``needs``: import names of the packages required beyond memfit's own.
    - ``forbids``: names of techniques or slots with which it cannot be combined.
    - ``excluded(facts)``: whether the search must not propose it for the job.
    - ``unsearched``: names of techniques with which the search does not combine it, though users may.
    - ``supports(kind)``: whether the packages that it needs have kernels for devices of this kind. The search
      proposes it for these only.
    - ``before_engine``: memfit applies it to a model, a loss or an optimizer before it passes them to an
      engine, so that most engines can train with it (engines/base.py).
    - ``freezes_parameters``: it freezes parameters of the job's model.
    - ``loaded_in_pieces``: while the model is loaded, the host holds one tensor of it at a time.
    - ``pins_host_memory``: what it keeps in host memory may be pinned. ``pins_traced_blocks(settings)``:
      whether each tensor that a trace shows there is then one block of pinned memory; False if engines pin
      blocks of other sizes.
    - ``observe_plain_model(bench)`` reads what the technique must know about the plain model, before any
      technique changes it.
    """

    name: str
    summary: str
    effect: EffectClass
    script_call: str
    changes: StepPart
    apply: Callable[[Workbench, Mapping[str, KnobValue]], None]
    order: int
    settings: Callable[[JobFacts], Iterable[Mapping[str, KnobValue]]] = lambda facts: ()
    slot: str = ""
    knobs: tuple[Knob, ...] = ()
    needs: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    excluded: Callable[[JobFacts], bool] = lambda facts: False
    unsearched: tuple[str, ...] = ()
    supports: Callable[[DeviceKind], bool] = lambda kind: True
    before_engine: bool = False
    freezes_parameters: bool = False
    loaded_in_pieces: bool = False
    pins_host_memory: bool = False
    pins_traced_blocks: Callable[[Mapping[str, KnobValue]], bool] = lambda settings: True
    observe_plain_model: Callable[[Workbench], None] = lambda bench: None

    def runs_on(self, kind: str) -> bool:
        """Return whether the technique supports devices of this kind, such as "cuda" (``supports``)."""
        return self.supports(device_kind(kind))

    @property
    def missing(self) -> tuple[str, ...]:
        """Import names of the packages in ``needs`` that are not installed."""
        return tuple(p for p in self.needs if importlib.util.find_spec(p) is None)

    def lacks(self, settings: Mapping[str, KnobValue]) -> tuple[str, ...]:
        """Return the import names of the packages that are not installed and that the technique itself or one
        of ``settings``, the values of its knobs, requires."""
        packages = (k.needs[settings[k.name]] for k in self.knobs if settings.get(k.name) in k.needs)
        return (*self.missing, *(p for p in packages if importlib.util.find_spec(p) is None))


class OptimizerLike(Protocol):
    """What the training step uses of an optimizer."""

    def step(self) -> Any: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
    @property
    def state(self) -> Any: ...


MakeOptimizer = Callable[[list["torch.nn.Parameter"]], OptimizerLike]
Context = Callable[[], contextlib.AbstractContextManager[Any]]


def run_slices(run: Callable[..., Any], slices: Sequence[tuple[torch.Tensor, ...]]) -> list[Any]:
    """Return ``run(*tensors)`` for the tensors of each slice, in their order."""
    return [run(*tensors) for tensors in slices]


@dataclasses.dataclass(kw_only=True)
class Workbench:
    """The training step under construction. `TrainingStep` creates it for a job, applies the plan's
    techniques, which change it, in the order of ``Technique.order``, and then runs steps as its fields say.
    In a trace, the tracer also sets functions to observe the step. Comments at the fields say what each is.
    """

    job: Job
    model: torch.nn.Module
    device: DeviceKind  # whose kernels run
    # Where tensors are: the device in a real run, but the CPU in a trace, whatever ``device`` is.
    torch_device: str = HOST
    world: World = dataclasses.field(default_factory=lambda: World(layout=Layout()))
    # Returns the first of n equal parts of the job's first batch.
    first_part: Callable[[int], Any] = lambda parts: None

    # -- Set by techniques.
    # Called with the trainable parameters once all techniques are applied.
    make_optimizer: MakeOptimizer
    # What the job's loss gets in place of ``model``; None: ``model`` itself.
    call: Any = None
    micro_batches: int = 1  # into which each rank's batch is cut
    # Each is called before each micro-batch (with a ``pipeline``, before each backward) with whether it is
    # the last of the step.
    before_micro_batch: list[Callable[[bool], None]] = dataclasses.field(default_factory=list)
    # Make the contexts around forward and loss of each micro-batch.
    forward_contexts: list[Context] = dataclasses.field(default_factory=list)
    closers: list[Callable[[], None]] = dataclasses.field(default_factory=list)  # called at the step's close
    step_in_backward: bool = False  # each parameter is updated as soon as its gradient is complete
    loss_scale: LossScale | None = None
    pipeline: RunsPipeline | None = None  # runs forward and backward if the plan has pipeline stages
    ddp: Any = None  # DDP's wrapper of the model
    # Returns the norm of all gradients over all ranks; None: gradients are those of the parameters.
    grad_norm: Callable[[], torch.Tensor] | None = None
    # The memory pools (see ``memory_pool``) in which gradients, and what is kept of parameters, are.
    gradients_on: str = ""
    parameters_on: str = ""
    islands: Mapping[str, torch.nn.Module] = dataclasses.field(default_factory=dict)  # computed in float32
    # Names of parameters that several pipeline ranks hold and that this rank leaves out of the gradient norm,
    # because another one counts them.
    counted_elsewhere: set[str] = dataclasses.field(default_factory=set)
    # Names of parameters that differ between data-parallel ranks. Their gradients are not averaged.
    own_parameters: set[str] = dataclasses.field(default_factory=set)
    # Names of parameters whose rows are in the order of tensor ranks, with the number of parts fused in each.
    fused_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    # Cuts a batch along its sequence, one part per context rank. ``loss_terms`` counts a part's labels; it
    # returns None if they cannot be counted.
    slices: Callable[[Any], list[Any]] | None = None
    loss_terms: Callable[[Any], int | None] = lambda part: None
    # By place in the code, the numbers to which code counts there on whole sequences (`GatheredCounts`).
    fixed_counts: Mapping[Any, frozenset[int]] = dataclasses.field(default_factory=dict)

    # -- Set by the tracer. In a real run they are None or do nothing.
    # Called with each parameter whose gradient is ready.
    on_gradient: Callable[[torch.nn.Parameter], None] | None = None
    # Called with DDP's wrapper before its first step.
    on_ddp: Callable[[Any], None] | None = None
    # Called with the bytes that leave memory and that come back.
    on_offload: Callable[[int, int], None] | None = None
    # Called with the bytes that are written to local storage, those read from it, and those that it holds.
    on_storage: Callable[[int, int, int], None] | None = None
    # Called with a tensor that replaces the model's own "parameter" or "gradient", and this word.
    on_kept: Callable[[torch.Tensor, str], None] = lambda tensor, category: None
    # Called with a sentence about what a trace assumes and a run finds out.
    on_assumption: Callable[[str], None] = lambda sentence: None
    # Returns a context in which new tensors count as memory of the host ("host"), of the stream of that name,
    # or ("") of the device.
    memory_pool: Callable[[str], contextlib.AbstractContextManager[Any]] = lambda name: (
        contextlib.nullcontext()
    )
    # Returns ``run(*tensors)`` for each of the slices, of which a trace runs a few.
    run_slices: Callable[[Callable[..., Any], Sequence[tuple[torch.Tensor, ...]]], list[Any]] = run_slices

    def device_of(self, pool: str) -> str:
        """Return where tensors of this memory pool are: the host's memory for "host", else
        ``torch_device``."""
        return HOST if pool == "host" else self.torch_device

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return the model's parameters that require gradients, in the order of ``model.parameters()``."""
        return [p for p in self.model.parameters() if p.requires_grad]
