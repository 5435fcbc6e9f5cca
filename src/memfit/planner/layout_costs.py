"""Compose the parts of any layout from a handful of traces.

What one of n tensor- or context-parallel ranks takes is a + d / n: a is what every rank does or keeps, d is
what is divided. One trace of a single rank and one of the largest degree therefore give all degrees between.
Tensor and context degrees multiply. Collectives are priced for their own number of ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from memfit.planner.block_costs import Seconds
from memfit.planner.block_traces import Key, Traced
from memfit.planner.parallelism_grid import GridLayout, Uses
from memfit.techniques.registry import make_use
from memfit.types.parts import NUMBERS, PIECES, Parts, Piece, Travel, Updating
from memfit.types.plan import Use

_FULL = make_use("activation-checkpointing", {"every": 1})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayoutCut:
    """Parts of a layout.

    ``tensor_travel`` and ``context_travel`` hold (forward, backward) collectives by piece.
    """

    parts: Parts
    tensor_travel: dict[str, tuple[Travel, Travel]]
    context_travel: dict[str, tuple[Travel, Travel]]


class Composer:
    """Composes parts of layouts from traces.

    ``compute``: the precision of the base traces. ``tensor``, ``context``: the largest degrees.
    ``vocabulary``: how the traces of blocks treat the vocabulary.
    """

    def __init__(
        self, traced: Traced, seconds: Seconds, compute: str, tensor: int, context: int, *, vocabulary: str
    ) -> None:
        self.vocabulary = vocabulary
        self.traced, self.seconds, self.compute = traced, seconds, compute
        self.tensor, self.context = tensor, context

    def keys(self, inside: Sequence[Uses], ends: Sequence[Uses], computes: Sequence[str]) -> Iterator[Key]:
        """Yield the keys of all traces that will be needed."""
        yield self._key(samples=2)
        for uses in {_traceable(u) for u in (*inside, *ends, (), (_FULL,))}:
            yield self._key(uses=uses)
            if self.tensor > 1 and not _named(uses, "compile") and uses not in ends[1:]:
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

    def block(self, layout: GridLayout, compute: str, uses: Uses) -> list[LayoutCut]:
        """Return the parts that decide a block's cost, for one and for two samples in a micro-batch."""
        one = self._composed(layout, compute, _traceable(uses), self.vocabulary)
        every = next((int(u.settings["every"]) for u in uses if u.technique == _FULL.technique), 1)
        if every > 1:
            without = tuple(u for u in uses if u.technique != _FULL.technique)
            one = _mixed(one, self._composed(layout, compute, without, self.vocabulary), every)
        return [one, self._twice(one)]

    def ends(self, layout: GridLayout, compute: str, uses: Uses) -> list[LayoutCut]:
        """Return the parts that decide the cost before and after the blocks, for one and for two samples."""
        one = self._composed(layout, compute, uses, layout.vocabulary)
        return [one, self._twice(one)]

    @functools.cache  # noqa: B019  lives as long as one search
    def updating(self, uses: Uses) -> Updating:
        return self.traced.updating(uses, self.seconds)

    # -- composing ------------------------------------------------------------------------------------

    def _key(
        self,
        *,
        uses: Uses = (),
        samples: int = 1,
        tensor: int = 1,
        sequence: bool = False,
        context: int = 1,
        vocabulary: str = "",
        compute: str = "",
    ) -> Key:
        vocabulary = vocabulary or (self.vocabulary if tensor > 1 else "whole")
        return Key(
            tensor=tensor,
            sequence=sequence,
            vocabulary=vocabulary,
            context=context,
            compute=compute or self.compute,
            uses=uses,
            samples=samples,
        )

    @functools.cache  # noqa: B019
    def _parts(self, key: Key) -> Parts:
        return self.traced.parts(key, self.seconds)

    @functools.cache  # noqa: B019
    def _composed(self, layout: GridLayout, compute: str, uses: Uses, vocabulary: str) -> LayoutCut:
        base, plain = self._parts(self._key(uses=uses)), self._parts(self._key())
        found, tensor, context = base, _no_travel(), _no_travel()
        if compute != self.compute:
            found = _scaled(found, plain, self._parts(self._key(compute=compute)), 1.0)
        if layout.tensor > 1:
            most, weight = self._at_most(layout, uses, base, vocabulary), _weight(layout.tensor, self.tensor)
            tensor = _travel(most, 1 / layout.context)
            found = _scaled(found, base, most, weight)
        if layout.context > 1:
            like = (_FULL,) if _named(uses, _FULL.technique) else ()
            one, cut = self._parts(self._key(uses=like)), self._key(uses=like, context=self.context)
            context = _travel(self._parts(cut), 1 / layout.tensor)
            found = _scaled(found, one, self._parts(cut), _weight(layout.context, self.context))
        return LayoutCut(parts=found, tensor_travel=tensor, context_travel=context)

    def _at_most(self, layout: GridLayout, uses: Uses, base: Parts, vocabulary: str) -> Parts:
        """Return the parts at the largest tensor degree.

        With a whole vocabulary, the ends are taken from the plain trace with the whole vocabulary on every
        rank.
        """
        plain = self._parts(self._key())
        cut = functools.partial(self._key, tensor=self.tensor, sequence=layout.sequence)
        traced = uses in ((), (_FULL,)) or layout.sequence
        if _named(uses, "chunked-cross-entropy") or not traced:
            most = _scaled(base, plain, self._parts(cut()), 1.0)
        else:
            most = self._parts(cut(uses=uses))
        if vocabulary == "whole":
            ends = self._parts(self._key(tensor=self.tensor, sequence=True, vocabulary="whole"))
            ends = _scaled(base, plain, ends, 1.0)
            return dataclasses.replace(most, before=ends.before, after=ends.after)
        return most

    def _twice(self, one: LayoutCut) -> LayoutCut:
        """Return the parts for two samples.

        What does not grow with them (gradients, cast weights) is as in the plain trace.
        """
        plain, double = self._parts(self._key()), self._parts(self._key(samples=2))

        def grown(which: str) -> Piece:
            piece: Piece
            piece, a, b = (getattr(p, which) for p in (one.parts, plain, double))
            share = piece.parameter_bytes / a.parameter_bytes if a.parameter_bytes else 1.0
            values = {}
            for name in NUMBERS:
                fixed = (2 * getattr(a, name) - getattr(b, name)) * share
                value = getattr(piece, name)
                values[name] = max(value, 2 * value - fixed)
            if a.forward_s and a.backward_s:  # seconds do not grow linearly
                for name in ("forward_s", "backward_s"):
                    values[name] = getattr(piece, name) * getattr(b, name) / getattr(a, name)
            values["parameter_bytes"] = piece.parameter_bytes
            return dataclasses.replace(piece, **values)

        twice = {
            which: (_times(one.tensor_travel[which], 2.0), _times(one.context_travel[which], 2.0))
            for which in PIECES
        }
        return LayoutCut(
            parts=Parts(before=grown("before"), block=grown("block"), after=grown("after")),
            tensor_travel={w: t for w, (t, _) in twice.items()},
            context_travel={w: c for w, (_, c) in twice.items()},
        )


def _times(travel: tuple[Travel, Travel], factor: float) -> tuple[Travel, Travel]:
    ahead, back = (tuple((k, b * factor) for k, b in one) for one in travel)
    return ahead, back


def _weight(degree: int, most: int) -> float:
    """Return the weight of the trace at ``most`` ranks for ``degree`` ranks, by a + d / n.

    The one-rank trace has the remaining weight.
    """
    return (1 - 1 / degree) / (1 - 1 / most)


def _scaled(found: Parts, one: Parts, other: Parts, weight: float) -> Parts:
    """Scale ``found`` by the ratios of ``other`` to ``one``.

    ``weight`` 1 applies the full ratio, 0 none of it.
    """

    def piece(which: str) -> Piece:
        now: Piece
        now, before, after = (getattr(p, which) for p in (found, one, other))
        values = {}
        for name in NUMBERS:
            old = getattr(before, name)
            ratio = getattr(after, name) / old if old > 0 else 1.0
            values[name] = getattr(now, name) * (1 + (ratio - 1) * weight)
        return dataclasses.replace(now, **values)

    return Parts(before=piece("before"), block=piece("block"), after=piece("after"))


def _no_travel() -> dict[str, tuple[Travel, Travel]]:
    return dict.fromkeys(PIECES, ((), ()))


def _travel(parts: Parts, share: float) -> dict[str, tuple[Travel, Travel]]:
    pieces = {which: getattr(parts, which) for which in PIECES}
    return {w: _times((p.forward_travel, p.backward_travel), share) for w, p in pieces.items()}


def _named(uses: Uses, name: str) -> bool:
    return any(u.technique == name for u in uses)


def _traceable(uses: Uses) -> Uses:
    """Replace recomputation of every k-th block by recomputation of every block; `_mixed` averages it with
    none.
    """

    def one(used: Use) -> Use:
        return _FULL if used.technique == _FULL.technique else used

    return tuple(one(u) for u in uses)


def _mixed(recomputed: LayoutCut, plain: LayoutCut, every: int) -> LayoutCut:
    """Return an average block when every k-th is recomputed. Its highest level is the higher of the two."""
    one, other, share = recomputed.parts.block, plain.parts.block, 1 / every

    def mean(name: str) -> float:
        return float(getattr(one, name) * share + getattr(other, name) * (1 - share))

    block = dataclasses.replace(
        one,
        backward_s=mean("backward_s"),
        kept_bytes=mean("kept_bytes"),
        flops=mean("flops"),
        forward_top_bytes=max(one.forward_top_bytes, other.forward_top_bytes),
    )
    return dataclasses.replace(recomputed, parts=dataclasses.replace(recomputed.parts, block=block))
