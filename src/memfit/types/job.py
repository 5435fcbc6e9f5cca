"""Job: what is trained. Users write one; the built-in jobs are of the same type."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from memfit.types.errors import UserError, suggest

DEFAULT_JOB: Final = "protein-ss"  # the built-in job of commands that name none
Bound = int | float | Mapping[str, int | float]
DEFAULT_EMA_DECAY = 0.999
# Degraded trainings that a job's test must be able to tell from plain training.
NegativeControl = Literal["half-steps", "tenth-learning-rate", "eight-bit-weights"]
NEGATIVE_CONTROLS: Final[tuple[str, ...]] = get_args(NegativeControl)
# Fields of a Job that say where things are in the model and the batch.
STRUCTURE = ("blocks", "more_blocks", "head", "tensor_parallel", "sequence_dim", "experts", "islands")

if TYPE_CHECKING:
    import torch

    Batch = Mapping[str, torch.Tensor] | torch.Tensor | tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """The scientific metric of a job. ``margin``: results that differ by less than this, in ``unit``, count
    as scientifically equivalent; it is fixed before anything runs.
    """

    name: str
    unit: str
    higher_is_better: bool
    margin: float
    margin_source: str
    naive: float  # result of a simple baseline method, in `unit`
    naive_name: str

    def __post_init__(self) -> None:
        assert self.margin > 0, "an equivalence margin is a positive number"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerChoice:
    """The optimizer of plain training and its hyperparameters: learning rate, betas, eps and weight decay. A
    technique may replace the algorithm, but not the hyperparameters.

    ``name``: "adamw", "adam", "sgd" or "adafactor", or the import path of any installed torch optimizer, such
    as "torch.optim:Muon". The latter gets ``arguments``, and the learning rate and weight decay if it has
    parameters ``lr`` and ``weight_decay`` that the arguments do not set. ``matrices``: settings of a
    parameter group of the matrices of the repeated blocks, such as GaLore's rank; None: there is no such
    group. ``others``: "adamw" if the optimizer gets only these matrices, as Muon must, and AdamW all other
    parameters; "same" if it gets all.

    If ``make`` is given, ``make(params)`` builds a user-defined optimizer instead; ``name`` is then only its
    name, and the hyperparameters here are not used. Raises UserError for any other value of ``others``.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    make: Callable[[list[torch.nn.Parameter]], Any] | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    matrices: Mapping[str, Any] | None = None
    others: str = "same"

    def __post_init__(self) -> None:
        if self.others not in ("same", "adamw"):
            raise UserError(
                f"OptimizerChoice(others=...), the optimizer of parameters besides the blocks' matrices, is "
                f"{self.others!r}",
                allowed="'same' (this optimizer) or 'adamw'",
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """A size of a job that its user can set. ``name``: such as "batch", "length", "crop" or "layers".
    ``value``: what the job has. ``multiple``: only multiples of it are possible, such as the number of heads
    for the width of a transformer.
    """

    name: str
    value: int
    multiple: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training job.

    ``build_model()`` returns the module. It is called inside a fake mode for prediction, so it must not read
    parameter values. ``make_batch(step, seed)`` returns the batch of that step: a tensor, a mapping, tuple or
    list of tensors, or an object with ``.to()`` that holds tensors, whose first dimension is the samples. The
    same arguments must give the same batch.
    ``loss(model, batch)`` returns the mean loss over the batch's terms. ``loss_terms(batch)`` returns how
    many terms were averaged (default: the batch size), so that accumulated micro-batches are weighted
    correctly. ``evaluate(model)`` returns the metric on held-out data, in the metric's unit.

    ``surrogates``: further endpoints besides ``metric``, each with a margin of its own, such as the held-out
    loss. ``evaluate`` then returns a mapping, the name of each endpoint -> its value. A plan is equivalent
    only if it is equivalent in every endpoint. ``negative_control``: the degraded training that the test must
    judge different, or a proof of concept says "not sensitive" instead of "equivalent". "half-steps": half of
    the optimizer steps. "tenth-learning-rate": a tenth of the learning rate. "eight-bit-weights": after each
    step, the weights are rounded to 8 bits, without a copy of higher precision.

    ``blocks`` is the path of a module whose children are the repeated blocks. None: of the ``nn.ModuleList``
    and ``nn.Sequential`` modules with at least two members, all of one class, the one with the most
    parameters. ``head`` is the path of the output projection whose logits the loss reads. Activation
    checkpointing also recomputes other stacks of blocks of the same class, and the stacks at the paths
    ``more_blocks``.

    For plans with several ranks: ``tensor_parallel`` names the Linear layers of the blocks to cut, {pattern
    of the module path: "colwise" or "rowwise"}; None: they are found by observing the model. ``experts`` is
    the pattern of modules called with (tokens, chosen experts, weights). Context parallelism cuts the
    dimension ``sequence_dim`` of the batch's tensors, and requires inputs and targets to be aligned in the
    batch.

    ``optimizer``: an `OptimizerChoice`, or just its name or import path.

    ``bound`` answers what depends on data and cannot be predicted. It gives the number of elements (an
    integer) or the share of the possible ones (a float) that ``nonzero``, ``masked_select``, a boolean index,
    ``unique`` and similar operators return. It is one number for all of them, or a mapping whose keys are
    operator names or lines of code (``{"model.py:12": 4096}``), or "" for all others. Under a line, or under
    the key "item", it is also what ``.item()`` returns there; if that is a bool, such as a loop's condition,
    it is how often in a row it is True before it is False.

    ``islands``: patterns (as in ``fnmatch``) of module paths that compute in float32 under any plan; ``memfit
    estimate --precision`` finds them. ``clip``: the largest gradient norm, over all parameters and ranks, as
    in ``torch.nn.utils.clip_grad_norm_``; None or infinity: gradients are not clipped. ``ema``: the decay of
    an exponential moving average of the weights, a copy besides the model; True means 0.999; None or False:
    none. ``workers``: number of DataLoader worker processes per rank, which take host memory.
    ``other_bytes``: of tensors on the device that the training keeps beside all this, such as a data set in
    memory. They are counted in predictions; no run makes them. ``largest_batch_ratio``: bytes of the largest
    batch of the training over those of the batches that ``make_batch`` returns, at least 1. The upper ends of
    predicted memory are those with the largest batch (`peak_with_batch`). ``reduced`` makes the same job with
    a small model, for the test of samples' dependence if this model is too large for it. ``dimensions``: the
    sizes that can be set when the job is loaded; memfit fills it in.

    Raises UserError unless 0 < ``ema`` < 1, ``clip`` is above 0, ``workers`` is a whole number of
    at least 0, ``bound`` is or maps to numbers, ``negative_control`` is one of the above, and ``surrogates``
    come with a ``metric`` and all have different names.
    """

    name: str
    build_model: Callable[[], torch.nn.Module]
    make_batch: Callable[[int, int], Any]
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    batch_size: int
    steps: int = 40
    demonstration_ratio: float = 0.25  # of plain training's peak: the cap on a CPU if none is given
    size: str = "tiny"
    title: str = ""
    loss_terms: Callable[[Any], int] | None = None
    evaluate: Callable[[torch.nn.Module], float | Mapping[str, float]] | None = None
    metric: Metric | None = None
    surrogates: tuple[Metric, ...] = ()
    negative_control: NegativeControl = "half-steps"
    optimizer: OptimizerChoice = dataclasses.field(default_factory=OptimizerChoice)
    blocks: str | None = None
    more_blocks: tuple[str, ...] = ()
    head: str | None = None
    tokens_per_batch: int = 0  # for throughput; 0: unknown
    length_unit: str = "tokens"  # unit of a sample's length, such as "residues", "bases"
    assumed: tuple[str, ...] = ()  # "batch", "length": left open by the user and set by a default
    bound: Bound | None = None
    data_source: str = ""  # provenance and licence, shown in the report
    # module pattern -> "colwise" | "rowwise"; None: found automatically
    tensor_parallel: Mapping[str, str] | None = None
    sequence_dim: int = 1  # of the batch's tensors, for techniques that cut the sequence
    experts: str | None = None  # pattern of modules called with (tokens, chosen experts, weights)
    islands: tuple[str, ...] = ()  # module path patterns
    reduced: Callable[[], Job] | None = None
    clip: float | None = None
    ema: float | None = None
    workers: int = 0
    other_bytes: int = 0
    largest_batch_ratio: float = 1.0
    dimensions: tuple[Dimension, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, str):
            object.__setattr__(self, "optimizer", OptimizerChoice(name=self.optimizer))
        if isinstance(self.ema, bool):
            object.__setattr__(self, "ema", DEFAULT_EMA_DECAY if self.ema else None)
        if self.ema is not None and not (_is_number(self.ema) and 0 < self.ema < 1):
            raise UserError(
                f"Job(ema=...), the decay of the moving average of the weights, is {self.ema!r}",
                allowed="True (0.999), a number above 0 and below 1, or None or False (no average)",
            )
        if self.clip == math.inf:
            object.__setattr__(self, "clip", None)  # as loops say that only need the norm
        if self.clip is not None and not (_is_number(self.clip) and self.clip > 0):
            raise UserError(
                f"Job(clip=...), the largest norm of the gradients, is {self.clip!r}",
                allowed="a finite number above 0 such as 1.0, or None (gradients are not clipped)",
            )
        if not (_is_number(self.workers) and self.workers >= 0 and self.workers == int(self.workers)):
            raise UserError(
                f"Job(workers=...), the number of worker processes of the DataLoader, is {self.workers!r}",
                allowed="a whole number, 0 or more",
            )
        bounds = self.bound.values() if isinstance(self.bound, Mapping) else (self.bound,)
        if self.bound is not None and not all(map(_is_number, bounds)):
            raise UserError(
                f"Job(bound=...), the numbers of elements that depend on data, is {self.bound!r:.200}",
                allowed='a number, or a mapping of operators or lines to numbers: {"model.py:12": 4096}',
            )
        if self.negative_control not in NEGATIVE_CONTROLS:
            raise UserError(
                f"Job(negative_control=...), the degraded training that the test must judge different, is "
                f"{self.negative_control!r}",
                allowed=", ".join(NEGATIVE_CONTROLS),
                hint=suggest(str(self.negative_control), NEGATIVE_CONTROLS),
            )
        names = [endpoint.name for endpoint in self.endpoints]
        if (self.surrogates and self.metric is None) or len(set(names)) < len(names):
            raise UserError(
                f"Job(surrogates=...) has the endpoints {', '.join(s.name for s in self.surrogates)}, and "
                f"the metric is {self.metric.name if self.metric else None}",
                allowed="surrogates only together with a metric, and each with another name",
            )

    @property
    def endpoints(self) -> tuple[Metric, ...]:
        """The metric and its surrogates; empty if there is no metric."""
        return (*((self.metric,) if self.metric else ()), *self.surrogates)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobRef:
    """How a child process builds the same Job again: plain data that can be sent as JSON.

    ``spec`` is the name of a built-in job, ``path.py:attribute`` or ``hf:PATH_OR_NAME`` (Hugging Face).
    ``data`` and ``weights`` are paths. ``batch``: samples per step over all ranks. ``length``: tokens
    (residues, bases) of a sample. ``clip``: the largest gradient norm; 0: gradients are not clipped. ``ema``:
    the decay of an average of the weights. A field that is None keeps the job's own setting. ``dimensions``:
    further sizes, name -> number, such as {"crop": 96}; those that it lacks keep the job's own number.
    """

    spec: str
    size: str | None = None
    data: str | None = None
    weights: str | None = None
    steps: int | None = None
    batch: int | None = None
    length: int | None = None
    clip: float | None = None
    ema: float | None = None
    dimensions: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def with_sizes(self, sizes: Mapping[str, int]) -> JobRef:
        """Return this reference with ``sizes``, name -> number: "batch" and "length" in the fields of these
        names, all others in ``dimensions``. What ``sizes`` lacks stays as it is."""
        others = {name: size for name, size in sizes.items() if name not in ("batch", "length")}
        return dataclasses.replace(
            self,
            batch=sizes.get("batch", self.batch),
            length=sizes.get("length", self.length),
            dimensions=dict(self.dimensions) | others,
        )
