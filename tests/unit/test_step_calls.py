"""The job that memfit makes of the calls in a script's loop."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional

from memfit.capture.step_calls import StepCalls
from memfit.jobs.training_step import TrainingStep
from memfit.types.plan import Plan, use


@pytest.mark.parametrize("shifted", [False, True], ids=["flattened", "shifted and flattened"])
def test_logits_and_labels_that_a_loop_flattens_may_be_chunked_and_split(shifted: bool) -> None:
    calls, model, batch = StepCalls(), tiny.Words(2, tied=False), tiny.words_batch(0, 0)
    tokens, labels = batch["tokens"], batch["labels"].clamp(min=0)
    logits = model(tokens)
    calls.note_call(model, (tokens,), {}, logits, model=model)
    if shifted:
        index = (slice(None), slice(1, None))
        whole, (logits, labels) = (logits, labels), (logits[index], labels[index])
        calls.note_call(torch.Tensor.__getitem__, (whole[0], index), {}, logits)
        calls.note_reshape(torch.Tensor.__getitem__, (whole[1], index), {}, labels)
    rows, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    calls.note_call(torch.Tensor.reshape, (logits, -1, logits.shape[-1]), {}, rows)
    calls.note_reshape(torch.Tensor.reshape, (labels, -1), {}, targets)
    loss = functional.cross_entropy(rows, targets)
    calls.note_call(functional.cross_entropy, (rows, targets), {}, loss)
    calls.note_loss(loss)
    job = calls.job("script", torch.optim.SGD(model.parameters(), lr=0.1), 1, clip=None, workers=0)
    uses = use("chunked-cross-entropy", chunks=2), use("gradient-accumulation", micro_batches=2)
    losses = []
    for plan in (Plan(), Plan(uses=uses[:1]), Plan(uses=uses)):
        torch.manual_seed(0)
        step = TrainingStep(job, plan)
        losses.append(step.run(job.make_batch(0, 0))[0].item())
        step.close()
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-3)


@pytest.mark.parametrize(
    ("function", "argument"),
    [(torch.Tensor.__getitem__, 1), (torch.Tensor.squeeze, 0), (torch.Tensor.view, (2, 8, 4))],
    ids=["a part", "without a dimension", "of other rows"],
)
def test_tensors_whose_rows_come_of_no_samples_are_items_of_the_batch(function: Any, argument: Any) -> None:
    calls, model, whole = StepCalls(), torch.nn.Linear(4, 4), torch.zeros(1, 16, 4)
    whole = whole.expand(2, 16, 4).contiguous() if function is torch.Tensor.__getitem__ else whole
    whole = whole[0] if function is torch.Tensor.view else whole
    part = function(whole, argument)
    calls.note_reshape(function, (whole, argument), {}, part)
    out = model(part)
    calls.note_call(model, (part,), {}, out, model=model)
    assert [tuple(t.shape) for t in calls.micro_batch] == [tuple(part.shape)]
