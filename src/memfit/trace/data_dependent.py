"""Values that are read from fake tensors, and shapes that depend on values.

A bound that the job gives (``Job.bound``) comes first. Without a bound, values that depend on the batch alone
are taken from the batch (`concrete_values`), and for others values in the range of the operator that made
them are assumed (`assumed_values`). If there is no such range, ``.item()`` answers True, 1 or 1.0. A size
that follows from no values and has no upper limit must be bounded by the user. The answers are listed in
``Guesses.assumptions``, except those for the model's construction and for the optimizer.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.utils import _pytree

from memfit.model.tensors import tensor_leaves
from memfit.trace.assumed_values import AssumedCase, is_assumed, mark_assumed
from memfit.trace.concrete_values import ConcreteValues
from memfit.trace.source_location import library_line, reading_frame, reading_line, user_line
from memfit.types.errors import UserError
from memfit.types.job import Bound

# Operators whose output size has an upper limit, which is the argument ``most`` of `Guesses.size`.
_LIMITED = frozenset({"nonzero", "masked_select", "unique", "_pack_padded_sequence", "ctc_loss"})
_REJECTIONS = 16  # of so many answers to one line of one call, the last is False and the others True
_LOOP_LIMIT = 1000  # answers to one line before it counts as an endless loop


class Guesses:
    """Answers to value-dependent questions in one trace.

    ``bound`` is the job's (`Job.bound`): answers that the user gives. ``concrete_values`` holds known and
    assumed values. ``scratch`` holds temporary tensors of the running operator until the recorder has
    recorded them. ``doubtful`` is the place in the code (`reading_line`) that last got an answer True that is
    not known to be true, or "". ``open`` lists the lines that got a number without any knowledge, ``assumed``
    those whose answer follows from assumed values (or the operator, where the line is not known), and
    ``assumptions`` the answers, and other assumptions of the trace, as sentences for the user. The keys of
    these dicts are the list. ``last_guess`` is the sentence of the last answer that does not follow from
    known values, or "".
    """

    def __init__(self, bound: Bound | None = None) -> None:
        self.bound = bound
        self.doubtful = ""
        self.open: dict[str, None] = {}
        self.assumed: dict[str, None] = {}
        self.concrete_values = ConcreteValues()
        self.assumptions: dict[str, None] = {}
        self.last_guess = ""
        self.scratch: list[torch.Tensor] = []
        self.questions = 0  # values that were asked for, known or not
        self._asked: Counter[str] = Counter()
        self._value_dependent = set[Any]()  # operators whose results depended on values
        self._loop: tuple[int, int, int] = (0, 0, 0)

    @property
    def statements(self) -> tuple[Any, ...]:
        """(``doubtful``, the numbers of ``open``, ``assumed`` and ``assumptions``). Equal at two times if no
        answer between them was noted in one of these."""
        return self.doubtful, len(self.open), len(self.assumed), len(self.assumptions)

    def item(self, tensor: torch.Tensor, *, is_listed: bool, value: Any = None) -> bool | int | float:
        """Return the answer to ``tensor.item()``. ``value`` is the tensor's known or assumed value, or None.

        The answer is the bound of the calling line (or of the key "item"), else ``value``, else True, 1 or
        1.0, with which ordinary code continues. For a bool, the bound n is a number of loops: the line gets
        True n times, then False, and so on. A bool that is unknown, or assumed to be True, is False if its
        place in the code (`reading_line`) is a key of the bounds. A bound that is a single number, not a
        mapping, is not used.

        With ``is_listed=False``, as for questions of the optimizer and of the model's construction, bounds of
        lines and of "item" are not used, and the answer is not listed as an assumption. If one line of one
        call keeps asking for an unknown bool, every 16th answer is False.

        Raises UserError if a line without a bound asks more than 1000 times in this trace with
        ``is_listed=True`` (a million times if the line is not known or the value follows from the batch).
        """
        self.questions += 1
        is_bool, is_float = tensor.dtype == torch.bool, tensor.dtype.is_floating_point
        is_guess = value is not None and is_assumed(self.concrete_values.of(tensor))
        place = reading_line() if is_bool and (value is None or (is_guess and value)) else ""
        is_denied = bool(place) and isinstance(self.bound, Mapping) and place in self.bound
        self.doubtful = place if place and not is_denied else self.doubtful
        if not is_listed:
            if value is not None and not is_denied:
                return value  # type: ignore[no-any-return]
            if is_bool:
                return not is_denied and not self._rejects()
            return 1.0 if is_float else 1
        line = library_line()
        bound = 0 if is_denied else self.bound_at("item", line)
        self._asked[line] += 1
        # Known values end a loop as they do without memfit; "" is an optimizer's own line in backward.
        may_loop = bool(line) and (value is None or is_guess)
        limit = _LOOP_LIMIT if may_loop else 1000 * _LOOP_LIMIT
        if bound is None and self._asked[line] > limit:
            raise UserError(
                f".item() at {line or 'an unknown line'} is called more than {limit} times, as in a loop "
                "that does not end because fake tensors have no values",
                allowed=f"bound={{{line or 'item'!r}: N}} in Job(...) or estimate(...), or for a script "
                f"--bound {line or 'item'}=N, where N is what .item() returns or, if that is a bool, how "
                "often in a row it is True",
            )
        source = ""
        if is_bool and (bound is not None or value is None):
            answer: bool | int | float = bound is None or self._asked[line] % (int(bound) + 1) != 0
        elif bound is not None:
            answer = bound if is_float else int(bound)
        elif value is not None:
            answer, source = value, self._source(is_guess, line)
        else:
            self.open[line] = None
            answer = 1.0 if is_float else 1
        if not (is_bool and bound):
            text = f".item() on {tensor.dtype} answered {answer}{source}"
            self.assume(text, line, is_guess=not source)
        return answer

    def _rejects(self) -> bool:
        """Return True for every 16th question in a row that the same line of one call of a function asks,
        else False. The caller then answers False, because initialisers that redraw until all values are in
        range, such as trunc_normal_, must terminate."""
        frame = reading_frame()
        place, count = (id(frame), frame.f_lineno if frame else 0), self._loop[2]
        self._loop = (*place, count + 1 if self._loop[:2] == place else 0)
        return self._loop[2] % _REJECTIONS == _REJECTIONS - 1

    def decides(self, func: Any) -> bool:
        """Return whether `call` does more for the operator than to run it: it has a rule for it, may replace
        masks among its indices, or has seen before that torch's fake result depends on values."""
        return func in _SHAPED or func in _INDEXED or func in self._value_dependent

    def call(self, func: Any, args: Any, kwargs: Mapping[str, Any], values: Any = None) -> Any:
        """Run the operator on fake tensors and return its result, with `size` for sizes that depend on data.

        ``values`` is its real result on known or assumed values, or None if some are missing. If torch has no
        fake result because it depends on values, the result is a fake one with the shapes of ``values``. If
        these are None, it has the shapes of the real result on values that are assumed here; raises UserError
        if that is impossible (`_call_on_assumed`). Also raises what `size` raises.
        """
        if func in _SHAPED:
            return _SHAPED[func](self, *args, **kwargs)
        args = self.positions(func, args)
        try:
            return func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            self.questions += 1
            op, line = func.overloadpacket.__name__, library_line()
            self._value_dependent.add(func)
            is_guess = values is None or any(map(is_assumed, _pytree.tree_leaves(values)))
            values = self._call_on_assumed(func, args, kwargs) if values is None else values
            if values is None:
                raise UserError(
                    op
                    + (f" at {line}" if line else "")
                    + " gives a result that depends on the values of its inputs, which are not known",
                    allowed="inputs whose values follow from the batch alone",
                    hint="remove the operator from the training step",
                ) from None
            origin = "assumed values" if is_guess else "known values, as in the batch"
            self.assume(f"{op} gave its result for {origin}", line, is_guess=is_guess)
            if is_guess:
                self.assumed[line or op] = None
            return _pytree.tree_map_only(
                torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), values
            )

    def size(self, op: str, most: int, decided: torch.Tensor, count: Callable[[torch.Tensor], Any]) -> int:
        """Return how many of ``most`` possible elements the operator ``op`` gives.

        This is the first of these bounds that is given: that of the calling line, of ``op``, of the key ""
        (or the bound itself if it is a single number). A float is a fraction of ``most``, rounded up; an
        integer is the number itself and is not limited to ``most``. Without a bound, the result is ``count``
        of the values of ``decided``: known ones, or for a mask assumed ones. If there are no values either,
        it is ``most`` (in the case LOW at most 1) for an operator whose result has an upper limit, such as
        nonzero or unique. Raises UserError for another operator.
        """
        self.questions += 1
        line = library_line()
        bound = self.bound_at(op, line)
        if bound is None:
            bound = self.bound.get("") if isinstance(self.bound, Mapping) else self.bound
        source = ""
        if bound is None:
            values = (
                self.concrete_values.assume(decided)
                if decided.dtype is torch.bool
                else self.concrete_values.of(decided)
            )
            if values is not None:
                with torch.no_grad(), unset_fake_temporarily():
                    bound = int(count(values))
                source = self._source(is_assumed(values), line or op)
            elif op in _LIMITED:  # all of them or one; the values are large, or distinct and unknown
                bound = min(1, most) if self.concrete_values.case is AssumedCase.LOW else most
                source = self._source(True, line or op)
            else:
                raise _unbounded(op, line)
        size = math.ceil(bound * most) if isinstance(bound, float) else bound
        self.assume(f"{op} gave {size} of {most} elements{source}", line, is_guess=not source)
        return size

    def bound_at(self, op: str, line: str) -> int | float | None:
        """Return the bound of ``line`` or of the user's line, else that of ``op``; None without."""
        if not isinstance(self.bound, Mapping):
            return None
        return self.bound.get(line, self.bound.get(user_line(), self.bound.get(op)))

    def _source(self, is_guess: bool, line: str) -> str:
        """Return the end of a sentence about an answer: "" if it is assumed (``is_guess``), else ", as in the
        batch". If it is assumed, add ``line`` to ``assumed``."""
        if is_guess:
            self.assumed[line] = None
        return "" if is_guess else ", as in the batch"

    def read(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """Return real values of ``tensor`` for code outside torch, which reads them by the function ``what``
        ("numpy" or "tolist"): known or else assumed ones. If none can be assumed (`ConcreteValues.assume`),
        as for integers and for large tensors, all elements are the bound of the calling line (or of the key
        "item"), or 1 without a bound."""
        self.questions += 1
        values, line = self.concrete_values.assume(tensor), library_line()
        if values is None:
            bound = self.bound_at("item", line)
            self.open |= {line: None} if bound is None else {}
            with unset_fake_temporarily():
                constants = torch.full(tensor.shape, 1 if bound is None else bound).to(tensor.dtype)
            self.assume(f"{what} gave {1 if bound is None else bound} everywhere", line, is_guess=True)
            return constants
        is_guess = is_assumed(values)
        text = f"{what} gave {'assumed ' if is_guess else ''}values{self._source(is_guess, line)}"
        self.assume(text, line, is_guess=is_guess)
        return values

    def _call_on_assumed(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return the operator's real result, with assumed numbers and masks where values are not known; these
        are forgotten afterwards. Return None if no values can be assumed for an argument
        (`ConcreteValues.assume`), as for integers, some of which would be out of range, or if the operator
        fails."""
        leaves = tensor_leaves((args, kwargs))
        unknown_tensors = [x for x in leaves if self.concrete_values.of(x) is None]
        values = {id(x): self.concrete_values.assume(x) for x in leaves}
        for tensor in unknown_tensors:
            self.concrete_values.forget(tensor)
        if None in values.values():
            return None
        real_arguments = _pytree.tree_map_only(torch.Tensor, lambda x: values[id(x)], (args, dict(kwargs)))
        with (
            torch.no_grad(),
            unset_fake_temporarily(),
            contextlib.suppress(RuntimeError, ValueError, IndexError),
        ):
            return func(*real_arguments[0], **real_arguments[1])
        return None

    def assume(self, text: str, line: str = "", *, is_guess: bool = False) -> None:
        """Add the sentence ``text`` to ``assumptions``, followed by "at LINE" unless ``line`` is "". With
        ``is_guess``, it is also the ``last_guess``."""
        sentence = text + (f" at {line}" if line else "")
        self.assumptions[sentence] = None
        self.last_guess = sentence if is_guess else self.last_guess

    def positions(self, func: Any, args: Any) -> Any:
        """Return the arguments of an indexing operator with each mask among its indices (bool or uint8)
        replaced by the positions of its True elements, as the kernel does by one ``nonzero`` for each mask.
        `size` decides the number of positions. The positions are added to ``scratch``. The arguments of other
        operators, of calls without a mask, and of writing a single value (a masked fill) are returned
        unchanged."""
        if func not in _INDEXED or not any(_is_mask(i) for i in args[1]):
            return args
        is_read = func is _ATEN.index.Tensor
        if not is_read and args[2].numel() == 1:
            return args  # a single value for all elements is a masked fill
        indices: list[Any] = []
        for index in args[1]:
            if _is_mask(index):
                size = self.size("nonzero", index.numel(), index, torch.count_nonzero)
                self.scratch.append(torch.empty(size, index.dim(), dtype=torch.int64))
                indices += self.scratch[-1].unbind(1)
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _unbounded(op: str, line: str) -> UserError:
    return UserError(
        op + (f" at {line}" if line else "") + " gives a result whose size depends on the data",
        allowed=f"bound={{{line or op!r}: N}} in Job(...) or estimate(...), or for a script --bound "
        f"{line or op}=N, where N is a number of elements, or a fraction of the most that are possible such "
        "as 0.5",
    )


def _nonzero(self: Guesses, x: torch.Tensor) -> torch.Tensor:
    size = self.size("nonzero", x.numel(), x, torch.count_nonzero)
    return torch.empty(x.dim(), size, dtype=torch.int64).t()  # stored by column, as the kernel does


def _masked_select(self: Guesses, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    max_elements = math.prod(torch.broadcast_shapes(x.shape, mask.shape))
    repeats = max_elements // max(1, mask.numel())
    return x.new_empty(
        self.size("masked_select", max_elements, mask, lambda values: values.count_nonzero() * repeats)
    )


def _unique(
    self: Guesses,
    x: torch.Tensor,
    ordered: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> tuple[torch.Tensor, ...]:
    size = self.size("unique", x.numel(), x, lambda values: values.unique().numel())
    shapes = (x.shape if return_inverse else 0, size * return_counts)
    return (x.new_empty(size), *(x.new_empty(n, dtype=torch.int64) for n in shapes))


def _unique_consecutive(
    self: Guesses, x: torch.Tensor, return_inverse: bool = False, return_counts: bool = False, dim: Any = None
) -> tuple[torch.Tensor, ...]:
    if dim is not None:
        return _unique_dim(self, x, dim, True, return_inverse, return_counts)
    return _unique(self, x, True, return_inverse, return_counts)


def _unique_dim(
    self: Guesses,
    x: torch.Tensor,
    dim: int,
    ordered: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> tuple[torch.Tensor, ...]:
    size = self.size("unique", x.shape[dim], x, lambda values: values.unique(dim=dim).shape[dim])
    shape = list(x.shape)
    inverse = x.new_empty(shape[dim] * return_inverse, dtype=torch.int64)
    shape[dim] = size
    return x.new_empty(shape), inverse, x.new_empty(size * return_counts, dtype=torch.int64)


def _bincount(self: Guesses, x: torch.Tensor, weights: Any = None, minlength: int = 0) -> torch.Tensor:
    size = max(minlength, self.size("bincount", x.numel(), x, _bins))
    return torch.empty(size, dtype=torch.int64 if weights is None else torch.float64)


def _bins(values: torch.Tensor) -> int:
    return int(values.max()) + 1 if values.numel() else 0


def _repeat_interleave(self: Guesses, repeats: torch.Tensor, *, output_size: Any = None) -> torch.Tensor:
    if output_size is None:
        output_size = self.size("repeat_interleave", repeats.numel(), repeats, torch.sum)
    return repeats.new_empty(output_size)


def _pack_padded_sequence(
    self: Guesses, padded: torch.Tensor, lengths: torch.Tensor, batch_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack a batch of padded sequences whose lengths are sorted, longest first. Return (packed elements,
    batch size of each time step).

    The batch sizes are a real tensor, because recurrent layers and the derivative read them where no mode
    sees it. Consecutive time steps of equal batch size are copied as one piece, and the pieces are
    concatenated (PackedSequence.cpp). If the lengths are not known, or a bound says another total, lengths
    are made up (`_split_lengths`) and the batch sizes are marked as assumed.
    """
    by_time = padded.transpose(0, 1) if batch_first else padded
    longest, rows = by_time.shape[:2]
    size = self.size("_pack_padded_sequence", longest * rows, lengths, torch.sum)
    real_lengths = self.concrete_values.of(lengths)
    with torch.no_grad(), unset_fake_temporarily():
        if real_lengths is None or int(real_lengths.sum()) != size:
            real_lengths = mark_assumed(_split_lengths(size, longest, rows))
        sizes = (real_lengths[None] > torch.arange(int(real_lengths.max()))[:, None]).sum(1)
        widths, steps = sizes.unique_consecutive(return_counts=True)
        cuts = torch.stack((steps.cumsum(0) - steps, steps.cumsum(0), widths), 1).tolist()
    if is_assumed(real_lengths):
        mark_assumed(sizes)
    pieces = [by_time[start:end, :width].contiguous().flatten(0, 1) for start, end, width in cuts]
    self.scratch += [sizes, *pieces]
    return torch.cat(pieces), sizes


def _split_lengths(size: int, longest: int, rows: int) -> torch.Tensor:
    """Return lengths of ``rows`` sequences with ``size`` elements in total: the first as long as possible,
    the others about equal. Each is between 1 and ``longest``; a ``size`` that does not allow this is replaced
    by the nearest that does. For a ``size`` of 10, a ``longest`` of 5 and 3 rows, they are 5, 3 and 2."""
    size = min(max(size, rows), longest * rows)
    max_length = min(longest, size - rows + 1)
    rest_length, remainder = divmod(size - max_length, max(1, rows - 1))
    return torch.tensor([max_length] + [rest_length + (i < remainder) for i in range(rows - 1)])


def _ctc_loss(
    self: Guesses, log_probs: torch.Tensor, targets: torch.Tensor, inputs: Any, lengths: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fake (losses, states) of a CTC loss. The losses are one per sequence. The states have the shape
    (sequences, time steps, 2 x longest target + 1): one per time step for every label and every gap before,
    between and after labels (LossCTC.cpp). ``inputs`` and ``lengths`` are the lengths of the inputs and of
    the targets; the latter are a tensor or numbers."""
    max_labels = targets.shape[1] if targets.dim() == 2 else targets.numel()
    are_numbers = not isinstance(lengths, torch.Tensor)
    states = 2 * (max(lengths) if are_numbers else self.size("ctc_loss", max_labels, lengths, torch.max)) + 1
    alpha = log_probs.new_empty(log_probs.shape[1], log_probs.shape[0], states)
    return log_probs.new_empty(log_probs.shape[1]), alpha


def _ctc_loss_backward(
    self: Guesses,
    grad: torch.Tensor,
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    inputs: Any,
    lengths: Any,
    likelihood: torch.Tensor,
    log_alpha: torch.Tensor,
    *rest: Any,
) -> torch.Tensor:
    self.scratch += [torch.empty_like(log_probs, memory_format=torch.contiguous_format)]
    self.scratch += [torch.empty_like(log_alpha)]
    return self.scratch[-2]


def _log_softmax_backward(
    self: Guesses, grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return a fake, contiguous gradient of the input, of the shape of ``grad`` and the dtype ``dtype``, as
    the kernel does (SoftMax.cpp). Torch's fake implementation would copy the layout of ``grad``."""
    return grad.new_empty(grad.shape, dtype=dtype)


def _equal(self: Guesses, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    """Answer ``equal`` or ``allclose`` of fake tensors: False if ``tensor`` is a bool scalar, else True.
    Torch compares such a scalar to test a condition (is_scalar_tensor_true in TensorUtils, for istft's
    windows), and a true condition is an error there."""
    answer = tensor.dim() > 0 or tensor.dtype is not torch.bool
    self.assume(f"equal answered {answer}", library_line(), is_guess=True)
    return answer


_ATEN: Any = torch.ops.aten
_INDEXED = frozenset(
    {
        _ATEN.index.Tensor,
        _ATEN.index_put.default,
        _ATEN.index_put_.default,
        _ATEN._index_put_impl_.default,
        _ATEN._unsafe_index_put.default,
    }
)
_SHAPED: dict[Any, Callable[..., Any]] = {
    # The fake implementation gives a new tensor.
    torch.ops._c10d_functional.wait_tensor.default: lambda self, x: x,
    _ATEN.nonzero.default: _nonzero,
    _ATEN.masked_select.default: _masked_select,
    _ATEN._unique2.default: _unique,
    _ATEN._unique.default: _unique,
    _ATEN.unique_consecutive.default: _unique_consecutive,
    _ATEN.unique_dim.default: _unique_dim,
    _ATEN.bincount.default: _bincount,
    _ATEN.repeat_interleave.Tensor: _repeat_interleave,
    _ATEN._pack_padded_sequence.default: _pack_padded_sequence,
    _ATEN._log_softmax_backward_data.default: _log_softmax_backward,
    _ATEN._ctc_loss.default: _ctc_loss,
    _ATEN._ctc_loss.Tensor: _ctc_loss,
    _ATEN._ctc_loss_backward.default: _ctc_loss_backward,
    _ATEN._ctc_loss_backward.Tensor: _ctc_loss_backward,
    _ATEN.equal.default: _equal,
    _ATEN.allclose.default: _equal,
}
