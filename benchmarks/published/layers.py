"""One rank's calls of a Megatron-LM run: kernels, collectives and their order for a micro-batch through each
kind of layer, as megatron.py has its tensors.

Read from megatron/core (tensor_parallel/layers.py: what backward overlaps; transformer; fusions) and
transformer_engine/pytorch. Every product's backward is two products, of which the weight's adds into float32.
"""

from __future__ import annotations

import dataclasses
import json
import math

from memfit.cost.kernel_model import FULL_SUM
from memfit.types.trace import OpCall, Phase
from published.arch import Arch, Mla, Moe
from published.calls import Shape

_FLOAT8_CAST = (
    4  # bytes an element: half precision read, one byte written both ways round (TE's cast_transpose)
)


def kernel(
    moved: float, *, flops: float = 0, kind: str = "", shape: tuple[int, ...] = (), dtype: str
) -> OpCall:
    args = [[], int(moved), int(flops), kind, list(shape), dtype]
    return OpCall(
        clock=0,
        op="memfit.kernel.default",
        signature=json.dumps(["memfit.kernel.default", args, {}]),
        phase=Phase.FORWARD,
        step=0,
        module="",
        dtype=dtype,
        flops=int(flops),
        moved_bytes=int(moved),
    )


def wait(stream: str) -> OpCall:
    made = kernel(0, dtype="")
    return dataclasses.replace(made, op="stream.wait", signature="[]", waits=(stream, 0))


@dataclasses.dataclass(kw_only=True)
class Calls:
    """``near``: ranks of a group in one host. ``overlap``: tensor-parallel communication hides behind
    products (Transformer Engine's user buffers). ``fork``: of Megatron-DeepSpeed of 2021,
    which waits for every reduction at once, the bytes that adding an element's gradient moves by kernels of
    their own."""

    arch: Arch
    shape: Shape
    hosts_of: int = 8
    expert: int = 1  # ranks that share the experts
    overlap: bool = False
    fork: int = 0

    def __post_init__(self) -> None:
        self.dtype = str(self.shape.dtype).removeprefix("torch.")
        self.split = self.shape.sequence_parallel and self.shape.tensor > 1

    # -- pieces -----------------------------------------------------------------------------------------

    def moved(self, elements: float) -> OpCall:
        """So many elements of half precision read or written."""
        return kernel(2 * elements, dtype=self.dtype)

    def product(
        self,
        rows: int,
        columns: int,
        inner: int,
        batch: int = 1,
        *,
        whole: bool = False,
        sums: bool = False,
        back: bool = False,
    ) -> list[OpCall]:
        """``whole``: not in float8. ``sums``: a weight's gradient, into float32. ``back``: an input's."""
        low = self.shape.float8 and not whole
        size = 1 if low else 2
        moved = batch * (size * (rows * inner + inner * columns) + (8 if sums else 2) * rows * columns)
        made = kernel(
            moved,
            flops=2 * batch * rows * columns * inner / (FULL_SUM if low and (sums or back) else 1),
            kind="mm",
            shape=(batch, rows, columns, inner),
            dtype="float8_e4m3fn" if low else self.dtype,
        )
        if sums and self.fork:
            return [made, kernel(self.fork * batch * rows * columns, dtype=self.dtype)]
        return (
            [kernel(_FLOAT8_CAST * batch * rows * inner, dtype=self.dtype), made]
            if low and not sums
            else [made]
        )

    def collective(
        self, kind: str, elements: float, ranks: int, *, stream: str = "", size: int = 2
    ) -> list[OpCall]:
        if ranks == 1:
            return []
        near = min(ranks, self.hosts_of)
        made = kernel(0, kind=kind, shape=(int(size * elements), ranks, near), dtype=self.dtype)
        return [dataclasses.replace(made, stream=stream)]

    def tensor(self, kind: str, *, stream: str = "") -> list[OpCall]:
        """A collective over the tensor-parallel ranks, of whole rows."""
        if self.overlap and not stream:
            stream = "group tensor"
        return self.collective(kind, self.rows * self.arch.hidden, self.shape.tensor, stream=stream)

    def whole_again(self) -> list[OpCall]:
        """What tensor-parallel ranks of DeepSpeed's pipeline were sent in parts: zeros, gathered into a list,
        copied from there, cloned (runtime/utils.py, PartitionedTensor.full)."""
        elements = self.rows * self.arch.hidden
        gathered = self.tensor("all_gather")
        return (
            [self.moved(elements), *gathered, self.moved(2 * elements), self.moved(2 * elements)]
            if gathered
            else []
        )

    @property
    def rows(self) -> int:
        return self.shape.whole_rows

    # -- linear layers ----------------------------------------------------------------------------------

    def column(self, columns: int) -> list[OpCall]:
        """Its input is gathered along the sequence."""
        gathered = self.tensor("all_gather") if self.split else []
        return [*gathered, *self.product(self.rows, columns, self.arch.hidden)]

    def column_backward(self, columns: int) -> list[OpCall]:
        """The input comes again beside the first product, its gradient is reduced beside the second."""
        hidden, stream = self.arch.hidden, "" if self.fork else "group tensor"
        again = self.tensor("all_gather", stream=stream) if self.split else []
        reduced = self.tensor("reduce_scatter" if self.split else "all_reduce", stream=stream)
        waits = [wait(stream)] if reduced and stream else []
        return [
            *again,
            *self.product(self.rows, hidden, columns, back=True),
            *waits,
            *reduced,
            *self.product(columns, hidden, self.rows, sums=True),
            *self.summed(columns),
            *waits,
        ]

    def row(self, inner: int) -> list[OpCall]:
        reduced = self.tensor("reduce_scatter" if self.split else "all_reduce")
        return [*self.product(self.rows, self.arch.hidden, inner), *reduced]

    def row_backward(self, inner: int) -> list[OpCall]:
        gathered = self.tensor("all_gather") if self.split else []
        grads = self.product(self.arch.hidden, inner, self.rows, sums=True)
        back = self.product(self.rows, inner, self.arch.hidden, back=True)
        return [*gathered, *back, *grads, *self.summed(self.arch.hidden)]

    def summed(self, columns: int) -> list[OpCall]:
        """A bias's gradient where it is not a by-product of the weight's: rows summed, then added up."""
        if not (self.fork and self.arch.bias):
            return []
        return [self.moved(self.rows * columns), kernel(self.fork * columns, dtype=self.dtype)]

    def plain(self, columns: int, inner: int, rows: int = 0, *, backward: bool = False) -> list[OpCall]:
        """A layer that every rank has whole."""
        rows = rows or self.shape.rows
        if not backward:
            return self.product(rows, columns, inner)
        return [
            *self.product(rows, inner, columns, back=True),
            *self.product(columns, inner, rows, sums=True),
        ]

    # -- attention --------------------------------------------------------------------------------------

    def core(self, *, backward: bool = False) -> list[OpCall]:
        shape, arch = self.shape, self.arch
        heads = shape.batch * arch.heads // shape.tensor
        width = _width(arch)
        if not shape.flash:
            return self._unfused(heads, backward)
        length = shape.length * shape.context
        keys = length if shape.context == 1 else -(-length // 2)  # balanced: half of all keys, on every rank
        flops = 2 * heads * shape.length * keys * 2 * width * (2.5 if backward else 1)
        moved = 2 * heads * shape.length * width * (8 if backward else 4)
        made = kernel(
            moved,
            flops=flops,
            kind="attention_backward" if backward else "attention",
            shape=(heads, shape.length, keys, width, int(shape.context == 1)),
            dtype=self.dtype,
        )
        return [*self._ring(width, backward), made, *([wait("group ring")] if shape.context > 1 else [])]

    def _ring(self, width: int, backward: bool) -> list[OpCall]:
        """Keys and values go round beside the work; backward sends their gradients too."""
        kept = (
            2 * self.shape.length * self.shape.batch * max(1, self.arch.kv_heads // self.shape.tensor) * width
        )
        times = (self.shape.context - 1) * (2 if backward else 1)
        near = min(2, max(1, self.hosts_of // self.shape.tensor))
        one = kernel(0, kind="send", shape=(2 * kept, 2, near), dtype=self.dtype)
        return [dataclasses.replace(one, stream="group ring")] * times

    def _unfused(self, heads: int, backward: bool) -> list[OpCall]:
        length, width = self.shape.length, self.arch.head_dim
        scores = float(heads) * length * length
        there, back = (length, length, width), (length, width, length)
        if not backward:
            softmax, dropout = self.moved(2 * scores), self.moved(2.5 * scores)
            return [*self._whole(there, heads), softmax, dropout, *self._whole(back, heads)]
        dropout, softmax = self.moved(2.5 * scores), self.moved(3 * scores)
        return [
            *self._whole(there, heads),
            *self._whole(back, heads),
            dropout,
            softmax,
            *self._whole(back, heads),
            *self._whole(back, heads),
        ]

    def _whole(self, sizes: tuple[int, int, int], batch: int) -> list[OpCall]:
        return self.product(*sizes, batch, whole=True)

    def attention(self, *, backward: bool = False) -> list[OpCall]:
        arch, t = self.arch, self.shape.tensor
        if arch.mla:
            return self._latent(arch.mla, backward=backward)
        query = arch.heads * arch.head_dim // t
        mixed = query + 2 * max(1, arch.kv_heads // t) * arch.head_dim
        turned = self.moved(2 * self.rows * mixed)  # rotated, or only laid out anew
        if not backward:  # torch.nn.functional.linear of three axes adds its bias apart
            added = [self.moved(2 * self.rows * mixed)] if self.fork and self.arch.bias else []
            asked = [*self.column(mixed), *added, turned]
            return [self.norm(), *asked, *self.core(), *self.row(query), self.residual()]
        return [
            self.residual(),
            *self.row_backward(query),
            *self.core(backward=True),
            turned,
            *self.column_backward(mixed),
            *self.norm_backward(),
        ]

    def _latent(self, mla: Mla, *, backward: bool) -> list[OpCall]:
        heads, hidden = self.arch.heads // self.shape.tensor, self.arch.hidden
        wide, pair = heads * (mla.nope + mla.rope), heads * (mla.nope + mla.value)
        sizes = (
            (mla.q_rank, hidden),
            (wide, mla.q_rank),
            (mla.kv_rank + mla.rope, hidden),
            (pair, mla.kv_rank),
        )
        calls = [c for n, k in sizes for c in self.plain(n, k, self.rows, backward=backward)]
        laid = self.moved(3 * self.rows * (wide + pair))
        out = self.row_backward(heads * mla.value) if backward else self.row(heads * mla.value)
        return [
            self.norm(backward=backward),
            *calls,
            laid,
            *self.core(backward=backward),
            *out,
            self.residual(),
        ]

    # -- the rest of a layer ----------------------------------------------------------------------------

    def norm(self, *, backward: bool = False) -> OpCall:
        return self.moved((3 if backward else 2) * self.shape.rows * self.arch.hidden)

    def norm_backward(self) -> list[OpCall]:
        """With its weight's and its bias's gradients added up, where products do not do it."""
        added = [kernel(self.fork * self.arch.hidden, dtype=self.dtype)] * 2 if self.fork else []
        return [self.norm(backward=True), *added]

    def residual(self) -> OpCall:
        return self.moved((3 + (0.5 if self.arch.dropout else 0)) * self.shape.rows * self.arch.hidden)

    def feed(self, *, backward: bool = False, sparse: bool = False) -> list[OpCall]:
        arch, t = self.arch, self.shape.tensor
        moe = arch.moe if sparse else None
        if moe is not None:
            shared = self.dense(moe.shared_ffn // t, 2, backward=backward) if moe.shared_ffn else []
            return [
                self.norm(backward=backward),
                *self.experts(moe, backward=backward),
                *shared,
                self.residual(),
            ]
        inner, gates = arch.ffn // t, 2 if arch.mlp == "swiglu" else 1
        norm = self.norm_backward() if backward else [self.norm()]
        return [*norm, *self.dense(inner, gates, backward=backward), self.residual()]

    def dense(self, inner: int, gates: int, *, backward: bool = False) -> list[OpCall]:
        act = self.moved((gates + 1) * self.rows * inner * (1.5 if backward else 1))
        if not backward:
            return [*self.column(gates * inner), act, *self.row(inner)]
        return [*self.row_backward(inner), act, *self.column_backward(gates * inner)]

    def experts(self, moe: Moe, *, backward: bool = False) -> list[OpCall]:
        """Permute, exchange, two grouped products, exchange, unpermute."""
        routed, here = self.shape.rows * moe.top_k, self.shape.experts_here
        each, hidden = -(-routed // here), self.arch.hidden
        laid = self.moved(2 * routed * hidden)
        exchanged = self.collective("all_to_all", routed * hidden, self.expert)
        sizes = ((2 * moe.ffn, hidden), (hidden, moe.ffn))
        products = [c for n, k in sizes for c in self.product(each, n, k, here)]
        if backward:
            products = [c for n, k in reversed(sizes) for c in self.product(each, k, n, here, back=True)]
            products += [c for n, k in sizes for c in self.product(n, k, each, here, sums=True)]
        router = self.product(self.shape.rows, moe.experts, hidden, whole=True) * (2 if backward else 1)
        act = self.moved(3 * routed * moe.ffn * (1.5 if backward else 1))
        return [*router, laid, *exchanged, laid, *products, act, laid, *exchanged, laid]

    def layer(self, *, backward: bool = False, sparse: bool = False) -> list[OpCall]:
        if not backward:
            return [*self.attention(), *self.feed(sparse=sparse)]
        again = self.core() if self.shape.recompute else []
        return [*self.feed(backward=True, sparse=sparse), *again, *self.attention(backward=True)]

    def head(self, *, backward: bool = False, fused: bool) -> list[OpCall]:
        """Last norm, logits of this rank's part of the vocabulary, their loss."""
        vocab = -(-self.arch.vocab // (128 * self.shape.tensor)) * 128
        logits = float(self.rows) * vocab
        gathered = self.tensor("all_gather") if self.split else []
        # Read twice in half precision where one kernel does it; else widened, and passed over in float32.
        loss = self.moved((2 if fused else 12) * logits)
        if not backward:
            return [
                self.norm(),
                *gathered,
                *self.product(self.rows, vocab, self.arch.hidden, whole=True),
                loss,
            ]
        hidden = self.arch.hidden
        reduced = self.tensor("reduce_scatter" if self.split else "all_reduce")
        return [
            self.moved((0 if fused else 5) * logits),
            *self.product(self.rows, hidden, vocab, whole=True),
            *reduced,
            *self.product(vocab, hidden, self.rows, whole=True, sums=True),
            self.norm(backward=True),
        ]

    def embedding(self) -> list[OpCall]:
        reduced = self.tensor("reduce_scatter" if self.split else "all_reduce")
        return [self.moved(2 * self.rows * self.arch.hidden), *reduced]


def _width(arch: Arch) -> int:
    """Of a head; with latent attention the mean of what is scored and what is summed."""
    return arch.head_dim if arch.mla is None else (arch.mla.nope + arch.mla.rope + arch.mla.value) // 2


def parameters(arch: Arch, shape: Shape, layers: int, *, ends: float) -> float:
    """Of a rank's dense part: so many layers, and a share of embedding and head."""
    t = shape.tensor
    mixed = arch.hidden * (2 * arch.heads + 2 * arch.kv_heads) * arch.head_dim // t
    dense = arch.hidden * arch.ffn * (3 if arch.mlp == "swiglu" else 2) // t
    if arch.moe is not None:
        moe = arch.moe
        dense = 3 * arch.hidden * (moe.ffn * shape.experts_here + moe.shared_ffn // t)
    return layers * (mixed + dense) + ends * math.ceil(arch.vocab / t) * arch.hidden
