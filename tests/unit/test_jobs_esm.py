"""The built-in ESM-2 against Hugging Face's with the same weights: equal outputs, gradients and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import EsmConfig, EsmForMaskedLM

import memfit
from memfit import Job
from memfit.jobs.builtin import esm
from memfit.jobs.registry import load
from memfit.types.errors import UserError
from memfit.types.job import JobRef

SIZE = esm.EsmSize(layers=3, width=48, heads=4, length=21, batch_size=3)


def hugging_face(size: esm.EsmSize = SIZE) -> Any:
    torch.manual_seed(3)
    config = EsmConfig(
        vocab_size=esm.VOCABULARY,
        pad_token_id=esm.PAD,
        mask_token_id=esm.MASK,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=1026,
        position_embedding_type="rotary",
        token_dropout=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-5,
        attn_implementation="sdpa",
    )
    model = EsmForMaskedLM(config)
    with torch.no_grad():
        for param in model.parameters():  # no zeros or ones, which could hide a fault
            param.add_(torch.randn(param.shape) * 0.1)
    del model.esm.contact_head
    return model


def ours(theirs: Any) -> esm.MaskedLanguageModel:
    model = esm.MaskedLanguageModel(SIZE)
    missing, unknown = model.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    assert not unknown
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    tokens = torch.randint(4, 24, (SIZE.batch_size, SIZE.length))
    valid = torch.arange(SIZE.length) < torch.tensor([21, 13, 5])[:, None]
    return tokens.masked_fill(~valid, esm.PAD), valid, torch.randint(0, 33, tokens.shape)


def trained(model: Any, logits: Any, *, autocast: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens, valid, labels = batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = logits(model, tokens, valid)
        functional.cross_entropy(found.flatten(0, 1), labels.flatten()).backward()
    return found, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
def test_outputs_and_gradients_equal_hugging_faces_bit_for_bit(kind: str) -> None:
    theirs = hugging_face()
    mine = ours(theirs)
    if kind == "bfloat16":
        theirs, mine = theirs.bfloat16(), mine.bfloat16()
    autocast = kind == "autocast"
    wanted, their_grads = trained(theirs, lambda m, t, v: m(t, attention_mask=v).logits, autocast=autocast)
    got, grads = trained(mine, lambda m, t, v: m(t, v), autocast=autocast)
    assert torch.equal(got, wanted)
    assert grads.keys() == their_grads.keys()
    assert all(torch.equal(grads[name], their_grads[name]) for name in grads)


@pytest.mark.parametrize("plan", [{}, {"bf16-autocast": {}}, {"bf16-parameters": {}}])
def test_peak_memory_is_that_of_hugging_faces_model(plan: dict[str, Any]) -> None:
    def peak(build: Any, call: Any) -> int:
        def loss(model: Any, parts: Any) -> torch.Tensor:
            return functional.cross_entropy(
                call(model, parts["tokens"], parts["valid"]).flatten(0, 1), parts["labels"].flatten()
            )

        def make_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
            return dict(zip(("tokens", "valid", "labels"), batch(), strict=True))

        job = Job(name="esm", build_model=build, make_batch=make_batch, loss=loss, batch_size=3)
        return int(memfit.estimate(job, plan=plan, machine="1xA100-80").allocated_bytes.value)

    def with_mask(model: Any, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Hugging Face's own forward drops a mask of ones, which fake tensors cannot detect."""
        inner = model.esm
        embedded = inner.embeddings(tokens, attention_mask=valid)
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        hidden = inner.encoder(
            embedded,
            attention_mask=valid[:, None, None, :],
            position_embeddings=inner.rotary_embeddings(embedded, positions),
        ).last_hidden_state
        return model.lm_head(hidden)  # type: ignore[no-any-return]

    theirs = peak(hugging_face, with_mask)
    mine = peak(lambda: esm.MaskedLanguageModel(SIZE), lambda m, t, v: m(t, v))
    positions = 8 * 1026 + 512  # a buffer that rotary positions do not use, and its rounding
    assert theirs - 2 * positions <= mine <= theirs


def test_a_hugging_face_checkpoint_loads_into_both_protein_jobs(tmp_path: Path) -> None:
    checkpoint = hugging_face(esm.EsmSize(layers=4, width=128, heads=4, length=128, batch_size=2))
    checkpoint.save_pretrained(tmp_path, max_shard_size="1MB")
    assert (tmp_path / "model.safetensors.index.json").exists(), "the case with shards"
    for name in ("protein-lm", "protein-ss"):
        model = load(JobRef(spec=name, weights=str(tmp_path))).build_model()
        wanted = checkpoint.esm.encoder.state_dict()
        got = model.esm.encoder.state_dict()  # type: ignore[union-attr]
        assert all(torch.equal(wanted[k], got[k]) for k in wanted)


def test_an_index_that_names_the_wrong_file_is_refused(tmp_path: Path) -> None:
    checkpoint = hugging_face(esm.EsmSize(layers=4, width=128, heads=4, length=128, batch_size=2))
    checkpoint.save_pretrained(tmp_path, max_shard_size="1MB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    next_file = dict(zip(files, [*files[1:], files[0]], strict=True))
    content["weight_map"] = {name: next_file[file] for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="cannot read the tensor"):
        load(JobRef(spec="protein-lm", weights=str(tmp_path))).build_model()


def test_initial_weights_are_distributed_as_in_esm2() -> None:
    model = esm.MaskedLanguageModel(esm.EsmSize(layers=2, width=128, heads=4, length=8, batch_size=1))
    assert model.lm_head.decoder.weight is model.esm.embeddings.word_embeddings.weight
    for name, param in model.named_parameters():
        if "orm" in name or name.endswith("bias"):
            assert torch.equal(param, torch.full_like(param, float("orm" in name and "weight" in name)))
        else:
            assert float(param.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not model.esm.embeddings.word_embeddings.weight[esm.PAD].any()
