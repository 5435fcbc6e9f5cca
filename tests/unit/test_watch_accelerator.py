"""The watch on an accelerator, here the simulated one: its allocator's figures, and losses without waiting.

``python test_watch_accelerator.py FILE`` trains there, as a backend of PyTorch changes its whole process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import simulated_accelerator

MIB = 2**20


def test_a_training_on_an_accelerator_is_recorded_without_waiting_for_it(tmp_path: Path) -> None:
    reason = simulated_accelerator.missing()
    if reason is not None:
        pytest.skip(reason)
    from child_ranks import run_children

    from memfit.monitoring.record import read_records

    simulated_accelerator.build()
    run_children(__file__, [[tmp_path / "answer.json"]], limit_s=120)
    answer = json.loads((tmp_path / "answer.json").read_text())
    (rank,) = read_records(tmp_path / "run.jsonl").ranks
    assert rank.start is not None
    assert rank.start.memory_source == "torch's allocator of sim"
    assert rank.start.device_name
    assert [s.loss if s.loss == s.loss else None for s in rank.steps] == answer["losses"]
    assert [s.allocated_bytes for s in rank.steps] == answer["allocated"]
    assert rank.peak("peak_allocated_bytes") == answer["peak"] >= 4 * MIB
    assert rank.steps[0].headroom_bytes == answer["headroom"]
    assert answer["synchronized"] == 0
    assert [a.kind for a in rank.alarms] == ["non-finite"]


def train(file: Path) -> None:
    simulated_accelerator.activate(devices=1, capacity_bytes=256 * MIB)
    import torch
    from torch import nn

    import memfit

    torch.manual_seed(0)
    model = nn.Linear(8, 8).to("sim")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, allocated, calls = [], [], []
    synchronize = torch.accelerator.synchronize
    torch.accelerator.synchronize = lambda *given: calls.append(given)  # type: ignore[assignment]
    torch.ones(MIB, device="sim")  # the peak of the run, before it: nobody may reset it
    with memfit.watch(file=file.with_name("run.jsonl"), on_alarm=lambda alarm: None) as watch:
        for step in range(6):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 8, device="sim")).square().mean()
            if step == 4:
                loss = loss * float("nan")
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            allocated.append(torch.accelerator.memory_allocated())
            assert len(watch._pending) <= 6
            if step == 0:
                headroom = torch.accelerator.get_memory_info()[0]
    torch.accelerator.synchronize = synchronize
    answer = {
        "losses": [float(v) for v in losses],
        "allocated": allocated,
        "peak": torch.accelerator.max_memory_allocated(),
        "headroom": headroom,
        "synchronized": len(calls),
    }
    answer["losses"] = [v if v == v else None for v in answer["losses"]]  # type: ignore[union-attr]
    file.write_text(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
