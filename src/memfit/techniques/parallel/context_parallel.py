"""Context parallelism: each rank works on its slice of the sequence, and attention gathers keys and values.

Each rank holds two chunks, one from the start of the sequence and one from its end, so that causal work is
balanced (Llama 3, Grattafiori et al. 2024, section 3.3.2). Attention over gathered blocks is merged by the
log-sum-exp of each (Liu et al. 2023, arXiv 2310.01889). Backward gathers again and scatters gradients. The
loss must be a mean over positions with inputs and targets aligned: a shift by one must be done in the batch.
Only attention through ``scaled_dot_product_attention`` may read other positions.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from unittest import mock

from memfit.model.blocks import find_blocks
from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch

_SHIFTS = ("ForCausalLM", "LMHeadModel")  # Hugging Face models whose loss shifts labels by one
_IGNORED = -100  # label that is ignored, as in torch's cross-entropy


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    mesh = bench.world.sub("context")
    if mesh is None:
        return
    from memfit.techniques.parallel.gathered_attention import GatheredAttention, SequenceRanks
    from memfit.techniques.parallel.sample_parallel_collectives import average_gradients

    across = SequenceRanks(
        group=mesh.get_group().group_name,
        rank=bench.world.index("context"),
        ranks=mesh.size(),
        device=bench.device,
        fixed=bench.fixed_counts,
    )
    mode = functools.partial(GatheredAttention, across)
    for module in (*_blocks(bench), bench.model):
        _under(module, mode)
    dim, shifts = bench.job.sequence_dim, type(bench.model).__name__.endswith(_SHIFTS)

    def slices(batch: Any) -> list[Any]:
        whole = _shifted(batch) if shifts else batch
        length = _length(whole, dim)
        if length % (2 * across.ranks):
            raise UserError(
                f"a sequence of length {length} cannot be cut for {across.ranks} context-parallel ranks",
                allowed=f"a length that is a multiple of {2 * across.ranks}",
            )
        across.length = length // across.ranks
        return [_slice(whole, dim, length, across.positions(rank)) for rank in range(across.ranks)]

    bench.slices = slices
    bench.loss_terms = _count_labels
    bench.before_micro_batch.append(average_gradients(bench, across))


def _observe_plain_model(bench: Workbench) -> None:
    if bench.world.layout.context > 1:
        from memfit.model.linear_roles import PlaceholderValues, without_values
        from memfit.techniques.parallel.gathered_attention import GatheredCounts

        with (
            without_values(bench.job, bench.model) as (model, batch),
            PlaceholderValues(),
            GatheredCounts() as gathered,
        ):
            bench.job.loss(model, batch)
        bench.fixed_counts = {site: frozenset(counts) for site, counts in gathered.counts.items()}


def _blocks(bench: Workbench) -> list[torch.nn.Module]:
    """Return the model's blocks, each of which must enter the attention mode itself, because recomputation
    calls blocks in backward, when the model's forward has ended. Return [] if no repeated blocks are found,
    or none at ``Job.blocks``."""
    try:
        return find_blocks(bench.model, bench.job.blocks)[1]
    except UserError:
        return []


def _under(module: torch.nn.Module, mode: Any) -> None:
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not module.training:
            return inner(*args, **kwargs)
        with mode(), _without_packing_detection():
            return inner(*args, **kwargs)

    module.forward = forward


@contextlib.contextmanager
def _without_packing_detection() -> Iterator[None]:
    """Disable, inside this context, Hugging Face's detection of packed sequences, which takes a jump in
    positions for the start of another sequence."""
    if "transformers.masking_utils" not in sys.modules:
        yield
        return
    with mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None):
        yield


def _length(batch: Any, dim: int) -> int:
    import torch
    from torch.utils import _pytree

    tensors = [t for t in _pytree.tree_leaves(batch) if isinstance(t, torch.Tensor) and t.dim() > dim]
    if not tensors:
        raise UserError(
            f"context-parallel cuts dimension {dim} (Job.sequence_dim, counted from 0) of the batch's "
            f"tensors, but none has more than {dim} dimensions",
            hint="set Job(sequence_dim=...) to the dimension along which the tokens lie: 1 for tensors of "
            "shape (batch, tokens); memfit.apply takes the same argument",
        )
    return int(tensors[0].shape[dim])


def _slice(batch: Any, dim: int, length: int, positions: torch.Tensor) -> Any:
    import torch
    from torch.utils import _pytree

    def cut(value: torch.Tensor) -> torch.Tensor:
        has_sequence = value.dim() > dim and value.shape[dim] == length
        return value.index_select(dim, positions.to(value.device)) if has_sequence else value

    return _pytree.tree_map_only(torch.Tensor, cut, batch)


def _shifted(batch: Any) -> Any:
    from torch.nn import functional

    if not isinstance(batch, Mapping) or "labels" not in batch:
        return batch
    return {**batch, "shift_labels": functional.pad(batch["labels"], (0, 1), value=_IGNORED)[..., 1:]}


def _count_labels(part: Any) -> int | None:
    """Return the number of labels that count in the loss of ``part``, one rank's part of a batch: those other
    than -100 in its ``shift_labels`` or, without these, its ``labels``. Return None if the part is not a
    mapping with such labels, or these are floating-point or have fewer than two dimensions."""
    labels = part.get("shift_labels", part.get("labels")) if isinstance(part, Mapping) else None
    if labels is None or labels.dim() < 2 or labels.is_floating_point():
        return None
    return int((labels != _IGNORED).sum())


TECHNIQUE = Technique(
    name="context-parallel",
    summary="each rank works on its slice of the sequence; attention gathers keys and values",
    script_call="torch.distributed.tensor.experimental.context_parallel over {degree} ranks",
    changes=StepPart.PASSES,
    effect=EffectClass.E1,
    apply=_apply,
    order=46,
    knobs=(Knob(name="degree", default=2, doc="number of ranks that share each sequence"),),
    forbids=("zero", "pipeline", "selective-checkpointing"),
    observe_plain_model=_observe_plain_model,
)
