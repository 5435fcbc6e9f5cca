"""Small jobs over many architectures, for benchmarks/memory_truth.py: every mechanism that decides memory,
at sizes of 5 to 100 MiB. The first set was used while the tracer was written, the second after it. The third
was written when nothing of the tracer was left to do, each different in kind from those before, and measured
once before any change that they might ask for."""

from __future__ import annotations

from collections.abc import Callable

from architectures.attention import evoformer, moe_dense, moe_index, perceiver, several, swin
from architectures.convolutions import conv3d, convnext, resnet, unet
from architectures.fields import fno, force_field, gnn, radiance, rollout, siren, spectral
from architectures.generative import adversaries, diffusion, glow, neural_ode, vae
from architectures.graphs import deep_sets, equivariant, graph_transformer, schnet, set_transformer
from architectures.hugging_face import bert, esm, gpt2, llama, t5, vit
from architectures.recommender import clicks
from architectures.sequences import (
    compiled,
    crf_tagger,
    custom,
    gru,
    lstm,
    mamba,
    packed,
    selective,
    speech,
    tied,
    translator,
    wavenet,
)
from architectures.vision import crops, detector, masked, mlp_mixer
from memfit.types.job import Job

__all__ = ["FIRST_SET", "SECOND_SET", "THIRD_SET"]

FIRST_SET: tuple[Callable[[], Job], ...] = (
    esm,
    gpt2,
    llama,
    bert,
    t5,
    vit,
    resnet,
    unet,
    conv3d,
    lstm,
    gru,
    packed,
    mamba,
    tied,
    custom,
    compiled,
    gnn,
    force_field,
    fno,
    evoformer,
    moe_dense,
    moe_index,
    several,
    swin,
    perceiver,
)
# (job, what its first run showed, on the day it was written)
_NO_CHANGE = "within 0.001 % in its first run"
_NORMS = (
    "plain +0.000 %, but -0.243 % under autocast in its first run: norms of mixed precision keep statistics "
    "in float32 (mended in the tracer)"
)
_BATCHES = (
    "-3.026 % in its first run: the trace knew the first step's pairs only, and the second step has more "
    "(mended: each traced step has its own batch)"
)
_BOTH = "-0.001 % plain and -0.042 % under autocast in its first run (both causes above, mended)"
SECOND_SET: tuple[tuple[Callable[[], Job], str], ...] = (
    (convnext, _NORMS),
    (wavenet, _NO_CHANGE),
    (deep_sets, _NO_CHANGE),
    (schnet, _BATCHES),
    (graph_transformer, _BOTH),
    (neural_ode, "-0.042 % in its first run"),
    (mlp_mixer, _NO_CHANGE),
    (crf_tagger, _NO_CHANGE),
    (set_transformer, _NO_CHANGE),
    (siren, _NO_CHANGE),
    (vae, _NO_CHANGE),
)
THIRD_SET: tuple[Callable[[], Job], ...] = (
    translator,
    glow,
    diffusion,
    clicks,
    selective,
    equivariant,
    crops,
    spectral,
    detector,
    adversaries,
    speech,
    masked,
    radiance,
    rollout,
)
