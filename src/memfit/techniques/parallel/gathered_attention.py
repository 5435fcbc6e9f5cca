"""Attention of this rank's queries to the keys and values of every rank's slice of the sequence."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from memfit.techniques.parallel.sample_parallel_collectives import GroupCollectives
from memfit.types.device_kind import DeviceKind
from memfit.types.errors import UserError

_HALF = (torch.float16, torch.bfloat16)
_ATEN: Any = torch.ops.aten
Site = tuple[tuple[Any, int], ...]  # (code, instruction)
_DEEP, _UNDER = 2, (str(Path(torch.__file__).parent), str(Path(__file__).parent))
Slices = tuple[slice, slice, bool]  # of queries and of keys, and whether attention between them is causal


@dataclasses.dataclass(slots=True, kw_only=True)
class SequenceRanks(GroupCollectives):
    """The ranks that share a sequence, each of which holds an equal part of it. ``length`` is the length of
    one rank's part, 0 until a batch is cut. ``device`` is the kind of device whose attention kernels run.

    The sequence consists of 2 x ranks chunks of one length. Rank r holds chunk r and, after it, chunk 2 x
    ranks - 1 - r.
    """

    device: DeviceKind
    length: int = 0
    fixed: Mapping[Site, frozenset[int]] = dataclasses.field(default_factory=dict)  # from `GatheredCounts`

    def positions(self, rank: int) -> torch.Tensor:
        """Return the positions, in the whole sequence, of the elements of a rank's part, in the order of that
        part."""
        chunk = self.length // 2
        front, back = rank * chunk, (2 * self.ranks - 1 - rank) * chunk
        return torch.cat([torch.arange(front, front + chunk), torch.arange(back, back + chunk)])

    def blocks(self, causal: bool) -> Iterator[tuple[int, Slices]]:
        """Yield (rank of the keys, (slice of this rank's queries, slice of those keys, whether attention
        between them is causal)) for each pair whose attention must be computed: this rank first, then the
        others in ascending order. Under causal attention, this rank sees only the first chunk of earlier
        ranks, and only its second chunk sees later ranks."""
        everything, front, back = slice(None), slice(0, self.length // 2), slice(self.length // 2, None)
        yield self.rank, (everything, everything, causal)
        for key_rank in range(self.ranks):
            if key_rank == self.rank:
                continue
            if not causal:
                yield key_rank, (everything, everything, False)
            elif key_rank < self.rank:
                yield key_rank, (everything, front, False)
            else:
                yield key_rank, (back, everything, False)


class GatheredAttention(TorchFunctionMode):
    """Mode in which scaled_dot_product_attention covers the keys and values of all ranks' parts of the
    sequence, and ``torch.arange(n)`` returns this rank's positions in the whole sequence if n is the length
    of a part. Calls of ``multi_head_attention_forward``, as by torch.nn.MultiheadAttention, raise UserError.

    ``across.fixed`` lists exceptions: the places in the code that also counted to n when the sequence was
    whole, and therefore count something else than positions.
    """

    def __init__(self, across: SequenceRanks) -> None:
        super().__init__()
        self.across = across

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _attention(self.across, *args, **kwargs)
        if func is functional.multi_head_attention_forward:  # this mode does not see the attention inside
            raise UserError(
                "context-parallel does not support torch.nn.MultiheadAttention",
                allowed="attention by torch.nn.functional.scaled_dot_product_attention",
                hint="plan with --without context-parallel",
            )
        out = func(*args, **kwargs)
        length = self.across.length
        if _arange_length(func, args) == length and length not in self.across.fixed.get(_site(), ()):
            return self.across.positions(self.across.rank).to(out)
        return out


class GatheredCounts(TorchFunctionMode):
    """Mode that records in ``counts``, for each place in the code, the numbers to which ``torch.arange``
    counts there. It is used while the sequence is whole. A place that later counts to the same number on a
    part of the sequence counts something else than positions, such as channels or heads."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[Site, set[int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (count := _arange_length(func, args)) is not None:
            self.counts.setdefault(_site(), set()).add(count)
        return func(*args, **(kwargs or {}))


def _arange_length(func: Any, args: Any) -> int | None:
    """Return n if the call is torch.arange(n) or torch.arange(0, n) with positional integers, else None.
    Keyword arguments are ignored: torch.arange(n, dtype=...) gives n, torch.arange(end=n) gives None."""
    if func is not torch.arange or len(args) not in {1, 2} or not all(isinstance(a, int) for a in args):
        return None
    return args[-1] if len(args) == 1 or args[0] == 0 else None


def _site() -> Site:
    """Return the place in the code from which a function was called: (code object, index of the instruction)
    of the two innermost stack frames whose file is neither torch's nor in the folder of this file, or of
    fewer if the stack has no more. The instruction is included because one line may hold several calls."""
    calls = list[tuple[Any, int]]()
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and len(calls) < _DEEP:
        if not frame.f_code.co_filename.startswith(_UNDER):
            calls.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(calls)


def _attention(
    across: SequenceRanks,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **grouped: bool,
) -> torch.Tensor:
    """Return scaled dot-product attention of this rank's queries to the keys of all ranks, with the arguments
    of torch's function. Tensors have shape (batch, heads, length of a part, head dim); keys and values may
    have fewer heads. Raises UserError if the number of queries or of keys is not the length of a part, for
    dropout, and for a mask that is not of shape (batch or 1, 1, 1, length), which masks keys."""
    if query.shape[2] != across.length or key.shape[2] != across.length:
        raise UserError(
            f"context-parallel does not support attention of {query.shape[2]} queries to {key.shape[2]} keys",
            allowed=f"self-attention, with this rank's {across.length} positions as queries and as keys",
        )
    if dropout_p:
        raise UserError("context-parallel does not support dropout in attention", allowed="dropout_p=0")
    if attn_mask is not None and (attn_mask.dim() != 4 or attn_mask.shape[1:3] != (1, 1)):
        raise UserError(
            f"context-parallel does not support an attention mask of shape {tuple(attn_mask.shape)}",
            allowed="no mask (is_causal=True is possible), or one of shape (batch, 1, 1, length) for keys",
        )
    if torch.is_autocast_enabled(query.device.type):
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    bias = None if attn_mask is None else _additive(attn_mask, query).expand(query.shape[0], 1, 1, -1)
    out: torch.Tensor = _Attend.apply(query, key, value, bias, across, is_causal, scale)  # type: ignore[no-untyped-call]
    return out


def _additive(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return the mask, which is boolean (True: visible) or additive, as an additive mask of the query's
    dtype. In place of minus infinity it has the lowest finite value: a query may have no visible key in a
    block, whose weight must then be 0 and not nan."""
    lowest = torch.finfo(query.dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), lowest)
    return mask.to(query.dtype).clamp(min=lowest)


class _Attend(torch.autograd.Function):
    """The autograd function of attention of this rank's queries to the keys and values of all ranks, block by
    block. It saves only this rank's tensors for backward, in which the keys and values of other ranks are
    gathered again. ``bias`` is an additive mask of this rank's keys, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        across: SequenceRanks,
        causal: bool,
        scale: float | None,
    ) -> torch.Tensor:
        keys, values = across.gather(key), across.gather(value)
        biases = across.gather(bias) if bias is not None else None
        out = total = torch.empty(0)
        for key_rank, (rows, columns, is_causal) in across.blocks(causal):
            block_bias = _columns(biases, key_rank, columns, rows, query)
            kernel = _Kernel(device=across.device, causal=is_causal, scale=scale, bias=block_bias)
            part, weight = kernel.forward(
                query[:, :, rows], keys[key_rank][:, :, columns], values[key_rank][:, :, columns]
            )
            if key_rank == across.rank:
                out, total = part.float(), weight
            else:
                _merge(out[:, :, rows], total[:, :, rows], part, weight)
        out = out.to(query.dtype)
        ctx.across, ctx.causal, ctx.scale = across, causal, scale
        ctx.save_for_backward(query, key, value, bias, out, total)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, bias, out, total = ctx.saved_tensors
        across: SequenceRanks = ctx.across
        keys, values = across.gather(key), across.gather(value)
        biases = across.gather(bias) if bias is not None else None
        grad_query = torch.zeros_like(query)
        grad_keys, grad_values = (
            torch.zeros((across.ranks, *t.shape), dtype=t.dtype, device=t.device) for t in (key, value)
        )
        for key_rank, (rows, columns, is_causal) in across.blocks(ctx.causal):
            block_bias = _columns(biases, key_rank, columns, rows, query)
            kernel = _Kernel(device=across.device, causal=is_causal, scale=ctx.scale, bias=block_bias)
            inputs = query[:, :, rows], keys[key_rank][:, :, columns], values[key_rank][:, :, columns]
            for_query, for_key, for_value = kernel.backward(
                grad[:, :, rows], inputs, out[:, :, rows], total[:, :, rows]
            )
            grad_query[:, :, rows] += for_query
            grad_keys[key_rank][:, :, columns] += for_key
            grad_values[key_rank][:, :, columns] += for_value
        grad_key = across.scatter_sum(grad_keys.flatten(0, 1))
        return grad_query, grad_key, across.scatter_sum(grad_values.flatten(0, 1)), None, None, None, None


def _columns(
    biases: tuple[torch.Tensor, ...] | None, key_rank: int, columns: slice, rows: slice, query: torch.Tensor
) -> torch.Tensor | None:
    if biases is None:
        return None
    return biases[key_rank][..., columns].expand(-1, query.shape[1], query[:, :, rows].shape[2], -1)


def _merge(out: torch.Tensor, total: torch.Tensor, part: torch.Tensor, weight: torch.Tensor) -> None:
    """Merge the attention outputs ``out`` and ``part`` of the same queries over two sets of keys: ``out``
    becomes, in place, the output over both sets. ``total`` and ``weight`` are the log-sum-exps of the scores
    of each set, and ``total`` becomes that of both (Liu et al. 2023, arXiv 2310.01889)."""
    log_sum = torch.logaddexp(total, weight)
    out.mul_((total - log_sum).exp_().unsqueeze(-1)).add_(part.mul((weight - log_sum).exp_().unsqueeze(-1)))
    total.copy_(log_sum)


def _repeated(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return keys or values (``tensor``) repeated so that they have as many heads as ``query``, for
    grouped-query attention."""
    repeats = query.shape[1] // tensor.shape[1]
    return tensor.repeat_interleave(repeats, 1) if repeats > 1 else tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    """One call of the attention kernel that torch would choose on the device. ``bias`` is an additive mask or
    None."""

    device: DeviceKind
    causal: bool
    scale: float | None
    bias: torch.Tensor | None

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (output, log-sum-exp of the scores, shape (batch, heads, queries))."""
        inputs = query, _repeated(key, query), _repeated(value, query)
        causal, scale, bias = self.causal, self.scale, self.bias
        if self.device.kernels == "cpu":
            results = _ATEN._scaled_dot_product_flash_attention_for_cpu(
                *inputs, 0.0, causal, attn_mask=bias, scale=scale
            )
        elif bias is None and query.dtype in _HALF:
            results = _ATEN._scaled_dot_product_flash_attention(*inputs, 0.0, causal, False, scale=scale)
        else:
            results = _ATEN._scaled_dot_product_efficient_attention(
                *inputs, bias, True, 0.0, causal, scale=scale
            )
        return results[0], results[1][:, :, : query.shape[2]]

    def backward(
        self,
        grad: torch.Tensor,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        total: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return the gradients of query, key and value, which are ``inputs``. ``grad``, ``out`` and ``total``
        belong to the attention of these queries to the keys of all ranks: the gradient of its output, the
        output and its log-sum-exp."""
        query, key, value = inputs
        kernel_inputs = query, _repeated(key, query), _repeated(value, query)
        causal, scale, bias = self.causal, self.scale, self.bias
        seed = torch.zeros((), dtype=torch.int64, device=query.device)  # dropout's seed, which is not used
        if self.device.kernels == "cpu":
            grads = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, *kernel_inputs, out, total, 0.0, causal, attn_mask=bias, scale=scale
            )
        elif bias is None and query.dtype in _HALF:
            lengths = None, None, query.shape[2], key.shape[2]
            grads = _ATEN._scaled_dot_product_flash_attention_backward(
                grad, *kernel_inputs, out, total.contiguous(), *lengths, 0.0, causal, seed, seed, scale=scale
            )
        else:
            # The kernel pads rows to multiples of 32.
            padded = functional.pad(total, (0, -total.shape[2] % 32))
            grad_flags = True, True, True, False
            grads = _ATEN._scaled_dot_product_efficient_attention_backward(
                grad, *kernel_inputs, bias, out, padded, seed, seed, 0.0, grad_flags, causal, scale=scale
            )
        heads = key.shape[1]
        key_value_grads = (
            g.unflatten(1, (heads, -1)).sum(2) if g.shape[1] != heads else g for g in grads[1:3]
        )
        return grads[0], *key_value_grads
