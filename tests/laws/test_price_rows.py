"""What one price of the catalog may do to the headline of a decision: less than its interval says."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_fixture import full_poc

from memfit.catalog import load, prices, tables
from memfit.decision import case as cases
from memfit.decision.decide import decide
from memfit.types.decision import Decision
from memfit.types.result import Interval, Offer
from memfit.types.units import GIB

CASES = Path(__file__).parents[2] / "docs" / "cases"
# machine, whether plain training fits, seconds of a step with plain training and with the plan, watts
TRAINED: dict[str, tuple[tuple[str, bool, float, float, float], ...]] = {
    "laboratory": (
        ("RTX-4090", False, 2.2, 2.5, 560.0),
        ("RTX-A6000", True, 2.9, 3.3, 450.0),
        ("A100-80GB-SXM", True, 1.2, 1.5, 650.0),
        ("L40S", True, 2.1, 2.4, 460.0),
    ),
    "group": (
        ("8xH100-SXM", False, 1.3, 1.5, 8400.0),
        ("8xB300", True, 1.0, 1.1, 13000.0),
        ("8xH200-SXM", True, 1.4, 1.5, 8400.0),
    ),
    "not_worth_it": (("RTX-4090", True, 0.9, 1.2, 480.0), ("RTX-3090", True, 1.4, 1.8, 430.0)),
}


def offers(name: str) -> Iterator[Offer]:
    for machine, fits, plain_s, plan_s, watts in TRAINED[name]:
        for plain, step_s in ((True, plain_s), (False, plan_s)):
            yield Offer(
                machine=machine,
                size="tiny",
                plan="plain training" if plain else "checkpointing",
                plain=plain,
                fits=fits or not plain,
                memory_bytes=Interval(value=20.0 * GIB, low=19.0 * GIB, high=21.0 * GIB),
                step_s=Interval(value=step_s, low=0.9 * step_s, high=1.1 * step_s),
                power_w=watts,
            )


@functools.cache
def decided_with_all(name: str) -> Decision:
    return decided(name)


def decided(name: str) -> Decision:
    poc = dataclasses.replace(full_poc(), offers=tuple(offers(name)))
    return decide(poc, cases.read(CASES / f"{name}.toml"), name=name)


@functools.cache
def decided_without(name: str, deal: str, device: str, index: int) -> Decision:
    """The decision without one row of prices.toml, as if nobody had found that price."""
    changed = copy.deepcopy(tables.table("prices.toml"))
    del changed[deal][device][index]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prices, "table", lambda file: changed if file == "prices.toml" else tables.table(file))
        load._device.cache_clear()
        try:
            return decided(name)
        finally:
            load._device.cache_clear()


def rows(name: str) -> list[tuple[str, str, int, dict[str, Any]]]:
    devices = {machine.rpartition("x")[2] for machine, *_ in TRAINED[name]}
    table = tables.table("prices.toml")
    return [
        (deal, device, index, row)
        for deal in ("rent", "buy")
        for device in sorted(devices)
        for index, row in enumerate(table[deal].get(device, ()))
    ]


@pytest.mark.parametrize("name", TRAINED)
def test_removing_any_one_price_moves_the_saving_by_less_than_its_interval(name: str) -> None:
    before = decided_with_all(name)
    assert before.saved_percent is not None
    assert before.saved_interval_percent is not None
    width = before.saved_interval_percent.high - before.saved_interval_percent.low
    moved = 0
    for deal, device, index, _ in rows(name):
        after = decided_without(name, deal, device, index)
        assert after.saved_percent is not None, f"no headline without {deal} {device} {index}"
        assert abs(after.saved_percent - before.saved_percent) < width, f"{deal} {device} {index}"
        moved += after.saved_percent != before.saved_percent
    assert moved > 0, "no price was part of the headline: the law says nothing"


@pytest.mark.parametrize("name", TRAINED)
def test_prices_of_other_kinds_never_move_the_saving(name: str) -> None:
    before = decided_with_all(name)
    kinds = {"rent": "on_demand", "buy": "street"}
    others = [(deal, device, index) for deal, device, index, row in rows(name) if row["kind"] != kinds[deal]]
    assert others
    for deal, device, index in others:
        after = decided_without(name, deal, device, index)
        assert (after.saved_percent, after.saved_interval_percent) == (
            before.saved_percent,
            before.saved_interval_percent,
        )
