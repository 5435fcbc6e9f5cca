"""Record the norms of the gradients that an update receives, and the calls of torch's clipping."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Self
from unittest import mock

import torch
from torch.nn.utils import clip_grad

from memfit.conformance.observation import UpdateNorms
from memfit.conformance.planned_shards import shard_degree
from memfit.conformance.prepared import Prepared
from memfit.conformance.sharding import world_size

_TORCH = ("_clip_grads_with_norm_", "clip_grads_with_norm_")  # torch's functions that scale gradients


class ClippingProbe:
    """Records calls of torch's gradient clipping between `__enter__` and `__exit__`, and the norms of
    gradients in each `before_update`.

    - ``limits``: the maximum norms with which torch's clipping was called.
    - ``squares``: id of a parameter -> (squared norm of its gradient on this rank, number of ranks that hold
      the same elements of it). Of several updates of a parameter, the one with the largest norm.
    - ``before``: the norm of all ranks' gradients before any clipping; None until the caller sets it.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self._stack = prepared, contextlib.ExitStack()
        self.limits: set[float] = set()
        self.squares: dict[int, tuple[float, float]] = {}
        self.before: float | None = None

    def __enter__(self) -> Self:
        for module in (clip_grad, torch.nn.utils):
            for name in _TORCH:
                if (inner := getattr(module, name, None)) is not None:
                    self._stack.enter_context(mock.patch.object(module, name, self._recording(inner)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _recording(self, inner: Callable[..., None]) -> Callable[..., None]:
        def clips(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> None:
            self.limits.add(float(max_norm))
            inner(parameters, max_norm, *args, **kwargs)

        return clips

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the gradient norm of each parameter of ``optimizer`` that has a gradient; to be called
        before each of its updates. An engine may update in several calls with different parameters. If a
        parameter is recorded several times, the largest norm is kept. Does nothing if ``Prepared.clip`` is
        None (it is unknown whether gradients should be clipped), because each norm waits for the device."""
        if self._prepared.clip is None:
            return
        for param in (p for group in optimizer.param_groups for p in group["params"]):
            if param.grad is not None:
                copies, local = self._copies(param.grad)
                square = float(torch.linalg.vector_norm(local, dtype=torch.float32)) ** 2
                self.squares[id(param)] = max((square, copies), self.squares.get(id(param), (0.0, 1.0)))

    def _copies(self, grad: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Return (number of ranks that hold the same elements of ``grad`` as this rank, these elements). They
        are a plain tensor, of a sparse gradient its stored values."""
        mesh: Any = getattr(grad, "device_mesh", None)
        local: torch.Tensor = grad.to_local() if mesh is not None else grad  # type: ignore[attr-defined]
        if local.is_sparse:
            local = local.coalesce().values()
        if mesh is None:
            degree = shard_degree(self._prepared.plan, "optimizer state")[0] if self._flat() else 1
            return world_size() / degree, local
        shard_count = math.prod(mesh.size(i) for i, p in enumerate(grad.placements) if p.is_shard())  # type: ignore[attr-defined]
        return world_size() / shard_count, local

    def _flat(self) -> bool:
        """Return whether an optimizer's tensor that is no DTensor is on one rank of a shard group only, as
        with zero and sharded-ddp."""
        return any(name in self._prepared.plan for name in ("zero", "sharded-ddp"))

    def observed(self) -> UpdateNorms:
        """Return what was recorded so far, without ``before``."""
        return UpdateNorms(
            limits=frozenset(self.limits),
            is_observed=bool(self.squares),
            squared_norm=sum(square for square, _ in self.squares.values()),
            squared_norm_share=sum(square / copies for square, copies in self.squares.values()),
        )
