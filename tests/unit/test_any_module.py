"""Arbitrary modules: the full allocation sequence of a trace is compared with the counting allocator's, where
torch treats real tensors differently from fake ones and where sizes depend on the data."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import regression
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, unpad_sequence

import memfit
from memfit.cost.memory import memory_profile, with_kept
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.counting_allocator import CountingAllocator, available
from memfit.runtime.op_benchmark import prepare_call, probe
from memfit.trace.assumed_values import AssumedCase, draw_values, fill_values
from memfit.trace.lifecycle import lifecycle
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Plan, Use, use
from memfit.types.trace import Phase, Trace

counted = pytest.mark.skipif(available() is not None, reason=f"no counting allocator: {available()}")
SMALL_BYTES = 64  # such as a Python number as a tensor, or a step count


def job(forward: Callable[..., torch.Tensor], *shape: int, **more: Any) -> Job:
    """A module with two weights whose ``forward(self, x)`` is the case; the loss is a mean of squares."""

    class Case(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
            self.table = nn.Embedding(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(self, x)

    return Job(
        name="case",
        build_model=Case,
        make_batch=lambda step, seed: torch.rand(
            shape or (40, 32), generator=torch.Generator().manual_seed(step)
        ),
        loss=lambda model, x: (model(x) * model(x)).mean() if more.get("twice") else model(x).square().mean(),
        batch_size=(shape or (40, 32))[0],
        bound=more.get("bound"),
    )


def predicted(found: Trace, first: Phase = Phase.FORWARD) -> list[int]:
    """Sizes of the last step's allocations and frees (negative) in order, small ones left out."""
    phases = list(Phase)[list(Phase).index(first) :]
    spans = [s for s in found.spans if s.step == found.steps - 1 and s.phase in phases]
    events = [(a.start, a.size_bytes) for a in found.allocations]
    events += [(a.end, -a.size_bytes) for a in found.allocations if a.end is not None]
    inside = sorted(e for e in events if spans[0].start <= e[0] < spans[-1].end)
    return [size for _, size in inside if abs(size) > SMALL_BYTES]


def measured(case: Job, plan: Plan = Plan()) -> list[int]:  # noqa: B008 - frozen
    counter = CountingAllocator()
    counter.install()
    gc.collect()
    step = TrainingStep(case, plan)
    for index in range(2):
        batch = case.make_batch(index, 0)
        marks: list[int] = []
        begun = sum(counter.counts()[:2])
        counter.start_log()
        step.run(batch, lambda phase, m=marks: m.append(sum(counter.counts()[:2])))  # type: ignore[misc]
        log = counter.stop_log().deltas_bytes
    step.close()
    return [d for d in log[marks[0] - begun :] if abs(d) > SMALL_BYTES]


# --- full allocation sequences


def residual(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    return h + torch.tanh(h)


def squared(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    return h * h


def strided_linear(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer on a transposed input takes another path than on a contiguous one."""
    return m.first(m.second(x).transpose(0, 1))


def gathered(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    return (
        h.gather(0, torch.arange(32).expand(8, 32)) + h[torch.arange(8)] + h.index_select(0, torch.arange(8))
    )


def largest(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.first(x).max(0).values + m.second(x).min(0).values


def complex_numbers(m: Any, x: torch.Tensor) -> torch.Tensor:
    one, other = (torch.view_as_complex(h.view(-1, 16, 2)) for h in (m.first(x), m.second(x)))
    return torch.view_as_real(3.0 * one + other)


def on_views(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    h[:, :16].mul_(2.0)
    h[4:8] = m.second(x)[4:8]
    return h.view(-1, 8)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * x * x


def custom(m: Any, x: torch.Tensor) -> torch.Tensor:
    return _Cube.apply(m.first(x)) + m.second(x)


def hooked(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.to(torch.float64), lambda t: t.to(torch.float32)
    ):
        return torch.exp(m.first(x))


def copied(m: Any, x: torch.Tensor) -> torch.Tensor:
    import copy

    frozen = copy.deepcopy(m.second)
    return m.first(x) + frozen(x).detach()


def slope(m: Any, x: torch.Tensor) -> torch.Tensor:
    place = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.sin(m.first(place)).sum(), place, create_graph=True)
    return gradient


def curved(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A derivative formula that builds its own graph writes in place as well."""
    place = x.detach().clone().requires_grad_()
    chosen = torch.sin(m.first(place))[torch.arange(8)]
    (gradient,) = torch.autograd.grad(chosen.square().sum(), place, create_graph=True)
    return gradient


def logits(m: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(m.first(x), x, reduction="none")


def means(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The derivative of a mean over scattered rows counts them in a tensor separate from its zeros."""
    places = torch.arange(40)[:, None].expand(40, 32) % 7
    return torch.zeros(7, 32).scatter_reduce(0, places, m.first(x), "mean", include_self=False)


def conjugates(m: Any, x: torch.Tensor) -> torch.Tensor:
    one, other = (torch.view_as_complex(h.view(8, 5, 16, 2)) for h in (m.first(x), m.second(x)))
    return torch.view_as_real(torch.einsum("bij,bkj->bik", one, other))


def transposed(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The derivative of log_softmax is contiguous, whatever the layout of the incoming gradient."""
    return m.second(m.first(x.view(8, 5, 32)).log_softmax(-1).transpose(0, 1))


def products(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    return torch.cumprod(h, 1) + h.prod()


def resized(m: Any, x: torch.Tensor) -> torch.Tensor:
    """As FSDP2 frees gathered parameters and allocates their storage again."""
    room = torch.zeros(64, 32)
    room.untyped_storage().resize_(0)
    h = m.first(x)
    room.untyped_storage().resize_(64 * 32 * 4)
    return h + room[:1]


CASES: tuple[tuple[Callable[..., torch.Tensor], tuple[int, ...]], ...] = (
    (residual, ()),
    (squared, ()),
    (strided_linear, (8, 16, 32)),
    (gathered, ()),
    (largest, ()),
    (on_views, ()),
    (complex_numbers, ()),
    (custom, ()),
    (hooked, ()),
    (copied, ()),
    (slope, ()),
    (curved, ()),
    (products, ()),
    (resized, ()),
)


@counted
@pytest.mark.parametrize(("forward", "shape"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_predicted_allocation_sequence_equals_the_measured_one(
    forward: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    case = job(forward, *shape)
    assert predicted(trace(case, Plan())) == measured(case)


@counted
@pytest.mark.parametrize("used", [use("sgd"), use("gradient-accumulation", micro_batches=2)])
def test_predicted_allocation_sequence_under_a_plan_equals_the_measured_one(used: Use) -> None:
    case, plan = job(residual), Plan(uses=(used,))
    assert predicted(trace(case, plan)) == measured(case, plan)


@counted
def test_predicted_backward_sequence_of_bce_with_logits_equals_the_measured_one() -> None:
    """The loss itself takes scratch memory in forward, which a trace does not see."""
    case = job(logits)
    expected = predicted(trace(case, Plan()), Phase.BACKWARD)
    assert expected == measured(case)[-len(expected) :]


def test_backward_of_a_scatter_mean_allocates_one_tensor_of_row_counts() -> None:
    found = trace(job(means), Plan(), steps=1)
    assert [a.op for a in found.allocations if a.phase is Phase.BACKWARD].count(
        "aten.scatter_add.default"
    ) == 1


def test_probes_receive_conjugate_inputs_where_the_trace_had_them() -> None:
    """The kernel copies conjugates internally, which a probe sees only if it receives them."""
    signatures = {o.signature for o in trace(job(conjugates), Plan(), steps=1).ops if "bmm" in o.op}
    seen = [t.is_conj() for s in signatures for t in prepare_call(s)[1] if isinstance(t, torch.Tensor)]
    assert any(seen)
    assert not all(seen)


def test_gradient_of_log_softmax_is_contiguous_so_backward_makes_no_clone() -> None:
    found = trace(job(transposed), Plan(), steps=1)
    assert not [a.op for a in found.allocations if a.phase is Phase.BACKWARD and a.op == "aten.clone.default"]


def test_backward_of_a_product_along_rows_divides_instead_of_cumulating() -> None:
    """The derivative counts the zeros and divides; the slower path takes two cumulative products."""
    found = trace(job(lambda m, x: m.first(x).prod(keepdim=True, dim=1)), Plan(), steps=1)
    made = [a.op.split(".")[1] for a in found.allocations if a.phase is Phase.BACKWARD]
    assert "div" in made
    assert "cumprod" not in made


def test_layer_norm_in_half_precision_keeps_float32_statistics_and_gives_half_gradients() -> None:
    case = job(lambda m, x: functional.layer_norm(m.first(x), (32,), m.first.bias))
    found = trace(case, Plan(uses=(use("bf16-autocast"),)), steps=1)
    made = [(a.op.split(".")[1], a.requested_bytes) for a in found.allocations if "layer_norm" in a.op]
    assert made[:3] == [("native_layer_norm", 40 * 32 * 2), *[("native_layer_norm", 40 * 4)] * 2]
    assert made[3] == ("native_layer_norm_backward", 40 * 32 * 2)


# --- sizes that depend on the batch


def by_mask(m: Any, x: torch.Tensor) -> torch.Tensor:
    chosen = x[:, 0] > 0.5
    return m.first(x)[chosen] + m.second(x)[chosen]


def by_values(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.first(x[(x[:, 0] > 0.5).nonzero()[:, 0]]) if (x >= 0).all() else m.second(x)


@pytest.mark.parametrize("forward", [by_mask, by_values])
def test_sizes_that_depend_on_the_batch_are_taken_from_its_values(forward: Any) -> None:
    case = job(forward)
    chosen = int((case.make_batch(0, 0)[:, 0] > 0.5).sum())
    found = trace(case, Plan())
    assert 0 < chosen < 40
    assert any(f"nonzero gave {chosen} of 40 elements, as in the batch" in a for a in found.assumptions)
    assert any(a.size_bytes == chosen * 32 * 4 for a in found.allocations)


def test_ctc_loss_states_are_sized_by_the_longest_label() -> None:
    """CTC keeps a state for every letter and gap of the longest label at every time step, and as many in
    backward."""

    def loss(m: Any, x: torch.Tensor) -> torch.Tensor:
        found = m.first(x).view(10, 4, 32).log_softmax(-1)
        lengths = (x[:4, 0] > 0.5) + 2
        return functional.ctc_loss(found, x[:4, :5].long() + 1, torch.full((4,), 10), lengths)

    case = dataclasses.replace(job(by_mask), loss=loss)
    found = trace(case, Plan())
    longest = 2 + int((case.make_batch(1, 0)[:4, 0] > 0.5).any())
    states = [a for a in found.allocations if a.requested_bytes == 4 * 10 * (2 * longest + 1) * 4 and a.step]
    assert [str(a.phase) for a in states] == ["forward", "backward"]


class Packed(nn.Module):
    """Sequences without padding; with ``by_weights``, a parameter decides their lengths."""

    def __init__(self, by_weights: bool = False) -> None:
        super().__init__()
        self.body, self.by_weights = nn.LSTM(16, 32, batch_first=True), by_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = (x[:, :, 0] > 0.5).long().sum(1).clamp(min=1)  # sums of bools are cast inside
        if self.by_weights:
            lengths = (lengths * self.body.bias_hh_l0[0].exp()).long()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, lengths = pad_packed_sequence(self.body(packed)[0], batch_first=True)
        return torch.cat(out.unbind(0)) if self.by_weights else torch.cat(unpad_sequence(out, lengths, True))


@counted
def test_packed_sequences_are_sized_by_the_lengths_in_the_batch() -> None:
    case = dataclasses.replace(job(residual, 6, 24, 16), build_model=Packed)
    found = trace(case, Plan())
    pieces = [a for a in found.allocations if "_pack_padded_sequence" in a.op and a.step]
    assert len(pieces) > 3  # each batch size is copied separately
    assert sorted(predicted(found)) == sorted(measured(case))


def test_sequence_lengths_that_depend_on_weights_follow_the_given_bound() -> None:
    case = dataclasses.replace(job(residual, 6, 24, 16), build_model=lambda: Packed(by_weights=True))
    unbound = trace(case, Plan())
    assert any("_pack_padded_sequence gave 144 of 144 elements at" in a for a in unbound.assumptions)
    assert unbound.assumed_low_ratio < 1 == unbound.assumed_high_ratio
    for bound, packed in ((0.5, 72), (100, 100), ({"_pack_padded_sequence": 10}, 10)):
        found = trace(dataclasses.replace(case, bound=bound), Plan())
        assert any(f"gave {packed} of 144" in a for a in found.assumptions)
        assert any(a.op == "aten.cat.default" and a.size_bytes == packed * 32 * 4 for a in found.allocations)
    assert any("gave 144 of 144" in a for a in memfit.estimate(case, bound=1.0).estimate.assumptions)


class Trimmed(Packed):
    """Reads the lengths that come back from a packed batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = (x[:, :, 0] > 0.5).long().sum(1).clamp(min=1).sort(descending=True).values
        if self.by_weights:
            lengths = (lengths * self.body.bias_hh_l0[0].exp()).long()
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        out, lengths = pad_packed_sequence(self.body(packed)[0], batch_first=True)
        return out[:, : int(lengths.max())]


@pytest.mark.parametrize("by_weights", [False, True])
def test_lengths_of_a_packed_batch_are_called_known_only_if_they_follow_from_the_batch(
    by_weights: bool,
) -> None:
    case = dataclasses.replace(job(residual, 6, 24, 16), build_model=lambda: Trimmed(by_weights))
    answers = [a for a in trace(case, Plan()).assumptions if a.startswith(".item() on torch.int64 answered")]
    assert {"as in the batch" in a for a in answers} == {not by_weights}


def written_in_parts(m: Any, x: torch.Tensor) -> torch.Tensor:
    keeps = torch.zeros(40, dtype=torch.bool)
    keeps[:20] = m.first(x)[:20].argmax(1) < 16
    return m.second(x[keeps])


def written_as_output(m: Any, x: torch.Tensor) -> torch.Tensor:
    ends = torch.zeros(5, dtype=torch.int64)
    torch.cumsum(m.first(x)[:4].argmax(1), 0, out=ends[1:])
    return m.second(x[: ends[-1].clamp(1, 40).item()])


def of_another_librarys_operator(m: Any, x: torch.Tensor) -> torch.Tensor:
    rows = torch.ops.memfit_tests.even(m.first(x).argmax(1))
    return m.second(x[: len(rows)])


@pytest.fixture
def even_operator() -> Iterator[None]:
    """An operator whose result has a size that depends on values."""
    library = torch.library.Library("memfit_tests", "DEF")
    library.define("even(Tensor x) -> Tensor", tags=(torch.Tag.dynamic_output_shape,))
    library.impl("even", lambda x: x[x % 2 == 0], "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("even_operator")
@pytest.mark.parametrize("forward", [written_in_parts, written_as_output, of_another_librarys_operator])
def test_values_that_follow_from_assumed_ones_are_not_called_known(forward: Any) -> None:
    found = trace(job(forward), Plan())
    assert found.assumed
    assert not any("as in the batch" in a for a in found.assumptions)


def test_the_interval_covers_sizes_that_assumed_values_decide_through_python_numbers() -> None:
    """Each case of assumed values is a trace of its own, so numbers need not be followed through Python."""

    def through_python(m: Any, x: torch.Tensor) -> torch.Tensor:
        count = int((m.first(x)[:, 0] > 0).sum())
        return m.second(x[: torch.tensor([count]).clamp(1, 40).item()])

    found = trace(job(through_python), Plan())
    assert found.assumed_low_ratio < 1 == found.assumed_high_ratio


def test_a_tensor_into_which_unknown_values_are_written_is_no_longer_known() -> None:
    def summed(m: Any, x: torch.Tensor) -> torch.Tensor:
        ends = torch.zeros(5, dtype=torch.int64)
        torch.cumsum(m.first(x)[:4, 0].exp().long(), 0, out=ends[1:])
        return m.second(x[: ends[-1].item()])

    with pytest.raises(UserError, match="determines how much memory the step takes"):
        trace(job(summed), Plan())


# --- sizes that depend on parameters: a bound is used, or the error is one line


def by_weights(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    return h[h[:, 0] > 0]


@pytest.mark.parametrize(("bound", "rows"), [(17, 17), (0.25, 10), ({"nonzero": 3}, 3)])
def test_sizes_that_depend_on_weights_equal_the_given_bound(bound: Any, rows: int) -> None:
    found = trace(job(by_weights, bound=bound), Plan())
    assert any(f"nonzero gave {rows} of 40" in a for a in found.assumptions)
    assert any(a.op == "aten.index.Tensor" and a.size_bytes == rows * 32 * 4 for a in found.allocations)


@pytest.mark.parametrize(
    ("forward", "op"),
    [
        (by_weights, "nonzero"),
        (lambda m, x: m.first(x).masked_select(m.second(x) > 0), "masked_select"),
        (lambda m, x: m.first(x)[(m.second(x) > 0).sum(1).unique().clamp(max=39)], "unique"),
        (lambda m, x: m.first(x).repeat_interleave((m.second(x)[:, 0] > 0).long(), 0), "repeat_interleave"),
    ],
)
def test_without_a_bound_all_elements_are_assumed_and_the_interval_includes_one_element(
    forward: Any, op: str
) -> None:
    found = memfit.estimate(job(forward))
    assert any(a.startswith(f"{op} gave") for a in found.estimate.guesses)
    few = memfit.estimate(job(forward, bound={op: 1})).allocated_bytes
    assert found.allocated_bytes.low <= few.value <= found.allocated_bytes.high


def test_attention_of_the_batch_alone_has_the_kernel_of_a_gpu() -> None:
    def attending(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.first(functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]))

    names = {op.op for op in trace(job(attending), Plan(), device="cuda").ops}
    assert "aten._scaled_dot_product_efficient_attention.default" in names


@pytest.mark.parametrize("rows", [0, 40])
def test_bincount_of_the_batch_has_the_bins_that_it_has(rows: int) -> None:
    def counted(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.first(x) * (1 + len((x[:rows, 0] * 10).long().bincount()))

    case = job(counted)
    bins = len((case.make_batch(0, 0)[:rows, 0] * 10).long().bincount())
    assert any(f"bincount gave {bins} of {rows}" in a for a in trace(case, Plan(), steps=1).assumptions)


@pytest.mark.parametrize("case", list(AssumedCase))
def test_numbers_drawn_in_place_are_those_drawn_into_a_new_tensor(case: AssumedCase) -> None:
    fill, target = torch.ops.aten.uniform_.default, torch.zeros(1)
    draw_values(fill, (target,), {}, case, seed=3)
    assert torch.equal(target, fill_values(fill, torch.zeros(1), (), {}, case, seed=3))


def test_a_size_without_an_upper_limit_is_refused_with_a_request_for_a_bound() -> None:
    def repeated(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.first(x).repeat_interleave(m.second(x)[:, 0].exp().long(), 0)

    wanted = r"repeat_interleave at test_any_module.py:\d+ gives a result whose size depends on .*bound"
    with pytest.raises(UserError, match=wanted):
        trace(job(repeated), Plan())


def until_small(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    while h.abs().max() > 0.1:
        h = torch.tanh(h)
    return h


def test_a_loop_on_tensor_values_is_refused_unless_a_bound_gives_its_rounds() -> None:
    with pytest.raises(
        UserError, match=r"\.item\(\) at test_any_module.py:\d+ is called more than 1000 times.*--bound"
    ) as caught:
        trace(job(until_small), Plan())
    line = str(caught.value).split(" at ")[1].split()[0]
    found = trace(job(until_small, bound={line: 5}), Plan(), steps=1)
    assert sum(o.op == "aten.tanh.default" for o in found.ops) == 5


def test_a_line_may_read_many_values_of_the_batch() -> None:
    def walked(m: Any, x: torch.Tensor) -> torch.Tensor:
        large = sum((x.flatten()[i] > 0.5).item() for i in range(700))
        return m.first(x)[: 1 + int(large > 0)]

    found = trace(job(walked), Plan())
    assert any("as in the batch" in a for a in found.assumptions)


def test_an_error_after_a_note_about_kernels_is_not_blamed_on_a_value() -> None:
    def fails(m: Any, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("the user's own")

    with pytest.raises(ValueError, match=r"^the user's own$"):
        trace(job(fails), Plan(), device="mps")


def test_an_error_caused_by_a_guessed_value_names_the_guess() -> None:
    def split(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.first(x)
        return torch.cat(h.split((h > 0).sum(0)[:2].tolist()))

    with pytest.raises(
        UserError, match=r"does not run on fake tensors: .*split.*guessed it \(tolist.*bound="
    ):
        trace(job(split), Plan())


# --- checks of values, and values that decide sizes


class Odd(Exception):
    """An exception of the user's own code."""


def checked(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    if torch.isnan(h).any() or not torch.isfinite(h).all():
        raise Odd("no numbers")
    assert not (h.abs() > 1e6).any(), "large"
    return h


def variance(m: Any, x: torch.Tensor) -> torch.Tensor:
    spread = functional.softplus(m.first(x))
    drawn = torch.distributions.Normal(m.second(x), spread, validate_args=True).rsample()
    return functional.gaussian_nll_loss(drawn, x, spread, reduction="none")


@pytest.mark.parametrize("forward", [checked, variance])
def test_value_checks_that_raise_are_assumed_to_pass(forward: Any) -> None:
    found = trace(job(forward), Plan())
    assert any("answered False" in a for a in found.assumptions)
    assert lifecycle(job(forward), Plan()).peak("steady-step").device_bytes > 0


def test_when_every_answer_raises_the_first_error_is_raised() -> None:
    def refused(m: Any, x: torch.Tensor) -> torch.Tensor:
        if (m.first(x) > 0).any():
            raise Odd("one way")
        raise Odd("the other way")

    with pytest.raises(Odd, match="one way"):
        trace(job(refused), Plan())


def cut(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    return h[: (h[:, 0] > 0).sum().item()].exp()


def counted_rounds(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    for _ in range(int(h.abs().sum())):
        h = torch.tanh(h)
    return h


def test_a_count_that_decides_sizes_is_assumed_maximal_and_lowers_the_interval() -> None:
    found = trace(job(cut), Plan())
    assert any(".item() on torch.int64 answered 40 at" in a for a in found.assumptions)
    assert found.assumed_low_ratio < 1 == found.assumed_high_ratio


@pytest.mark.parametrize("forward", [counted_rounds])
def test_a_value_that_decides_sizes_is_refused_unless_a_bound_gives_it(forward: Any) -> None:
    with pytest.raises(
        UserError, match=r"a tensor at test_any_module.py:\d+ determines how much.*bound"
    ) as told:
        trace(job(forward), Plan())
    line = str(told.value).split(" at ")[1].split()[0]
    found = trace(job(forward, bound={line: 7}), Plan())
    assert any("answered 7" in a for a in found.assumptions)


def test_a_value_that_decides_no_sizes_is_reported_as_an_assumption() -> None:
    def logged(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.first(x)
        m.right, m.mean = (h.argmax(1) == 3).sum().item(), h.mean().item()
        return h

    found = memfit.estimate(job(logged))
    answers = [a for a in found.estimate.assumptions if a.startswith(".item()")]
    assert {a.split()[2] for a in answers} == {"torch.int64", "torch.float32"}
    assert not any("as in the batch" in a for a in answers)
    assert "assumed" in str(found)
    assert "assumed" in found._repr_html_()


def test_values_that_torch_reads_without_dispatching_still_decide_sizes() -> None:
    def parted(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([h.exp() for h in torch.tensor_split(m.first(x), torch.tensor([3, 10]))])

    def aligned(m: Any, x: torch.Tensor) -> torch.Tensor:
        scores = m.first(x).view(10, 4, 32).log_softmax(-1)
        return functional.ctc_loss(scores, torch.full((4, 5), 2), [10] * 4, [3] * 4)

    assert any(a.size_bytes == 7 * 32 * 4 for a in trace(job(parted), Plan()).allocations)
    assert any(a.requested_bytes == 4 * 10 * 7 * 4 for a in trace(job(aligned), Plan()).allocations)


def test_a_model_initialised_with_trunc_normal_is_traced_without_an_endless_redraw() -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        nn.init.trunc_normal_(net[0].weight)
        return net

    assert trace(regression(build), Plan()).parameter_count == 8 * 16 + 16 + 16 * 4 + 4


# --- memory that kernels hold internally


@counted
def test_workspace_of_a_recurrent_layer_is_probed_in_forward_and_backward() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.LSTM(16, 32, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)[0]

    case = dataclasses.replace(
        job(residual, 4, 24, 16), build_model=Recurrent, loss=lambda model, x: model(x).square().mean()
    )
    counter = CountingAllocator()
    counter.install()
    found = trace(case, Plan())
    signatures = {o.signature for o in found.ops if "mkldnn_rnn_layer" in o.op}
    if not signatures:
        pytest.skip("this torch has no oneDNN recurrent kernels")
    probed = {s: p for s in signatures if (p := probe(s, counter)) is not None}
    assert probed.keys() == signatures
    calibration = Calibration(
        op_peak_bytes={s: p.peak_bytes for s, p in probed.items()},
        op_kept_bytes={s: p.kept_bytes for s, p in probed.items() if p.kept_bytes},
    )
    kept = sum(a.size_bytes for a in with_kept(found, calibration).allocations if a.step == 1)
    assert (
        kept - sum(a.size_bytes for a in found.allocations if a.step == 1)
        in calibration.op_kept_bytes.values()
    )
    assert (
        memory_profile(found, calibration).peak_bytes > 1.2 * memory_profile(found, Calibration()).peak_bytes
    )


def test_a_loss_with_torch_func_derivatives_is_predicted() -> None:
    """Values of a batch are not followed through the wrapped tensors of vmap and grad."""
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        def height(x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, dict(model.named_parameters()), (x[None],))[0, 0]

        slopes = torch.func.vmap(torch.func.grad(height))(batch)
        return slopes.square().mean()

    assert memfit.estimate(model, torch.randn(32, 2), loss=loss).allocated_bytes.value > 32 * 64 * 4


def test_an_optimizer_that_divides_by_one_minus_its_scalars_is_predicted() -> None:
    model = nn.Linear(4, 4)
    found = memfit.estimate(
        model, torch.randn(2, 4), loss=lambda output, batch: output.sum(), optimizer=torch.optim.NAdam
    )
    assert found.by_phase["optimizer"] > 4 * 4 * 4 * 4  # weight, gradient and two moments


def test_an_optimizer_with_a_closure_is_refused() -> None:
    lbfgs = torch.optim.LBFGS
    with pytest.raises(UserError, match="the optimizer LBFGS needs a closure in its step, to compute"):
        memfit.estimate(
            nn.Linear(4, 4), torch.randn(2, 4), loss=lambda output, batch: output.sum(), optimizer=lbfgs
        )


@counted
def test_istft_overlap_check_is_assumed_to_pass_and_its_memory_is_predicted() -> None:
    """torch.istft raises where windows do not overlap, a condition on values that no dispatch mode sees."""

    def forward(case: Any, x: torch.Tensor) -> Any:
        window = torch.hann_window(32)
        waves = torch.stft(case.first(x), 32, 8, window=window, return_complex=True)
        return torch.istft(waves * 2, 32, 8, window=window, length=32)

    case = job(forward, 40, 32)
    found = trace(case, Plan())
    assert any("equal answered False" in told for told in found.assumptions)
    # The kernels of the transforms use scratch memory, which a trace alone does not see.
    most, least = (max(itertools.accumulate(sizes)) for sizes in (measured(case), predicted(found)))
    assert least == pytest.approx(most, rel=0.01)
