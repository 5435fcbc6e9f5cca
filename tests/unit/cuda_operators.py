"""What torch runs for calls on a GPU under autocast, as its own fake CUDA tensors show it.

    python tests/unit/cuda_operators.py      write tests/data/cuda_operators.json; needs torch built for CUDA

No GPU is needed: fake tensors run no kernels. The test beside it compares memfit's traces on fake tensors of
the host with the file.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RECORD = Path(__file__).parents[1] / "data" / "cuda_operators.json"
# dtype of the arguments, dtype of autocast
SETTINGS = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32 in bfloat16": (torch.float32, torch.bfloat16),
}
_VIEWS = {"detach", "alias", "t", "transpose", "permute", "expand", "view", "_unsafe_view"}
_VIEWS |= {"squeeze", "unsqueeze"}
_ONE_ARGUMENT = """
    exp expm1 log log10 log1p log2 acos asin cosh sinh tan erfinv rsqrt reciprocal sum prod mean var std norm
    sqrt sigmoid tanh relu
"""


def calls(device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Return calls of torch's functions on tensors of ``dtype``, and of float32 where a name has "mixed"."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, device=device, dtype=dtype, requires_grad=True)

    def wide(*shape: int) -> torch.Tensor:
        return tensor(*shape, dtype=torch.float32)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device=device, dtype=torch.long)

    x, z, matrix, bias, image = tensor(8, 16), wide(8, 16), wide(16, 16), wide(16), tensor(2, 4, 8, 8)
    rows = tensor(4, 8, 16)
    f = functional
    one = {name: operator.methodcaller(name) for name in _ONE_ARGUMENT.split()}
    return {name: functools.partial(call, x) for name, call in one.items()} | {
        "cross_entropy": lambda: f.cross_entropy(x, numbers(8)),
        "cross_entropy smoothed": lambda: f.cross_entropy(x, numbers(8), label_smoothing=0.1),
        "cross_entropy soft": lambda: f.cross_entropy(x, tensor(8, 16)),
        "cross_entropy of images": lambda: f.cross_entropy(image, numbers(2, 8, 8)),
        "nll_loss": lambda: f.nll_loss(x, numbers(8)),
        "mse_loss mixed": lambda: f.mse_loss(x, z),
        "l1_loss mixed": lambda: f.l1_loss(x, z),
        "smooth_l1_loss mixed": lambda: f.smooth_l1_loss(x, z),
        "huber_loss mixed": lambda: f.huber_loss(x, z),
        "kl_div mixed": lambda: f.kl_div(x, z.detach()),
        "binary_cross_entropy_with_logits": lambda: f.binary_cross_entropy_with_logits(x, z.detach()),
        "poisson_nll_loss": lambda: f.poisson_nll_loss(x, z),
        "triplet_margin_loss": lambda: f.triplet_margin_loss(x, x, x),
        "multi_margin_loss": lambda: f.multi_margin_loss(x, numbers(8)),
        "softmax": lambda: f.softmax(x, -1),
        "softmax in float32": lambda: f.softmax(x, -1, dtype=torch.float32),
        "log_softmax of float32": lambda: f.log_softmax(z, -1),
        "softmin": lambda: f.softmin(x, -1),
        "layer_norm": lambda: f.layer_norm(x, (16,), bias, bias),
        "group_norm": lambda: f.group_norm(image, 2),
        "normalize": lambda: f.normalize(x),
        "linalg.norm": lambda: torch.linalg.norm(x),
        "cosine_similarity": lambda: f.cosine_similarity(x, x),
        "linear mixed": lambda: f.linear(x, matrix, bias),
        "matmul mixed": lambda: rows @ matrix,
        "einsum mixed": lambda: torch.einsum("bij,jk->bik", rows, matrix),
        "bmm": lambda: torch.bmm(rows, rows.transpose(1, 2)),
        "addmm mixed": lambda: torch.addmm(bias, x, matrix),
        "multi_dot mixed": lambda: torch.linalg.multi_dot([x, matrix, matrix]),
        "tensordot mixed": lambda: torch.tensordot(x, matrix, 1),
        "conv1d mixed": lambda: f.conv1d(rows, wide(5, 8, 3)),
        "conv2d mixed": lambda: f.conv2d(image, wide(6, 4, 3, 3)),
        "conv_transpose2d mixed": lambda: f.conv_transpose2d(image, wide(4, 6, 3, 3)),
        "prelu mixed": lambda: f.prelu(x, wide(1)),
        "gelu": lambda: f.gelu(x),
        "silu": lambda: f.silu(x),
        "softplus": lambda: f.softplus(x),
        "glu": lambda: f.glu(x),
        "cumsum": lambda: x.cumsum(0),
        "pow": lambda: x**2,
        "rpow": lambda: 2**x,
        "1 / x": lambda: 1 / x,
        "logsumexp": lambda: x.logsumexp(-1),
        "cdist": lambda: torch.cdist(x, x),
        "renorm": lambda: torch.renorm(x, 2, 0, 1.0),
        "interpolate": lambda: f.interpolate(image, scale_factor=2),
        "interpolate bilinear": lambda: f.interpolate(image, scale_factor=2, mode="bilinear"),
        "grid_sample": lambda: f.grid_sample(image, tensor(2, 8, 8, 2), align_corners=False),
        "cat mixed": lambda: torch.cat([x, z]),
        "stack mixed": lambda: torch.stack([x, z]),
        "addcmul mixed": lambda: torch.addcmul(z, x, x),
        "atan2 mixed": lambda: torch.atan2(x, z),
        "bilinear mixed": lambda: f.bilinear(x, x, wide(3, 16, 16)),
        "dot mixed": lambda: torch.dot(tensor(8), wide(8)),
        "scatter_add mixed": lambda: torch.scatter_add(x, 0, numbers(8, 16), z),
        "embedding": lambda: f.embedding(numbers(4), matrix),
        "dropout": lambda: f.dropout(x, 0.1),
        "dropout without gradient": lambda: f.dropout(x.detach(), 0.1),
        "lstm_cell": lambda: torch.lstm_cell(
            x, (x, x), tensor(64, 16), tensor(64, 16), tensor(64), tensor(64)
        ),
        "attention with weights": lambda: f.multi_head_attention_forward(
            rows, rows, rows, 16, 4, wide(48, 16), wide(48), None, None, False, 0.1, matrix, bias
        ),
    }


def operators(call: Callable[[], Any]) -> list[list[Any]]:
    """Return the operators that the call runs, without views, each with the dtypes and shapes of its results.
    The order of casts that follow one another says nothing, and is sorted."""
    seen: list[list[Any]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            if name not in _VIEWS and func.namespace == "aten":
                seen.append([name, [[str(t.dtype).removeprefix("torch."), *t.shape] for t in results]])
            return out

    with Recorder():
        call()
    groups = itertools.groupby(seen, key=lambda entry: entry[0] == "_to_copy")
    return [entry for is_cast, run in groups for entry in (sorted(run) if is_cast else run)]


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Enable CUDA's autocast, which `torch.autocast` refuses without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_cache_enabled(True)


def main() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    record: dict[str, Any] = {"torch": torch.__version__}
    for setting, (dtype, autocast_dtype) in SETTINGS.items():
        with FakeTensorMode(), cuda_autocast(autocast_dtype):
            record[setting] = {name: operators(call) for name, call in calls("cuda", dtype).items()}
    lines = [f'"torch": "{record.pop("torch")}"']
    for setting, by_call in record.items():
        entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(ops)}" for name, ops in by_call.items())
        lines.append(f'"{setting}": {{\n{entries}\n }}')
    RECORD.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
