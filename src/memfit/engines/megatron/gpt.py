"""Convert memfit's own Gpt to megatron-core's GPTModel with the same sizes and initial weights.

Megatron's tensors are (length, batch, width). It interleaves query, key and value by head, adds the biases of
`mix` and `narrow` separately from their products, and always splits embedding and head by vocabulary. Its own
attention requires CUDA, so the layer spec gets memfit's core attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from memfit.jobs.builtin.gpt import Gpt, GptBlock
from memfit.types.errors import UserError

_LINEARS = ("query_key_value", "mix", "widen", "narrow")
_NORMS = ("norm_attention", "norm_feed")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GptShape:
    """The sizes and settings from which a Gpt can be rebuilt. ``layers``: number of blocks; ``width``: of the
    hidden states; ``heads``: of each block's attention; ``feed``: the inner width of the feed-forward part;
    ``length``: the most tokens of a sequence; ``vocabulary``: number of different tokens; ``eps``: the
    epsilon of the norms; ``biased``: Linear layers of the blocks have biases; ``tied``: the head shares the
    embedding's weight."""

    layers: int
    width: int
    heads: int
    feed: int
    length: int
    vocabulary: int
    eps: float
    biased: bool
    tied: bool


def read(model: nn.Module) -> GptShape:
    """Return the shape of ``model``. Raises UserError if its class is not exactly memfit's Gpt (a subclass is
    refused, too), or if it has something that Megatron's GPTModel cannot express, which the message names."""
    if type(model) is not Gpt:
        raise UserError(
            f"engine megatron cannot convert the job's model, which is a {type(model).__name__}",
            allowed="a model whose class is memfit.jobs.builtin.gpt.Gpt, not a subclass of it",
        )
    if reasons := list(_differences(model)):
        raise UserError(
            f"engine megatron: Megatron's GPTModel cannot express, in the job's model, {'; '.join(reasons)}",
            allowed="a memfit.jobs.builtin.gpt.Gpt with at least one block and the submodules that it "
            "builds; with all parameters trainable; with equal numbers of heads and equal feed-forward "
            "widths in all blocks; with biases in all Linear layers of the blocks or in none; with weight, "
            "bias and the same eps in all norms; and with a head that has no bias and one output per token "
            "of the embedding",
        )
    first_block: Any = model.blocks[0]
    return GptShape(
        layers=len(model.blocks),
        width=model.embed.embedding_dim,
        heads=first_block.heads,
        feed=first_block.widen.out_features,
        length=model.position.num_embeddings,
        vocabulary=model.embed.num_embeddings,
        eps=model.norm.eps,
        biased=first_block.mix.bias is not None,
        tied=model.head.weight is model.embed.weight,
    )


def sizes(shape: GptShape) -> dict[str, str]:
    """Return the shape as options of Megatron-LM's trainer, name without dashes -> value, "" for a switch."""
    options = {
        "num-layers": str(shape.layers),
        "hidden-size": str(shape.width),
        "ffn-hidden-size": str(shape.feed),
        "num-attention-heads": str(shape.heads),
        "seq-length": str(shape.length),
        "max-position-embeddings": str(shape.length),
        "vocab-size": str(shape.vocabulary),
        "position-embedding-type": "learned_absolute",
        "normalization": "LayerNorm",
        "norm-epsilon": str(shape.eps),
    }
    switches = {
        "untie-embeddings-and-output-weights": not shape.tied,
        "disable-bias-linear": not shape.biased,
    }
    return options | {name: "" for name, enabled in switches.items() if enabled}


def _differences(model: Gpt) -> Iterator[str]:
    linears = {f"blocks.{i}.{n}": getattr(b, n, None) for i, b in enumerate(model.blocks) for n in _LINEARS}
    norms = {f"blocks.{i}.{n}": getattr(b, n, None) for i, b in enumerate(model.blocks) for n in _NORMS}
    expectations: list[tuple[Mapping[str, Any], type[nn.Module]]] = [
        ({f"blocks.{i}": b for i, b in enumerate(model.blocks)}, GptBlock),
        (linears, nn.Linear),
        ({**norms, "norm": model.norm}, nn.LayerNorm),
    ]
    mismatches = [
        f"{n}, a {type(m).__name__}"
        for members, expected_class in expectations
        for n, m in members.items()
        if type(m) is not expected_class
    ]
    if mismatches or not linears:
        yield from mismatches or ["a model without blocks"]
        return
    yield from _unlike(model, list(linears.values()), [*norms.values(), model.norm])


def _unlike(model: Any, linears: list[Any], norms: list[Any]) -> Iterator[str]:
    """Yield what GPTModel cannot express, each as a text: settings that vary within the model although
    GPTModel has one value for all blocks, and properties of the model that GPTModel cannot have. ``linears``
    are the Linear layers of all blocks; ``norms`` are the norms of all blocks and the one before the head."""
    values_by_problem = {
        "norms with different eps": {n.eps for n in norms},
        "blocks with different heads": {b.heads for b in model.blocks},
        "feed-forward parts of different widths": {b.widen.out_features for b in model.blocks},
        "biases in some Linear layers only": {m.bias is not None for m in linears},
    }
    yield from (
        f"{problem} {sorted(values)}" for problem, values in values_by_problem.items() if len(values) > 1
    )
    if any(n.weight is None or n.bias is None for n in norms):
        yield "norms without weight or bias"
    if model.head.bias is not None:
        yield "a head with a bias"
    if model.head.out_features != model.embed.num_embeddings:
        yield f"a head of {model.head.out_features} for {model.embed.num_embeddings} tokens"
    if not all(p.requires_grad for p in model.parameters()):
        yield "frozen parameters"


def check_cut(shape: GptShape, degree: int) -> None:
    """Raise UserError if ``degree``, the number of tensor-parallel ranks, does not divide the number of
    heads, or does not divide the feed-forward width."""
    must_divide("number of heads", shape.heads, degree)
    must_divide("feed-forward width", shape.feed, degree)


def must_divide(what: str, count: int, degree: int) -> None:
    """Raise UserError if ``degree``, a number of tensor-parallel ranks, does not divide ``count``. ``what``
    names the count in the message, such as "number of heads"."""
    if count % degree:
        raise UserError(
            f"engine megatron cannot split a {what} of {count} evenly over {degree} tensor-parallel ranks",
            allowed=f"a {what} that is a multiple of {degree}, or a number of tensor-parallel ranks that "
            f"divides {count}",
        )


class CoreAttention(nn.Module):
    """Causal attention with torch's fused kernel. Query, key and value are ``(length, batch, heads, head
    width)``, the output is ``(length, batch, heads x head width)``, as in Megatron's DotProductAttention.
    All other arguments, the mask included, are ignored."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        output = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return output.permute(2, 0, 1, 3).flatten(2)


class Norm(nn.LayerNorm):
    """torch's LayerNorm with an attribute ``sequence_parallel`` on each parameter, which says whether the
    configuration has sequence parallelism. If it has, Megatron sums the gradients of these parameters over
    the tensor-parallel ranks. Megatron refuses torch's own LayerNorm then, whose parameters lack the
    attribute."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **ignored: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        for param in self.parameters():
            cast(Any, param).sequence_parallel = config.sequence_parallel


class MegatronGpt(nn.Module):
    """Megatron's GPTModel with the interface of memfit's Gpt: it is called with tokens and has ``blocks`` and
    ``head``. The vocabulary is padded to a multiple of the number of tensor-parallel ranks, as in Megatron's
    trainer. Logits of the padding are left out."""

    def __init__(self, shape: GptShape, config: Any) -> None:
        super().__init__()
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

        layer = get_gpt_layer_local_spec(normalization="LayerNorm")
        layer.submodules.self_attention.submodules.core_attention = CoreAttention
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        block = TransformerBlockSubmodules(layer_specs=[layer] * shape.layers, layer_norm=Norm)
        self.config = config  # Megatron's own functions look for it here
        self.vocabulary, degree = shape.vocabulary, config.tensor_model_parallel_size
        padded_size = -(-shape.vocabulary // degree) * degree
        self.core = GPTModel(
            config,
            block,
            vocab_size=padded_size,
            max_sequence_length=shape.length,
            parallel_output=False,
            share_embeddings_and_output_weights=shape.tied,
        )

    @property
    def blocks(self) -> Any:
        return self.core.decoder.layers

    @property
    def head(self) -> Any:
        return self.core.output_layer

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits ``(batch, length, vocabulary)`` for tokens ``(batch, length)``. Raises UserError if
        the configuration has sequence parallelism and the number of tensor-parallel ranks does not divide the
        length."""
        if self.config.sequence_parallel:
            must_divide("sequence length", tokens.shape[1], self.config.tensor_model_parallel_size)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits: torch.Tensor = self.core(tokens, positions, None)
        is_padded = logits.shape[-1] > self.vocabulary
        return logits[..., : self.vocabulary].contiguous() if is_padded else logits


def transformer_config(shape: GptShape, **parallel: Any) -> Any:
    """Return Megatron's TransformerConfig for the shape, without dropout and without anything that requires
    CUDA. ``parallel`` holds further fields of it, by name."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.feed,
        layernorm_epsilon=shape.eps,
        add_bias_linear=shape.biased,
        activation_func=functional.gelu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **parallel,
    )


def copy_weights(source: Gpt, target: MegatronGpt, *, rank: int) -> None:
    """Copy the weights of ``source`` to ``target``. ``rank`` is this process's rank within its
    tensor-parallel group: of a sharded parameter its slice is copied, and other parameters are copied whole.
    Rows that pad the vocabulary become zero. Then replace the parameters of ``source`` by empty tensors to
    free their memory. Raises UserError as `read` does."""
    shape = read(source)
    target_params = dict(target.core.named_parameters())
    for name, full_tensor in _whole(source, shape):
        param = target_params.pop(name)
        dim = next((d for d in range(full_tensor.dim()) if full_tensor.shape[d] != param.shape[d]), None)
        with torch.no_grad():
            if dim is None:
                param.copy_(full_tensor)
                continue
            start, size = rank * param.shape[dim], param.shape[dim]
            cast(Any, param).tensor_model_parallel = True  # Megatron sets it only when it initializes weights
            real_rows = max(0, min(size, full_tensor.shape[dim] - start))  # the other rows pad the vocabulary
            param.narrow(dim, real_rows, size - real_rows).zero_()
            param.narrow(dim, 0, real_rows).copy_(
                full_tensor.narrow(dim, min(start, full_tensor.shape[dim]), real_rows)
            )
    assert not target_params, f"without initial weights: {', '.join(target_params)}"
    for param in source.parameters():
        param.data = param.data.new_empty(0)


def _whole(source: Gpt, shape: GptShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in GPTModel, whole tensor from ``source``) for every parameter of GPTModel. "Whole" means
    not sharded, and rows are in Megatron's order."""
    yield "embedding.word_embeddings.weight", source.embed.weight
    yield "embedding.position_embeddings.weight", source.position.weight
    pairs: Mapping[str, str] = {
        "input_layernorm": "norm_attention",
        "self_attention.linear_qkv": "query_key_value",
        "self_attention.linear_proj": "mix",
        "pre_mlp_layernorm": "norm_feed",
        "mlp.linear_fc1": "widen",
        "mlp.linear_fc2": "narrow",
    }
    for index, block in enumerate(source.blocks):
        for megatron_name, gpt_name in pairs.items():
            for name, param in getattr(block, gpt_name).named_parameters():
                rows = _by_head(param, shape.heads) if gpt_name == "query_key_value" else param
                yield f"decoder.layers.{index}.{megatron_name}.{name}", rows
    yield from ((f"decoder.final_layernorm.{n}", p) for n, p in source.norm.named_parameters())
    if not shape.tied:
        yield "output_layer.weight", source.head.weight


def _by_head(param: torch.Tensor, heads: int) -> torch.Tensor:
    """Return ``param`` with its rows reordered: from all rows of the queries, then of the keys, then of the
    values, to query, key and value of the first head, then of the second, and so on."""
    rows: torch.Tensor = param.unflatten(0, (3, heads, -1)).transpose(0, 1).reshape(param.shape)
    return rows
