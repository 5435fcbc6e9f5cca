"""The data of the calculator and the gallery: traced training steps whose sizes are polynomials.

    python scripts/memory_pages.py trace [--only REGEX]   # writes scripts/pages/traces.json
    python scripts/memory_pages.py build [FOLDER]         # writes the pages, by default to build/site/

The sequence of allocations and frees of a step stays the same when only the batch of a device and the length
change; the bytes that are asked for are a polynomial of both, or of the batch and the length rounded up. The
memory inside some kernels is neither (`TAKEN`, `BOUNDED`), but the shapes of their arguments are, and the
pages have the formulas. So a few traces give the step at all batches and lengths between them. The pages
replay it, and the caching allocator with it, as `memfit estimate JOB` does. Traces that took no part in the
fit test it: a combination whose step is not the same there, in all its bytes, is left out.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import datetime
import functools
import itertools
import json
import re
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy

from memfit.cost.cuda_workspaces import REDUCTIONS
from memfit.files.replace import write_whole
from memfit.types.errors import MemfitError, UserError, first_line

HERE: Final = Path(__file__).parent / "pages"
ROOT: Final = Path(__file__).parents[1]
DATA: Final = HERE / "traces.json"
COMMAND: Final = "python scripts/memory_pages.py trace"
_DIFFERS: Final = "which operators a step runs depends on the batch or the length"
RANKS: Final = 8
PRECISIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "float32": {},
    "bf16-autocast": {"bf16-autocast": {}},
    "bf16-parameters": {"bf16-parameters": {}},
}
RECOMPUTATION: Final[Mapping[str, Mapping[str, Any]]] = {
    "none": {},
    "blocks": {"activation-checkpointing": {"every": 1}},
}
SHARDING: Final[Mapping[str, Mapping[str, Any]]] = {"none": {}, "fsdp2": {"fsdp2": {}}}
# Devices that compute in bfloat16, and of which the catalog knows what they use beside tensors.
DEVICES: Final = (
    *("A10G", "L4", "RTX-4090", "RTX-5090", "L40S", "RTX-PRO-6000"),
    *("A100-40GB-SXM", "A100-80GB-SXM", "H100-SXM", "H200-SXM", "B200"),
)
LATE_EVENTS: Final = (1, 4, 16)  # as cost/memory_estimate.py delays frees; a test compares the answers
_INDEX: Final = re.compile(r"(^|(?<=[.]))[0-9]+(?=[.]|$)")
_BLAS: Final = -1  # in place of a size: the device's workspace for matrix products
# Operators whose memory inside depends on their shapes by thresholds and divisions, as answer.js computes it:
# what they take, and what has an upper bound only
TAKEN: Final = frozenset({*REDUCTIONS, "sort", "index_put", "embedding_dense_backward"})
BOUNDED: Final = frozenset(
    {"_scaled_dot_product_flash_attention"}
    | {f"_scaled_dot_product_{kind}_attention_backward" for kind in ("flash", "efficient")}
)
_MULTIPLES: Final = (1, 8, 16, 32, 64, 128)  # to which a kernel may pad the length


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of the pages. ``spec``, ``size``: the job. ``second``: the size beside the batch that can be
    chosen, "" for none; ``unit``: the key of its unit in the words. ``seconds``: the values of it that are
    traced to fit, one more than the degree of the polynomial (two where attention is a fused kernel);
    ``batches``: those of the batch of a device. ``checks``: (batch, second) of the traces that test the fit.
    ``multiple``: the values of ``second`` are multiples of it. ``start``: what the page shows first."""

    spec: str
    size: str | None = None
    title: str
    second: str = ""
    unit: str = ""
    seconds: tuple[int, ...] = (1,)
    batches: tuple[int, int]
    checks: tuple[tuple[int, int], ...]
    multiple: int = 1
    start: tuple[int, int]
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    shardings: tuple[str, ...] = tuple(SHARDING)


_ONE_DEVICE: Final = {"precisions": ("float32", "bf16-autocast"), "shardings": ("none",)}
_TOKENS: Final = {"second": "length", "unit": "tokens"}
MODELS: Final[Mapping[str, Model]] = {
    "llama-3.1-8b": Model(
        spec="hf:meta-llama/Llama-3.1-8B",
        title="Llama-3.1-8B",
        **_TOKENS,
        seconds=(128, 2048, 16384),  # attention that is written out is quadratic
        batches=(2, 32),
        checks=((1, 4097), (5, 1001), (27, 9999)),
        start=(1, 2048),
    ),
    "mixtral-8x7b": Model(
        spec="hf:mistralai/Mixtral-8x7B-v0.1",
        title="Mixtral-8x7B",
        **_TOKENS,
        seconds=(128, 2048, 16384),  # attention that is written out is quadratic
        batches=(2, 32),
        checks=((1, 4097), (5, 1001), (27, 9999)),
        start=(1, 2048),
    ),
    "gpt-2": Model(
        spec="hf:openai-community/gpt2",
        title="GPT-2 (124 M)",
        **_TOKENS,
        seconds=(64, 384, 1024),
        batches=(2, 64),
        checks=((1, 333), (5, 777), (41, 130)),
        start=(8, 1024),
    ),
    "esm-2-650m": Model(
        spec="hf:facebook/esm2_t33_650M_UR50D",
        title="ESM-2 650M",
        second="length",
        unit="residues",
        seconds=(64, 1024),
        batches=(2, 64),
        checks=((1, 333), (5, 777), (41, 130)),
        start=(8, 512),
    ),
    "alphafold-2": Model(
        spec="alphafold2",
        size="initial",
        title="AlphaFold 2",
        second="length",
        unit="residues",
        seconds=(64, 128, 256, 512),
        batches=(2, 4),
        checks=((1, 300), (3, 200)),
        start=(1, 256),
        **_ONE_DEVICE,
    ),
    "schnet": Model(
        spec="potential",
        size="paper",
        title="SchNet (Open Catalyst)",
        second="atoms",
        unit="atoms",
        seconds=(64, 128, 256),
        batches=(2, 64),
        checks=((1, 77), (5, 99), (37, 201)),
        start=(8, 128),
        **_ONE_DEVICE,
    ),
    "vit-large": Model(
        spec="hf:google/vit-large-patch16-224",
        title="ViT-L/16",
        batches=(2, 256),
        checks=((33, 1), (150, 1)),
        start=(64, 1),
    ),
    "u-net-3d": Model(
        spec="segmentation3d",
        size="paper",
        title="3-D U-Net (nnU-Net)",
        second="crop",
        unit="voxels",
        seconds=(64, 96, 128, 160),
        batches=(2, 8),
        checks=((3, 96), (7, 128)),
        multiple=32,
        start=(2, 128),
        **_ONE_DEVICE,
    ),
    "hyenadna": Model(
        spec="genome",
        size="paper",
        title="HyenaDNA",
        second="length",
        unit="bases",
        seconds=(1024, 65536, 262144),
        batches=(2, 8),
        checks=((1, 32768), (3, 100001), (7, 5003)),
        start=(1, 65536),
        **_ONE_DEVICE,
    ),
    "weather": Model(
        spec="weather",
        size="paper",
        title="FourCastNet",
        batches=(2, 16),
        checks=((5, 1), (11, 1)),
        start=(2, 1),
        **_ONE_DEVICE,
    ),
}


# -- from traces to polynomials ---------------------------------------------------------------------


def plan_of(precision: str, recomputation: str, sharding: str) -> dict[str, Any]:
    """Return the content of the plan file of three choices."""
    techniques = {**PRECISIONS[precision], **RECOMPUTATION[recomputation], **SHARDING[sharding]}
    return {"techniques": techniques, **({"ranks": RANKS} if sharding != "none" else {})}


def request_of(model: Model, plan: Mapping[str, Any], batch: int, second: int, device: str) -> Any:
    """Return the request that `memfit estimate JOB` makes for ``batch`` samples on each device."""
    from memfit.catalog.machine_spec import machine
    from memfit.jobs.registry import JobRef
    from memfit.planner.request import Request

    ranks = plan.get("ranks", 1)
    sizes = {"batch": batch * ranks} | ({model.second: second} if model.second else {})
    ref = JobRef(spec=model.spec, size=model.size).with_sizes(sizes)
    return Request(job_ref=ref, machine=machine(f"{ranks}x{device}" if ranks > 1 else device))


def traced(model: Model, plan: Mapping[str, Any], batch: int, second: int) -> Any:
    """Return the trace of the step, with the workspaces for matrix products, as an estimate is made of it."""
    from memfit.cost.device_overhead import with_workspaces
    from memfit.jobs.registry import load
    from memfit.techniques.plan_file import parse_plan
    from memfit.techniques.rank_mesh import layout
    from memfit.techniques.registry import check
    from memfit.trace.trace_extrapolation import deep_trace
    from memfit.types.gc_pause import pause_gc

    request = request_of(model, plan, batch, second, "H100-SXM")
    checked = check(parse_plan(plan, what="the plan"), request.machine)
    assert layout(checked).distinct_ranks() == (0,), "one trace stands for all ranks"
    with pause_gc():
        trace = deep_trace(load(request.job_ref), checked, device=request.machine.device.trace_kind)
    return with_workspaces(trace, request.machine.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """Memory inside a call of an operator. ``name``: the operator if it is one of `TAKEN` or `BOUNDED`, which
    the page computes from ``arguments``, those of its signature as JSON; else "". Then it takes ``beside``
    bytes beside its outputs, and ``alone`` bytes before they exist. ``outputs``: bytes of these. ``least``:
    so many bytes count as none."""

    name: str = ""
    arguments: str = ""
    beside: int = 0
    alone: int = 0
    outputs: tuple[int, ...] = ()
    least: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The structure of a trace, which must be the same in all of them, and its sizes, which may differ.

    ``events``: index of an allocation, or -1 minus that index for its free, in the order of the clock.
    ``kinds``: (category, stream, contributor) of each allocation. ``spans``: (phase, step, first event, end).
    ``bounded``: (first event, end) of each operator whose workspace has a bound. ``requested``: bytes of each
    allocation, and ``bounds`` of each of these workspaces.
    """

    events: tuple[int, ...]
    kinds: tuple[tuple[str, str, str], ...]
    spans: tuple[tuple[str, int, int, int], ...]
    bounded: tuple[tuple[int, int], ...]
    groups: tuple[int, ...]
    ratio: tuple[float, float]
    requested: tuple[int | Kernel, ...]
    bounds: tuple[Kernel, ...]

    @property
    def structure(self) -> tuple[Any, ...]:
        return self.events, self.kinds, self.spans, self.bounded, self.groups, self.ratio


def step_of(trace: Any, device: Any) -> Step:
    from memfit.cost.cuda_workspaces import NEGLIGIBLE_BYTES, temporaries
    from memfit.cost.device_overhead import BLAS_WORKSPACE
    from memfit.cost.workspaces import bound_bytes
    from memfit.report.explain import op_name
    from memfit.types.trace import Phase

    blas = max((a.size_bytes for a in trace.allocations if a.op == BLAS_WORKSPACE), default=0)
    made = list(trace.allocations)
    requested: list[int | Kernel] = [
        _BLAS if a.op == BLAS_WORKSPACE and a.size_bytes == blas else a.requested_bytes or a.size_bytes
        for a in made
    ]
    for temporary in temporaries(trace, device):
        inside, outputs = temporary.inside, [a.requested_bytes or a.size_bytes for a in temporary.outputs]
        kernel = Kernel(
            **_computed(temporary.call, TAKEN)
            or {"beside": inside.beside_bytes, "alone": inside.alone_bytes},
            outputs=tuple(outputs)
            if inside.alone_bytes or _base(temporary.call) == "embedding_dense_backward"
            else (),
            least=NEGLIGIBLE_BYTES,
        )
        if kernel.name or kernel.beside or kernel.alone:
            made.append(temporary.allocation)
            requested.append(kernel)
    assert all(a.pieces == 1 for a in made), "no chunked plan"
    freed = [i for i, a in enumerate(made) if a.end is not None]
    clock = numpy.array([a.start for a in made] + [made[i].end for i in freed], dtype=numpy.int64)
    order = numpy.argsort(clock, kind="stable")
    clock = clock[order]
    calls = [
        (op, Kernel(**_computed(op, BOUNDED) or {"beside": bound}))
        for op in trace.ops
        if (op.phase is not Phase.SETUP or op.step == 0)
        and ((bound := bound_bytes(op.signature, trace.device, 1)) or _base(op) in BOUNDED)
    ]
    starts = sorted({op.clock for op in trace.ops})
    following = dict(zip(starts, [*starts[1:], int(clock[-1]) + 1], strict=True))
    first = numpy.searchsorted(clock, [op.clock for op, _ in calls], side="right") - 1
    end = numpy.searchsorted(clock, [following[op.clock] for op, _ in calls], side="right")
    return Step(
        events=tuple(int(i) if i < len(made) else -1 - freed[i - len(made)] for i in order),
        kinds=tuple(
            (
                str(a.category),
                a.stream,
                f"{_INDEX.sub('*', a.module)}\t{op_name(a.op)}",
            )
            for a in made
        ),
        spans=tuple(
            (str(s.phase), s.step, *(int(n) for n in numpy.searchsorted(clock, (s.start, s.end))))
            for s in trace.spans
        ),
        bounded=tuple((max(0, int(i)), max(1, int(j))) for i, j in zip(first, end, strict=True)),
        groups=tuple(ranks for _, ranks in trace.communicators if ranks > 1),
        ratio=(trace.assumed_low_ratio, trace.assumed_high_ratio),
        requested=tuple(requested),
        bounds=tuple(kernel for _, kernel in calls),
    )


def _base(op: Any) -> str:
    from memfit.types.trace import base_name

    return base_name(op.op)


def _computed(op: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the name and the arguments of an operator that the page computes; {} if it does not."""
    name, (_, arguments, options) = _base(op), json.loads(op.signature)
    if name not in names or (name == "index_put" and '"bool"' in op.signature):
        return {}
    if options.keys() - {"dtype", "scale"}:
        raise UserError(f"the page has no formula for {name} with {', '.join(options)}")
    dtype = [options["dtype"]["torch"]] if name in ("sum", "mean") and options.get("dtype") else []
    return {"name": name, "arguments": json.dumps([arguments, *dtype])}


@functools.cache
def _inverse(values: tuple[int, ...]) -> list[list[Fraction]]:
    """Return the inverse of the matrix of powers of the values: it maps values of a polynomial at them to its
    coefficients, exactly."""
    size = len(values)
    rows = [
        [Fraction(v) ** p for p in range(size)] + [Fraction(i == j) for j in range(size)]
        for i, v in enumerate(values)
    ]
    for column in range(size):
        pivot = next(r for r in range(column, size) if rows[r][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [x / rows[column][column] for x in rows[column]]
        for r in range(size):
            if r != column:
                rows[r] = [a - rows[r][column] * b for a, b in zip(rows[r], rows[column], strict=True)]
    return [row[size:] for row in rows]


def coefficients(batches: Sequence[int], seconds: Sequence[int], values: Sequence[int]) -> tuple[float, ...]:
    """Return the coefficients of the polynomial with these values at ``batches`` x ``seconds``: of 1, s, s^2,
    ..., then, if there are two batches, of b, b s, b s^2, ...."""
    count = len(seconds)
    by_second = [
        [
            sum(w * v for w, v in zip(ws, values[i : i + count], strict=True))
            for ws in _inverse(tuple(seconds))
        ]
        for i in range(0, len(values), count)
    ]
    return tuple(
        float(sum(w * row[p] for w, row in zip(ws, by_second, strict=True)))
        for ws in _inverse(tuple(batches))
        for p in range(count)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """Finds what has given values at the sizes ``batches`` x ``seconds``, and after them at ``checks``."""

    batches: tuple[int, ...]
    seconds: tuple[int, ...]
    checks: tuple[tuple[int, int], ...]
    known: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def polynomial(self, values: tuple[int, ...]) -> Any:
        """Return the coefficients, (multiple, coefficients) if they are of the length rounded up to a
        multiple, or the value itself if it is always the same. Raises UserError if there are none."""
        if values not in self.known:
            self.known[values] = self._polynomial(values)
        return self.known[values]

    def _polynomial(self, values: tuple[int, ...]) -> Any:
        if len(set(values)) == 1:
            return values[0]
        count = len(self.batches) * len(self.seconds)
        for multiple in _MULTIPLES if len(self.seconds) > 1 else (1,):
            seconds = [-(-s // multiple) * multiple for s in self.seconds]
            if len(set(seconds)) < len(seconds):
                break
            found = coefficients(self.batches, seconds, values[:count])
            if all(
                round(value_at(found, b, -(-s // multiple) * multiple, len(seconds))) == value
                for (b, s), value in zip(self.checks, values[count:], strict=True)
            ):
                return {"of": found, **({"multiple": multiple} if multiple > 1 else {})}
        raise UserError("the memory of an operator is no polynomial of the batch and the length")

    def quantity(self, values: tuple[int | Kernel, ...]) -> Any:
        """Return what the pages compute a size from. Raises UserError if it cannot be computed."""
        if values not in self.known:
            self.known[values] = self._quantity(values)
        return self.known[values]

    def _quantity(self, values: tuple[int | Kernel, ...]) -> Any:
        first = values[0]
        if not isinstance(first, Kernel):
            return self.polynomial(values)  # type: ignore[arg-type]
        kernels: tuple[Kernel, ...] = values  # type: ignore[assignment]
        least = {"least": first.least} if first.least else {}
        if len({len(k.outputs) for k in kernels}) > 1:
            raise UserError(_DIFFERS)
        outputs = [self.polynomial(sizes) for sizes in zip(*(k.outputs for k in kernels), strict=True)]
        least |= {"outputs": outputs} if outputs else {}
        if not first.name:
            beside, alone = (
                self.polynomial(tuple(getattr(k, n) for k in kernels)) for n in ("beside", "alone")
            )
            return {"beside": beside, **({"alone": alone} if alone else {}), **least}
        return {
            "kernel": first.name,
            "arguments": self._tree([json.loads(k.arguments) for k in kernels]),
            **least,
        }

    def _tree(self, values: Sequence[Any]) -> Any:
        first = values[0]
        if type(first) is int:
            return self.polynomial(tuple(values))
        if isinstance(first, list) and len({len(v) for v in values}) == 1:
            return [self._tree(v) for v in zip(*values, strict=True)]
        if isinstance(first, dict) and "t" in first:
            return {"t": self._tree([v["t"][:3] for v in values])}
        if any(v != first for v in values):
            raise UserError(_DIFFERS)
        return first


def value_at(found: Sequence[float], batch: int, second: int, degrees: int) -> float:
    """Return the value of the polynomial with the coefficients ``found``."""
    return sum(c * second ** (i % degrees) * (batch if i >= degrees else 1) for i, c in enumerate(found))


def entry_of(model: Model, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Trace one plan of a model and return what the pages need of it; {"problem": why not} if it cannot be
    traced. A batch of one is a step of its own, because many operators then need no copies."""
    parts: dict[str, int] = {}
    steps, groups = [], ""
    for batches in ((1,), model.batches):
        own_checks = [c for c in model.checks if (c[0] == 1) == (batches == (1,))]
        try:
            step, sizes, bounds = fitted_step(model, plan, batches, own_checks)
        except MemfitError as error:
            return {"problem": first_line(error)}
        steps.append({"batches": (batches[0], batches[-1]), **_encoded(step, sizes, bounds, parts)})
        groups = ",".join(map(str, step.groups))
    text = json.dumps({"steps": steps, "parts": list(parts)}, separators=(",", ":"))
    text = re.sub(r"\.0(?=[,\]])", "", text)
    data = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    return {"groups": groups, "data": data}


def fitted_step(
    model: Model, plan: Mapping[str, Any], batches: tuple[int, ...], checks: Sequence[tuple[int, int]]
) -> tuple[Step, list[str], list[str]]:
    """Return the step, and as JSON what the sizes of its allocations and its bounds are computed from. Raises
    UserError if the step is not the same at the sizes in between, which ``checks`` tests."""
    points = list(itertools.product(batches, model.seconds))
    device = request_of(model, plan, *model.start, "H100-SXM").machine.device
    steps = [step_of(traced(model, plan, b, s), device) for b, s in (*points, *checks)]
    first = steps[0]
    if any(step.structure != first.structure for step in steps):
        raise UserError(_DIFFERS)
    fit = Fit(batches=batches, seconds=model.seconds, checks=tuple(checks))
    sizes, bounds = (
        [json.dumps(fit.quantity(values)) for values in zip(*(getattr(s, name) for s in steps), strict=True)]
        for name in ("requested", "bounds")
    )
    return first, sizes, bounds


def _encoded(
    step: Step, quantities: Sequence[str], bounds: Sequence[str], parts: dict[str, int]
) -> dict[str, Any]:
    """Return the step as plain data. ``parts``: contributors -> number, to which its own are added. In the
    tokens, an allocation is the number of its kind, and a free is -1 minus (category + 8 x the number of
    younger allocations of that category that are alive), so that equal blocks have equal tokens."""
    sizes = list(dict.fromkeys((*quantities, *bounds)))
    categories = list(dict.fromkeys(category for category, _, _ in step.kinds))
    streams = list(dict.fromkeys(stream for _, stream, _ in step.kinds))
    numbers = {size: n for n, size in enumerate(sizes)}
    kinds = [
        (numbers[size], categories.index(c), streams.index(s), parts.setdefault(part, len(parts)))
        for size, (c, s, part) in zip(quantities, step.kinds, strict=True)
    ]
    table = {kind: n for n, kind in enumerate(dict.fromkeys(kinds))}
    alive: list[list[int]] = [[] for _ in categories]
    tokens = []
    for event in step.events:
        index = event if event >= 0 else -1 - event
        own = alive[kinds[index][1]]
        if event >= 0:
            tokens.append(table[kinds[index]])
            own.append(index)
        else:
            place = len(own) - 1
            while own[place] != index:
                place -= 1
            tokens.append(-1 - kinds[index][1] - 8 * (len(own) - 1 - place))
            del own[place]
    return {
        "sizes": [json.loads(size) for size in sizes],
        "categories": categories,
        "streams": streams,
        "kinds": list(table),
        "tokens": tokens,
        "spans": step.spans,
        "bounds": [(*place, numbers[bound]) for place, bound in zip(step.bounded, bounds, strict=True)],
        "ratio": step.ratio,
    }


# -- the file ------------------------------------------------------------------------------------------


def devices(groups: Iterable[str]) -> dict[str, Any]:
    """Return name of a device -> its memory, its workspace for matrix products, and (value, low, high) of
    what a process uses beside PyTorch's allocator, for each of the communicators of ``groups``."""
    from memfit.catalog.load import device
    from memfit.cost.cuda_workspaces import Multiprocessors
    from memfit.cost.device_overhead import device_overhead

    table = {}
    for name in DEVICES:
        found = device(name)
        beside = {}
        for group in groups:
            ranks = [("", int(n)) for n in group.split(",") if n]
            total = device_overhead(found, ranks).total_bytes
            beside[group] = [total.value, total.low, total.high] if total else None
        table[name] = {
            "memory": int(found.memory_bytes.value),
            "blas": int(found.blas_workspace_bytes.value) if found.blas_workspace_bytes else 0,
            "multiprocessors": dataclasses.asdict(Multiprocessors.of(found)),
            "beside": beside,
        }
    return table


def write(only: str) -> None:
    """Trace the plans whose MODEL/PRECISION/RECOMPUTATION/SHARDING matches ``only``, and put each into the
    file as soon as it is traced."""
    import torch
    import transformers

    from memfit.jobs.registry import load
    from memfit.trace import trace_extrapolation
    from memfit.trace.tracer import fake_model

    trace_extrapolation._LARGE = sys.maxsize  # torch keeps what it learned of a model in one process only
    trace_extrapolation._MANY_TENSORS = sys.maxsize
    made = {
        "revision": revision(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "command": COMMAND,
    }
    for name, model in MODELS.items():
        for key in plans_of(name):
            if not re.search(only, "/".join((name, *key))):
                continue
            entry = entry_of(model, plan_of(*key))
            print(name, *key, entry.get("problem", len(entry.get("data", ""))), flush=True)
            file: dict[str, Any] = json.loads(DATA.read_text()) if DATA.is_file() else {"models": {}}
            known = file["models"].get(name, {})
            if "parameters" not in known:
                job = load(request_of(model, {}, *model.start, "H100-SXM").job_ref)
                known = {"parameters": sum(p.numel() for p in fake_model(job).parameters()), "plans": {}}
            plans = known["plans"] | {"/".join(key): entry}
            file["models"][name] = {"made": made, "parameters": known["parameters"], "plans": plans}
            groups = dict.fromkeys(
                e["groups"] for m in file["models"].values() for e in m["plans"].values() if "groups" in e
            )
            file["devices"] = devices(groups)
            write_whole(DATA, _text(file).encode())


def plans_of(name: str) -> list[tuple[str, str, str]]:
    """Return the plans of a model: (precision, recomputation, sharding)."""
    return list(itertools.product(MODELS[name].precisions, RECOMPUTATION, MODELS[name].shardings))


def page_data() -> dict[str, Any]:
    """Return what the script of the pages needs: the file, and what of `MODELS` and the choices it shows."""
    file = json.loads(DATA.read_text())
    for name, entry in file["models"].items():
        facts = dataclasses.asdict(MODELS[name])
        kept = ("spec", "size", "title", "second", "unit", "seconds", "batches", "multiple", "start")
        entry |= {key: facts[key] for key in kept}
    generator: Any = numpy.random.default_rng(0).bit_generator.state["state"]
    return file | {
        "models": {name: file["models"][name] for name in MODELS if name in file["models"]},
        "choices": {"precision": PRECISIONS, "recomputation": RECOMPUTATION, "sharding": SHARDING},
        "ranks": RANKS,
        "late": LATE_EVENTS,
        "random": {key: str(generator[key]) for key in ("state", "inc")},
    }


def revision() -> str:
    return _git("rev-parse", "--short=12", "HEAD")


# -- the pages -----------------------------------------------------------------------------------------


def page_words() -> dict[str, dict[str, Any]]:
    """Return language -> the texts of the pages: those of words.toml, and the report's own."""
    from memfit.report.plan_words import plan_title
    from memfit.report.words import LANGUAGES, load_words
    from memfit.types.trace import Category, Phase

    texts = tomllib.loads((HERE / "words.toml").read_text(encoding="utf-8"))
    for lang in LANGUAGES:
        report = load_words(lang)
        titles = {
            "precision_bf16-autocast": "bf16-autocast",
            "precision_bf16-parameters": "bf16-parameters",
            "recomputation_blocks": "activation-checkpointing",
        }
        texts[lang] |= {key: plan_title(plan, report) for key, plan in titles.items()}
        texts[lang]["categories"] = {str(c): report.name("category", c) for c in Category}
        texts[lang]["phases"] = {str(p): report.name("phase", p) for p in Phase}
    return texts


def build(folder: Path, *, in_site: bool = False) -> list[Path]:
    """Write the calculator, the gallery's index and one page for each model into ``folder``/calculator and
    ``folder``/gallery, and return their paths. Each page is one file that loads nothing. ``in_site``: whether
    ``folder`` gets the documentation, too; the pages then have a link to it."""
    file, words = page_data(), page_words()
    pages = {folder / "calculator" / "index.html": _page(file, words, "", in_site)}
    pages[folder / "gallery" / "index.html"] = _index(file, words, in_site)
    for name, model in file["models"].items():
        own = file | {"models": {name: model}}
        pages[folder / "gallery" / f"{name}.html"] = _page(own, words, name, in_site)
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(pages)


def _page(file: Mapping[str, Any], words: Mapping[str, Any], fixed: str, in_site: bool) -> str:
    en = words["en"]
    title = en["model_title"].format(model=file["models"][fixed]["title"]) if fixed else en["title"]
    calculator, gallery = (
        ("../calculator/index.html", "index.html") if fixed else ("", "../gallery/index.html")
    )
    return _rendered(
        "calculator.html.j2",
        title=title,
        fixed=fixed,
        links=[("calculator", calculator), ("gallery", gallery)][0 if fixed else 1 :]
        + [("documentation", "../index.html")] * in_site,
        file=_json(file),
        words=_json(words),
        script=(HERE / "answer.js").read_text(encoding="utf-8"),
        page=(HERE / "page.js").read_text(encoding="utf-8"),
        **words,
    )


def _index(file: Mapping[str, Any], words: Mapping[str, Any], in_site: bool) -> str:
    cards = [
        (f"{name}.html", model["title"], f"{model['parameters'] / 1e6:,.0f} M")
        for name, model in file["models"].items()
    ]
    return _rendered("gallery.html.j2", cards=cards, count=str(len(cards)), in_site=in_site, **words)


def _rendered(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    report = resources.files("memfit.report").joinpath("style.css").read_text(encoding="utf-8")
    style = report + (HERE / "style.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(style=style, **values)


def _json(data: Any) -> str:
    """Return JSON that can stand inside a script element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _text(file: Mapping[str, Any]) -> str:
    """Return the file as JSON with one line for each plan of a model, so that its history can be read."""
    text = json.dumps(file, indent=1, sort_keys=False)
    return re.sub(r"\n {5,}| (?<=\n) {4}(?=\})|\n {4}(?=\})", " ", text) + "\n"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("trace").add_argument("--only", default="", metavar="REGEX")
    commands.add_parser("build").add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "site")
    options = parser.parse_args(arguments)
    if options.command == "trace":
        write(options.only)
    else:
        print("\n".join(map(str, build(options.folder))))


if __name__ == "__main__":
    main(sys.argv[1:])
