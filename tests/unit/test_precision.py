"""Precision advice for modules that are known to need float32, and for others that do not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.cli import main
from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold.model import AlphaFold, small_size
from memfit.precision.advise import add_padding, advise
from memfit.precision.recording import deterministic
from memfit.precision.replay import modes
from memfit.precision.sums import NarrowSums, add_narrow
from memfit.types.job import Job
from memfit.types.precision import ExaminedModules, PrecisionAdvice


class MaskedSoftmax(nn.Module):
    """A softmax with a large additive mask made inside."""

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return (x + (1 - seen) * -1e9).softmax(-1)


class Distances(nn.Module):
    def forward(self, xyz: torch.Tensor) -> torch.Tensor:
        return ((xyz.unsqueeze(2) - xyz.unsqueeze(1)).square().sum(-1) + 1e-6).sqrt()


class Rotations(nn.Module):
    """The product of many rotations, about x and z in turn."""

    def forward(self, angles: torch.Tensor) -> torch.Tensor:
        turned = torch.eye(3, dtype=angles.dtype).expand(len(angles), 3, 3)
        for i in range(angles.shape[1]):
            c, s = angles[:, i].cos(), angles[:, i].sin()
            o, z = torch.ones_like(c), torch.zeros_like(c)
            rows = [c, -s, z, s, c, z, z, z, o] if i % 2 else [o, z, z, z, c, -s, z, s, c]
            turned = turned @ torch.stack(rows, -1).view(-1, 3, 3)
        return turned


class LogSum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp().sum(-1).log()


class Squares(nn.Module):
    """A sum of many squares."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(1)


class Spectrum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(x, dim=1).abs()


class Ordinary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(16), nn.Linear(16, 32)
        self.act, self.down = nn.GELU(), nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(self.act(self.up(self.norm(x)))))


class Attention(nn.Module):
    """Attention with the softmax in its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.query(x) @ self.key(x).transpose(-1, -2) / 4).softmax(-1)
        return x + weights @ self.value(x)


class Known(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Ordinary() for _ in range(3)])
        self.attention, self.scores, self.softmax = Attention(), nn.Linear(16, 16), nn.Softmax(-1)
        self.convolution, self.rms = nn.Conv1d(16, 16, 3, padding=1), nn.RMSNorm(16)
        self.masked, self.far_norm, self.distances = MaskedSoftmax(), nn.LayerNorm(16), Distances()
        self.angles, self.rotations, self.log_sum = nn.Linear(16, 4), Rotations(), LogSum()
        self.squares, self.spectrum, self.head = Squares(), Spectrum(), nn.Linear(16, 8)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        x = batch["x"]
        for block in self.blocks:
            x = block(x)
        x = self.attention(x)
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.masked(self.scores(x), batch["seen"]) + self.softmax(self.scores(x))
        x = x + self.far_norm(batch["far"])
        others = (
            self.distances(batch["xyz"]),
            self.rotations(self.angles(x).flatten(1)),
            self.log_sum(x + batch["hot"]),
            self.squares(batch["long"]),
            self.spectrum(x),
        )
        return self.head(self.rms(x)), *others


def known_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + step)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": normal(4, 32, 16),
        "seen": (normal(4, 1, 16) > -1).float(),
        "far": 1000 + normal(4, 32, 16),
        "xyz": 500 + normal(4, 32, 3),
        "hot": torch.full((4, 1, 1), 12.0),
        "long": normal(4, 100_000),
        "y": torch.randint(0, 8, (4, 32), generator=generator),
    }


def known_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits, distances, rotations, sums, squares, spectrum = (t.float() for t in model(batch))
    others = distances.mean() + sums.mean() + 1e-5 * squares.mean() + spectrum.mean() + rotations[:, 0].mean()
    return functional.cross_entropy(logits.flatten(0, 1), batch["y"].flatten()) + 0.01 * others


def job(model: Any = Known, batch: Any = known_batch, loss: Any = known_loss) -> Job:
    return Job(name="known", build_model=model, make_batch=batch, loss=loss, batch_size=4)


def found(advice: PrecisionAdvice) -> dict[str, ExaminedModules]:
    return {e.pattern: e for e in (*advice.examined, *advice.outside)}


@pytest.fixture(scope="module")
def both() -> tuple[PrecisionAdvice, ...]:
    return advise(job(), ("bf16", "fp16"), batches=1, trained=2)


@pytest.fixture(scope="module")
def bf16(both: tuple[PrecisionAdvice, ...]) -> PrecisionAdvice:
    return both[0]


@pytest.fixture(scope="module")
def fp16(both: tuple[PrecisionAdvice, ...]) -> PrecisionAdvice:
    return both[1]


def test_in_bf16_the_known_islands_are_named_and_no_other_module(bf16: PrecisionAdvice) -> None:
    assert set(bf16.islands) == {"far_norm", "distances", "rotations", "spectrum"}
    reasons = {p: e.reason for p, e in found(bf16).items() if p in bf16.islands}
    assert reasons["far_norm"] == reasons["distances"] == "inputs"
    assert reasons["spectrum"] == "fails"  # no kernel in half precision


def test_in_fp16_modules_that_overflow_are_named_too(fp16: PrecisionAdvice) -> None:
    expected = {"masked", "far_norm", "distances", "log_sum", "squares"}
    assert expected <= set(fp16.islands) <= expected | {"rotations", "spectrum"}
    seen = found(fp16)
    assert {seen[p].reason for p in ("masked", "log_sum", "squares")} == {"overflow"}
    assert "exp" in seen["log_sum"].pure.lost


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_ordinary_modules_have_only_the_error_of_rounding(dtype: str, request: pytest.FixtureRequest) -> None:
    unit = {"bf16": 2.0**-9, "fp16": 2.0**-12}[dtype]
    seen = found(request.getfixturevalue(dtype))
    inside = ("blocks.*.up", "blocks.*.act", "blocks.*.norm")
    for pattern in (*inside, "attention", "softmax", "convolution", "rms"):
        assert seen[pattern].reason == ""
        assert unit / 4 < seen[pattern].pure.error_ratio < 3 * unit
        assert seen[pattern].float32.error_ratio < 1e-5
    assert seen["blocks.*.up"].modules_count == 3


def test_advice_for_autocast_leaves_out_modules_that_autocast_keeps_in_float32(
    bf16: PrecisionAdvice, fp16: PrecisionAdvice
) -> None:
    for advice in (bf16, fp16):
        assert not {"far_norm", "distances", "squares", "log_sum"} & set(advice.islands_autocast)
    assert "rotations" in bf16.islands_autocast  # because of its own matrix products


def test_keeping_the_islands_in_float32_changes_the_loss_less(
    bf16: PrecisionAdvice, fp16: PrecisionAdvice
) -> None:
    assert bf16.kept_ratio <= bf16.loss_ratio
    assert fp16.loss_ratio == float("inf")
    assert fp16.kept_ratio < 1e-2


class Frames(nn.Module):
    """The inner module gets an object that holds tensors."""

    class Frame:
        def __init__(self, origin: torch.Tensor) -> None:
            self.origin = origin

    class Inner(nn.Module):
        def forward(self, frame: Any, points: torch.Tensor) -> torch.Tensor:
            return points - frame.origin

    def __init__(self) -> None:
        super().__init__()
        self.into, self.weight = Frames.Inner(), nn.Linear(3, 3)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.weight(self.into(Frames.Frame(batch["origin"]), batch["points"]))


def test_tensors_inside_objects_are_cast_to_lower_precision_too() -> None:
    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        origin = torch.full((4, 1, 3), 300.0) + torch.randn(4, 1, 3)
        return {"origin": origin, "points": origin + torch.randn(4, 8, 3)}

    (advice,) = advise(job(Frames, batch, lambda m, b: m(b).square().mean()), ("bf16",), batches=1, trained=0)
    assert advice.islands == ("into",)


class OnlyInFloat32(nn.Module):
    """Calls its child in float32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.weight = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = self.weight(batch["x"])
        return self.child(x) if x.dtype is torch.float32 else x


def test_a_module_that_does_not_call_a_child_in_lower_precision_is_no_traceback() -> None:
    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(4, 16)}

    advice = advise(
        job(OnlyInFloat32, batch, lambda m, b: m(b).float().square().mean()), ("bf16",), batches=1, trained=0
    )
    assert [a.dtype for a in advice] == ["bf16"]


class FarNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 2000)


class Deep(nn.Module):
    """The norms of the blocks in `far` get values with a large mean."""

    def __init__(self, far: tuple[int, ...], blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Ordinary() for _ in range(blocks)])
        for index in far:
            self.blocks[index].norm = FarNorm(16)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["x"]
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("far", "islands"),
    [
        ((1,), ("blocks.1.norm",)),
        ((2, 3), ("blocks.2.norm", "blocks.3.norm")),
        (tuple(range(6)), ("blocks.*.norm",)),
    ],
)
def test_patterns_name_only_the_modules_at_fault(far: tuple[int, ...], islands: tuple[str, ...]) -> None:
    given = job(lambda: Deep(far), loss=lambda m, b: m(b).square().mean())
    (advice,) = advise(given, ("bf16",), batches=1, trained=0)
    assert advice.islands == islands
    assert advice.kept_ratio < advice.loss_ratio


class Calls(nn.Module):
    """Applies every function to the same input; each is a module of its own."""

    class One(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(x)

    def __init__(self, **functions: Any) -> None:
        super().__init__()
        self.into = nn.Linear(16, 16)
        self.names = list(functions)
        for name, function in functions.items():
            setattr(self, name, Calls.One(function))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = self.into(batch["x"])
        return torch.stack([getattr(self, name)(x) for name in self.names]).sum(0)


def by_hand(x: torch.Tensor) -> torch.Tensor:
    apart = x - x.mean(-1, keepdim=True)
    return apart / (apart.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def scanned(x: torch.Tensor) -> torch.Tensor:
    state, kept = torch.zeros_like(x[:, 0]), []
    for i in range(x.shape[1]):
        state = 0.95 * state + 0.05 * x[:, i]
        kept.append(state)
    return torch.stack(kept, 1)


def test_a_long_recurrence_is_an_island_and_other_code_of_many_operators_is_not() -> None:
    innocent = {
        "norm": by_hand,
        "gelu": lambda x: 0.5 * x * (1 + (0.8 * (x + 0.045 * x**3)).tanh()),
        "mish": lambda x: x * functional.softplus(x).tanh(),
        "kinks": lambda x: (x + x.flip(1)).relu(),  # signs change where the sum is next to nothing
        "constant": lambda x: 1 + 1e-3 * x,  # its variation is lost, which does not matter
        "weights": lambda x: x.softmax(-1),
    }
    given = job(lambda: Calls(**innocent, scan=scanned), loss=lambda m, b: m(b).square().mean())
    for advice in advise(given, ("bf16", "fp16"), batches=1, trained=1):
        assert set(advice.islands) <= {"scan"}
    assert advise(given, ("bf16",), batches=2, trained=1)[0].islands == ("scan",)


@pytest.fixture(scope="module")
def fold() -> tuple[PrecisionAdvice, ...]:
    """AlphaFold 2 at the size of its tiny job, with one block, on real chains."""
    size = dataclasses.replace(small_size(residues=40, batch_size=2), blocks=1)
    folds = alphafold2.built_in_folds()
    job = Job(
        name="fold",
        build_model=lambda: AlphaFold(size),
        batch_size=2,
        loss=alphafold2.loss,
        make_batch=lambda step, seed: alphafold2.train_batch(folds, size, step=step, seed=seed),
    )
    return advise(job, ("bf16", "fp16"), batches=1, trained=40)


@pytest.mark.long
def test_alphafolds_known_islands_are_found(fold: tuple[PrecisionAdvice, ...]) -> None:
    """Softmax behind large masks (float16 ends at 65,504), statistics of norms, distances and frames."""
    bf16, fp16 = fold
    masked = {
        "extra.0.row",
        "extra.0.column.attention",
        "extra.0.pairs.starting",
        "extra.0.pairs.ending",
        "blocks.0.row",
        "blocks.0.column",
        "blocks.0.pairs.starting",
        "blocks.0.pairs.ending",
        "structure.attention",
    }
    assert masked <= set(fp16.islands) <= masked | {"recycle", "structure"}
    reasons = {e.pattern.replace("*", "0"): e.reason for e in fp16.examined}
    assert {reasons[path] for path in masked} == {"overflow"}
    # Frames are composed, round after round. Distances of the last round's atoms are cut into bins, which
    # only matters once training has spread the atoms.
    assert {"structure"} <= set(bf16.islands) <= {"recycle", "structure"}
    kinds = {e.pattern: e.kind for e in bf16.examined}
    assert {kinds[pattern] for pattern in bf16.sums} & {"LayerNorm"}
    assert not {kinds[pattern] for pattern in (*bf16.islands, *fp16.sums)} & {"Linear", "Transition"}


def test_modules_that_torch_sums_in_float32_are_listed_separately() -> None:
    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(4, 32, 512, generator=torch.Generator().manual_seed(step))}

    given = job(
        lambda: nn.ModuleDict({"norm": nn.LayerNorm(512), "up": nn.Linear(512, 16), "soft": nn.Softmax(-1)}),
        batch,
        lambda m, b: m["up"](m["soft"](m["norm"](b["x"]))).square().mean(),
    )
    (advice,) = advise(given, ("bf16",), batches=1, trained=0)
    assert advice.islands == ()
    assert set(advice.sums) == {"norm", "soft"}
    assert found(advice)["norm"].sums_ratio > 4 * found(advice)["norm"].pure.error_ratio


@pytest.mark.parametrize(
    "module",
    [
        nn.TransformerEncoderLayer(16, 4, 32, dropout=0.9, batch_first=True),
        nn.LSTM(16, 16, num_layers=2, dropout=0.9),
        nn.GRU(16, 16, num_layers=2, dropout=0.9),
    ],
    ids=lambda module: type(module).__name__,
)
def test_dropout_inside_functions_of_torch_is_disabled_too(module: nn.Module) -> None:
    def output() -> torch.Tensor:
        result = module(torch.ones(2, 8, 16))
        return result[0] if isinstance(result, tuple) else result

    with deterministic():
        trained = output()
    module.eval()
    torch.testing.assert_close(trained, output())


@pytest.mark.parametrize(("cuda", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_under_autocast_the_softmax_of_attention_is_that_of_the_device(
    cuda: bool, dtype: torch.dtype
) -> None:
    dtypes: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            dtypes.extend([args[0].dtype] if func is torch.ops.aten._softmax.default else [])
            return func(*args, **(kwargs or {}))

    mode = modes(nn.MultiheadAttention(16, 4), torch.bfloat16, cuda=cuda)["autocast"]
    x = torch.ones(8, 2, 16)
    with mode.make_context(), Watch():
        mode.model(x, x, x)
    assert dtypes == [dtype]


class Asserting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype is torch.float32
        return 2 * x


class LookingUp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * {torch.float32: 2}[x.dtype]


@pytest.mark.parametrize("module", [Asserting, LookingUp])
def test_a_module_that_checks_its_dtype_by_an_assertion_or_a_table_is_an_island(module: Any) -> None:
    given = job(
        lambda: nn.ModuleDict({"up": nn.Linear(8, 8), "own": module()}),
        lambda step, seed: {"x": torch.randn(4, 8)},
        lambda m, b: m["own"](m["up"](b["x"])).square().mean(),
    )
    (advice,) = advise(given, ("bf16",), batches=1, trained=0)
    assert advice.islands == ("own",)
    assert found(advice)["own"].reason == "fails"


def test_narrow_sums_leave_scalars_alone() -> None:
    with NarrowSums() as sums:
        assert float(torch.ones((), dtype=torch.bfloat16).sum(0)) == 1.0
    assert not sums.used


def test_a_narrow_sum_over_no_elements_is_zero() -> None:
    assert torch.equal(add_narrow(torch.ones(3, 0, dtype=torch.bfloat16)), torch.zeros(3).bfloat16())


def test_all_ones_masks_get_padding_and_other_tensors_do_not_change() -> None:
    made = add_padding(
        {"mask": torch.ones(2, 32), "one_hot": torch.eye(32), "scale": torch.ones(32), "x": None}
    )
    assert made["mask"].sum() == 2 * 30
    assert torch.equal(made["one_hot"], torch.eye(32))
    assert torch.equal(made["scale"], torch.ones(32))  # of one dimension: it may be anything


def test_the_precision_command_prints_english_japanese_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import test_precision\n\njob = test_precision.job()\n")
    for lang, words in (("en", "add to the Job"), ("ja", "Job に次を加えて")):
        assert main(["precision", f"{file}:job", "--after", "0", "--lang", lang]) == 0
        out = capsys.readouterr().out
        assert words in out
        assert "islands=(" in out
    assert main(["precision", f"{file}:job", "--after", "0", "--dtype", "both", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["advice"]
    assert [a["dtype"] for a in told] == ["bf16", "fp16"]
    assert "far_norm" in told[0]["islands"]
    assert main(["precision", f"{file}:job", "--dtype", "int8"]) == 2
