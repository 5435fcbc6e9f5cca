"""Job: what is trained. A user writes one of these; the built-in jobs are the same thing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from memfit.types.errors import UserError

Bound = int | float | Mapping[str, int | float]
DEFAULT_EMA_DECAY = 0.999

if TYPE_CHECKING:
    import torch

    Batch = Mapping[str, torch.Tensor] | torch.Tensor | tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """The science's own measure, with the equivalence margin fixed before anything runs."""

    name: str
    unit: str
    higher_is_better: bool
    margin: float  # two results closer than this are the same science, in `unit`
    margin_source: str
    naive: float  # what the honest naive baseline reaches, in `unit`
    naive_name: str

    def __post_init__(self) -> None:
        assert self.margin > 0, "an equivalence margin is a positive number"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerChoice:
    """The optimizer plain training uses. Techniques may replace the algorithm, not the numbers.

    ``make(params)`` builds an optimizer of the user's own instead; ``name`` is then only what it is called.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    make: Callable[[list[torch.nn.Parameter]], Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training job.

    ``build_model()`` returns the module; called inside a fake mode for prediction, so it must not look
    at parameter values. ``make_batch(step, seed)`` returns the batch of that step: a mapping, tuple or
    tensor whose tensors have the batch as first dimension; same arguments, same batch.
    ``loss(model, batch)`` returns the mean loss over the batch's terms; ``loss_terms(batch)`` says how
    many terms were averaged (default: the batch size), so that accumulated micro-batches weigh right.
    ``evaluate(model)`` returns the metric on held-out data, in the metric's unit.
    ``blocks`` and ``head`` are module paths: the repeated blocks (found by default as the longest
    ``nn.ModuleList``/``nn.Sequential``) and the output projection whose logits the loss reads. Checkpointing
    recomputes other stacks of the same class too, and those at the paths ``more_blocks``.
    For plans of several ranks: ``tensor_parallel`` names the Linear layers of the blocks to cut where
    watching them is not enough; ``experts`` names modules called with (tokens, chosen experts, weights);
    context parallelism cuts ``sequence_dim`` and wants inputs and targets aligned in the batch.
    ``bound`` is for shapes that depend on data, which no prediction can know: how many elements (an
    integer) or what share of the possible ones (a float) ``nonzero``, ``masked_select``, a boolean index,
    ``unique`` and the like give; one number, or by operator name or line (``{"model.py:12": 4096}``).
    At a line, or under "item", it answers ``.item()`` too; for a condition, how often it is true.
    ``islands``: patterns (as of ``fnmatch``) of module paths that compute in float32 under any plan, found by
    ``memfit precision``.
    ``clip`` is the largest gradient norm, over all parameters and ranks, as in
    ``torch.nn.utils.clip_grad_norm_``; None: gradients are not clipped. ``ema`` is the decay of an
    exponential moving average of the weights, kept beside the model (True: 0.999); None: no copy.
    ``workers`` counts the DataLoader's worker processes of each rank, which take host memory.
    ``reduced`` makes the same job with a small model, for trials on real numbers where this one is too large.
    """

    name: str
    build_model: Callable[[], torch.nn.Module]
    make_batch: Callable[[int, int], Any]
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    batch_size: int
    steps: int = 40
    demonstration_ratio: float = 0.25  # of plain training's peak: a CPU's cap where none is asked for
    size: str = "tiny"
    title: str = ""
    loss_terms: Callable[[Any], int] | None = None
    evaluate: Callable[[torch.nn.Module], float] | None = None
    metric: Metric | None = None
    optimizer: OptimizerChoice = dataclasses.field(default_factory=OptimizerChoice)
    blocks: str | None = None
    more_blocks: tuple[str, ...] = ()
    head: str | None = None
    tokens_per_batch: int = 0  # for throughput; 0: unknown
    length_unit: str = "tokens"  # of a sample's length: "residues", "bases"
    assumed: tuple[str, ...] = ()  # "batch", "length": what the user left open and a default decides
    bound: Bound | None = None
    data_source: str = ""  # provenance and licence, shown in the report
    tensor_parallel: Mapping[str, str] | None = None  # module pattern -> "colwise" | "rowwise"; None: found
    sequence_dim: int = 1  # of the batch's tensors, for what cuts the sequence
    experts: str | None = None  # pattern of modules called with (tokens, chosen experts, weights)
    islands: tuple[str, ...] = ()  # module path patterns
    reduced: Callable[[], Job] | None = None
    clip: float | None = None
    ema: float | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.ema, bool):
            object.__setattr__(self, "ema", DEFAULT_EMA_DECAY if self.ema else None)
        if self.ema is not None and not (_is_number(self.ema) and 0 < self.ema < 1):
            raise UserError(f"ema={self.ema!r}", allowed="True, or a decay between 0 and 1 such as 0.999")
        if self.clip is not None and not (_is_number(self.clip) and self.clip > 0):
            raise UserError(f"clip={self.clip!r}", allowed="a positive gradient norm such as 1.0, or None")
        if not (_is_number(self.workers) and self.workers >= 0 and self.workers == int(self.workers)):
            raise UserError(f"workers={self.workers!r}", allowed="a number of processes, 0 or more")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobRef:
    """How a child process makes the same Job again: plain data, crosses as JSON.

    ``spec`` is a built-in name, ``path.py:attribute`` or ``hf:PATH_OR_NAME``. ``length``: tokens (residues,
    bases) of a sample. ``None`` keeps the job's own.
    ``clip``: the largest gradient norm; 0: gradients are not clipped.
    """

    spec: str
    size: str | None = None
    data: str | None = None
    weights: str | None = None
    steps: int | None = None
    batch: int | None = None
    length: int | None = None
    clip: float | None = None
