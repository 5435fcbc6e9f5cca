"""Do the bounds of convolution workspaces hold? Random shapes, run on this processor.

    python benchmarks/workspaces.py [--seed 1] [--count 300] [--threads 2]

Prints how many calls took more than `memfit.cost.workspaces.bound_bytes` allows, and the largest share of
a bound that was used. Exit 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from typing import Any

import torch

from memfit.cost.workspaces import bound_bytes
from memfit.runtime.memory import PeakCounter, peak_counter
from memfit.trace.signature import describe

_MOST_BYTES, _MOST_PRODUCTS = 2**25, 4 * 10**9
_FORWARD, _BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


def drawn(rng: random.Random) -> tuple[list[int], list[int], list[Any], torch.dtype] | None:
    """(input's shape, weight's shape, the other arguments of aten.convolution, dtype); None: too large."""
    rank = rng.choice([1, 2, 2, 2, 3])
    groups: Any = rng.choice([1, 1, 1, 1, "each", 2, 4])
    cin = rng.choice([1, 3, 4, 8, 13, 16, 24, 32, 48, 64, 100, 128, 256])
    if groups == "each":
        groups, cout = cin, cin * rng.choice([1, 1, 2])
    else:
        cin = -(-cin // groups) * groups
        cout = -(-rng.choice([1, 2, 3, 8, 10, 16, 32, 40, 64, 128, 256]) // groups) * groups
    kernel = [rng.choice([1, 2, 3, 3, 3, 4, 5, 7])] * rank
    size = {1: [16, 100, 500, 2000], 2: [7, 14, 28, 32, 56, 64], 3: [6, 12, 16, 24]}[rank]
    x = [rng.choice([1, 1, 2, 4, 8, 16]), cin, *[rng.choice(size)] * rank]
    transposed = rng.random() < 0.2
    weight = [cin, cout // groups, *kernel] if transposed else [cout, cin // groups, *kernel]
    dtype = rng.choice([torch.float32] * 6 + [torch.bfloat16, torch.float64])
    stride, padding = [rng.choice([1, 1, 1, 2, 4])] * rank, [rng.choice([0, kernel[0] // 2])] * rank
    dilation = [rng.choice([1, 1, 1, 2])] * rank
    products = x[0] * cout * cin // groups * math.prod(kernel) * math.prod(x[2:])
    if math.prod(x) * 4 > _MOST_BYTES or products > _MOST_PRODUCTS:
        return None
    return x, weight, [stride, padding, dilation, transposed, [0] * rank, groups], dtype


def used(counter: PeakCounter, rng: random.Random) -> Iterator[tuple[float, str]]:
    """(bytes taken inside / bound, signature) of one convolution, forward and backward."""
    if (shapes := drawn(rng)) is None:
        return
    x_shape, weight_shape, rest, dtype = shapes
    x, weight = torch.rand(x_shape, dtype=dtype), torch.rand(weight_shape, dtype=dtype)
    bias = torch.rand(weight_shape[1] * rest[5] if rest[3] else weight_shape[0], dtype=dtype)
    try:
        out, first = inside(counter, _FORWARD, [x, weight, bias, *rest])
    except RuntimeError:  # the kernel is larger than the input
        return
    yield first
    call = [torch.rand_like(out), x, weight, [len(bias)], *rest, [True, True, True]]
    yield inside(counter, _BACKWARD, call)[1]


def inside(counter: PeakCounter, call: Any, args: list[Any]) -> tuple[Any, tuple[float, str]]:
    before = counter.live_bytes()
    counter.reset_peak()
    out = call(*args)
    extra_bytes = counter.peak_bytes() - counter.live_bytes()
    assert counter.live_bytes() > before
    signature = describe(str(call), args, {})
    return out, (extra_bytes / bound_bytes(signature, "cpu", torch.get_num_threads()), signature)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    counter, rng = peak_counter(), random.Random(asked.seed)
    shares = sorted((s for _ in range(asked.count) for s in used(counter, rng)), reverse=True)
    over = [s for s in shares if s[0] > 1]
    print(
        f"{len(shares)} calls, {len(over)} above the bound, largest share {shares[0][0]:.2f}: {shares[0][1]}"
    )
    return int(bool(over))


if __name__ == "__main__":
    raise SystemExit(main())
