"""From the last hidden states to a loss, as each code base does it: where logits turn float32, what a
training loop still holds when backward starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from memfit.techniques.synthetic_kernel import kernel, read_bytes

Batch = dict[str, torch.Tensor]


class Loss:
    """``kind``: "hidden" (no head), "float-held" (titan's first: float32 from the model, held through
    backward), "chunked" (litgpt with adapters: head and loss over 128 positions at a time), "split" (litgpt
    without: one head, its shifted logits copied, the loss over 128 rows at a time), "plain" (logits in their
    own type), "float" (titan: one float32 copy), "compiled" (titan since spring 2025: no float32 copy),
    "eighths" (torchtune since autumn 2024: head and loss over an eighth of the positions at a time),
    "eighths-compiled" (no float32 copies either), "shift-12", "shift-14" and "padded" (Hugging Face before
    4.46: a float32 copy and its shifted copy; from 4.46 the half-precision logits too; from 4.49 labels are
    shifted and logits are not copied), "fused-linear" (Liger: a few rows of logits at a time), "fast"
    (unsloth's kernel: gradients overwrite the logits). Chunks and outputs that the loop's variables hold stay
    until the next step overwrites them; ``alone``: what the step before
    holds does not count, its samples were much shorter."""

    def __init__(self, kind: str, *, alone: bool = False) -> None:
        self.kind, self.alone = kind, alone
        self.held: Any = None  # by variables of the training loop
        self.inside = getattr(self, "_inside_" + kind.replace("-", "_"), self._inside_logits)
        self.outside = getattr(self, "_outside_" + kind.replace("-", "_"), lambda loss, targets: loss)

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        if self.alone:
            self.held = None
        result = model(batch["tokens"], batch["targets"])
        if self.kind in ("chunked", "split"):
            result = _widened(result)
        if self.kind in ("chunked", "split", "plain"):
            self.held = result
        loss: torch.Tensor = self.outside(result, batch["targets"])
        if self.kind in ("chunked", "split", "plain"):
            self.held = (result, loss)
        return loss

    def _inside_logits(self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return head(hidden)  # type: ignore[no-any-return]

    def _inside_hidden(self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.held = hidden
        return hidden.sum()

    def _inside_chunked(self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> Any:
        return [head(part) for part in hidden.split(128, dim=1)]

    def _outside_chunked(self, chunks: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        terms = [
            functional.cross_entropy(c.reshape(-1, c.shape[-1]), t.reshape(-1), reduction="none")
            for c, t in zip(chunks, targets.split(128, dim=1), strict=True)
        ]
        return torch.cat(terms).sum() / targets.numel()

    def _outside_split(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = logits[:, :-1].reshape(-1, logits.shape[-1])
        terms = [
            functional.cross_entropy(c, t, reduction="none")
            for c, t in zip(rows.split(128), targets[:, 1:].reshape(-1).split(128), strict=True)
        ]
        return torch.cat(terms).sum() / targets.numel()

    def _outside_plain(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _inside_float_held(
        self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        return head(hidden).float()  # type: ignore[no-any-return]

    def _outside_float_held(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.held = logits
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _outside_float(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _inside_eighths(self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> Any:
        return [head(part) for part in hidden.chunk(8, dim=1)]

    _inside_eighths_compiled = _inside_eighths

    def _outside_eighths(self, chunks: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        return _total(chunks, targets, lambda c, t: functional.cross_entropy(c.float(), t, reduction="sum"))

    def _outside_eighths_compiled(self, chunks: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        return _total(chunks, targets, lambda c, t: _Compiled.apply(c))

    def _outside_compiled(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _Compiled.apply(logits.flatten(0, 1))  # type: ignore[no-any-return,no-untyped-call]

    def _inside_shift_12(self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head(hidden).float()
        return functional.cross_entropy(_shifted(logits), targets[:, 1:].flatten())

    def _inside_shift_14(self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        wide = logits.float()
        return functional.cross_entropy(_shifted(wide), targets[:, 1:].flatten())

    def _inside_padded(self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def _inside_fast(self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head(hidden).float()
        return _Overwriting.apply(_shifted(logits))  # type: ignore[no-any-return,no-untyped-call]

    def _inside_fused_linear(
        self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        weight: torch.Tensor = head.weight  # type: ignore[assignment]
        return FusedLinear.apply(hidden.flatten(0, 1), weight, targets.flatten())  # type: ignore[no-any-return,no-untyped-call]


def _total(chunks: list[torch.Tensor], targets: torch.Tensor, one: Any) -> torch.Tensor:
    pairs = zip(chunks, targets.chunk(8, dim=1), strict=True)
    total: torch.Tensor = sum(one(c.reshape(-1, c.shape[-1]), t.reshape(-1)) for c, t in pairs)
    return total / targets.numel()


def _widened(logits: Any) -> Any:
    """Lightning Fabric turns what a half-precision module returns into the default type (its precision
    plugins' ``convert_output``)."""
    return [c.float() for c in logits] if isinstance(logits, list) else logits.float()


def _shifted(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])


class _Overwriting(torch.autograd.Function):
    """Keeps logits and one float32 per row; the gradient is written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, logits.new_empty(logits.shape[0], dtype=torch.float32))
        kernel([], read_bytes([logits]))
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        kernel([], 2 * read_bytes(ctx.saved_tensors[:1]))
        return ctx.saved_tensors[0]


class _Compiled(torch.autograd.Function):
    """What a compiler keeps of cross-entropy: the logits as they came, two float32 a row."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        rows = [logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2)]
        ctx.save_for_backward(logits, *rows)
        kernel([], read_bytes([logits]))
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        out = torch.empty_like(ctx.saved_tensors[0])
        kernel([out], read_bytes(ctx.saved_tensors[:1]))
        return out


class FusedLinear(torch.autograd.Function):
    """Head and loss together, rows in chunks so that a chunk's logits are about as large as the hidden
    states; the gradients are computed in forward (Liger kernel's fused_linear_cross_entropy_forward)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows, width = hidden.shape
        parts = -(-weight.shape[0] // width)
        chunk = 1 << max(0, (-(-rows // parts) - 1).bit_length())
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        losses = hidden.new_zeros(rows, dtype=torch.float32)
        for start in range(0, rows, chunk):
            part = hidden[start : start + chunk]
            logits = part @ weight.t()
            wide = logits.float()
            grad_hidden[start : start + chunk] = wide.to(logits.dtype) @ weight
            if grad_weight is not None:
                grad_weight += wide.to(logits.dtype).t() @ part
            del logits, wide
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return (*ctx.saved_tensors, None)
