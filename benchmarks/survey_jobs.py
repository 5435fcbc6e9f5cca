"""Jobs that stand for models of the survey's Table 1 which are neither built in nor of a model type that
`hf:` takes: encoders with decoders, and a vision transformer. They are for memory only: weights and data are
random."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

from memfit import Job


def _tokens(vocabulary: int, shape: tuple[int, int], step: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randint(4, vocabulary, shape, generator=generator)


def _bart(
    name: str, *, vocabulary: int, layers: int, width: int, heads: int, length: int
) -> Callable[..., Job]:
    """Return a function that makes the job of a BART of this shape. It takes ``batch`` and ``length``."""

    def make(batch: int = 1, length: int = length) -> Job:
        config = transformers.BartConfig(
            vocab_size=vocabulary,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            max_position_embeddings=max(length, 1024),
            use_cache=False,
        )
        return Job(
            name=name,
            build_model=lambda: transformers.BartForConditionalGeneration(config),
            make_batch=lambda step, seed: {
                "input_ids": _tokens(vocabulary, (batch, length), step, seed),
                "labels": _tokens(vocabulary, (batch, length), step + 1, seed),
            },
            loss=lambda model, part: model(**part).loss,
            batch_size=batch,
            blocks="model.encoder.layers",
            more_blocks=("model.decoder.layers",),
        )

    return make


chemformer = _bart("chemformer", vocabulary=523, layers=8, width=1024, heads=16, length=512)
molgen = _bart("molgen", vocabulary=185, layers=12, width=1024, heads=16, length=512)


def climax(batch: int = 1) -> Job:
    """The trunk of ClimaX at 1.40625 degrees: a vision transformer over 2,048 patches. What encodes each
    variable and sums over variables is not in it."""
    config = transformers.ViTConfig(
        image_size=(128, 256),
        patch_size=4,
        num_channels=48,
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        intermediate_size=4096,
    )

    def make_batch(step: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        return torch.randn(batch, 48, 128, 256, generator=generator)

    return Job(
        name="climax-trunk",
        build_model=lambda: transformers.ViTModel(config, add_pooling_layer=False),
        make_batch=make_batch,
        loss=lambda model, fields: model(fields).last_hidden_state.square().mean(),
        batch_size=batch,
    )
