"""Vision transformers as timm builds them: patches, a class token, pre-norm blocks with biases."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from memfit.types.errors import UserError
from memfit.types.job import Job
from published.arch import Arch
from published.rows import Setup


class VitBlock(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.head_dim = arch.head_dim
        self.norm_1, self.norm_2 = nn.LayerNorm(arch.hidden), nn.LayerNorm(arch.hidden)
        self.qkv = nn.Linear(arch.hidden, 3 * arch.hidden)
        self.out = nn.Linear(arch.hidden, arch.hidden)
        self.gated = arch.mlp == "swiglu-packed"
        self.up = nn.Linear(arch.hidden, 2 * arch.ffn if self.gated else arch.ffn)
        self.down = nn.Linear(arch.ffn, arch.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        wide = self.up(self.norm_2(x))
        if self.gated:
            gate, wide = wide.chunk(2, dim=-1)
            return x + self.down(functional.silu(gate) * wide)  # type: ignore[no-any-return]
        return x + self.down(functional.gelu(wide))  # type: ignore[no-any-return]


class Vit(nn.Module):
    def __init__(self, arch: Arch, image: int, patch: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, arch.hidden, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, arch.hidden))
        self.position = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, arch.hidden))
        self.blocks = nn.ModuleList(VitBlock(arch) for _ in range(arch.layers))
        self.norm = nn.LayerNorm(arch.hidden)
        self.head = nn.Linear(arch.hidden, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


def vit_job(setup: Setup, arch: Arch) -> Job:
    """Raises UserError where the row does not give the size of the image and its patches."""
    from published.models import default_dtype

    if not {"side", "patch"} <= {*setup.image}:
        raise UserError("the row does not give the image and patch size")
    samples = setup.micro_batch * setup.micro_batches * setup.ranks["dp"]
    side, size, classes = (int(setup.image.get(k, 1000)) for k in ("side", "patch", "classes"))

    def build() -> nn.Module:
        with default_dtype(setup.parameters):
            return Vit(arch, side, size, classes)

    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        images = torch.zeros(samples, 3, side, side, dtype=getattr(torch, setup.parameters))
        return {"images": images, "labels": torch.zeros(samples, dtype=torch.int64)}

    return Job(
        name=setup.id,
        build_model=build,
        make_batch=batch,
        batch_size=samples,
        blocks="blocks",
        head="head",
        loss=lambda model, part: functional.cross_entropy(model(part["images"]), part["labels"]),
    )
