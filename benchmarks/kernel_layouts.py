"""Do traced operators give their results the shapes and strides that real kernels give them?

    python benchmarks/kernel_layouts.py [--seed 1] [--each 2] [--groups timm monai]

Trains models of unseen_population.py for one step on real tensors, ``--each`` of each group in the seed's
order, and traces every distinct operator call on fake tensors of the same layouts. A result of other strides
lets the next operators choose other kernels than the step does. Prints the operators that differ; exit 1 if
there are any.
"""

from __future__ import annotations

import argparse
import os
import random
from collections import defaultdict
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from unseen_models import CONTEXT, PRELOADED, THREADS, child, first_form, task

from memfit.trace.allocation_recorder import AllocationRecorder
from memfit.trace.operators import call_key


class Compared(TorchDispatchMode):
    """Runs operators. ``differing``: operator -> (arguments, layouts of the kernel, layouts of the trace)."""

    def __init__(self) -> None:
        super().__init__()
        self.differing: dict[str, tuple[str, str, str]] = {}
        self.seen = set[Any]()
        self.untraced = set[str]()
        AllocationRecorder("cpu")  # measures once what it needs autograd for, which a dispatch mode has not

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        key = call_key(func, args, kwargs)
        if func.namespace == "aten" and not func._schema.is_mutable and key not in self.seen:
            self.seen.add(key)
            self._compare(func, args, kwargs, out)
        return out

    def _compare(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        try:
            with FakeTensorMode(), AllocationRecorder("cpu"):
                traced = func(*_pytree.tree_map_only(torch.Tensor, _like, args), **_fakes(kwargs))
        except Exception:  # noqa: BLE001 such as sizes that follow from values
            self.untraced.add(str(func))
            return
        if layouts(traced) != layouts(out):
            self.differing[str(func)] = (
                str(layouts((args, kwargs))),
                str(layouts(out)),
                str(layouts(traced)),
            )


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _fakes(kwargs: Any) -> Any:
    return _pytree.tree_map_only(torch.Tensor, _like, kwargs)


def layouts(values: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(shape, strides) of the tensors of more than one element."""
    leaves = [t for t in _pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]
    return [(tuple(t.shape), t.stride()) for t in leaves if t.layout is torch.strided and t.numel() > 1]


def compare(group: str, name: str) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    made = task(group, name)
    made.model.train()
    batch = made.batches[first_form(made)]
    compared = Compared()
    with compared:
        made.loss(made.model, batch).backward()
    return {"calls": len(compared.seen), "differing": compared.differing, "untraced": compared.untraced}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--each", type=int, default=2, help="models of each group")
    parser.add_argument("--groups", nargs="*", help="only these")
    asked = parser.parse_args()
    from unseen_population import GROUPS

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn reads its constants with pickle
    CONTEXT.set_forkserver_preload([*PRELOADED, "kernel_layouts"])
    differing = defaultdict[str, list[tuple[str, tuple[str, str, str]]]](list)
    untraced, models, calls = set[str](), 0, 0
    for group, (_, make) in GROUPS.items():
        if asked.groups and group not in asked.groups:
            continue
        names, done = list(make()), 0
        for name in random.Random(f"{asked.seed} {group}").sample(names, len(names)):
            found = child(compare, group, name)
            if "error" in found:
                print(f"left out: {group} / {name}: {found['error']}", flush=True)
                continue
            models, calls, done = models + 1, calls + found["calls"], done + 1
            untraced |= found["untraced"]
            for operator, case in found["differing"].items():
                differing[operator].append((f"{group} / {name}", case))
            if done == asked.each:
                break
    print(f"{models} models, {calls} distinct calls, {len(differing)} operators differ")
    print("not traced alone:", ", ".join(sorted(untraced)) or "none")
    for operator, cases in differing.items():
        where, (call, kernel, traced) = cases[0]
        print(
            f"{operator} in {len(cases)} models, as {where}:\n  {call}\n  kernel {kernel}\n  trace  {traced}"
        )
    return int(bool(differing))


if __name__ == "__main__":
    raise SystemExit(main())
