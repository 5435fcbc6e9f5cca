"""Replace torch's own kernels in its dispatcher for a while."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def replace_kernels(kernels: Iterable[tuple[str, str, Callable[..., Any]]]) -> Iterator[None]:
    """Inside this context, torch's dispatcher runs other kernels. ``kernels`` has for each (operator of the
    namespace "aten" as for `aten_operator`, such as "softmax.int"; dispatch key, such as "AutogradCPU";
    function to run).

    Graph captures dispatch in Python (torch/_ops.py), in a cache of each operator. The caches of these
    operators are cleared when the context begins and when it ends: else a compiled model would run the
    kernels of an earlier device, or have no gradients. Raises what `aten_operator` raises.
    """
    kernels = list(kernels)
    operators = {aten_operator(name) for name, _, _ in kernels}
    try:
        with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that kernels of torch are replaced
            for name, key, function in kernels:
                library.impl(name, function, key)
            _forget_dispatch(operators)
            yield
    finally:
        _forget_dispatch(operators)


def aten_operator(name: str) -> Any:
    """Return torch's operator of the namespace "aten" with the name ``name``, such as "softmax.int" or
    "aten::softmax.int". Raises AttributeError if there is none."""
    packet, _, overload = name.removeprefix("aten::").partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _forget_dispatch(operators: Iterable[Any]) -> None:
    for operator in operators:
        operator._dispatch_cache.clear()
