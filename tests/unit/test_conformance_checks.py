"""Checks of conformance on observations written by hand: no model, no optimizer, no process group."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from memfit.conformance import observation, registry
from memfit.conformance.block_checks import plain_runs, recomputation
from memfit.conformance.clipping_check import gradient_clipping
from memfit.conformance.distributed_checks import replicas, stages
from memfit.conformance.findings import Checked, NotChecked
from memfit.conformance.fingerprints import fingerprint
from memfit.conformance.observation import (
    BlockActivity,
    InputDigests,
    Observations,
    ObservedParameter,
    PassOrder,
    RankObservation,
    UpdateNorms,
)
from memfit.conformance.registry import CHECKS
from memfit.conformance.sample_checks import different_samples
from memfit.conformance.schedule_check import schedule
from memfit.conformance.shard_checks import parameters
from memfit.techniques.rank_mesh import layout
from memfit.techniques.registry import make_use
from memfit.types.plan import Plan


def _plan(name: str, ranks: int = 1, **settings: Any) -> Plan:
    return Plan(uses=(make_use(name, settings),), ranks=ranks)


def _observed(plan: Plan, *of_ranks: dict[str, Any], **fields: Any) -> Observations:
    """Observations of rank 0. ``of_ranks``: the fields of what each rank observed, by default none."""
    ranks = tuple(
        RankObservation(coordinate=layout(plan).coordinate(rank), **of_rank)
        for rank, of_rank in enumerate(of_ranks or [{}] * plan.ranks)
    )
    return Observations(rank=0, ranks=ranks, **fields)


def _parameter(name: str, **fields: Any) -> ObservedParameter:
    defaults: dict[str, Any] = {
        "shape": (64, 64),
        "dtype": torch.float32,
        "is_trained": True,
        "elements": 4096,
        "whole_elements": 4096,
        "local_elements": 4096,
        "shard_bytes": 16384,
        "shard_device": "cpu",
    }
    return ObservedParameter(name=name, **{**defaults, **fields})


def test_every_observation_is_a_frozen_value() -> None:
    classes = [c for c in vars(observation).values() if inspect.isclass(c) and dataclasses.is_dataclass(c)]
    assert Observations in classes
    assert all(c.__dataclass_params__.frozen for c in classes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted({check.function.__module__ for check in CHECKS}))
def test_modules_of_checks_import_nothing_that_reads_a_model_or_other_ranks(name: str) -> None:
    check_modules = {check.function.__module__ for check in CHECKS}
    values = {
        f"memfit.conformance.{n}" for n in ("findings", "fingerprints", "observation", "planned_shards")
    }
    tree = ast.parse(Path(str(importlib.import_module(name).__file__)).read_text(encoding="utf-8"))
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    of_conformance = {m for m in imported if m.startswith("memfit.conformance")}
    assert of_conformance <= values | check_modules
    assert {m for m in imported if m.startswith("torch")} <= {"torch"}


def test_a_check_is_entered_once() -> None:
    functions = [check.function for check in CHECKS]
    assert len(set(functions)) == len(functions)


def test_without_a_step_no_check_that_needs_one_reports_and_its_technique_is_named() -> None:
    plan = _plan("activation-offload")
    texts = [f.text for f in registry.findings(plan, _observed(plan)) if isinstance(f, NotChecked)]
    assert texts == [
        "gradients, recomputation and replicas: no training step was observed",
        "activation-offload: no training step was observed",
    ]


def test_a_rank_that_holds_more_than_its_shard_is_reported() -> None:
    plan = _plan("fsdp2", ranks=2)
    for local_elements, wrong in ((2048, False), (4096, True)):
        params = (_parameter("weight", local_elements=local_elements, has_mesh=True),)
        (finding,) = parameters(plan, _observed(plan, parameters=params))
        assert finding == Checked(
            "fsdp2: parameters", "1/2 of 4,096 elements on a rank", f"{local_elements:,}", wrong
        )


def test_replicas_are_compared_by_the_norms_of_all_ranks() -> None:
    plan = _plan("ddp", ranks=2)
    for norm, wrong in ((1.0, False), (1.1, True)):
        (finding,) = replicas(plan, _observed(plan, {"norms": {"w": 1.0}}, {"norms": {"w": norm}}))
        assert isinstance(finding, Checked)
        assert (finding.feature, finding.wrong) == ("ddp: replicas", wrong)


def test_a_model_without_trained_parameters_has_no_replicas_to_compare() -> None:
    plan = _plan("ddp", ranks=2)
    assert list(replicas(plan, _observed(plan))) == []
    assert fingerprint(torch.zeros(3, 0)).tolist() == [0.0] * 4


def test_ranks_with_the_same_samples_are_reported_only_if_several_samples_and_losses_are_equal() -> None:
    plan = _plan("ddp", ranks=2)
    same = {"inputs": InputDigests(digests=("a",), several=True), "losses": (1.0,)}
    (finding,) = different_samples(plan, _observed(plan, same, same))
    assert isinstance(finding, Checked)
    assert finding.wrong
    one_sample = {**same, "inputs": InputDigests(digests=("a",))}
    for pair in ((one_sample, one_sample), (same, {**same, "losses": (2.0,)})):
        (finding,) = different_samples(plan, _observed(plan, *pair))
        assert isinstance(finding, NotChecked)
    different = {**same, "inputs": InputDigests(digests=("b",), several=True)}
    (finding,) = different_samples(plan, _observed(plan, same, different))
    assert isinstance(finding, Checked)
    assert not finding.wrong


def test_a_schedule_with_too_many_micro_batches_in_flight_is_reported() -> None:
    plan = _plan("pipeline", ranks=2, schedule="1f1b", micro_batches=4)
    for first, wrong in (("FFBFBFBB", False), ("FFFFBBBB", True)):
        orders = [{"order": PassOrder(letters=o, is_staged=True)} for o in (first, "FBFBFBFB")]
        finding, weights = schedule(plan, _observed(plan, *orders))
        assert isinstance(finding, Checked)
        assert (finding.planned, finding.wrong) == ("1f1b, 2, 1 micro-batches in flight on its ranks", wrong)
        assert isinstance(weights, Checked)
        assert not weights.wrong


def test_parameters_that_only_another_stage_trains_are_reported() -> None:
    plan = _plan("pipeline", ranks=2)
    params = (_parameter("a", blocks=(0,), has_gradient=True), _parameter("b", blocks=(1,)))
    of_ranks = [
        {"learned": frozenset({name}), "norms": {"a": 1.0, "b": norm}} for name, norm in (("a", 1), ("b", 2))
    ]
    observed = _observed(plan, *of_ranks, parameters=params, block_count=2, model_elements=8192)
    blocks, idle = stages(plan, observed)
    assert isinstance(blocks, Checked)
    assert (blocks.found, blocks.wrong) == ("2 (0, 1)", True)
    assert isinstance(idle, Checked)
    assert (idle.found, idle.wrong) == ("4,096 elements that other stages train (b)", True)


def test_the_norm_at_the_update_is_summed_over_ranks() -> None:
    plan = _plan("ddp", ranks=2)
    update = UpdateNorms(is_observed=True, squared_norm=4.0, squared_norm_share=2.0)
    (finding,) = gradient_clipping(plan, _observed(plan, {"update": update}, {"update": update}, clip=1.0))
    assert finding == Checked("gradient clipping", "gradients of norm at most 1 at the update", "2", True)
    assert not list(gradient_clipping(plan, _observed(plan, {"update": update}, {"update": update})))


def test_what_the_plain_model_recomputes_is_asked_for_only_if_it_can_explain_something() -> None:
    activity = BlockActivity(ran={0: {1: 8}, 1: {2: 8}}, again={1: {2: 8}}, passed=frozenset({0, 1}))
    plain, planned = Plan(), _plan("activation-checkpointing")
    observed = _observed(plain, activity=activity)
    assert (plain_runs(plain, observed), plain_runs(planned, observed)) == ({None}, set())
    assert [type(f) for f in recomputation(plain, observed)] == [NotChecked, Checked]
    for run, wrong in ((activity, False), (BlockActivity(), True)):
        (finding,) = recomputation(plain, dataclasses.replace(observed, plain_runs={None: run}))
        assert isinstance(finding, Checked)
        assert finding.wrong == wrong
