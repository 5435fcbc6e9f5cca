"""Measure the peak of live tensor bytes and the loss of a training script, per optimizer step.

Python imports this module at start when its folder is on PYTHONPATH. It does nothing unless the environment
names a folder in MEMFIT_TRUTH. Then the import of torch also installs the counting allocator, and each
process that takes two optimizer steps, or as many as MEMFIT_TRUTH_STEPS says, writes `rank-<RANK>.json` there
and ends. The loss of a step is the sum of what `backward` was called on, as each micro-batch passes its share
of it. Nothing here imports memfit's tracer or its cost model. With MEMFIT_TORCH_SEED, torch starts with that
seed in place of a random one. With MEMFIT_TRUTH_NUDGE, each weight is multiplied by 1 plus or minus that
number before the first forward pass, with signs drawn from the seed MEMFIT_TRUTH_NUDGE_SEED, apart from
torch's own random numbers. With MEMFIT_ANY_CIFAR, torchvision does not check the MD5 sums of CIFAR-10's
files.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STEPS = int(os.environ.get("MEMFIT_TRUTH_STEPS", "2"))
_WAIT_S = 30.0


class _Finder(importlib.abc.MetaPathFinder):
    """Find one module as usual, with a loader that calls `then` after the module's own code has run."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _after_torch(torch: Any) -> None:
    if seed := os.environ.get("MEMFIT_TORCH_SEED"):
        torch.manual_seed(int(seed))
    if folder := os.environ.get("MEMFIT_TRUTH"):
        _Measurement(Path(folder)).start()


def _accept_any_cifar(cifar: Any) -> None:
    """Let torchvision read a CIFAR-10 that is not the published one."""
    cifar.CIFAR10._check_integrity = lambda dataset: True
    cifar.check_integrity = lambda path, md5=None: True


class _Measurement:
    """Peaks of live bytes: until the first forward pass that computes gradients, then of each optimizer
    step."""

    def __init__(self, folder: Path) -> None:
        from memfit.runtime.counting_allocator import CountingAllocator

        self._folder = folder
        self._allocator = CountingAllocator()
        self._begin_s = time.monotonic()
        self._setup: dict[str, Any] | None = None
        self._steps: list[dict[str, Any]] = []
        self._process = os.getpid()
        self._losses: list[float] = []
        self._depth = 0  # of backward passes and of optimizer steps, which may run inside each other

    def start(self) -> None:
        import torch
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        self._allocator.install()
        self._handle = register_module_forward_pre_hook(self._before_forward)
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)
        torch.autograd.backward = self._recorded(torch.autograd.backward)

    def _recorded(self, backward: Callable[..., None]) -> Callable[..., None]:
        def call(tensors: Any, *arguments: Any, **options: Any) -> None:
            if self._depth == 0 and getattr(tensors, "numel", lambda: 0)() == 1:
                self._losses.append(tensors.detach().item())
            self._depth += 1
            try:
                backward(tensors, *arguments, **options)
            finally:
                self._depth -= 1

        return call

    def _before_forward(self, module: Any, arguments: Any) -> None:
        import torch

        trains = module.training and torch.is_grad_enabled()
        if trains and any(p.requires_grad for p in module.parameters()):
            self._handle.remove()
            if nudge := float(os.environ.get("MEMFIT_TRUTH_NUDGE", "0")):
                _nudge(module, nudge)
            self._setup = self._next_period()

    def _before_step(self, optimizer: Any, arguments: Any, options: Any) -> None:
        self._depth += 1

    def _after_step(self, optimizer: Any, arguments: Any, options: Any) -> None:
        self._depth -= 1
        if os.getpid() != self._process or self._depth:
            return
        loss = {"loss": sum(self._losses), "backward_calls": len(self._losses)}
        self._losses.clear()
        self._steps.append(self._next_period() | {"optimizer": type(optimizer).__name__} | loss)
        if len(self._steps) == _STEPS:
            self._write()
            os._exit(0)

    def _next_period(self) -> dict[str, Any]:
        period = {
            "peak_bytes": self._allocator.peak_bytes(),
            "end_bytes": self._allocator.live_bytes(),
            "end_s": time.monotonic() - self._begin_s,
        }
        self._allocator.reset_peak()
        return period

    def _write(self) -> None:
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        record = {
            "rank": rank,
            "setup": self._setup,
            "steps": self._steps,
            "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        draft = self._folder / f"rank-{rank}.draft"
        draft.write_text(json.dumps(record), encoding="utf-8")
        draft.rename(self._folder / f"rank-{rank}.json")
        limit_s = time.monotonic() + _WAIT_S  # a rank that leaves early would end the others
        while len(list(self._folder.glob("rank-*.json"))) < ranks and time.monotonic() < limit_s:
            time.sleep(0.05)


def _nudge(module: Any, ratio: float) -> None:
    import torch

    generator = torch.Generator().manual_seed(int(os.environ.get("MEMFIT_TRUTH_NUDGE_SEED", "1")))
    with torch.no_grad():
        for param in module.parameters():
            signs = torch.randint(0, 2, param.shape, generator=generator) * 2 - 1
            param.mul_(1 + ratio * signs)


if os.environ.get("MEMFIT_TRUTH") or os.environ.get("MEMFIT_TORCH_SEED"):
    sys.meta_path.insert(0, _Finder("torch", _after_torch))
if os.environ.get("MEMFIT_ANY_CIFAR"):
    sys.meta_path.insert(0, _Finder("torchvision.datasets.cifar", _accept_any_cifar))
