"""Expert parallelism: the experts of each mixture are distributed over the data-parallel ranks, and tokens
are sent to them.

The experts of a mixture are one module called with ``(tokens (N, width), chosen (N, k), weights (N, k))``
that returns ``(N, width)``. ``Job.experts`` names such modules. A module holds its experts in an
``nn.ModuleList``, each called with tokens, or as Hugging Face does in ``gate_up_proj`` and ``down_proj``,
with one slice per expert. Every expert has room for the same number of tokens from every rank, its capacity,
which is ``capacity_percent`` of an even share of that rank's choices. Choices beyond it are dropped (Lepikhin
et al. 2020, arXiv 2006.16668), so that memory does not depend on the router.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from memfit.techniques.base import Knob, Space, Technique, Workbench
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch

_GROUPED = ("gate_up_proj", "down_proj")  # shapes (experts, 2 x inner, width) and (experts, width, inner)


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    ranks, mesh = bench.world.layout.data, bench.world.sub("replicate", "shard")
    if mesh is None or mesh.ndim > 1 or int(settings["degree"]) != ranks:
        raise UserError(
            f"expert-parallel of degree {settings['degree']} does not fit {ranks} data-parallel ranks",
            allowed=f"degree={ranks}, if that is at least 2; and fsdp2, if used, with replicas=1",
        )
    group = mesh.get_group()
    for name in _mixtures(bench):
        module = bench.model.get_submodule(name)
        experts = _deal(module, name, bench.world.layout.data_index(bench.world.rank), ranks)
        dispatcher = _Travel(
            group=group,
            ranks=ranks,
            experts=experts.total,
            capacity_percent=int(settings["capacity_percent"]),
            run=experts.run,
        )
        module.forward = dispatcher.forward
        for param_name, param in module.named_parameters():
            bench.own_parameters.add(f"{name}.{param_name}")
            # These gradients sum the terms of every rank, while other gradients are averaged over ranks.
            param.register_hook(lambda grad: grad / ranks)


def _mixtures(bench: Workbench) -> list[str]:
    """Return the names of the modules that hold experts: those that match the pattern ``Job(experts=...)``.
    If that is None, return those that are built like Hugging Face's: their parameters are gate_up_proj and
    down_proj, of three dimensions each, and they have act_fn. Raises UserError if there are none."""
    names = [name for name, _ in bench.model.named_modules()]
    if (pattern := bench.job.experts) is not None:
        mixtures = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
    else:
        mixtures = [n for n in names if _is_grouped(bench.model.get_submodule(n))]
    if not mixtures:
        raise UserError(
            "expert-parallel finds no experts in the model" + (f" at {pattern!r}" if pattern else ""),
            hint='name them in Job(experts="blocks.*.experts")',
        )
    return mixtures


def _is_grouped(module: torch.nn.Module) -> bool:
    params = dict(module.named_parameters(recurse=False))
    return (
        tuple(params) == _GROUPED and all(p.dim() == 3 for p in params.values()) and hasattr(module, "act_fn")
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Dealt:
    """The experts of one mixture that this rank keeps. ``run`` applies them: it maps the tokens of each of
    them, shape (experts of this rank, n, width), to results of the same shape. ``total`` is the number of
    experts of all ranks."""

    total: int
    run: Callable[[torch.Tensor], torch.Tensor]


def _deal(module: Any, name: str, rank: int, ranks: int) -> _Dealt:
    """Remove all experts but those of ``rank`` from the module, whose name is ``name``, and return those of
    ``rank``. Raises UserError if the module neither has a ModuleList of experts as its only child nor is
    built like Hugging Face's (see `_mixtures`), or if the number of experts is no multiple of ``ranks``."""
    import torch

    lists = [(n, m) for n, m in module.named_children() if isinstance(m, torch.nn.ModuleList)]
    is_grouped = _is_grouped(module)
    total = module.gate_up_proj.shape[0] if is_grouped else len(lists[0][1]) if len(lists) == 1 else 0
    if not total or (not is_grouped and len(list(module.named_children())) > 1):
        raise UserError(
            f"{name} is not a module of experts",
            allowed="a module whose only child is an nn.ModuleList of experts; or one whose own parameters "
            "are only gate_up_proj and down_proj, of three dimensions each, and that has an attribute act_fn",
            hint="correct Job(experts=...), the pattern of the paths of such modules",
        )
    if total % ranks:
        raise UserError(
            f"{total} experts of {name} cannot be shared equally by {ranks} data-parallel ranks",
            allowed=f"a number of data-parallel ranks that divides {total}",
        )
    own_slice = slice(rank * (total // ranks), (rank + 1) * (total // ranks))
    if is_grouped:
        for param in _GROUPED:
            weights = getattr(module, param).detach()[own_slice].clone()
            setattr(module, param, torch.nn.Parameter(weights))
        return _Dealt(total=total, run=lambda tokens: _gated(module, tokens))
    path, experts = lists[0]
    own_experts = torch.nn.ModuleList(list(experts)[own_slice])
    setattr(module, path, own_experts)
    return _Dealt(
        total=total, run=lambda tokens: torch.stack([e(t) for e, t in zip(own_experts, tokens, strict=True)])
    )


def _gated(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return down(act(gate) * up) of each expert of the module for its own tokens. Tokens and results have
    shape (experts, n, width)."""
    import torch

    gate, up = torch.bmm(tokens, module.gate_up_proj.to(tokens.dtype).mT).chunk(2, dim=-1)
    return torch.bmm(module.act_fn(gate) * up, module.down_proj.to(tokens.dtype).mT)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Travel:
    """Sends tokens to the ranks of their experts, runs the experts there, and sends the results back.
    ``experts`` is the number of experts of all ranks. ``run`` is that of `_Dealt`. Each expert takes, from
    each rank, at most ``capacity_percent`` of an even share of that rank's choices."""

    group: Any
    ranks: int
    experts: int
    capacity_percent: int
    run: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The forward of the module of experts. ``tokens`` has shape (N, width), ``chosen`` (indices of
        experts) and ``weights`` have shape (N, k). Return, for each token, the sum of its k experts' results
        times their weights, shape (N, width). Choices beyond an expert's capacity add zero. N must be the
        same on every rank, because the capacity depends on it."""
        import torch

        choices, width = chosen.shape[-1], tokens.shape[-1]
        capacity = math.ceil(chosen.numel() * self.capacity_percent / (100 * self.experts))
        by_expert, order = chosen.reshape(-1).sort(stable=True)
        slots = self._slots(by_expert, capacity)
        rows = tokens.new_zeros(self.experts * capacity + 1, width)  # the last row receives dropped tokens
        rows = rows.index_copy(0, slots, tokens[order // choices])[:-1]
        own_tokens = self._swap(rows).view(self.ranks, -1, capacity, width).transpose(0, 1)
        outputs = self.run(own_tokens.flatten(1, 2)).view(-1, self.ranks, capacity, width).transpose(0, 1)
        results = self._swap(outputs.reshape(-1, width))
        results = torch.cat([results, results.new_zeros(1, width)])[slots]
        weighted_results = results * weights.reshape(-1)[order].unsqueeze(-1).to(results.dtype)
        return torch.zeros_like(tokens).index_add(0, order // choices, weighted_results)

    def _slots(self, by_expert: torch.Tensor, capacity: int) -> torch.Tensor:
        """Return, for each of the choices, which are sorted by expert, the row in which its token is sent.
        Each expert has ``capacity`` rows, which its first choices get. Later choices get the row after the
        last one, which is not sent."""
        import torch

        numbers = torch.arange(by_expert.numel(), device=by_expert.device)
        counts = torch.zeros(self.experts, dtype=torch.int64, device=by_expert.device)
        counts = counts.scatter_add(0, by_expert, torch.ones_like(by_expert))
        index = numbers - (counts.cumsum(0) - counts)[by_expert]
        return torch.where(index < capacity, by_expert * capacity + index, self.experts * capacity)

    def _swap(self, rows: torch.Tensor) -> torch.Tensor:
        """Cut ``rows`` into one equal part for each rank, and send the i-th part to the i-th rank. Return the
        parts received, in the order of ranks. Called twice, it returns the original rows."""
        import torch
        from torch.distributed._functional_collectives import all_to_all_single

        part_sizes = [rows.shape[0] // self.ranks] * self.ranks
        result: torch.Tensor = all_to_all_single(rows.contiguous(), part_sizes, part_sizes, self.group)
        return torch.ops._c10d_functional.wait_tensor(result)  # type: ignore[no-any-return]


def _nothing(space: Space) -> Iterable[Mapping[str, KnobValue]]:
    return []  # useless in a plan of one rank


TECHNIQUE = Technique(
    name="expert-parallel",
    summary="the experts of each mixture are distributed over the data-parallel ranks",
    effect=EffectClass.E3,  # tokens beyond an expert's capacity are dropped
    apply=_apply,
    settings=_nothing,
    order=47,
    knobs=(
        Knob(
            name="degree",
            default=2,
            doc="number of ranks that share the experts; must be the number of data-parallel ranks",
        ),
        Knob(
            name="capacity_percent",
            default=125,
            doc="tokens that an expert takes, in percent of an even share; tokens beyond that are dropped",
        ),
    ),
    forbids=("tensor-parallel", "context-parallel", "pipeline", "zero", "lora", "qlora", "compile"),
)
