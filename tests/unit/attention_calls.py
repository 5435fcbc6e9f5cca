"""Which kernel torch chooses for calls of attention on a GPU, and what trainings with attention take there.

    CUBLAS_WORKSPACE_CONFIG=:0:0 CUBLASLT_WORKSPACE_SIZE=0 python tests/unit/attention_calls.py

writes this GPU's part of tests/data/attention_calls.json. It needs torch built for CUDA and a CUDA device. It
was recorded with torch 2.15's own dispatcher and caching allocator on a stand-in for the CUDA runtime, which
gives host memory, runs no kernels and reports the compute capability that is asked for.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from memfit import Job

RECORD = Path(__file__).parents[1] / "data" / "attention_calls.json"
LETTERS = {"error": "-", "math": "m", "flash": "f", "efficient": "e", "cudnn": "c"}
_BACKENDS = ("math", "flash", "efficient", "cudnn")  # by number from 0 on
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_HEAD_DIMS = (1, 4, 6, 8, 18, 20, 36, 64, 128, 192, 196, 224, 232, 256, 264, 512)
_LAYOUTS = ("heads last", "transposed", "every second", "expanded batch", "expanded dim", "offset")
_MASKS = (
    "bool",
    "keys",
    "expanded queries",
    "expanded keys",
    "transposed",
    "float",
    "float of all",
    "trained",
    "every second",
)


def cases() -> list[dict[str, Any]]:
    """Return descriptions of calls, for `arguments`: what differs from a plain one."""
    every: list[dict[str, Any]] = []
    sizes = itertools.product(_HEAD_DIMS, (None, "bool"), (0.0, 0.1), (True, False))
    every += [{"dim": d, "value_dim": d, "mask": m, "dropout": p, "grad": g} for d, m, p, g in sizes]
    every += [{"dim": d, "value_dim": v} for d in (8, 64) for v in (1, 8, 128)]
    for layout, dim in itertools.product(_LAYOUTS, (1, 8, 64)):
        where = [("queries", "keys", "values"), ("queries",), ("keys",), ("values",)]
        every += [{"dim": dim, "value_dim": dim, **dict.fromkeys(names, layout)} for names in where]
    every += [{"mask": mask, "key_length": n} for mask in _MASKS for n in (64, 63, 1)]
    lengths = ((64, 64), (64, 96), (1, 64), (64, 1), (0, 64), (64, 0))
    for (q, k), causal in itertools.product(lengths, (True, False)):
        every += [{"length": q, "key_length": k, "causal": causal}]
    heads = ((4, 2, 2), (4, 1, 1), (4, 2, 4), (4, 4, 2), (4, 3, 3), (1, 4, 4), (4, 4, 4))
    for (h, k, v), grouped, mask in itertools.product(heads, (False, True), (None, "bool")):
        for dims in (4, 3):
            numbers = {"heads": h, "key_heads": k, "value_heads": v}
            every += [numbers | {"grouped": grouped, "mask": mask, "dims": dims}]
    every += [{"batch": b, "key_batch": k, "mask": m} for b, k in ((2, 1), (1, 2)) for m in (None, "bool")]
    every += [{"dims": dims, "mask": mask} for dims in (2, 5) for mask in (None, "bool")]
    return [{"dtype": dtype} | case for dtype in _DTYPES for case in every]


def is_of_new_rules(case: dict[str, Any]) -> bool:
    """Return whether the call is one that torch decides in another way from 2.15 on."""
    has_offset = "offset" in case.values()
    return has_offset or case.get("dims") == 3 or case.get("key_heads", 4) != case.get("heads", 4)


def arguments(case: dict[str, Any], device: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Return (queries, keys and values; the other arguments of attention) of a call."""
    get, dtype = case.get, getattr(torch, case["dtype"])
    batch, length, dim, dims = get("batch", 2), get("length", 64), get("dim", 64), get("dims", 4)
    key_length = get("key_length", 64)
    shapes = {
        "queries": (batch, get("heads", 4), length, dim),
        "keys": (get("key_batch", 2), get("key_heads", 4), key_length, dim),
        "values": (get("key_batch", 2), get("value_heads", 4), key_length, get("value_dim", 64)),
    }
    options = {"dtype": dtype, "device": device, "requires_grad": get("grad", True)}
    tensors = [_tensor(get(name, ""), shape, options) for name, shape in shapes.items()]
    mask = _mask(get("mask"), (batch, get("heads", 4), length, key_length), dtype, device)
    if dims != 4:
        tensors = [t[0] if dims == 3 else t[0, 0] if dims == 2 else t[None] for t in tensors]
        mask = mask[0] if dims == 3 and mask is not None and mask.dim() == 4 else mask
    return tensors, {
        "attn_mask": mask,
        "dropout_p": get("dropout", 0.0),
        "is_causal": get("causal", False),
        "enable_gqa": get("grouped", False),
    }


def _tensor(layout: str, shape: tuple[int, ...], options: dict[str, Any]) -> torch.Tensor:
    *outer, heads, length, dim = shape
    if layout == "heads last":
        return torch.empty(*outer, length, heads, dim, **options).transpose(-2, -3)
    if layout == "transposed":
        return torch.empty(*outer, heads, dim, length, **options).transpose(-1, -2)
    if layout == "every second":
        return torch.empty(*outer, heads, length, 2 * dim, **options)[..., ::2]
    if layout == "expanded batch":
        return torch.empty(1, heads, length, dim, **options).expand(shape)
    if layout == "expanded dim":
        return torch.empty(*outer, heads, length, 1, **options).expand(shape)
    if layout == "offset":
        return torch.empty(*outer, heads, length, dim + 1, **options)[..., 1:]
    return torch.empty(shape, **options)


def _mask(
    name: str | None, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> torch.Tensor | None:
    batch, _, queries, keys = shape

    def empty(*sizes: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    masks: dict[str, Callable[[], torch.Tensor]] = {
        "bool": lambda: empty(queries, keys),
        "keys": lambda: empty(batch, 1, 1, keys),
        "expanded queries": lambda: empty(batch, 1, 1, keys).expand(batch, 1, queries, keys),
        "expanded keys": lambda: empty(batch, 1, queries, 1).expand(batch, 1, queries, keys),
        "transposed": lambda: empty(batch, 1, keys, queries).transpose(-1, -2),
        "float": lambda: empty(1, 1, queries, keys, dtype=dtype),
        "float of all": lambda: empty(*shape, dtype=dtype),
        "trained": lambda: empty(*shape, dtype=dtype).requires_grad_(),
        "every second": lambda: empty(1, 1, queries, 2 * keys, dtype=dtype)[..., ::2],
    }
    return masks[name]() if name else None


# -- trainings -------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    """Attention with a residual connection, under autocast to ``dtype``. ``how``: "causal"; "padded", a mask
    over odd lengths; "transposed", heads whose elements are not consecutive, as in diffusion models; "bank",
    keys and values without a batch; "grouped", two heads of keys and values for eight and a mask;
    "unbatched", tensors of three dimensions."""

    def __init__(self, how: str, dtype: torch.dtype, dim: int) -> None:
        super().__init__()
        self.how, self.dtype, self.dim = how, dtype, dim
        heads = 12 if how == "grouped" else 24
        self.qkv, self.out = nn.Linear(32, heads * dim), nn.Linear(8 * dim, 32)
        self.bank = nn.Parameter(torch.randn(2, 1, 8, 384, dim)) if how == "bank" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, self.dtype):
            return x + self.out(self.attend(x))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        rows, how, attention = self.qkv(x), self.how, functional.scaled_dot_product_attention
        if how == "transposed":
            rows = rows.transpose(1, 2).contiguous().unflatten(1, (3, 8, self.dim))
            q, k, v = rows.transpose(-1, -2).unbind(1)
            return attention(q, k, v).transpose(1, 2).flatten(2)
        q, k, v = (
            rows.unflatten(-1, (-1, self.dim)).transpose(1, 2).split([8, 2, 2] if how == "grouped" else 8, 1)
        )
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if how == "unbatched":
            out = torch.stack([attention(*each) for each in zip(q, k, v, strict=True)])
        elif self.bank is not None:
            out = attention(q, *self.bank)
        elif how == "grouped":
            out = attention(q, k, v, seen, enable_gqa=True)
        else:
            out = attention(q, k, v, seen if how == "padded" else None, is_causal=how == "causal")
        return out.transpose(1, 2).flatten(2)


JOBS = {
    f"{how}, {dtype}, {dim}": (how, dtype, dim)
    for how, dtype, dim in (
        ("causal", "float16", 64),
        ("causal", "float16", 36),
        ("causal", "bfloat16", 64),
        ("causal", "bfloat16", 200),
        ("padded", "bfloat16", 64),
        ("transposed", "bfloat16", 64),
        ("bank", "bfloat16", 64),
        ("grouped", "bfloat16", 64),
        ("unbatched", "float16", 64),
    )
}


def job_of(name: str) -> Job:
    """Return a job of `JOBS`."""
    how, dtype, dim = JOBS[name]
    return Job(
        name="attention",
        build_model=lambda: _Attention(how, getattr(torch, dtype), dim),
        make_batch=lambda step, seed: torch.zeros(2, 383, 32),
        loss=lambda model, batch: model(batch).square().mean(),
        batch_size=2,
    )


# -- recording -------------------------------------------------------------------------------------------


def _choices() -> Iterator[str]:
    for case in cases():
        tensors, options = arguments(case, "cuda")
        mask = options.pop("attn_mask")
        try:
            number = int(torch._fused_sdp_choice(*tensors, mask, **options))
        except RuntimeError:
            number = -1
        yield LETTERS[_BACKENDS[number] if number >= 0 else "error"]


def _peak_bytes(name: str) -> int:
    """Return the peak of the bytes that are asked of the allocator: it may give up to 1 MiB more a block."""
    job = job_of(name)
    model = job.build_model().cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(3):
        batch = job.make_batch(step, 0).cuda()
        torch.cuda.reset_peak_memory_stats()
        job.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        del batch
    return torch.cuda.memory_stats()["requested_bytes.all.peak"]


def main() -> None:
    """Add what this GPU's compute capability chooses, cuDNN's kernel disabled and it alone enabled, and what
    the jobs take on it."""
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    torch.backends.cuda.enable_cudnn_sdp(False)
    part: dict[str, Any] = {"choices": "".join(_choices())}
    part["bytes"] = {name: _peak_bytes(name) for name in JOBS}
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        part["cudnn"] = "".join(_choices())
    record |= {"torch": torch.__version__, capability: part}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
