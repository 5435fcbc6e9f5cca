"""Plan: which techniques with which settings. ``Plan()`` is plain training, which may be the best plan."""

from __future__ import annotations

import dataclasses
import enum
import json
import zlib

KnobValue = str | int | float | bool


class EffectClass(enum.IntEnum):
    """How far a technique may change the results of training, which decides how equality is tested. E0:
    bitwise equal. E1: sums are reordered; equal within float32 tolerance. E2: the precision changes; tested
    for equivalence over pairs of runs of equal seed. E3: the algorithm changes; judged by the task's metric.
    """

    E0 = 0
    E1 = 1
    E2 = 2
    E3 = 3

    @property
    def label(self) -> str:
        return f"E{int(self)}"


class Accuracy(enum.StrEnum):
    """The accuracy that the user asks for: "exact", "rounding" or "any". ``highest`` is the highest effect
    class that a plan may have: E0, E2 or E3.
    """

    EXACT = "exact"
    ROUNDING = "rounding"
    ANY = "any"

    @property
    def highest(self) -> EffectClass:
        return {"exact": EffectClass.E0, "rounding": EffectClass.E2, "any": EffectClass.E3}[self.value]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Use:
    """One technique in use. ``knobs``: its settings as (name, value) pairs, which must be sorted by name."""

    technique: str
    knobs: tuple[tuple[str, KnobValue], ...] = ()

    def __post_init__(self) -> None:
        assert list(self.knobs) == sorted(self.knobs), "the knobs of a Use must be sorted by name"

    @property
    def settings(self) -> dict[str, KnobValue]:
        return dict(self.knobs)


def use(technique: str, **knobs: KnobValue) -> Use:
    """Return a Use of ``technique`` with these settings, as in ``use("gradient-accumulation",
    micro_batches=4)``.
    """
    return Use(technique=technique, knobs=tuple(sorted(knobs.items())))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Techniques applied to one job, each at most once, on ``ranks`` processes with one device each.

    ``uses`` is sorted when the plan is made, so that plans with the same techniques, settings and ranks
    compare and hash equal.
    """

    uses: tuple[Use, ...] = ()
    ranks: int = 1

    def __post_init__(self) -> None:
        names = [u.technique for u in self.uses]
        assert len(names) == len(set(names)), f"a technique appears twice in a plan: {names}"
        assert self.ranks >= 1, f"{self.ranks} ranks: a plan needs at least one"
        object.__setattr__(self, "uses", tuple(sorted(self.uses)))

    def get(self, technique: str) -> Use | None:
        """Return how the plan uses ``technique``, or None if it does not."""
        return next((u for u in self.uses if u.technique == technique), None)

    def __contains__(self, technique: str) -> bool:
        return self.get(technique) is not None

    @property
    def techniques(self) -> frozenset[str]:
        """The names of the techniques."""
        return frozenset(u.technique for u in self.uses)

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of a step on each rank, by gradient accumulation; 1 without it."""
        accumulation = self.get("gradient-accumulation")
        return int(accumulation.settings["micro_batches"]) if accumulation is not None else 1

    def without(self, technique: str) -> Plan:
        """Return the plan without ``technique``; an equal plan if it does not use it."""
        return dataclasses.replace(self, uses=tuple(u for u in self.uses if u.technique != technique))

    def with_use(self, added: Use) -> Plan:
        """Return the plan with ``added``, which replaces an earlier use of the same technique."""
        return dataclasses.replace(self, uses=(*self.without(added.technique).uses, added))

    def to_dict(self) -> dict[str, dict[str, KnobValue]]:
        """Return the name of each technique -> its settings (name -> value). The number of ranks is left
        out."""
        return {u.technique: u.settings for u in self.uses}

    @property
    def label(self) -> str:
        """Short text that is the same every time: ``activation-checkpointing(every=1) + bf16-autocast on 2
        ranks``.

        A plan without techniques is "plain"; one rank is not mentioned. Setting values of more than 24
        characters are shortened to the first 12 and a checksum.
        """
        techniques = " + ".join(_label(u) for u in self.uses) or "plain"
        return f"{techniques} on {self.ranks} ranks" if self.ranks > 1 else techniques

    @property
    def fingerprint(self) -> str:
        """Canonical text of techniques, settings and ranks: equal for equal plans and different for different
        ones.
        """
        return json.dumps(self.to_dict(), sort_keys=True) + (f" x{self.ranks}" if self.ranks > 1 else "")


def _label(u: Use) -> str:
    inner = ", ".join(f"{k}={_short(v)}" for k, v in u.knobs)
    return f"{u.technique}({inner})" if inner else u.technique


def _short(value: KnobValue) -> str:
    """Return the value as text. If that is longer than 24 characters, return its first 12, "..." and a
    checksum of the whole.
    """
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}...{zlib.crc32(text.encode()):08x}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Limits of a plan besides memory.

    ``deadline_s`` and ``budget_usd``: longest time and highest cost of the whole training of ``steps`` steps,
    which only these two need; None: no limit. ``micro_batch``: samples per micro-batch of one rank (0: any
    number). ``without``: names of techniques not to use.
    """

    steps: int = 0
    deadline_s: float | None = None
    budget_usd: float | None = None
    micro_batch: int = 0
    without: tuple[str, ...] = ()
