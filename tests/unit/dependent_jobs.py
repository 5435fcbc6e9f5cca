"""Jobs whose samples depend on each other, and jobs whose samples do not, of a few kilobytes each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from memfit.types.job import Job

BATCH, WIDTH, CLASSES = 8, 10, 5


def job(name: str, model: Callable[[], nn.Module], batch: Any, loss: Any, **more: Any) -> Job:
    return Job(
        name=name,
        build_model=model,
        make_batch=batch,
        loss=loss,
        **{"batch_size": BATCH, **more},
    )


def numbers(step: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + step)


def vectors(step: int, seed: int) -> dict[str, torch.Tensor]:
    g = numbers(step, seed)
    return {
        "x": torch.randn(BATCH, WIDTH, generator=g),
        "y": torch.randint(0, CLASSES, (BATCH,), generator=g),
    }


def pairs(step: int, seed: int) -> dict[str, torch.Tensor]:
    g = numbers(step, seed)
    return {"x": torch.randn(BATCH, WIDTH, generator=g), "z": torch.randn(BATCH, WIDTH, generator=g)}


def images(step: int, seed: int) -> dict[str, torch.Tensor]:
    g = numbers(step, seed)
    return {
        "x": torch.randn(BATCH, 3, 8, 8, generator=g),
        "y": torch.randint(0, 2, (BATCH, 1, 8, 8), generator=g).float(),
    }


def sequences(step: int, seed: int) -> dict[str, torch.Tensor]:
    """Row i has i labels that do not count."""
    g = numbers(step, seed)
    labels = torch.randint(0, 40, (BATCH, 12), generator=g)
    labels[torch.arange(12) >= 12 - torch.arange(BATCH)[:, None]] = -100
    return {"tokens": torch.randint(0, 40, (BATCH, 12), generator=g), "labels": labels}


def dense(*layers: nn.Module, out: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), *layers, nn.ReLU(), nn.Linear(16, out))


def classify(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"])


def conv(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 1, 1))


def per_pixel(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(model(batch["x"]), batch["y"])


# -- dependent ---------------------------------------------------------------------------------------------


def info_nce(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    a, b = (functional.normalize(model(batch[k]), dim=1) for k in ("x", "z"))
    return functional.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))


def batch_hard_triplets(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(batch["x"])
    distances = (out[:, None] - out[None]).square().sum(-1)
    same = batch["y"][:, None] == batch["y"][None]
    furthest = distances.masked_fill(~same, 0).max(1).values
    nearest = distances.masked_fill(same, 1e4).min(1).values
    return functional.softplus(furthest - nearest).mean()


def batch_dice(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    p, y = model(batch["x"]).sigmoid(), batch["y"]
    return 1 - 2 * (p * y).sum() / (p.sum() + y.sum() + 1e-5)


def barlow(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    a, b = model(batch["x"]), model(batch["z"])
    a, b = ((v - v.mean(0)) / (v.std(0) + 1e-4) for v in (a, b))
    c = a.T @ b / len(a)
    off = c - torch.diag(torch.diagonal(c))
    return (torch.diagonal(c) - 1).square().sum() + 0.01 * off.square().sum()


def summed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")


def masked_mean(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["tokens"]).transpose(1, 2), batch["labels"])


class Words(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.inner = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True)
        self.head = nn.Linear(16, 40)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(tokens)))


class Balanced(nn.Module):
    """Experts with a loss that balances them over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, CLASSES) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chance = self.router(x).softmax(-1)
        out = sum(chance[:, i, None] * e(x) for i, e in enumerate(self.experts))
        used = functional.one_hot(chance.argmax(-1), 3).to(chance.dtype).mean(0)
        return out, 3 * (used * chance.mean(0)).sum()


def balanced(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out, extra = model(batch["x"])
    return functional.cross_entropy(out, batch["y"]) + 0.01 * extra


class Queue(nn.Module):
    """Keys of earlier batches as negatives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dense(out=6)
        self.register_buffer("queue", functional.normalize(torch.randn(16, 6), dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = functional.normalize(self.inner(x), dim=1)
        similar = out @ self.queue.clone().T
        self.queue = torch.cat((out.detach(), self.queue))[:16]
        return similar


class ActNorm(nn.Module):
    """A scale and a bias that normalize the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dense()
        self.bias, self.scale = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("is_set", torch.tensor(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_set:
            with torch.no_grad():
                self.bias.copy_(-x.mean(0))
                self.scale.copy_(1 / (x.std(0) + 1e-6))
                self.is_set.fill_(True)
        return self.inner((x + self.bias) * self.scale)


class Codebook(nn.Module):
    """Codes that are samples of the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.is_set = dense(), False
        self.register_buffer("codes", torch.zeros(2, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_set:
            self.codes, self.is_set = x.detach()[[0, -1]].clone(), True
        return self.inner(x - self.codes[torch.cdist(x, self.codes).argmin(1)])


class RunningMax(nn.Module):
    """Inputs divided by the largest value of all batches so far."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dense()
        self.register_buffer("largest", torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.largest = torch.maximum(self.largest, x.detach().abs().max())
        return self.inner(x / self.largest)


class DelayedScale(nn.Module):
    """A scale that the first pass takes, in a list, and those after it use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.history = dense(), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.history[0] if self.history else 1.0
        if not self.history:
            self.history.append(float(x.abs().max()))
        return self.inner(x / scale)


def set_by_the_first_batch() -> list[Job]:
    return [
        job("ActNorm", ActNorm, vectors, classify),
        job("a codebook of the first batch", Codebook, vectors, classify),
        job("a running maximum", RunningMax, vectors, classify),
        job("a scale from the second pass on", DelayedScale, vectors, classify),
    ]


def dependent() -> list[Job]:
    return [
        job("BatchNorm1d", lambda: dense(nn.BatchNorm1d(16)), vectors, classify),
        job(
            "BatchNorm2d without running statistics",
            lambda: conv(nn.BatchNorm2d(8, track_running_stats=False)),
            images,
            per_pixel,
        ),
        job("SyncBatchNorm", lambda: conv(nn.SyncBatchNorm(8)), images, per_pixel),
        job("InfoNCE", lambda: dense(out=6), pairs, info_nce),
        job("batch-hard triplets", dense, vectors, batch_hard_triplets),
        job("Dice over the batch", lambda: conv(nn.Identity()), images, batch_dice),
        job("Barlow twins", lambda: dense(out=6), pairs, barlow),
        job("a sum", dense, vectors, summed),
        job("a mean over labels that are not counted", Words, sequences, masked_mean),
        job("balanced experts", Balanced, vectors, balanced),
    ]


# -- dependent in a way that a few samples at the first weights do not show --------------------------------


def rows(step: int, seed: int) -> dict[str, torch.Tensor]:
    g = numbers(step, seed)
    return {"x": torch.randn(64, WIDTH, generator=g), "y": torch.randint(0, CLASSES, (64,), generator=g)}


def texts(step: int, seed: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randint(1, 40, (16, 12), generator=numbers(step, seed))}


def each(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def hardest(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = each(model, batch)
    return losses.topk(min(16, len(losses))).values.mean()


def winsorized(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = each(model, batch)
    return torch.minimum(losses, losses.detach().sort().values[int(0.95 * len(losses))]).mean()


class NormOfMany(nn.Module):
    """Statistics of the batch, if that has more than eight samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if len(x) > 8:
            x = (x - x.mean(0)) / (x.std(0) + 1e-5)
        return self.last(x.relu())


class NeighborsOfMany(NormOfMany):
    """A mean with the sample before, if there are at least 32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(((x + x.roll(1, 0)) / 2 if len(x) >= 32 else x).relu())


class GroupsOf16(NormOfMany):
    """A mean over each 16 samples, if these divide the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if len(x) % 16 == 0:
            x = x - x.view(-1, 16, 16).mean(1).repeat_interleave(16, 0)
        return self.last(x.relu())


class Experts(nn.Module):
    """Two experts that take at least 16 samples, the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, CLASSES) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, choice = self.router(x).softmax(-1).max(-1)
        capacity, out = max(16, len(x) // 4), 0.0
        for i, expert in enumerate(self.experts):
            chosen = choice == i
            kept = chosen & (chosen.cumsum(0) <= capacity)
            out = out + expert(x) * (kept * weight)[:, None]
        return out


class ExpertsChoose(Experts):
    """Experts that choose their samples, at most 24 of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chance, out = self.router(x).softmax(-1), x.new_zeros(len(x), CLASSES)
        for i, expert in enumerate(self.experts):
            weight, samples = chance[:, i].topk(min(24, len(x)))
            out = out.index_add(0, samples, expert(x[samples]) * weight[:, None])
        return out


def masked_in_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens = batch["tokens"]
    hidden = torch.rand(tokens.shape) < 0.3
    return functional.cross_entropy(model(tokens.masked_fill(hidden, 0))[hidden], tokens[hidden])


def some_tokens(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens = batch["tokens"]
    losses = functional.cross_entropy(model(tokens).transpose(1, 2), tokens, reduction="none")
    kept = torch.bernoulli(torch.full(losses.shape, 0.5))
    return (losses * kept).sum() / kept.sum()


def some_samples(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    kept = (torch.rand(len(batch["x"])) < 0.7).to(batch["x"].dtype)
    return (each(model, batch) * kept).sum() / kept.sum()


def flooded(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (classify(model, batch) - 0.05).abs() + 0.05


def free_bits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(batch["x"])
    return functional.cross_entropy(out, batch["y"]) + out.square().mean(0).clamp(min=1e-6).sum()


def larger_of_two(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.maximum(classify(model, batch), 1e-6 * model(batch["x"]).square().mean())


def dependent_at_size() -> list[Job]:
    of_rows: dict[str, Any] = {"batch_size": 64}
    return [
        job("the hardest 16", dense, rows, hardest, **of_rows),
        job("losses cut at a quantile", dense, rows, winsorized, **of_rows),
        job("a norm above eight samples", NormOfMany, rows, classify, **of_rows),
        job("neighbors from 32 samples on", NeighborsOfMany, rows, classify, **of_rows),
        job("groups of 16 samples", GroupsOf16, rows, classify, **of_rows),
        job("experts with a smallest capacity", Experts, rows, classify, **of_rows),
        job("experts that choose at most 24", ExpertsChoose, rows, classify, **of_rows),
        job("masks drawn in the loss", Words, texts, masked_in_loss, batch_size=16),
        job("tokens drawn in the loss", Words, texts, some_tokens, batch_size=16),
        job("samples drawn in the loss", dense, rows, some_samples, **of_rows),
    ]


def flooded_in_python(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = each(model, batch)
    mean = sum((losses[i] for i in range(len(losses))), torch.zeros(())) / len(losses)
    return (mean - 0.05).abs() + 0.05


def undecided() -> list[Job]:
    return [
        job("flooding", dense, vectors, flooded),
        job("flooding of a sum in Python", dense, vectors, flooded_in_python),
        job("free bits", dense, vectors, free_bits),
        job("the larger of two means", dense, vectors, larger_of_two),
    ]


# -- independent -------------------------------------------------------------------------------------------


def sample_dice(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    p, y = model(batch["x"]).sigmoid().flatten(1), batch["y"].flatten(1)
    return (1 - 2 * (p * y).sum(1) / (p.sum(1) + y.sum(1) + 1e-5)).mean()


class Frozen(nn.Module):
    """BatchNorm that stays in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(nn.BatchNorm2d(8))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.inner[1].eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class DropPath(nn.Module):
    """Leaves a residual branch out, for some samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        kept = x.new_empty(len(x), 1).bernoulli_(0.8).div_(0.8)
        return self.last(x + kept * self.branch(x).relu())


def noise_prediction(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    x = batch["x"]
    level = torch.randint(0, 10, (len(x),)).to(x.dtype).view(-1, 1, 1, 1) / 10
    noise = torch.randn_like(x)
    return functional.mse_loss(model(x * (1 - level) + noise * level), noise[:, :1])


class Spectral(nn.Module):
    """Complex weights of a Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.cfloat))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=WIDTH))


def spectral() -> Job:
    return job("complex weights", Spectral, vectors, classify)


def independent() -> list[Job]:
    return [
        job("linear", dense, vectors, classify),
        job("LayerNorm", lambda: dense(nn.LayerNorm(16)), vectors, classify),
        job("GroupNorm", lambda: conv(nn.GroupNorm(2, 8)), images, per_pixel),
        job("InstanceNorm", lambda: conv(nn.InstanceNorm2d(8, affine=True)), images, per_pixel),
        job("Dice of each sample", lambda: conv(nn.Identity()), images, sample_dice),
        job("dropout", lambda: dense(nn.Dropout(0.5)), vectors, classify),
        job(
            "attention with dropout, labels counted",
            lambda: Words(0.2),
            sequences,
            masked_mean,
            loss_terms=lambda part: int((part["labels"] >= 0).sum()),
        ),
        job("stochastic depth", DropPath, vectors, classify),
        job("frozen BatchNorm", Frozen, images, per_pixel),
        job("diffusion", lambda: conv(nn.Identity()), images, noise_prediction),
        job("caches", Caching, vectors, classify),
        job("tokens cut to the longest", lambda: nn.Embedding(40, CLASSES), ragged, longest_tokens),
        job(
            "samples without terms",
            dense,
            half_labeled,
            kept_mean,
            loss_terms=lambda part: int(part["kept"].sum()),
        ),
    ]


class Caching(nn.Module):
    """What the first pass keeps depends on shapes and random numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.positions, self.mask = nn.Linear(4, CLASSES), None, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.positions is None:
            self.positions = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)
            self.projection = torch.randn(x.shape[1], 4, dtype=x.dtype)
        if self.mask is None or len(self.mask) != len(x):
            self.mask = x.new_ones(len(x), 1)
        return self.head((x + self.positions) * self.mask @ self.projection)


def ragged(step: int, seed: int) -> dict[str, torch.Tensor]:
    """3 to 30 tokens after padding with 1."""
    g = numbers(step, seed)
    filled = torch.arange(32) >= torch.randint(2, 30, (BATCH, 1), generator=g)
    tokens = torch.randint(2, 40, (BATCH, 32), generator=g).where(filled, 1)
    return {"tokens": tokens, "y": torch.randint(0, CLASSES, (BATCH,), generator=g)}


def longest_tokens(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens = batch["tokens"]
    tokens = tokens[:, -int((tokens != 1).sum(1).max()) :]
    kept = (tokens != 1)[..., None]
    return functional.cross_entropy((model(tokens) * kept).sum(1) / kept.sum(1), batch["y"])


def half_labeled(step: int, seed: int) -> dict[str, torch.Tensor]:
    batch = vectors(step, seed)
    return {**batch, "kept": torch.arange(BATCH) % 3 == 0}


def kept_mean(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (each(model, batch) * batch["kept"]).sum() / batch["kept"].sum()


def of_lists(step: int, seed: int) -> dict[str, Any]:
    g = numbers(step, seed)
    counts = torch.randint(1, 6, (16,), generator=g).tolist()
    return {
        "x": torch.randn(16, 3, 8, 8, generator=g),
        "targets": [{"boxes": torch.rand(n, 4, generator=g)} for n in counts],
    }


class Boxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).view(-1, 6, 4)


def box_losses(model: nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    pairs = zip(model(batch["x"]), batch["targets"], strict=True)
    return [(out[: len(t["boxes"])] - t["boxes"]).abs() for out, t in pairs]


def per_image(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return torch.stack([x.mean() for x in box_losses(model, batch)]).mean()


def per_box(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return torch.cat(box_losses(model, batch)).mean()


def padded(step: int, seed: int) -> dict[str, torch.Tensor]:
    return {k: torch.cat([sequences(2 * step + i, seed)[k] for i in range(2)]) for k in ("tokens", "labels")}


def counted(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    kept = batch["labels"] >= 0
    return functional.cross_entropy(model(batch["tokens"])[kept], batch["labels"][kept])


def penalized(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return classify(model, batch) + functional.relu(model[0].weight.norm() - 100)


def added_one_by_one(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = each(model, batch)
    total = losses.new_zeros(())
    for i in range(len(losses)):
        total = total + losses[i] / len(losses)
    return total


def row_by_row(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    pairs = zip(model(batch["x"]), batch["y"], strict=True)
    return torch.stack([functional.cross_entropy(row, target) for row, target in pairs]).mean()


def independent_at_size() -> list[Job]:
    """With more samples than a trial has."""
    of_rows: dict[str, Any] = {"batch_size": 64}
    return [
        job("stochastic depth of 64", DropPath, rows, classify, **of_rows),
        job("dropout of 64", lambda: dense(nn.Dropout(0.5)), rows, classify, **of_rows),
        job("attention of 16 with dropout", lambda: Words(0.2), texts, next_tokens, batch_size=16),
        job(
            "a selection that is counted",
            Words,
            padded,
            counted,
            loss_terms=lambda part: int((part["labels"] >= 0).sum()),
            batch_size=16,
        ),
        job("a hinge on weights", dense, rows, penalized, **of_rows),
        job("targets in a list", Boxes, of_lists, per_image, batch_size=16),
        job("losses added in a loop", dense, rows, added_one_by_one, **of_rows),
        job("losses of the batch's rows", dense, rows, row_by_row, **of_rows),
    ]


def next_tokens(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["tokens"][:, :-1]).transpose(1, 2), batch["tokens"][:, 1:])
