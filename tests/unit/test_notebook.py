"""``%load_ext memfit`` and ``%%memfit``: the step of a cell is predicted without being run; predictions show
themselves in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from torch.nn import functional

import memfit

SETUP = """
import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
model = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 10))
x, y, device, calls = torch.randn(512, 256), torch.zeros(512, dtype=torch.long), "cuda:0", []
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=512, shuffle=True)
optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
scaler = torch.amp.GradScaler("cpu")
"""
STEP = """
calls.append(1)
loss = F.cross_entropy(model(x), y)
loss.backward()
optimizer.step()
optimizer.zero_grad()
"""
LOOP = """
for epoch in range(3):
    for inputs, labels in loader:
        inputs, labels = inputs.to(device), labels.cuda(non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(inputs), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
"""


@pytest.fixture
def predict() -> Iterator[Callable[..., Any]]:
    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "memfit")
    shell.run_cell(SETUP)
    yield lambda cell, line="--on H100-SXM": shell.run_cell_magic("memfit", line, cell)
    model = shell.user_ns["model"]
    assert shell.user_ns["calls"] == []
    assert "loss" not in shell.user_ns
    assert all(p.grad is None for p in model.parameters())
    assert not shell.user_ns["optimizer"].state


def test_a_cell_is_predicted_as_memfit_estimate_predicts_its_step(predict: Callable[..., Any]) -> None:
    prediction = predict(STEP)
    model = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 10))
    wanted = memfit.estimate(
        model,
        (torch.randn(512, 256), torch.zeros(512, dtype=torch.long)),
        loss=functional.cross_entropy,
        optimizer=torch.optim.SGD(model.parameters(), momentum=0.9),
        machine="H100-SXM",
    )
    assert prediction.allocated_bytes == wanted.allocated_bytes
    assert "Sequential" in str(prediction)


def test_of_loops_the_first_batch_is_predicted_on_the_device_with_autocast(
    predict: Callable[..., Any],
) -> None:
    random_before = torch.random.get_rng_state()
    prediction = predict(LOOP)
    assert torch.equal(torch.random.get_rng_state(), random_before)
    assert prediction.job.batch_size == 512
    assert prediction.job.clip == 0.5
    kept_by_gelu = predict(STEP).by_category["activation"] - prediction.by_category["activation"]
    assert kept_by_gelu > 512 * 2048 * 2, "float32 without autocast, two bytes with it"


def test_a_cell_may_call_backward_in_an_else_branch(predict: Callable[..., Any]) -> None:
    branches = (
        "loss = F.cross_entropy(model(x), y)\nif calls:\n    loss = 2 * loss\nelse:\n    loss.backward()\n"
        "optimizer.step()\n"
    )
    assert predict(branches).allocated_bytes == predict(STEP).allocated_bytes


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("loss = 1", "calls backward 0 times"),
        (STEP + STEP, "calls backward 2 times"),
        ("while True:\n    model(x).sum().backward()", "backward inside while"),
        ("seen = model(x).sum().backward()", "backward inside assign"),
        ("model(x).sum().backward()", "step of 0 optimizers"),
        ("x.sum().backward(); optimizer.step()", "uses no model"),
        ("loss.backward(", "not Python"),
        ("for a in loader.missing:\n    model(a).sum().backward()\n    optimizer.step()", "AttributeError"),
        (STEP.replace("optimizer.zero", "clip_grad_norm_(1, len(calls)); optimizer.zero"), "largest norm"),
    ],
)
def test_cells_without_one_step_are_refused_in_one_line(
    predict: Callable[..., Any], cell: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as error:
        predict(cell)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["--machine H100-SXM", "--on 'H100-SXM", "--on"])
def test_other_options_and_open_quotation_marks_are_refused(predict: Callable[..., Any], line: str) -> None:
    with pytest.raises(UsageError, match=r"allowed: %%memfit \[--on MACHINE\]"):
        predict(STEP, line)


def test_a_prediction_shows_table_parts_and_timeline_in_a_notebook(predict: Callable[..., Any]) -> None:
    prediction = predict(STEP, "--on H100-SXM --plan bf16-autocast")
    page = prediction._repr_html_()
    assert "bf16-autocast" in page
    assert page.count("<svg") == 2  # the plot and its stretched part
    assert "memory over one step" in page
    assert "MiB" in page
    assert prediction._repr_html_() != page, "ids are unique, since a notebook is one page"
    assert "<script" not in page
