"""Compose the parts of a model (before, in and after its blocks) under any layout of parallelism from a
handful of traces.

What one of n tensor- or context-parallel ranks takes is a + d / n: a is what every rank does or keeps, d is
what is divided. One trace of a single rank and one of the largest degree therefore give all degrees between.
Tensor and context degrees multiply. Collectives are timed for their own number of ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from memfit.planner.block_costs import Seconds
from memfit.planner.block_traces import BlockTracer, Key
from memfit.planner.parallelism_grid import GridLayout, Uses
from memfit.techniques.registry import make_use
from memfit.types.parts import NUMBERS, PIECES, PartCosts, Parts, Travel, UpdateCosts
from memfit.types.plan import Use

_FULL = make_use("activation-checkpointing", {"every": 1})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayoutCut:
    """Parts of a model under one layout, for one micro-batch size, as one rank runs them. Their times do not
    include the collectives of tensor, context and expert parallelism.

    ``tensor_travel``, ``context_travel`` and ``expert_travel`` hold these collectives as (kind, bytes): name
    of the piece ("before", "block", "after") -> (those of its forward, those of its backward).
    """

    parts: Parts
    tensor_travel: dict[str, tuple[Travel, Travel]]
    context_travel: dict[str, tuple[Travel, Travel]]
    expert_travel: dict[str, tuple[Travel, Travel]]


class Composer:
    """Composes the parts of a model under layouts of parallelism from small traces.

    ``seconds`` returns the total time of a sequence of operators. ``compute``: the precision of most traces;
    parts in another precision are scaled from these. ``tensor``, ``context``: the largest degrees of tensor
    and context parallelism. Only degree 1 and these are traced; parts for degrees between them are
    interpolated. ``vocabulary``: how tensor-parallel ranks hold the vocabulary in traces of blocks; a value
    of the setting ``vocabulary`` of tensor-parallel. ``experts``: the degree of expert parallelism, which is
    traced as it is.
    """

    def __init__(
        self,
        traced: BlockTracer,
        seconds: Seconds,
        compute: str,
        tensor: int,
        context: int,
        *,
        vocabulary: str,
        experts: int,
    ) -> None:
        self.vocabulary = vocabulary
        self.traced, self.seconds, self.compute = traced, seconds, compute
        self.tensor, self.context, self.experts = tensor, context, experts

    def keys(self, inside: Sequence[Uses], ends: Sequence[Uses], computes: Sequence[str]) -> Iterator[Key]:
        """Yield the keys of all traces from which `block` and `ends` compose the parts for these values of
        the grid axes ``inside`` and ``ends`` in these precisions.
        """
        yield self._double_key(1)
        for uses in {_traceable(u) for u in (*inside, *ends, (), (_FULL,))}:
            yield self._key(uses=uses)
            if self.tensor > 1 and not _has(uses, "compile") and uses not in ends[1:]:
                yield self._key(uses=uses, tensor=self.tensor, sequence=True)
        for compute in computes:
            yield self._key(compute=compute)
        if self.tensor > 1:
            yield self._key(tensor=self.tensor, sequence=True, vocabulary="whole")
            for uses in ((), (_FULL,)):
                yield self._key(uses=uses, tensor=self.tensor, sequence=False)
        if self.context > 1:
            for uses in ((), (_FULL,)):
                yield self._key(uses=uses, context=self.context)
                yield self._with_many_samples(self._key(uses=uses, context=self.context))
        if self.experts > 1:
            yield from self._expert_keys(inside, computes)

    def block(self, layout: GridLayout, compute: str, uses: Uses) -> list[LayoutCut]:
        """Return [parts for one sample in a micro-batch, parts for two] under a layout. Only their piece
        "block" is to be used; `ends` returns the pieces before and after it.

        ``uses``: techniques of the grid axis ``inside``, such as recomputation. Raises UserError if the model
        cannot be divided or traced that way.
        """
        single = self._compose(layout, compute, _traceable(uses), self.vocabulary)
        period = next((int(u.settings["every"]) for u in uses if u.technique == _FULL.technique), 1)
        if period > 1:
            other_uses = tuple(u for u in uses if u.technique != _FULL.technique)
            single = _mix(single, self._compose(layout, compute, other_uses, self.vocabulary), period)
        return [single, self._twice(single, layout)]

    def ends(self, layout: GridLayout, compute: str, uses: Uses) -> list[LayoutCut]:
        """Return [parts for one sample in a micro-batch, parts for two] under a layout. Only their pieces
        "before" and "after" are to be used; `block` returns the block.

        ``uses``: techniques of the grid axis ``ends``, such as a loss in chunks. Raises UserError if the
        model cannot be divided or traced that way.
        """
        layout = dataclasses.replace(layout, experts=1)  # experts are in the blocks
        single = self._compose(layout, compute, uses, layout.vocabulary)
        return [single, self._twice(single, layout)]

    @functools.cache  # noqa: B019  lives as long as one search
    def update_costs(self, uses: Uses) -> UpdateCosts:
        return self.traced.update_costs(uses, self.seconds)

    # -- composing ------------------------------------------------------------------------------------

    def _key(
        self,
        *,
        uses: Uses = (),
        tensor: int = 1,
        sequence: bool = False,
        context: int = 1,
        vocabulary: str = "",
        compute: str = "",
        experts: int = 1,
    ) -> Key:
        vocabulary = vocabulary or (self.vocabulary if tensor > 1 else "whole")
        return Key(
            tensor=tensor,
            sequence=sequence,
            vocabulary=vocabulary,
            context=context,
            compute=compute or self.compute,
            uses=uses,
            samples=1,
            experts=experts,
        )

    def _with_many_samples(self, key: Key) -> Key:
        """Return the key of the trace of as many samples as there are context-parallel ranks, of which a rank
        has as many tokens as one sample has, so that its kernels have as much work as without context
        parallelism. Their number is at most that of the job's batch."""
        return dataclasses.replace(key, samples=min(key.context, self.traced.job.batch_size))

    def _expert_keys(self, inside: Sequence[Uses], computes: Sequence[str]) -> Iterator[Key]:
        for uses in {_traceable(u) for u in (*inside, ())}:
            if not _has(uses, "compile"):
                yield self._key(uses=uses, experts=self.experts)
        for compute in computes:
            yield self._key(compute=compute, experts=self.experts)
        yield self._double_key(self.experts)

    def _double_key(self, experts: int) -> Key:
        """Return the key of the trace of two samples without other techniques, on ``experts`` ranks if the
        job's batch has two samples for each of them, else on one rank.
        """
        has_enough = self.traced.job.batch_size >= 2 * experts
        return dataclasses.replace(self._key(experts=experts if has_enough else 1), samples=2)

    @functools.cache  # noqa: B019
    def _parts(self, key: Key) -> Parts:
        return self.traced.parts(key, self.seconds)

    @functools.cache  # noqa: B019
    def _compose(self, layout: GridLayout, compute: str, uses: Uses, vocabulary: str) -> LayoutCut:
        key = functools.partial(self._key, experts=layout.experts)
        base, plain_parts = self._parts(key(uses=uses)), self._parts(key())
        parts, tensor_travel, context_travel = base, _no_travel(), _no_travel()
        expert_travel = _travel(base, 1.0) if layout.experts > 1 else _no_travel()
        if compute != self.compute:
            compute_parts = self._parts(key(compute=compute))
            parts = _scale(parts, plain_parts, compute_parts, 1.0)
            expert_travel = _rescale_travel(expert_travel, plain_parts, compute_parts)
        if layout.tensor > 1:
            most_cut_parts, weight = (
                self._at_most(layout, uses, base, vocabulary),
                _weight(layout.tensor, self.tensor),
            )
            tensor_travel = _travel(most_cut_parts, 1 / layout.context)
            parts = _scale(parts, base, most_cut_parts, weight)
        if layout.context > 1:
            matching_uses = (_FULL,) if _has(uses, _FULL.technique) else ()
            uncut_parts, cut_key = (
                self._parts(self._key(uses=matching_uses)),
                self._key(uses=matching_uses, context=self.context),
            )
            context_travel = _travel(self._parts(cut_key), 1 / layout.tensor)
            weight, many_key = _weight(layout.context, self.context), self._with_many_samples(cut_key)
            many_parts = self._parts(many_key)
            large_parts = _scale(parts, uncut_parts, many_parts, weight, share=1 / many_key.samples)
            parts = _with_sample_times(_scale(parts, uncut_parts, self._parts(cut_key), weight), large_parts)
        return LayoutCut(
            parts=parts,
            tensor_travel=tensor_travel,
            context_travel=context_travel,
            expert_travel=expert_travel,
        )

    def _at_most(self, layout: GridLayout, uses: Uses, base: Parts, vocabulary: str) -> Parts:
        """Return the parts for one sample at the largest tensor-parallel degree.

        ``base``: the parts with ``uses`` at degree 1. They are scaled if there is no trace with ``uses`` at
        the largest degree. ``vocabulary``: "whole" if every rank holds the whole vocabulary; the pieces
        before and after the blocks are then ``base`` scaled by such a trace without ``uses``.
        """
        plain_parts = self._parts(self._key())
        most_cut_key = functools.partial(self._key, tensor=self.tensor, sequence=layout.sequence)
        is_traced = uses in ((), (_FULL,)) or layout.sequence
        if _has(uses, "chunked-cross-entropy") or not is_traced:
            most_cut_parts = _scale(base, plain_parts, self._parts(most_cut_key()), 1.0)
        else:
            most_cut_parts = self._parts(most_cut_key(uses=uses))
        if vocabulary == "whole":
            ends = self._parts(self._key(tensor=self.tensor, sequence=True, vocabulary="whole"))
            ends = _scale(base, plain_parts, ends, 1.0)
            return dataclasses.replace(most_cut_parts, before=ends.before, after=ends.after)
        return most_cut_parts

    def _twice(self, single: LayoutCut, layout: GridLayout) -> LayoutCut:
        """Return the parts for two samples in a micro-batch, computed from those for one.

        Times do not double: they are multiplied by the ratio that traces of two samples and of one have
        without other techniques. With context parallelism they stay the same: the kernels of so small a part
        of one sample take as long with more work, until the seconds of `_with_sample_times` are more. Of the
        memory and FLOPs, what does not grow with the number of samples, such as gradients and cast weights,
        is taken from the same two traces; the rest doubles. Parameters stay the same, and the collectives'
        bytes double.
        """
        double_key = self._double_key(layout.experts)
        double_parts = self._parts(double_key)
        plain_parts = self._parts(dataclasses.replace(double_key, samples=1))

        def grown(which: str) -> PartCosts:
            piece: PartCosts
            piece, a, b = (getattr(p, which) for p in (single.parts, plain_parts, double_parts))
            parameter_share = piece.parameter_bytes / a.parameter_bytes if a.parameter_bytes else 1.0
            # Casts double bytes at most; the gradient of a shared parameter may be in another piece.
            parameter_share = min(parameter_share, 2.0)
            values = {}
            for name in NUMBERS:
                fixed = (2 * getattr(a, name) - getattr(b, name)) * parameter_share
                value = getattr(piece, name)
                values[name] = max(value, 2 * value - fixed)
            if a.forward_s and a.backward_s:  # seconds do not grow linearly
                for name in ("forward_s", "backward_s"):
                    growth = 1.0 if layout.context > 1 else getattr(b, name) / getattr(a, name)
                    values[name] = getattr(piece, name) * growth
            values["parameter_bytes"] = piece.parameter_bytes
            return dataclasses.replace(piece, **values)

        def doubled(travel: dict[str, tuple[Travel, Travel]]) -> dict[str, tuple[Travel, Travel]]:
            return {which: _scale_travel(travel[which], 2.0) for which in PIECES}

        return LayoutCut(
            parts=Parts(before=grown("before"), block=grown("block"), after=grown("after")),
            tensor_travel=doubled(single.tensor_travel),
            context_travel=doubled(single.context_travel),
            expert_travel=doubled(single.expert_travel),
        )


def _scale_travel(travel: tuple[Travel, Travel], factor: float) -> tuple[Travel, Travel]:
    forward, backward = (tuple((k, b * factor) for k, b in collectives) for collectives in travel)
    return forward, backward


def _weight(degree: int, largest_degree: int) -> float:
    """Return the weight of the trace on ``largest_degree`` ranks in the costs on ``degree`` ranks; the trace
    on one rank has the rest up to 1. A cost on n ranks is taken to be a + d / n.
    """
    return (1 - 1 / degree) / (1 - 1 / largest_degree)


def _scale(parts: Parts, denominator: Parts, numerator: Parts, weight: float, *, share: float = 1.0) -> Parts:
    """Return ``parts`` with each number multiplied by the ratio of the same number in ``numerator``, times
    ``share``, to that in ``denominator``.

    ``weight``: the share of this change that is applied; 1 all of it, 0 none. A number that is 0 in
    ``denominator`` is not scaled.
    """

    def piece(which: str) -> PartCosts:
        base_piece: PartCosts
        base_piece, denominator_piece, numerator_piece = (
            getattr(p, which) for p in (parts, denominator, numerator)
        )
        values = {}
        for name in NUMBERS:
            denominator_value = getattr(denominator_piece, name)
            value = getattr(numerator_piece, name) * share
            ratio = value / denominator_value if denominator_value > 0 else 1.0
            values[name] = getattr(base_piece, name) * (1 + (ratio - 1) * weight)
        return dataclasses.replace(base_piece, **values)

    return Parts(before=piece("before"), block=piece("block"), after=piece("after"))


def _with_sample_times(parts: Parts, large_parts: Parts) -> Parts:
    """Return ``parts`` with the seconds of ``large_parts`` as those that each sample adds in a large
    micro-batch."""

    def piece(which: str) -> PartCosts:
        large: PartCosts = getattr(large_parts, which)
        own: PartCosts = getattr(parts, which)
        return dataclasses.replace(own, forward_sample_s=large.forward_s, backward_sample_s=large.backward_s)

    return Parts(before=piece("before"), block=piece("block"), after=piece("after"))


def _no_travel() -> dict[str, tuple[Travel, Travel]]:
    return dict.fromkeys(PIECES, ((), ()))


def _travel(parts: Parts, share: float) -> dict[str, tuple[Travel, Travel]]:
    pieces = {which: getattr(parts, which) for which in PIECES}
    return {w: _scale_travel((p.forward_travel, p.backward_travel), share) for w, p in pieces.items()}


def _rescale_travel(
    travel: dict[str, tuple[Travel, Travel]], denominator: Parts, numerator: Parts
) -> dict[str, tuple[Travel, Travel]]:
    """Return the collectives with their bytes multiplied by the ratio of those of ``numerator`` to those of
    ``denominator``, piece by piece; unchanged where the latter has none.
    """

    def total(parts: Parts, which: str) -> float:
        piece: PartCosts = getattr(parts, which)
        return sum(b for _, b in (*piece.forward_travel, *piece.backward_travel))

    return {
        w: _scale_travel(t, total(numerator, w) / total(denominator, w) if total(denominator, w) else 1.0)
        for w, t in travel.items()
    }


def _has(uses: Uses, name: str) -> bool:
    return any(u.technique == name for u in uses)


def _traceable(uses: Uses) -> Uses:
    """Return the techniques with activation-checkpointing of every k-th block replaced by that of every
    block. For k above 1, `_mix` then averages the parts with those without recomputation.
    """

    def one(used: Use) -> Use:
        return _FULL if used.technique == _FULL.technique else used

    return tuple(one(u) for u in uses)


def _mix(recomputed: LayoutCut, plain: LayoutCut, period: int) -> LayoutCut:
    """Return the parts whose block is the average one if every ``period``-th block is recomputed.
    ``recomputed``: the parts if all blocks are recomputed; ``plain``: if none is.

    The block's backward time, the bytes it keeps for backward and its FLOPs are means in the proportion 1 to
    ``period`` - 1; its highest memory in forward is the higher of the two. All else is as in ``recomputed``.
    """
    recomputed_block, plain_block, share = recomputed.parts.block, plain.parts.block, 1 / period

    def mean(name: str) -> float:
        return float(getattr(recomputed_block, name) * share + getattr(plain_block, name) * (1 - share))

    block = dataclasses.replace(
        recomputed_block,
        backward_s=mean("backward_s"),
        backward_sample_s=mean("backward_sample_s"),
        kept_bytes=mean("kept_bytes"),
        flops=mean("flops"),
        forward_top_bytes=max(recomputed_block.forward_top_bytes, plain_block.forward_top_bytes),
    )
    return dataclasses.replace(recomputed, parts=dataclasses.replace(recomputed.parts, block=block))
