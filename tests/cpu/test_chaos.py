"""The short form of benchmarks/chaos.py: one run of two ranks, of which one is killed at a random instant."""

from __future__ import annotations

import signal
from pathlib import Path

import chaos
import pytest


def test_a_kill_at_a_random_instant_changes_no_loss(tmp_path: Path) -> None:
    _is_recovered("ZeRO 3", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in chaos.KINDS if kind != "ZeRO 3"])
def test_each_kind_of_plan_recovers(kind: str, tmp_path: Path) -> None:
    _is_recovered(kind, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", chaos.HANGING)
def test_a_stopped_rank_is_named(kind: str, tmp_path: Path) -> None:
    row = chaos.hang_round(kind, 1, tmp_path / "hang")
    assert row["named_s"] is not None
    assert (row["completed"], row["restarts"]) == (True, 1), row["reason"]


def _is_recovered(kind: str, folder: Path) -> None:
    spec = chaos.spec_of(kind, folder / "whole", steps=chaos.STEPS, step_s=0.0, every=chaos.STEPS)
    undisturbed = list(chaos.train(spec)["measured"].losses)
    assert len(undisturbed) == chaos.STEPS
    row = chaos.kill_round(kind, 1, folder / "killed", undisturbed, kills=1)
    assert row["kills"] == 1
    assert row["recovered"], row
    assert row["losses_equal"], row


def test_the_disturber_sends_each_signal_once_for_its_cause() -> None:
    disturber = chaos.Disturber(signal.SIGKILL, [("step", 60.0), ("start", 60.0)], chaos.random.Random(0))
    disturber.begin("start")  # not yet its turn
    assert len(disturber._threads) == 0
    disturber.begin("step")
    disturber.begin("start")
    disturber.begin("start")
    assert len(disturber._threads) == 2
    disturber.end()
    assert disturber.hits == []
