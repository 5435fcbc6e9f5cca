"""Trainings that die for lack of memory, as a user would have written them, each in its own way.

    python dying_training.py KIND DEVICE MEMORY

DEVICE is "sim", whose capacity is MEMORY, or "cpu", on which the process caps itself at MEMORY bytes above
what it holds after a step for warm-up.
"""

from __future__ import annotations

import io
import sys

import torch
from torch import nn

WIDTH, LAYERS, BATCH = 512, 6, 64  # 1 MiB of parameters a layer; 128 KiB an activation


def build(device: str) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).to(device)


def batch(device: str, samples: int = BATCH) -> torch.Tensor:
    return torch.ones(samples, WIDTH, device=device)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def evaluate(model: nn.Module, device: str) -> None:
    model(batch(device, 200 * BATCH))  # without no_grad, and with a larger batch


def train(kind: str, device: str) -> None:
    model = build(device)
    adam = kind == "optimizer-step"
    optimizer = torch.optim.Adam(model.parameters()) if adam else torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []
    for step in range(1000):
        samples = BATCH
        if kind == "tensors-too-large":
            samples = 400 * BATCH
        elif kind == "longer-sample" and step == 12:
            samples = 300 * BATCH
        if kind == "longer-sample":
            print(f"step {step} tokens {samples}", flush=True)
        loss = train_step(model, optimizer, batch(device, samples))
        if kind == "leak":
            kept.append(model(batch(device)))  # with its graph
            print(f"step {step} allocated {len(kept) + 12:.1f} MiB", flush=True)
        elif kind != "longer-sample":
            print(f"step {step} loss {loss.item():.3f}", flush=True)
        if kind == "evaluation" and step == 3:
            evaluate(model, device)
        if kind == "checkpoint" and step == 3:
            save_and_resume(model, device)
        if kind == "not-memory" and step == 3:
            raise ValueError("sample 17 has no label")


def save_and_resume(model: nn.Module, device: str) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    states = []
    for _ in range(100):
        file.seek(0)
        states.append(torch.load(file, map_location=device))


def main(kind: str, device: str, memory: str) -> None:
    if device == "cpu":
        from memfit.runtime.memory_cap import MemoryLimit

        small = build(device)
        train_step(small, torch.optim.Adam(small.parameters()), batch(device))
        MemoryLimit(int(memory)).apply()
    train(kind, device)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
