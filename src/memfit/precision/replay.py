"""Run one module's own code again in another precision, on its recorded inputs.

The children of a module do not run: each child's recorded output is used instead, and what the module's own
code passes to a child is compared like an output. An error is thus attributed to the module that makes it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.precision.recording import FAILURES, LOSS, RecordedCall, deterministic
from memfit.precision.tensors import Gap, all_finite, gap, is_float, leaves, rebuild
from memfit.trace.device_autocast import cuda_autocast_on_host


@dataclasses.dataclass(frozen=True, slots=True)
class Mode:
    """A precision in which modules are replayed.

    ``name``: the key of the mode in ``RecordedCall.dtypes``. ``model``: the model whose parameters are used.
    ``input_dtype``: dtype of inputs whose dtype was not learned from a real run. ``rounded``: dtype to which
    inputs and outputs are rounded, while the computation is in ``input_dtype``; None: no rounding.
    ``make_context()`` returns a context in which modules run. ``narrow``: whether `replay_call` without
    ``listening`` records the operators that make non-finite values."""

    name: str
    model: nn.Module
    input_dtype: torch.dtype
    rounded: torch.dtype | None = None
    make_context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    narrow: bool = False


def modes(model: nn.Module, low: torch.dtype, *, cuda: bool) -> dict[str, Mode]:
    """Return the modes of a float32 ``model`` by name:

    - "exact": everything in float64.
    - "float32": the model as it is.
    - "rounded": inputs, parameters and outputs rounded to ``low``, computation in float64.
    - "pure": everything in ``low``.
    - "autocast": under torch.autocast to ``low``. What this keeps in float32 is that of CUDA if ``cuda``,
      else that of the CPU.
    """

    def twin(*dtypes: torch.dtype) -> nn.Module:
        twin_model = copy.deepcopy(model)
        for dtype in dtypes:
            twin_model = twin_model.to(dtype)
        return twin_model

    def autocast() -> contextlib.AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.autocast("cpu", dtype=low, cache_enabled=False))
        if cuda:
            stack.enter_context(cuda_autocast_on_host())
        return stack

    wide = torch.float64
    return {
        "exact": Mode("exact", twin(wide), wide),
        "float32": Mode("float32", model, torch.float32),
        "rounded": Mode("rounded", twin(low, wide), wide, rounded=low),
        "pure": Mode(f"pure {low}", twin(low), low, narrow=True),
        "autocast": Mode(f"autocast {low}", model, low, make_context=autocast, narrow=True),
    }


@dataclasses.dataclass(slots=True)
class ReplayedModule:
    """Result of a replay.

    ``outputs``: floating-point tensors that the module's own code gave to its children and to its caller.
    ``passed``: for each output, whether it is an input or shares an input's memory, so that it was not
    computed. ``inputs``: floating-point tensors that the own code received from its caller and its children.
    ``grads``: gradients of the inputs, None where there is none. ``parameters``: the gradients of the
    module's parameters as one float64 vector, None if there are none. ``nonfinite_operators``: names of
    operators that made non-finite values from finite ones. ``failed``: "", or the error if the replay failed;
    then all fields but ``nonfinite_operators`` are empty."""

    outputs: list[torch.Tensor]
    passed: list[bool]
    inputs: list[torch.Tensor]
    grads: list[torch.Tensor | None]
    parameters: torch.Tensor | None
    nonfinite_operators: set[str]
    failed: str = ""


def replay_call(
    call: RecordedCall,
    mode: Mode,
    loss: Callable[[Any, Any], torch.Tensor],
    *,
    listening: contextlib.AbstractContextManager[Any] | None = None,
    backward: bool = True,
) -> ReplayedModule:
    """Run the forward of the call's module again in ``mode``, with its children's recorded outputs in place
    of the children, and, with ``backward``, its backward. For the call of the loss function, run ``loss``.
    Return what the module's own code received and gave, with gradients.

    ``listening``: a context manager around the forward; None: `NonFiniteOperators` if the mode is narrow,
    else none. Errors that a precision may cause (`FAILURES`), and calls of other children than in the
    recorded run, are not raised but described in ``failed`` of the result."""
    run = _Replay(call, mode)
    listener = listening or (NonFiniteOperators() if mode.narrow else contextlib.nullcontext())
    nonfinite_operators = listener.names if isinstance(listener, NonFiniteOperators) else set()
    try:
        with deterministic(), run.children(), listener, mode.make_context():
            output = run.run_forward(loss)
        if run.pending:
            raise ReplayMismatch(f"the module does not call its child {run.pending[0].path} again")
        run.collect(output)
        if backward:
            run.run_backward()
    except FAILURES as error:
        text = " ".join(str(error).split())[:160] or type(error).__name__
        return ReplayedModule([], [], [], [], None, nonfinite_operators, failed=text)
    finally:
        run.module.zero_grad(set_to_none=True)
    return run.result(nonfinite_operators)


class ReplayMismatch(RuntimeError):
    """Raised inside `replay_call`, which catches it, if a replayed module does not call the same children in
    the same order as in the recorded run."""


class _Replay:
    def __init__(self, call: RecordedCall, mode: Mode) -> None:
        self.call, self.mode = call, mode
        self.module = mode.model if call.path == LOSS else mode.model.get_submodule(call.path)
        self.pending = list(call.inner)
        self.sources: list[torch.Tensor] = []
        self.ends: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self.dtypes = call.dtypes.get(mode.name)
        self.received = self.sources

    def enter(self, value: Any, dtypes: list[torch.dtype] | None) -> Any:
        """Return the value with its floating-point tensors replaced by new tensors that begin an autograd
        graph, and add these to ``sources``. A tensor that occurs twice gets one new tensor.

        ``dtypes`` has one dtype for each tensor of the value, also for those that are not floating-point, in
        the order of `leaves`. The new tensor is cast to it, or to the mode's ``input_dtype`` if ``dtypes`` is
        None or too short; if the mode rounds, it is rounded before."""
        memo: dict[int, torch.Tensor] = {}
        dtype_order = iter(dtypes or ())

        def replace(tensor: torch.Tensor) -> torch.Tensor:
            dtype = next(dtype_order, self.mode.input_dtype)
            if not is_float(tensor):
                return tensor
            if id(tensor) not in memo:
                leaf = tensor.detach()
                for target_dtype in (self.mode.rounded or dtype, dtype):
                    leaf = _within(leaf, target_dtype)
                leaf = leaf.clone().requires_grad_(tensor.requires_grad)
                memo[id(tensor)] = leaf
                self.sources.append(leaf)
            leaf = memo[id(tensor)]
            # the module's own code may write into it
            return leaf.view_as(leaf) if leaf.requires_grad else leaf

        return rebuild(value, replace)

    def run_forward(self, loss: Callable[[Any, Any], torch.Tensor]) -> Any:
        if self.call.path == LOSS:
            self.received = list(leaves(self.call.inputs))
            return loss(self.mode.model, self.call.inputs[0][0])
        args, kwargs = self.enter(self.call.inputs, self.dtypes[0] if self.dtypes else None)
        return self.module.forward(*args, **kwargs)

    @contextlib.contextmanager
    def children(self) -> Iterator[None]:
        modules = self.module.named_modules(prefix="" if self.call.path == LOSS else self.call.path)
        inner_modules = [(n, m) for n, m in modules if m is not self.module or self.call.path == LOSS]
        with contextlib.ExitStack() as stack:
            for name, module in inner_modules:
                own_forward = vars(module).get("forward")
                module.forward = self._child(name)
                stack.callback(_restore, module, own_forward)
            yield

    def _child(self, path: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.pending or self.pending[0].path != path:
                raise ReplayMismatch(f"the module calls its child {path} where the recorded run did not")
            call = self.pending.pop(0)
            for index, tensor in enumerate(leaves((args, kwargs))):
                if is_float(tensor):
                    self.ends.append((tensor, call.input_grads.get(index)))
            dtypes = call.dtypes.get(self.mode.name)
            return self.enter(call.output, dtypes[1] if dtypes else None)

        return forward

    def collect(self, output: Any) -> None:
        for index, tensor in enumerate(leaves(output)):
            if is_float(tensor):
                self.ends.append((tensor, self.call.output_grads.get(index)))
        if self.mode.rounded:
            self.ends = [(t.to(self.mode.rounded).to(t.dtype), g) for t, g in self.ends]

    def run_backward(self) -> None:
        """Run backward from the outputs with their recorded gradients. All of these are divided by the
        largest of their absolute values, so that they do not vanish in float16, whose smallest positive
        number is 6e-8. Do nothing if all are zero or there are none."""
        pairs = [(t, g) for t, g in self.ends if g is not None and t.requires_grad]
        largest = max((float(g.abs().max()) for _, g in pairs if g.numel()), default=0.0)
        if largest > 0:
            torch.autograd.backward([t for t, _ in pairs], [(g / largest).to(t.dtype) for t, g in pairs])

    def result(self, nonfinite_operators: set[str]) -> ReplayedModule:
        storages = {t.untyped_storage().data_ptr() for t in self.received}
        passed = [t.untyped_storage().data_ptr() in storages for t, _ in self.ends]
        grads = [p.grad.double().flatten() for p in self.module.parameters() if p.grad is not None]
        return ReplayedModule(
            outputs=[t.detach() for t, _ in self.ends],
            passed=passed,
            inputs=[t.detach() for t in self.sources],
            grads=[t.grad for t in self.sources],
            parameters=torch.cat(grads) if grads else None,
            nonfinite_operators=nonfinite_operators,
        )


def _within(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in ``dtype``. Finite values beyond the range of ``dtype`` become its largest finite
    value, with their sign, so that their overflow is attributed to the module that made them, not to those
    that read them. Infinities and NaN stay."""
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(tensor.dtype).max:
        return tensor.to(dtype)
    return torch.where(tensor.isfinite(), tensor.clamp(-limit, limit), tensor).to(dtype)


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


class NonFiniteOperators(TorchDispatchMode):
    """Collects in ``names``, within the context, the names of operators whose floating-point results are not
    all finite although all their inputs are. Operators that make uninitialised tensors (empty) do not
    count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_candidate = name not in self.names and not name.startswith(("empty", "new_empty"))
        if is_candidate and _broken(result) and not _broken((args, kwargs or {})):
            self.names.add(name)
        return result


def _broken(value: Any) -> bool:
    return any(is_float(t) and not all_finite(t) for t in leaves(value))


@dataclasses.dataclass(slots=True)
class ReplayErrors:
    """Errors of a replay relative to the one in float64. ``output``: the worst of the outputs, lost also if a
    gradient is lost. ``gradient``: the worst error of the gradients of inputs and parameters (`compare` says
    relative to what). ``nonfinite_operators``: names of operators that made non-finite values from finite
    ones, joined by ", ". ``failed``: the error if the replay failed, else ""."""

    output: Gap
    gradient: float
    nonfinite_operators: str = ""
    failed: str = ""

    def worst(self, other: ReplayErrors) -> ReplayErrors:
        """Return the larger errors of the two, the operators of both, and the first failure."""
        operators = ", ".join(
            sorted({*self.nonfinite_operators.split(", "), *other.nonfinite_operators.split(", ")} - {""})
        )
        return ReplayErrors(
            self.output.worst(other.output),
            max(self.gradient, other.gradient),
            operators,
            self.failed or other.failed,
        )


def compare(exact: ReplayedModule, replay: ReplayedModule) -> ReplayErrors:
    """Return the errors of the replay ``replay`` relative to ``exact``, a replay of the same call that has
    not failed. Outputs that ``exact`` did not compute but passed through (``passed``) are not
    compared. The error of a gradient is relative to its own root mean square, or to a quarter of that of the
    largest gradient if that is more; the worst 1 % of its elements is left out. If ``replay`` failed, the
    result has its ``failed``, an output that is lost, errors of 0 and no operators."""
    output, gradient = Gap(), 0.0
    if replay.failed:
        return ReplayErrors(Gap(lost=True), 0.0, failed=replay.failed)
    for reference, replayed, passed in zip(exact.outputs, replay.outputs, exact.passed, strict=True):
        if not passed:
            output = output.worst(gap(reference, replayed))
    pairs = [
        (a, b) for a, b in zip(exact.grads, replay.grads, strict=True) if a is not None and b is not None
    ]
    if exact.parameters is not None and replay.parameters is not None:
        pairs.append((exact.parameters, replay.parameters))
    largest = max((float(a.double().square().mean().sqrt()) for a, _ in pairs if a.numel()), default=0.0)
    lost = False
    for reference, replayed in pairs:
        difference = gap(reference, replayed, floor=0.25 * largest, trim=True)
        gradient, lost = max(gradient, difference.error), lost or difference.lost
    output.lost = output.lost or lost
    return ReplayErrors(output, gradient, nonfinite_operators=", ".join(sorted(replay.nonfinite_operators)))
