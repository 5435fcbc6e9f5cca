"""What the conformance check reports where other weights or another optimizer train than planned."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import child_ranks
import pytest
import torch
from torch import nn

from memfit.api import conform
from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.jobs.training_step import TrainingStep
from memfit.techniques import adapters
from memfit.techniques.registry import TECHNIQUES, make_use
from memfit.types.conformance import NotConforming
from memfit.types.job import Job
from memfit.types.plan import Plan

SIZE = GptSize(layers=2, width=64, heads=4, length=16, vocabulary=64, batch_size=4)
LORA = pytest.mark.skipif(bool(TECHNIQUES["lora"].missing), reason="peft is not installed")
CODES = pytest.mark.skipif(bool(TECHNIQUES["adamw-8bit"].missing), reason="bitsandbytes is not installed")


def _batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


JOB = Job(name="gpt", build_model=lambda: Gpt(SIZE), make_batch=_batch, loss=_loss, batch_size=4)


def _told(*uses: tuple[str, dict[str, Any]]) -> str:
    torch.manual_seed(0)
    plan = Plan(uses=tuple(make_use(name, settings) for name, settings in uses))
    return child_ranks.told(TrainingStep(JOB, plan), sum(p.numel() for p in Gpt(SIZE).parameters()))


# -- adapters ---------------------------------------------------------------------------------------------


@LORA
@pytest.mark.parametrize("rank", [4, 8, 64, 100])
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_adapters_of_any_rank_are_recognised(name: str, rank: int) -> None:
    """The model is 64 wide."""
    if missing := TECHNIQUES[name].missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    told = _told((name, {"rank": rank}))
    assert told.startswith("fine: as planned")
    assert f"{name}: adapters" in told.partition("; not checked")[0]


@LORA
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_adapters_of_a_lower_rank_are_reported(name: str) -> None:
    if missing := TECHNIQUES[name].missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    inner = adapters._adapt
    with mock.patch.object(adapters, "_adapt", lambda bench, rank, **how: inner(bench, rank // 2, **how)):
        told = _told((name, {"rank": 8}))
    assert f"{name}: adapters: planned " in told
    assert "found 0 of that rank; ranks of the matrices: 4" in told


@LORA
def test_adapters_on_fewer_layers_are_reported() -> None:
    inner = adapters.block_linears
    first = mock.patch.object(adapters, "block_linears", lambda model, path: list(inner(model, path))[1:])
    with first:
        told = _told(("lora", {"rank": 8}))
    assert "lora: adapters: planned " in told
    assert "for 8 linear layers" in told


class _Low(nn.Module):
    """An adapter written by hand, beside a layer that it holds."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T  # type: ignore[no-any-return]


@pytest.mark.parametrize(("rank", "fine"), [(8, True), (4, False)])
def test_handwritten_adapters_are_checked_by_their_rank(rank: int, fine: bool) -> None:
    model = nn.Sequential(
        *[nn.Sequential(_Low(nn.Linear(32, 48), rank), _Low(nn.Linear(48, 32), rank)) for _ in range(3)]
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    told = contextlib.nullcontext() if fine else pytest.raises(NotConforming, match="lora: adapters")
    with told:
        conform(model, optimizer, {"lora": {"rank": 8}})


# -- optimizers -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _run(optimizer: str) -> Iterator[None]:
    """This optimizer runs, whichever one is planned."""

    def apply(bench: Any, settings: Any) -> None:
        TECHNIQUES[optimizer].apply(bench, settings)

    names = ("adamw-8bit", "adamw-4bit", "adamw-paged", "adafactor", "sgd", "adamw-fused", "adamw-single")
    others = {n: dataclasses.replace(TECHNIQUES[n], apply=apply) for n in names if n != optimizer}
    with mock.patch.dict("memfit.techniques.registry.TECHNIQUES", others):
        yield


OPTIMIZERS = ("adamw-8bit", "adamw-4bit", "adafactor", "sgd", "adamw-single")


@CODES
@pytest.mark.parametrize("found", OPTIMIZERS)
@pytest.mark.parametrize("planned", OPTIMIZERS)
def test_an_optimizer_other_than_planned_is_reported(planned: str, found: str) -> None:
    if missing := [*TECHNIQUES[planned].missing, *TECHNIQUES[found].missing]:
        pytest.skip(f"{', '.join(missing)} is not installed")
    with _run(found):
        told = _told((planned, {}))
    if planned == found:
        assert told.startswith("fine: as planned"), told
        assert planned in told.partition("; not checked")[0]
    else:
        assert f"{planned}: planned" in told
        assert "bytes of state per element" in told


@CODES
def test_states_that_an_8bit_optimizer_keeps_in_float32_by_rule_conform() -> None:
    """States of embeddings, as bitsandbytes advises, and of parameters that are not made of whole blocks."""
    model = nn.Sequential(nn.Embedding(128, 64), nn.Linear(64, 128, bias=False), nn.Linear(128, 65))
    optimizer = torch.optim.AdamW(model.parameters())
    codes = {f"state{i}": torch.zeros(128, 64, dtype=torch.uint8) for i in (1, 2)}

    def step() -> None:
        optimizer.state.pop(model[1].weight, None)
        model(torch.arange(4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.state[model[1].weight] = codes

    assert "adamw-8bit" in conform(model, optimizer, {"adamw-8bit": {}}, step=step).checked
    codes["state2"] = codes["state2"].float()
    with pytest.raises(NotConforming, match=r"adamw-8bit: planned 2 to 3 .* found 5.00, 1.00 in codes"):
        conform(model, optimizer, {"adamw-8bit": {}}, step=step)


@pytest.mark.parametrize("planned", ["sgd", "adamw-single", "adafactor"])
def test_float32_master_weights_do_not_count_as_optimizer_state(planned: str) -> None:
    told = _told((planned, {}), ("bf16-parameters", {}))
    assert told.startswith("fine: as planned"), told
    assert planned in told.partition("; not checked")[0]


def _model(frozen: bool, tied: bool) -> nn.Module:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    if tied:
        model[1].weight = model[3].weight  # type: ignore[assignment]
    if frozen:
        model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("planned", "make"),
    [
        ("adamw-single", lambda params: torch.optim.AdamW(params, foreach=False)),
        ("adamw-single", lambda params: torch.optim.AdamW(params, foreach=False, amsgrad=True)),
        ("sgd", lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)),
        ("sgd", lambda params: torch.optim.SGD(params, lr=0.1)),
        ("adafactor", torch.optim.Adafactor),
    ],
)
def test_a_users_own_optimizer_that_matches_the_plan_conforms(
    planned: str, make: Callable[[Any], Any], frozen: bool, tied: bool
) -> None:
    model = _model(frozen, tied)
    optimizer = make(model.parameters())

    def step() -> None:
        model(torch.randn(2, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert not conform(model, optimizer, {planned: {}}, step=step).differences


def test_moments_that_share_one_buffer_are_all_counted() -> None:
    model = nn.Linear(64, 64, bias=False)
    buffer = torch.zeros(2, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def step() -> None:
        model(torch.randn(2, 64)).square().sum().backward()
        optimizer.state[model.weight] = {
            "step": torch.tensor(0.0),
            "exp_avg": buffer[0],
            "exp_avg_sq": buffer[1],
        }
        optimizer.step()

    assert "adamw-single" in conform(model, optimizer, {"adamw-single": {}}, step=step).checked
