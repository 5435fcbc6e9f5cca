"""Replace torch's own kernels in its dispatcher for a while."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def replace_kernels(kernels: Iterable[tuple[str, str, Callable[..., Any]]]) -> Iterator[None]:
    """Inside this context, torch's dispatcher runs other kernels. ``kernels`` has for each the name of an
    operator of the namespace "aten", such as "softmax.int", the dispatch key, such as "AutogradCPU", and the
    function.

    Graph captures dispatch in Python (torch/_ops.py) and keep what they found for an operator. It is
    forgotten when the context begins and when it ends: else a compiled model ran the kernels of an earlier
    device, or had no gradients.
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
    """Return torch's operator of the namespace "aten" with the name ``name``, such as "softmax.int"."""
    packet, _, overload = name.removeprefix("aten::").partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _forget_dispatch(operators: Iterable[Any]) -> None:
    for operator in operators:
        operator._dispatch_cache.clear()
