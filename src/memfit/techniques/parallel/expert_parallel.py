"""Expert parallelism: the experts of each mixture are distributed over the data-parallel ranks, and tokens
are sent to them.

The experts of a mixture are one module called with ``(tokens (N, width), chosen (N, k), weights (N, k))``
that returns ``(N, width)``. ``Job.experts`` names such modules. A module holds its experts in an
``nn.ModuleList``, each called with tokens, or as Hugging Face does in ``gate_up_proj`` and ``down_proj``,
with one slice per expert.

By default every expert has room for the same number of tokens from every rank, its capacity, which is
``capacity_percent`` of an even share of that rank's choices. Choices beyond it are dropped (Lepikhin et al.
2020, arXiv 2006.16668), so that memory does not depend on the router. With ``dropless``, every choice is sent
(Gale et al. 2022, arXiv 2211.15841), and memory depends on the router. A trace then assumes that the rank's
experts get ``capacity_percent`` of an even share of every rank's choices. The default is the capacity of 1.25
at which models that are trained to balance their experts drop less than 1 % of the tokens (Fedus et al. 2021,
arXiv 2101.03961, section 2.2).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch

_GROUPED = ("gate_up_proj", "down_proj")  # shapes (experts, 2 x inner, width) and (experts, width, inner)


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    ranks, mesh = bench.world.layout.data, bench.world.sub("replicate", "shard")
    if mesh is None or mesh.ndim > 1 or int(settings["degree"]) != ranks:
        raise UserError(
            f"expert-parallel of degree {settings['degree']} does not fit {bench.world.layout.replicate} x "
            f"{bench.world.layout.shard} data-parallel ranks (replicas x shards)",
            allowed=f"degree={ranks}, all of these ranks; and fsdp2, if used, with replicas=1"
            if ranks > 1
            else "at least 2 data-parallel ranks, as many as the degree",
        )
    group, percent = mesh.get_group(), int(settings["capacity_percent"])
    for name in find_mixtures(bench.model, bench.job.experts):
        module = bench.model.get_submodule(name)
        experts = _keep_own_experts(module, name, bench.world.layout.data_index(bench.world.rank), ranks)
        dispatcher = _TokenExchange(group=group, ranks=ranks, experts=experts, capacity_percent=percent)
        module.forward = dispatcher.send_all if settings["dropless"] else dispatcher.send_capacity
        for param_name, param in module.named_parameters():
            bench.own_parameters.add(f"{name}.{param_name}")
            # These gradients sum the terms of every rank, while other gradients are averaged over ranks.
            param.register_hook(lambda grad: grad / ranks)
    if settings["dropless"]:
        bench.on_assumption(
            f"experts of the busiest rank get {percent / 100:g} times an even share of the tokens "
            "(expert-parallel's capacity_percent)"
        )


def find_mixtures(model: torch.nn.Module, pattern: str | None) -> list[str]:
    """Return the names of the modules that hold experts: those that match ``pattern`` (as in ``fnmatch``),
    that of ``Job(experts=...)``. If it is None, return those that are built like Hugging Face's: their own
    parameters are gate_up_proj and down_proj, of three dimensions each, and they have an attribute act_fn.
    Raises UserError if there are no such modules."""
    names = [name for name, _ in model.named_modules()]
    if pattern is not None:
        matches = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
    else:
        matches = [n for n in names if _is_grouped(model.get_submodule(n))]
    if not matches:
        raise UserError(
            "expert-parallel finds no experts in the model" + (f" at {pattern!r}" if pattern else ""),
            hint='name them in Job(experts="blocks.*.experts"); memfit.apply takes the same argument',
        )
    return matches


def count_experts(module: Any, name: str) -> int:
    """Return the number of experts of the module, whose name is ``name``. Raises UserError if the module is
    not built like Hugging Face's (`find_mixtures`) and does not have a ModuleList with members, the experts,
    as its only child."""
    import torch

    if _is_grouped(module):
        return int(module.gate_up_proj.shape[0])
    children = list(module.children())
    if len(children) == 1 and isinstance(children[0], torch.nn.ModuleList) and len(children[0]):
        return len(children[0])
    raise UserError(
        f"{name} is not a module of experts",
        allowed="a module whose only child is an nn.ModuleList of experts; or one whose own parameters "
        "are only gate_up_proj and down_proj, of three dimensions each, and that has an attribute act_fn",
        hint="correct Job(experts=...), the pattern of the paths of such modules; memfit.apply takes the "
        "same argument",
    )


def _is_grouped(module: torch.nn.Module) -> bool:
    params = dict(module.named_parameters(recurse=False))
    return (
        tuple(params) == _GROUPED and all(p.dim() == 3 for p in params.values()) and hasattr(module, "act_fn")
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _LocalExperts:
    """The experts of one mixture that this rank keeps. ``run`` applies them all at once: it maps the tokens
    of each of them, shape (experts of this rank, n, width), to results of the same shape. ``run_each``
    applies them one by one to a list with the tokens of each, of shape (n, width) with an n of its own.
    ``own`` and ``total`` are the numbers of experts of this rank and of all ranks."""

    own: int
    total: int
    run: Callable[[torch.Tensor], torch.Tensor]
    run_each: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


def _keep_own_experts(module: Any, name: str, rank: int, ranks: int) -> _LocalExperts:
    """Remove all experts but those of ``rank`` from the module, whose name is ``name``, and return those of
    ``rank``. Raises UserError as `count_experts` does, or if the number of experts is no multiple of
    ``ranks``."""
    import torch

    total = count_experts(module, name)
    if total % ranks:
        raise UserError(
            f"{total} experts of {name} cannot be shared equally by {ranks} data-parallel ranks",
            allowed=f"a number of data-parallel ranks that divides {total}",
        )
    own = total // ranks
    own_slice = slice(rank * own, (rank + 1) * own)
    if _is_grouped(module):
        for param in _GROUPED:
            weights = getattr(module, param).detach()[own_slice].clone()
            setattr(module, param, torch.nn.Parameter(weights))
        return _LocalExperts(
            own=own,
            total=total,
            run=lambda tokens: _run_gated(module, tokens),
            run_each=lambda parts: _run_gated_each(module, parts),
        )
    path, experts = next(module.named_children())
    own_experts = torch.nn.ModuleList(list(experts)[own_slice])
    setattr(module, path, own_experts)

    def run_each(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [e(t) for e, t in zip(own_experts, parts, strict=True)]

    return _LocalExperts(
        own=own, total=total, run=lambda tokens: torch.stack(run_each(list(tokens))), run_each=run_each
    )


def _run_gated(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return down(act(gate) * up) of each expert of the module for its own tokens. Tokens and results have
    shape (experts, n, width)."""
    import torch

    gate, up = torch.bmm(tokens, module.gate_up_proj.to(tokens.dtype).mT).chunk(2, dim=-1)
    return torch.bmm(module.act_fn(gate) * up, module.down_proj.to(tokens.dtype).mT)


def _run_gated_each(module: Any, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the results of `_run_gated` for experts that get different numbers of tokens. ``parts`` and the
    results are one tensor of shape (n, width) for each expert."""
    from torch.nn.functional import linear

    results = []
    for tokens, gate_up, down in zip(
        parts, module.gate_up_proj.unbind(), module.down_proj.unbind(), strict=True
    ):
        gate, up = linear(tokens, gate_up.to(tokens.dtype)).chunk(2, dim=-1)
        results.append(linear(module.act_fn(gate) * up, down.to(tokens.dtype)))
    return results


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _TokenExchange:
    """Sends tokens to the ranks of their experts, runs the experts there, and sends the results back.

    `send_capacity` and `send_all` are forwards of the module of experts. ``tokens`` has shape (N, width),
    ``chosen`` (indices of experts) and ``weights`` have shape (N, k). They return, for each token, the sum of
    its k experts' results times their weights, shape (N, width)."""

    group: Any
    ranks: int
    experts: _LocalExperts
    capacity_percent: int

    def send_capacity(
        self, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts with a capacity. Each expert takes at most that many choices from each rank:
        ``capacity_percent`` of an even share of the rank's N x k choices, rounded up. Further choices add
        zero to their token's result. N must be the same on every rank."""
        import torch

        total, choices, width = self.experts.total, chosen.shape[-1], tokens.shape[-1]
        capacity = self._capacity(chosen.numel())
        by_expert, order = chosen.reshape(-1).sort(stable=True)
        slots = self._slots(by_expert, capacity)
        rows = tokens.new_zeros(total * capacity + 1, width)  # the last row receives dropped tokens
        rows = rows.index_copy(0, slots, tokens[order // choices])[:-1]
        even = [rows.shape[0] // self.ranks] * self.ranks
        own_tokens = self._exchange(rows, even, even).view(self.ranks, -1, capacity, width).transpose(0, 1)
        outputs = self.experts.run(own_tokens.flatten(1, 2)).view(-1, self.ranks, capacity, width)
        results = self._exchange(outputs.transpose(0, 1).reshape(-1, width), even, even)
        results = torch.cat([results, results.new_zeros(1, width)])[slots]
        return _weighted_sum(tokens, results, weights, order)

    def send_all(self, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Run the experts without a capacity: every choice is sent. Ranks first tell each other how many
        tokens they will send. N may differ between ranks."""
        import torch

        own, ranks = self.experts.own, self.ranks
        by_expert, order = chosen.reshape(-1).sort(stable=True)
        counts = self._counts(by_expert)
        incoming_counts = self._exchange(counts, [own] * ranks, [own] * ranks)
        sent, received = self._sizes(counts, incoming_counts, chosen.numel())
        sent_sizes, received_sizes = [sum(s) for s in sent], [sum(r) for r in received]
        rows = self._exchange(tokens[order // chosen.shape[-1]], received_sizes, sent_sizes)
        if own == 1:
            results = self.experts.run_each([rows])[0]
        else:
            parts = rows.split([n for per_expert in received for n in per_expert])
            outputs = self.experts.run_each([torch.cat(parts[e::own]) for e in range(own)])
            per_rank = [o.split([r[e] for r in received]) for e, o in enumerate(outputs)]
            results = torch.cat([o[r] for r in range(ranks) for o in per_rank])
        return _weighted_sum(tokens, self._exchange(results, sent_sizes, received_sizes), weights, order)

    def _capacity(self, choices: int) -> int:
        return math.ceil(choices * self.capacity_percent / (100 * self.experts.total))

    def _sizes(
        self, counts: torch.Tensor, incoming_counts: torch.Tensor, choices: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return (numbers of tokens that this rank sends, numbers that it receives). Both have one list for
        each rank, with the number for each expert of the receiver.

        Numbers are read from the device. On torch's fake process group they are unknown, and it is assumed
        that this rank's experts get ``capacity_percent`` of an even share of every rank's ``choices``. The
        rest of this rank's choices is spread evenly over the experts of other ranks."""
        import torch.distributed as dist

        own, ranks = self.experts.own, self.ranks
        if dist.get_backend(self.group) != "fake":
            return counts.view(ranks, own).tolist(), incoming_counts.view(ranks, own).tolist()
        busy = min(self._capacity(choices), choices // own)
        others = self.experts.total - own
        rest = choices - busy * own
        spread = [rest // others + (i < rest % others) for i in range(others)]
        rank = dist.get_rank(self.group)
        sizes = [*spread[: rank * own], *[busy] * own, *spread[rank * own :]]
        return [sizes[r * own : (r + 1) * own] for r in range(ranks)], [[busy] * own] * ranks

    def _counts(self, by_expert: torch.Tensor) -> torch.Tensor:
        import torch

        counts = torch.zeros(self.experts.total, dtype=torch.int64, device=by_expert.device)
        return counts.scatter_add(0, by_expert, torch.ones_like(by_expert))

    def _slots(self, by_expert: torch.Tensor, capacity: int) -> torch.Tensor:
        """Return, for each choice, the index of the row in which its token is sent. ``by_expert`` holds the
        experts chosen, sorted. Each expert has ``capacity`` rows, which its first choices get. Later choices
        get the row after those of all experts, which is not sent."""
        import torch

        numbers = torch.arange(by_expert.numel(), device=by_expert.device)
        counts = self._counts(by_expert)
        index = numbers - (counts.cumsum(0) - counts)[by_expert]
        return torch.where(index < capacity, by_expert * capacity + index, self.experts.total * capacity)

    def _exchange(self, rows: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
        """Send the first ``sent[0]`` of the rows to the first rank, the next ``sent[1]`` to the second, and
        so on. Return the ``received[i]`` rows of each rank i, in the order of ranks."""
        import torch
        from torch.distributed._functional_collectives import all_to_all_single

        result: torch.Tensor = all_to_all_single(rows.contiguous(), received, sent, self.group)
        return torch.ops._c10d_functional.wait_tensor(result)  # type: ignore[no-any-return]


def _weighted_sum(
    tokens: torch.Tensor, results: torch.Tensor, weights: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Return, for each token, the sum of its results times their weights, of the shape (N, width) of
    ``tokens``. ``weights`` has shape (N, k). ``results`` has one row for each entry of ``order``, which holds
    the indices of the N x k choices in the order in which they were sent."""
    import torch

    weighted_results = results * weights.reshape(-1)[order].unsqueeze(-1).to(results.dtype)
    return torch.zeros_like(tokens).index_add(0, order // weights.shape[-1], weighted_results)


TECHNIQUE = Technique(
    name="expert-parallel",
    summary="the experts of each mixture are distributed over the data-parallel ranks",
    script_call="distribute experts over {degree} ranks",
    changes=StepPart.PASSES,
    effect=EffectClass.E3,  # tokens beyond an expert's capacity are dropped; with dropless it is E1
    apply=_apply,
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
            doc="tokens that an expert takes, in percent of an even share; tokens beyond that are dropped; "
            "with dropless=true, the share that a prediction assumes for the experts of the busiest rank",
        ),
        Knob(
            name="dropless",
            default=False,
            doc="whether every token is sent to its experts, however many choose the same one",
            choices=(False, True),
        ),
    ),
    forbids=("tensor-parallel", "context-parallel", "pipeline", "zero", "lora", "qlora", "compile"),
)
