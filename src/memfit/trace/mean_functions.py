"""Functions of a sum or mean over samples that are not linear, such as ``(loss - b).abs()``, in the autograd
graph of a loss. At some values they act as a linear function, so that a trial may not notice them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_TAKING_SAMPLES = "Select Slice Index IndexSelect Unbind Split SplitWithSizes Narrow Squeeze Gather"
_COPYING = "View Reshape ReshapeAlias UnsafeView Unsqueeze Expand Permute T Transpose ToCopy Clone Copy Alias"
# Linear in each of their arguments. A product or quotient of two means shows at every value.
_ADDING = "Add Sub Rsub Neg Mul Div Sum Mean Nansum Mm Mv Bmm Addmm Addmv Baddbmm Dot Stack Cat Cumsum Trace"
_PICKS = frozenset(_TAKING_SAMPLES.split())
_LINEAR = _PICKS | frozenset(
    f"{_COPYING} {_ADDING} Lerp NllLoss NllLoss2D AccumulateGrad Repeat Flip".split()
)


def function_of_a_mean(whole: Any, half: Any) -> str:
    """Return the name of a function that is not linear and is applied to a sum, mean or other reduction over
    samples, such as "abs"; "" if there is none. ``whole``, ``half``: the autograd nodes of the losses of a
    batch and of half of it.

    A tensor with the same shape in both graphs counts as one without a dimension of samples. Where the graphs
    differ in their operators, they are not followed further.
    """
    for nodes in _walk((whole, half), into_samples=True):
        name = _name(nodes[0])
        if name not in _LINEAR and not _has_samples(nodes) and _is_of_reduction(nodes):
            return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    return ""


def _is_of_reduction(nodes: tuple[Any, Any]) -> bool:
    """Return whether an argument of a node without a dimension of samples was made by reducing such a
    dimension, or from several samples of one tensor, as by a sum in Python. ``nodes``: the node in the graph
    of the whole batch and that in the graph of the half."""
    picked: dict[Any, set[Any]] = {}  # node with samples -> what of its result was picked
    for below in _walk(nodes, into_samples=False):
        sources = [child[0] for child in _arguments(below) if _has_samples(child)]
        if not sources or below[0] is nodes[0]:
            continue
        if all(_name(source) == "Unbind" for source in sources):  # whose results are samples
            for node, number in below[0].next_functions:
                if node in sources:
                    picked.setdefault(node, set()).add(number)
            continue
        if _name(below[0]) not in _PICKS:
            return True
        numbers = [getattr(below[0], name, None) for name in ("_saved_index", "_saved_start")]
        picked.setdefault(sources[0], set()).add(tuple(n for n in numbers if isinstance(n, int)))
    return any(len(samples) > 1 for samples in picked.values())


def _walk(nodes: tuple[Any, Any], *, into_samples: bool) -> Iterator[tuple[Any, Any]]:
    """Yield the pair ``nodes`` (a node in the graph of the whole batch and in that of the half) and the pairs
    of the nodes whose results they use, directly or not, as long as both of a pair are of the same kind.
    ``into_samples``: whether to go on at nodes with a dimension of samples, which are left out otherwise."""
    waiting, known = [nodes], set()
    while waiting:
        whole, half = waiting.pop()
        if whole is None or half is None or whole in known or _name(whole) != _name(half):
            continue
        if not into_samples and _has_samples((whole, half)):
            continue
        known.add(whole)
        yield whole, half
        waiting.extend(_arguments((whole, half)))


def _arguments(nodes: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    pairs = zip(nodes[0].next_functions, nodes[1].next_functions, strict=False)
    return [(a, b) for (a, _), (b, _) in pairs if a is not None and b is not None]


def _has_samples(nodes: tuple[Any, Any]) -> bool:
    return _shapes(nodes[0]) != _shapes(nodes[1])


def _shapes(node: Any) -> list[Any]:
    if hasattr(node, "variable"):
        return [tuple(node.variable.shape)]
    return [tuple(m.shape) for m in node._input_metadata]


def _name(node: Any) -> str:
    return re.sub(r"(Backward)?\d*$", "", node.name().rsplit("::")[-1])
