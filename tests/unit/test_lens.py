"""What CUDA kernels keep for backward, by hand, against what fake CPU tensors keep under the device lens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from memfit.trace.device_kernels import use_device_kernels
from memfit.trace.tracer import trace
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.trace import UNKNOWN_BUFFER, Phase

_SHAPE = (4, 8, 16)
_COUNT = 4 * 8 * 16


def _kept_bytes(
    call: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, *, autocast: bool = False
) -> int:
    """Bytes of the distinct storages that autograd holds, without the input's own."""
    kept: dict[int, int] = {}
    with FakeTensorMode(), use_device_kernels("cuda"):
        x = torch.empty(_SHAPE, dtype=dtype, requires_grad=True)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata != x.untyped_storage()._cdata:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        ):
            out = call(x)
        assert out.requires_grad
    return sum(kept.values())


def test_dropout_keeps_one_byte_per_element() -> None:
    assert _kept_bytes(lambda x: functional.dropout(x, 0.1), torch.bfloat16) == _COUNT


def test_softmax_into_float32_keeps_its_output_only() -> None:
    assert (
        _kept_bytes(lambda x: functional.softmax(x, dim=-1, dtype=torch.float32), torch.bfloat16)
        == 4 * _COUNT
    )
    assert (
        _kept_bytes(lambda x: functional.log_softmax(x, dim=-1, dtype=torch.float32), torch.bfloat16)
        == 4 * _COUNT
    )


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float16, 0), (torch.bfloat16, 1)])
def test_softmax_into_float32_is_one_kernel_for_float16_only(dtype: torch.dtype, copies: int) -> None:
    """aten/src/ATen/native/SoftMax.cpp converts bfloat16 first."""
    job = Job(
        name="softmax",
        build_model=lambda: torch.nn.Linear(16, 16, dtype=dtype),
        batch_size=4,
        make_batch=lambda step, seed: {"x": torch.zeros(4, 8, 16, dtype=dtype)},
        loss=lambda model, batch: model(batch["x"]).softmax(-1, dtype=torch.float32).sum(),
    )
    found = trace(job, Plan(), device="cuda")
    made = [
        a
        for a in found.allocations
        if "_to_copy" in a.op and a.phase is Phase.FORWARD and a.step == found.steps - 1
    ]
    assert len(made) == copies


def test_autocast_layer_norm_runs_in_float32() -> None:
    """A float32 copy of the input and two statistics a row; the CPU's autocast would stay in bfloat16."""
    kept = _kept_bytes(lambda x: functional.layer_norm(x, (16,)), torch.bfloat16, autocast=True)
    assert kept == 4 * _COUNT + 2 * 4 * (_COUNT // 16)


def test_autocast_softmax_sum_and_power_give_float32() -> None:
    with FakeTensorMode(), use_device_kernels("cuda"), torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.empty(_SHAPE, dtype=torch.bfloat16, requires_grad=True)
        assert torch.softmax(x, dim=-1).dtype == torch.float32
        assert x.sum().dtype == torch.float32
        assert (x**2).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attention_keeps_no_matrix_of_scores(dtype: torch.dtype) -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        heads = x.unsqueeze(1)
        return functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)

    out_and_statistics = 2 * _COUNT + 4 * 4 * 8
    assert _kept_bytes(attend, dtype) == pytest.approx(out_and_statistics, abs=64)  # and a few random numbers


def test_the_cpu_lens_leaves_autocast_softmax_in_bfloat16() -> None:
    with FakeTensorMode(), use_device_kernels("cpu"), torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.empty(_SHAPE, dtype=torch.bfloat16, requires_grad=True)
        assert torch.softmax(x, dim=-1).dtype == torch.bfloat16


@pytest.mark.parametrize(("device", "tensors"), [("cpu", 1), ("cuda", 2)])
def test_softmax_backward_on_cuda_allocates_a_temporary_product(device: str, tensors: int) -> None:
    """`Tensor tmp = grad * output;` in softmax_backward_cuda_out, aten/src/ATen/native/cuda/SoftMax.cu."""
    job = Job(
        name="softmax",
        build_model=lambda: torch.nn.Linear(16, 16),
        batch_size=4,
        make_batch=lambda step, seed: {"x": torch.zeros(4, 8, 16)},
        loss=lambda model, batch: (model(batch["x"]).softmax(-1) * batch["x"]).sum(),
    )
    made = [a for a in trace(job, Plan(), device=device).allocations if "_softmax_backward" in a.op]
    last = [a for a in made if a.step == max(m.step for m in made)]
    assert [a.requested_bytes for a in last] == tensors * [4 * _COUNT]
    assert all(a.end is not None for a in last)


STEPS, ROWS, WIDTH, UNITS = 5, 4, 8, 16


def _recurrent(network: Callable[[], torch.nn.Module], *, packed: bool = False) -> Job:
    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if not packed:
            return model(batch)[0].sum()  # type: ignore[no-any-return]
        lengths = torch.tensor([5, 4, 2, 1])
        return model(torch.nn.utils.rnn.pack_padded_sequence(batch, lengths))[0].data.sum()

    return Job(
        name="recurrent",
        build_model=network,
        batch_size=ROWS,
        make_batch=lambda step, seed: torch.zeros(STEPS, ROWS, WIDTH),
        loss=loss,
    )


@pytest.mark.parametrize(
    ("network", "kept"),
    [
        (lambda: torch.nn.LSTM(WIDTH, UNITS), 5),
        (lambda: torch.nn.GRU(WIDTH, UNITS), 4),
        (lambda: torch.nn.RNN(WIDTH, UNITS, nonlinearity="relu"), 0),
        (lambda: torch.nn.GRU(WIDTH, UNITS, 2, bias=False), 2 * 4 + 1),  # and the first layer's output
        (lambda: torch.nn.LSTM(WIDTH, UNITS, bidirectional=True), 2 * 5),
    ],
)
def test_a_recurrent_network_is_one_kernel_on_cuda_and_keeps_what_backward_needs(
    network: Callable[[], torch.nn.Module], kept: int
) -> None:
    """Torch has no kernel for it on a CPU, or one that depends on the processor's instructions."""
    traced = trace(_recurrent(network), Plan(), device="cuda")
    kernels = [op for op in traced.ops if op.step == 1 and op.op.startswith("memfit.kernel")]
    assert [op.phase for op in kernels] == [Phase.FORWARD, Phase.BACKWARD]
    sizes = [a.requested_bytes for a in traced.allocations if a.step == 1 and a.phase is Phase.FORWARD]
    assert not kept or kept * STEPS * ROWS * UNITS * 4 in sizes
    assert traced.assumptions == (UNKNOWN_BUFFER,)


def test_packed_sequences_keep_what_their_steps_need_on_cuda() -> None:
    traced = trace(_recurrent(lambda: torch.nn.LSTM(WIDTH, UNITS), packed=True), Plan(), device="cuda")
    sizes = [a.requested_bytes for a in traced.allocations if a.step == 1 and a.phase is Phase.FORWARD]
    assert 5 * (5 + 4 + 2 + 1) * UNITS * 4 in sizes


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_without_cudnn_the_cells_of_a_recurrent_network_are_one_kernel_each(name: str) -> None:
    with torch.backends.cudnn.flags(enabled=False):
        job = _recurrent(lambda: getattr(torch.nn, name)(WIDTH, UNITS, 2))
        traced = trace(job, Plan(), device="cuda")
    ops = [op.op for op in traced.ops if op.step == 1]
    assert sum(f"_thnn_fused_{name.lower()}_cell." in op for op in ops) == 2 * STEPS
    assert traced.assumptions == ()


def test_autocast_casts_a_recurrent_network_as_a_whole() -> None:
    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16):
            return model(batch)[0].sum()  # type: ignore[no-any-return]

    job = dataclasses.replace(_recurrent(lambda: torch.nn.GRU(WIDTH, UNITS)), loss=loss)
    kernels = [op for op in trace(job, Plan(), device="cuda").ops if op.op.startswith("memfit.kernel")]
    assert kernels[0].dtype == "bfloat16"
