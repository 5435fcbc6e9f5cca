"""What torch's CUDA kernels allocate inside operators, as its caching allocator counts it.

    python tests/unit/cuda_workspaces.py      write tests/data/cuda_workspaces.json; needs CUDA

The sizes follow from the shapes, so that they can also be measured where kernels do nothing, with a stand-in
for the CUDA runtime; the file says how it was written. The test beside it compares memfit's formulas with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RECORD = Path(__file__).parents[1] / "data" / "cuda_workspaces.json"
ATEN: Any = torch.ops.aten
SIZES = (5000, 2**18 + 3, 2**20)
_HALF, _LONG = torch.float16, torch.int64


def calls(device: str) -> dict[str, Callable[[], tuple[Any, ...]]]:  # noqa: C901 - a table
    """Return functions by name that make an operator and its arguments on a device."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    made: dict[str, Callable[[], tuple[Any, ...]]] = {}
    for n in SIZES:
        for dtype in (torch.float32, _HALF, _LONG):
            made |= {
                f"sort {n} {dtype}": lambda n=n, d=dtype: (ATEN.sort, new(n, dtype=d)),
                f"median {n} {dtype}": lambda n=n, d=dtype: (ATEN.median, new(n, dtype=d)),
                f"topk {n} {dtype}": lambda n=n, d=dtype: (ATEN.topk, new(n, dtype=d), n // 4),
                f"unique {n} {dtype}": lambda n=n, d=dtype: (ATEN._unique2, new(n, dtype=d), True, True),
            }
        for dtype in (torch.int32, _LONG):
            rows = n, 8
            made |= {
                f"index_put {n} {dtype}": lambda n=n, d=dtype, r=rows: (
                    (ATEN._index_put_impl_, new(1000, 8), [new(n, dtype=d)], new(*r), True)
                ),
                f"embedding {n} {dtype}": lambda n=n, d=dtype, r=rows: (
                    (ATEN.embedding_dense_backward, new(*r), new(n, dtype=d), 50000, -1, False)
                ),
            }
        made |= {
            f"index_put of two {n}": lambda n=n: (
                (ATEN.index_put_, new(99, 9, 8), [new(n, dtype=_LONG)] * 2, new(n, 8), True)
            ),
            f"index_put of one value {n}": lambda n=n: (
                (ATEN.index_put_, new(1000, 8), [new(n, dtype=_LONG)], new(1), True)
            ),
            f"masked_scatter {n}": lambda n=n: (
                (ATEN.masked_scatter, new(n), new(n, dtype=torch.bool), new(n))
            ),
            f"multinomial {n}": lambda n=n: (ATEN.multinomial, new(64, n // 64), 10, True),
        }
    for rows in (16, 128, 1000):
        for length in (1000, 4097, 20000):
            made |= {
                f"sort rows {rows} {length}": lambda r=rows, c=length: (ATEN.sort, new(r, c), 1),
                f"sort columns {rows} {length}": lambda r=rows, c=length: (ATEN.sort, new(c, r), 0),
                f"topk rows {rows} {length}": lambda r=rows, c=length: (ATEN.topk, new(r, c), c // 2),
            }
    for width in (32, 256):
        for weights in (30_000, 50_000):
            made[f"embedding {width} {weights}"] = lambda w=width, v=weights: (
                (ATEN.embedding_dense_backward, new(2**18, w), new(2**18, dtype=_LONG), v, -1, False)
            )
    for n in (100, 1000):
        made |= {
            f"cdist {n}": lambda n=n: (
                (ATEN._cdist_backward, new(n, 300), new(n, 8), new(300, 8), 1.0, new(n, 300))
            ),
            f"softmax {n}": lambda n=n: (
                (ATEN._softmax_backward_data, new(n, 999), new(n, 999), 1, torch.float32)
            ),
            f"softmax of columns {n}": lambda n=n: (ATEN._softmax, new(999, n).t(), 1, False),
            f"cumsum of columns {n}": lambda n=n: (ATEN.cumsum, new(999, n).t(), 1),
            f"layer norm of columns {n}": lambda n=n: (
                (ATEN.native_layer_norm, new(999, n).t(), [999], None, None, 1e-5)
            ),
        }
    for steps in (128, 512):
        made[f"ctc {steps}"] = lambda s=steps: (
            (
                ATEN._ctc_loss_backward,
                new(64),
                new(s, 64, 32),
                torch.ones(64, 100, dtype=_LONG, device=device),
                [s] * 64,
                [100] * 64,
                new(64),
                new(64, s, 201),
                0,
            )
        )
    return made


def main() -> None:
    torch.zeros(1, device="cuda")
    record = {}
    for name, make in calls("cuda").items():
        operator, *args = make()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = operator(*args)
        after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        record[name] = [peak - before, after - before]
        del out, args
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(sizes)}" for name, sizes in record.items())
    capability = torch.cuda.get_device_capability()
    about = (
        f"torch {torch.__version__}, its caching allocator, compute capability {capability}, CUDA runtime "
        "replaced by functions that do nothing; [peak, outputs] in bytes"
    )
    RECORD.write_text(
        f'{{\n "about": {json.dumps(about)},\n "bytes": {{\n{rows}\n }}\n}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
