"""A trial of dependence compares samples that a loss may weigh differently, however rare they are."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from memfit.model.batch_objects import batch_length, join, select, split
from memfit.trace.sample_dependence import sample_dependence
from memfit.trace.varied_samples import varied_samples
from memfit.types.dependence import DependenceCause, DependenceKind
from memfit.types.job import Job

WIDTH, LENGTH, VOCABULARY = 6, 12, 300


def job(make_batch: Any, loss: Any, batch_size: int, **more: Any) -> Job:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 3))

    return Job(
        name="tried",
        **{"build_model": build, "make_batch": make_batch, "loss": loss, "batch_size": batch_size, **more},
    )


def rare_class(rows: int, place: int, step: int = 0, *, label: int = 2) -> Any:
    """Return a function that makes batches of ``rows`` samples of classes 0 and 1. Only sample ``place`` of
    the batch of ``step`` has ``label``."""

    def make_batch(at: int, seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(100 * seed + at)
        y = torch.randint(0, 2, (rows,), generator=g)
        if at == step:
            y[place] = label
        return {"x": torch.randn(rows, WIDTH, generator=g), "y": y}

    return make_batch


def weighted(model: nn.Module, batch: Any) -> torch.Tensor:
    weights = torch.tensor([1.0, 1.0, 20.0], dtype=batch["x"].dtype)
    return functional.cross_entropy(model(batch["x"]), batch["y"], weight=weights)


def plain(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"])


def padded_tokens(rows: int, padded: int) -> Any:
    """Return a function that makes batches of ``rows`` texts, of which text ``padded`` has few labels."""

    def make_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(100 * seed + step)
        tokens = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=g)
        labels = tokens.clone()
        labels[padded, 2:] = -100
        return {"tokens": tokens, "labels": labels}

    return make_batch


def language_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))


def next_token(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize(
    "make_batch",
    [rare_class(40, 37), rare_class(8, 3, step=9)],
    ids=["late in the first batch", "in a later batch"],
)
def test_the_weight_of_a_rare_class_is_detected(make_batch: Any) -> None:
    result = sample_dependence(job(make_batch, weighted, batch_length(make_batch(0, 0))))
    assert (result.kind, result.cause) == (DependenceKind.DEPENDENT, DependenceCause.WEIGHTS)


def test_the_weight_of_a_class_is_detected_though_no_sample_has_it() -> None:
    result = sample_dependence(job(rare_class(8, 3, step=99), weighted, 8))
    assert result.cause is DependenceCause.WEIGHTS
    assert result.reason == "the loss is a mean that weighs classes differently"


def test_a_rare_class_without_a_weight_leaves_samples_independent() -> None:
    assert sample_dependence(job(rare_class(40, 37), plain, 40)).kind is DependenceKind.INDEPENDENT


def test_a_mean_over_unpadded_labels_is_detected_though_few_texts_are_padded() -> None:
    tried = job(padded_tokens(64, 50), next_token, 64, build_model=language_model)
    assert sample_dependence(tried).cause is DependenceCause.WEIGHTS


def test_a_mean_over_counted_labels_is_independent_if_the_job_counts_them() -> None:
    tried = job(
        padded_tokens(64, 50),
        next_token,
        64,
        build_model=language_model,
        loss_terms=lambda batch: int((batch["labels"] != -100).sum()),
    )
    assert sample_dependence(tried).kind is DependenceKind.INDEPENDENT


def test_a_sample_without_counted_labels_shows_wrong_weights_and_no_nan() -> None:
    result = sample_dependence(job(rare_class(8, 1, label=-100), plain, 8))
    assert result.cause is DependenceCause.WEIGHTS
    assert "nan" not in result.reason


def test_chosen_samples_show_every_class_and_keep_their_order() -> None:
    def make_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        y = torch.zeros(30, dtype=torch.long)
        y[[5, 12, 20, 29]] = torch.tensor([4, 3, 2, 1])
        return {"x": torch.arange(30.0)[:, None].expand(30, WIDTH), "y": y}

    chosen = varied_samples(job(make_batch, plain, 30), 8)
    assert set(chosen["y"].tolist()) == {0, 1, 2, 3, 4}
    assert chosen["x"][:, 0].tolist() == sorted(chosen["x"][:, 0].tolist())
    assert {0.0, 29.0} <= set(chosen["x"][:, 0].tolist())  # the extreme means


def test_a_loss_over_samples_of_one_class_that_stand_together_is_detected() -> None:
    """Eight samples of eight classes have no pair of one class."""

    def make_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(100 * seed + step)
        return {"x": torch.randn(64, WIDTH, generator=g), "y": torch.arange(16).repeat_interleave(4)}

    def hardest_pairs(model: nn.Module, batch: Any) -> torch.Tensor:
        out, y = model(batch["x"]), batch["y"]
        distance = torch.cdist(out, out)
        same = y[:, None] == y[None, :]
        nearest = torch.where(same, distance.new_tensor(1e6), distance).min(1).values
        return (torch.where(same, distance, 0.0).max(1).values - nearest + 1).clamp(min=0).mean()

    assert sample_dependence(job(make_batch, hardest_pairs, 64)).kind is DependenceKind.DEPENDENT


def test_a_counter_that_every_forward_pass_raises_is_a_state() -> None:
    class Annealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, 3)
            self.register_buffer("passes", torch.zeros((), dtype=torch.long))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            return self.inner(x)

    result = sample_dependence(job(rare_class(8, 1), plain, 8, build_model=Annealed))
    assert (result.cause, result.across_ranks) == (DependenceCause.STATE, False)


def test_no_more_samples_are_chosen_than_the_job_has_in_a_batch() -> None:
    assert batch_length(varied_samples(job(rare_class(4, 1, step=3), plain, 4), 8)) == 4


def test_batches_of_different_lengths_are_not_joined() -> None:
    def make_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(8, WIDTH + step), "y": torch.zeros(8, dtype=torch.long)}

    assert varied_samples(job(make_batch, plain, 8), 8)["x"].shape == (8, WIDTH)


class Graphs:
    """A batch of graphs as libraries make it: numbers of graphs, joined."""

    def __init__(self, numbers: list[int]) -> None:
        self.y, self.num_graphs = torch.tensor(numbers), len(numbers)

    def to(self, device: str) -> Graphs:
        return self

    def to_data_list(self) -> list[int]:
        return self.y.tolist()

    @classmethod
    def from_data_list(cls, numbers: list[int]) -> Graphs:
        return cls(numbers)


def test_samples_of_a_batch_object_are_selected_and_joined_by_its_own_methods() -> None:
    assert select(Graphs([5, 6, 7]), [0, 2]).y.tolist() == [5, 7]
    joined = join(Graphs([5, 6]), Graphs([7]))
    assert joined is not None
    assert joined.y.tolist() == [5, 6, 7]


def test_a_batch_is_freed_at_once_after_it_was_split() -> None:
    batch = {"x": torch.zeros(4, 2), "targets": [{"boxes": torch.zeros(n, 4)} for n in (1, 2, 1, 3)]}
    freed = weakref.ref(batch["x"])
    gc.disable()
    try:
        halves = split(batch, 2)
        assert [len(half["targets"]) for half in halves] == [2, 2]
        del batch, halves
        assert freed() is None
    finally:
        gc.enable()
