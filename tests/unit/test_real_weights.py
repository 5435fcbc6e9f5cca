"""Sizes that follow from computed values are those of the model's weights, if the step may be computed."""

from __future__ import annotations

import torch

import memfit

_ROWS, _WIDTH, _EXPERT = 512, 32, 1024


class Selecting(torch.nn.Module):
    """Trains an expert on the rows whose score is positive: those are known only from the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.score = torch.nn.Linear(_WIDTH, 1)
        self.expert = torch.nn.Linear(_WIDTH, _EXPERT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x[self.score(x).squeeze(1) > 0]
        return self.expert(kept).relu().sum() + self.score(x).sum()


def _model(positive_rows: int) -> tuple[Selecting, torch.Tensor]:
    """Return a model and a batch of which the model keeps the first ``positive_rows`` rows."""
    model, x = Selecting(), torch.rand(_ROWS, _WIDTH)
    with torch.no_grad():
        model.score.weight.fill_(1.0)
        model.score.bias.zero_()
    x[positive_rows:] *= -1
    return model, x


def _rows_kept(prediction: memfit.Prediction) -> float:
    """Return the rows that the expert's activations have at the peak, of which there are two at most."""
    return prediction.estimate.allocated_bytes.value / (_EXPERT * 4)


def test_a_size_that_the_weights_decide_is_computed_from_them() -> None:
    few, many = (memfit.estimate(*_model(rows)) for rows in (32, 448))
    assert _rows_kept(many) - _rows_kept(few) >= 448 - 32


def test_without_probes_such_a_size_is_assumed() -> None:
    few, many = (memfit.estimate(*_model(rows), probe=False) for rows in (32, 448))
    assert few.estimate.allocated_bytes.value == many.estimate.allocated_bytes.value


def test_the_interval_still_covers_other_weights() -> None:
    few = memfit.estimate(*_model(32)).estimate.allocated_bytes
    many = memfit.estimate(*_model(448)).estimate.allocated_bytes
    assert few.high >= many.value
    assert many.low <= few.value


def test_neither_the_model_nor_the_batch_is_written_to() -> None:
    model, x = _model(64)
    before = [t.clone() for t in (*model.parameters(), x)]

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        batch.mul_(2.0)
        return model(batch)

    memfit.estimate(model, x, loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), x), strict=True))


@torch.library.custom_op("memfit_test::keep_positive", mutates_args=())
def keep_positive(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0].clone()


@keep_positive.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(torch.library.get_ctx().new_dynamic_size())


class Twice(torch.nn.Module):
    """Calls the operator on two tensors of one layout, of whose elements it keeps few and many."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4096))
        self.wide = torch.nn.Parameter(torch.ones(1, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few, many = (keep_positive((x[i] * self.weight).detach()) for i in (0, 1))
        return (many[:, None] * self.wide).relu().sum() + few.sum()


def test_each_call_of_an_operator_gives_the_size_of_its_own_values() -> None:
    x = torch.ones(2, 4096)
    x[0, 4:] = -1.0
    prediction = memfit.estimate(Twice(), x)
    assert prediction.estimate.allocated_bytes.value >= 4096 * 256 * 4
