"""Lazy logits give the same results as real logits, whatever is done with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from memfit.techniques.deferred_logits import LazyLogits

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 7, 5, 11
Loss = Callable[[Any, torch.Tensor], torch.Tensor]


def labels() -> torch.Tensor:
    found = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    found[0, 2:] = -100
    found[2, 0] = 3
    return found


def both(loss: Loss, *, bias: bool = True, chunks: int = 4) -> list[list[torch.Tensor]]:
    """[loss, gradients of hidden, weight, bias] with real logits and with lazy ones."""
    results = []
    for lazy in (False, True):
        torch.manual_seed(0)
        hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
        head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        value = loss(LazyLogits(hidden, head, chunks) if lazy else head(hidden), labels())
        value.backward()
        results.append([value.detach(), *(p.grad for p in (hidden, *head.parameters()))])
    return results


def cross_entropy(**options: Any) -> Loss:
    return lambda logits, target: functional.cross_entropy(
        logits.view(-1, VOCABULARY), target.view(-1), **options
    )


def shifted(logits: Any, target: torch.Tensor) -> torch.Tensor:
    """The loss as Hugging Face's causal models compute it."""
    moved = logits.float()[..., :-1, :].contiguous()
    return functional.cross_entropy(moved.view(-1, moved.size(-1)), target[..., 1:].reshape(-1))


KEPT: dict[str, Loss] = {
    "mean": cross_entropy(),
    "sum": cross_entropy(reduction="sum"),
    "ignore_index": lambda logits, target: cross_entropy(ignore_index=3)(logits, target.clamp(min=0)),
    "module": lambda logits, target: nn.CrossEntropyLoss()(logits.flatten(0, 1), target.flatten()),
    "by name": lambda logits, target: functional.cross_entropy(
        input=logits.reshape((ROWS * LENGTH, -1)), target=target.flatten()
    ),
    "flatten to the last": lambda logits, target: functional.cross_entropy(
        logits.flatten(end_dim=-2), target.flatten()
    ),
    "causal": shifted,
    "mask": lambda logits, target: functional.cross_entropy(logits[target != -100], target[target != -100]),
    "whole": lambda logits, target: functional.cross_entropy(logits[()].flatten(0, 1), target.flatten()),
    "one row": lambda logits, target: functional.cross_entropy(logits[1], target[1]),
    "last place": lambda logits, target: functional.cross_entropy(logits[:, 0, :], target[:, 0]),
}


@pytest.mark.parametrize("name", KEPT)
def test_chunked_loss_and_gradients_equal_torchs_without_making_the_logits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LazyLogits, "make", lambda self: pytest.fail("the logits were made whole"))
    for real, lazy in zip(*both(KEPT[name]), strict=True):
        assert_close(lazy, real)


@pytest.mark.parametrize("chunks", [2, 5, 21, 100])
def test_any_number_of_chunks_without_bias_gives_torchs_loss_and_gradients(chunks: int) -> None:
    for real, lazy in zip(*both(cross_entropy(), bias=False, chunks=chunks), strict=True):
        assert_close(lazy, real)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_get_torchs() -> None:
    found = []
    for lazy in (False, True):
        torch.manual_seed(0)
        hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
        head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(requires_grad=False)
        cross_entropy()(LazyLogits(hidden, head, 4) if lazy else head(hidden), labels()).backward()
        assert head.weight.grad is None
        found.append(hidden.grad)
    assert_close(*found)


def test_where_every_label_is_ignored_the_loss_and_gradients_are_zero() -> None:
    head = nn.Linear(WIDTH, VOCABULARY)
    lazy = LazyLogits(torch.ones(4, WIDTH, requires_grad=True), head, 2)
    value = functional.cross_entropy(lazy, torch.full((4,), -100))
    value.backward()
    assert value == 0
    assert not head.weight.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_any_rows_the_loss_and_gradients_are_zero(reduction: str) -> None:
    head = nn.Linear(WIDTH, VOCABULARY)
    hidden = torch.ones(4, WIDTH, requires_grad=True)
    rows = LazyLogits(hidden, head, 2)[torch.zeros(4, dtype=torch.bool)]
    value = functional.cross_entropy(rows, torch.ones(0, dtype=torch.long), reduction=reduction)
    value.backward()
    assert value == 0
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


def set_in_place(logits: Any, target: torch.Tensor) -> torch.Tensor:
    logits[..., 0] = 0.0
    return logits.square().mean()


def scaled_by_an_operator(logits: Any, target: torch.Tensor) -> torch.Tensor:
    same = logits
    logits /= 2.0
    return functional.cross_entropy(same.view(-1, VOCABULARY), target.view(-1))


def scaled_in_place(logits: Any, target: torch.Tensor) -> torch.Tensor:
    logits.div_(2.0)
    return functional.cross_entropy(logits.view(-1, VOCABULARY), target.view(-1))


MADE: dict[str, Loss] = {
    "softmax": lambda logits, target: logits.softmax(-1).square().mean(),
    "torch function": lambda logits, target: torch.logsumexp(logits, dim=-1).mean(),
    "stacked": lambda logits, target: torch.cat([logits, logits]).square().mean(),
    "scaled": lambda logits, target: cross_entropy()(30 * torch.tanh(logits / 30), target),
    "compared": lambda logits, target: (logits * (logits > 0)).sum(),
    "compared for equality": lambda logits, target: (
        logits * (logits == logits.amax().item()) + 2 * logits * (logits != logits.amin().item())
    ).sum(),
    "remainder": lambda logits, target: (+logits % 0.5 + abs(logits) + 2**logits).sum(),
    "classes second": lambda logits, target: functional.cross_entropy(logits.transpose(1, 2), target),
    "more dimensions": lambda logits, target: functional.cross_entropy(
        logits[:, :VOCABULARY], torch.zeros(ROWS, VOCABULARY, dtype=torch.long)
    ),
    "soft targets": lambda logits, target: functional.cross_entropy(
        logits.flatten(0, 1), torch.full((ROWS * LENGTH, VOCABULARY), 1 / VOCABULARY)
    ),
    "smoothing": cross_entropy(label_smoothing=0.1),
    "weights": cross_entropy(weight=torch.linspace(1, 2, VOCABULARY)),
    "no reduction": lambda logits, target: cross_entropy(reduction="none")(logits, target).sum(),
    "a class": lambda logits, target: logits[..., 2].square().mean(),
    "some classes": lambda logits, target: logits[:, :, :4].square().mean(),
    "new dimension": lambda logits, target: logits[None].square().mean(),
    "mask and class": lambda logits, target: logits[target != -100, 2].square().mean(),
    "all in one": lambda logits, target: logits.view(-1).square().mean(),
    "flattened whole": lambda logits, target: logits.flatten().square().mean(),
    "rows of other widths": lambda logits, target: logits.view(-1, ROWS).square().mean(),
    "set in place": set_in_place,
    "scaled in place": scaled_in_place,
    "scaled by an operator": scaled_by_an_operator,
}


@pytest.mark.parametrize("name", MADE)
def test_uses_other_than_chunked_losses_get_the_results_of_real_logits(name: str) -> None:
    for real, lazy in zip(*both(MADE[name]), strict=True):
        assert_close(lazy, real)


def test_lazy_logits_know_their_shape_without_being_made() -> None:
    lazy = LazyLogits(torch.ones(ROWS, LENGTH, WIDTH), nn.Linear(WIDTH, VOCABULARY), 2)
    assert (lazy.shape, lazy.size(1), lazy.dim()) == ((ROWS, LENGTH, VOCABULARY), LENGTH, 3)
    assert lazy.real_logits is None
    assert len(lazy) == ROWS
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(lazy)
    with pytest.raises(AttributeError):
        lazy.__no_such_thing__  # noqa: B018 - asking is the test


@pytest.mark.parametrize(
    "cast",
    [
        lambda lazy: lazy.float(),
        lambda lazy: lazy.to(torch.float32),
        lambda lazy: lazy.to(dtype=torch.float32),
        lambda lazy: lazy.type_as(torch.ones(1)),
    ],
)
def test_logits_cast_to_float32_are_float32_when_made(cast: Callable[[Any], Any]) -> None:
    head = nn.Linear(WIDTH, VOCABULARY).bfloat16()
    hidden = torch.ones(4, WIDTH, dtype=torch.bfloat16)
    wide = cast(LazyLogits(hidden, head, 2))
    assert wide.dtype == torch.float32
    assert_close(wide.softmax(-1), head(hidden).float().softmax(-1), rtol=0, atol=0)
    assert LazyLogits(hidden, head, 2).to("cpu").softmax(-1).dtype == torch.bfloat16


def test_under_autocast_the_products_are_bfloat16_and_the_loss_float32() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(WIDTH, VOCABULARY), torch.randn(8, WIDTH, requires_grad=True)
    target = torch.arange(8)
    with torch.autocast("cpu", torch.bfloat16):
        lazy = functional.cross_entropy(LazyLogits(hidden, head, 3), target)
        real = functional.cross_entropy(head(hidden).float(), target)
    lazy.backward()
    assert lazy.dtype == torch.float32
    assert_close(lazy, real, rtol=1e-2, atol=1e-2)
    assert head.weight.grad.dtype == torch.float32
