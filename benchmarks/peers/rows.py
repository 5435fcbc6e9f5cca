"""The rows: steps of small models on this machine, on one rank and two, and published runs on GPUs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import rank_jobs
import torch
from architectures.attention import several
from architectures.convolutions import resnet
from memory_truth_ranks import ROWS, Row
from published.arch import Arch
from published.checks import contradictions
from published.rows import Setup, setup_of
from published.schema import problems, read
from torch import nn

from memfit.types.job import Job, OptimizerChoice
from memfit.types.plan import Plan, Use, use
from peers.facts import Facts, Question

WIDTH, LAYERS, HEADS, KV_HEADS, FFN, GATED_FFN, WORDS, POSITIONS = 384, 6, 6, 2, 1536, 1024, 8192, 512
AUTOCAST, FULL, SGD = use("bf16-autocast"), use("activation-checkpointing", every=1), use("sgd")
SHARDING = ("ddp", "fsdp2", "zero")
SHAPES = {"resnet": (3, 96, 96), "vit": (3, 96, 96), "mlp": (37,), "convnet": (3, 16, 16)}


def _text(batch: int, length: int, words: int, step: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    ids = torch.randint(5, words, (batch, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def _pictures(batch: int, step: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    labels = torch.randint(0, 100, (batch,), generator=generator)
    return {"pixel_values": torch.randn(batch, 3, 96, 96, generator=generator), "labels": labels}


def _model(kind: str, config: str, **fields: Any) -> nn.Module:
    import transformers

    model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**fields))
    return model


def _own_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


_ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": partial(
        _model,
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=WORDS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=POSITIONS,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "llama": partial(
        _model,
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=WORDS,
        num_key_value_heads=KV_HEADS,
        use_cache=False,
        **{**_ENCODER, "intermediate_size": GATED_FFN},
    ),
    "bert": partial(_model, "BertForMaskedLM", "BertConfig", vocab_size=WORDS, **_ENCODER),
    "esm": partial(
        _model,
        "EsmForMaskedLM",
        "EsmConfig",
        vocab_size=33,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=32,
        token_dropout=True,
        **_ENCODER,
    ),
    "vit": partial(
        _model,
        "ViTForImageClassification",
        "ViTConfig",
        image_size=96,
        patch_size=8,
        num_labels=100,
        **_ENCODER,
    ),
}
VOCABULARY = {"gpt2": WORDS, "llama": WORDS, "bert": WORDS, "esm": 33}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A step on one rank of this machine."""

    model: str
    batch: int = 0
    length: int = 0
    uses: tuple[Use, ...] = ()

    @property
    def plan(self) -> Plan:
        return Plan(uses=self.uses)

    @property
    def name(self) -> str:
        size = f" {self.batch}x{self.length}" if self.length else f" {self.batch}" if self.batch else ""
        return f"{self.model}{size}: {self.plan.label}"


def _text_case(model: str, batch: int, length: int, *uses: Use) -> Case:
    return Case(model=model, batch=batch, length=length, uses=uses)


CASES = (
    _text_case("gpt2", 4, 256),
    _text_case("gpt2", 1, 256),
    _text_case("gpt2", 8, 128),
    _text_case("gpt2", 4, 256, AUTOCAST),
    _text_case("gpt2", 4, 256, FULL),
    _text_case("gpt2", 4, 256, SGD),
    _text_case("llama", 4, 256),
    _text_case("llama", 1, 256),
    _text_case("llama", 2, 512, FULL),
    _text_case("llama", 4, 256, AUTOCAST),
    _text_case("llama", 4, 256, FULL),
    _text_case("llama", 4, 256, AUTOCAST, FULL),
    _text_case("llama", 1, 256, AUTOCAST),
    _text_case("bert", 1, 256),
    _text_case("bert", 8, 128, AUTOCAST),
    _text_case("bert", 8, 128, FULL),
    _text_case("esm", 1, 256),
    _text_case("esm", 4, 256, AUTOCAST),
    Case(model="vit", batch=1),
    Case(model="vit", batch=8),
    Case(model="vit", batch=8, uses=(AUTOCAST,)),
    Case(model="resnet"),
    Case(model="resnet", uses=(SGD,)),
    Case(model="resnet", uses=(AUTOCAST,)),
    Case(model="mlp"),
    Case(model="mlp", uses=(SGD,)),
    Case(model="multi-input"),
    Case(model="multi-input", uses=(AUTOCAST,)),
)
# Of the rows of memory_truth_ranks.py: each rank trains the whole model on its half of the batch.
DATA_PARALLEL = {*SHARDING, "activation-checkpointing", "gradient-accumulation"}


def run_together(sharding: str) -> list[Row]:
    """What `memory_truth_ranks.py --only SHARDING` runs on two ranks."""
    return [r for r in ROWS if r.plan.ranks == 2 and sharding in r.name]


def rank_rows(sharding: str) -> list[Row]:
    """Of models whose inputs and sizes every peer can be told."""
    return [
        r
        for r in run_together(sharding)
        if {u.technique for u in r.plan.uses} <= DATA_PARALLEL and (r.job in SHAPES or _gpt_of(r.job))
    ]


@functools.cache
def _gpt_of(job: str) -> rank_jobs.Gpt | None:
    with torch.device("meta"):
        model = getattr(rank_jobs, job)().build_model()
    plain = type(model) is rank_jobs.Gpt and all(p.requires_grad for p in model.parameters())
    return model if plain else None


def job_of(case: Case) -> Job:
    if case.model in ("resnet", "multi-input", "mlp"):
        return {"resnet": resnet, "multi-input": several, "mlp": rank_jobs.mlp}[case.model]()
    words = VOCABULARY.get(case.model)
    make = partial(_text, case.batch, case.length, words) if words else partial(_pictures, case.batch)
    return Job(
        name=case.model,
        build_model=MODELS[case.model],
        make_batch=make,
        loss=_own_loss,
        batch_size=case.batch,
        optimizer=OptimizerChoice(learning_rate=1e-4),
    )


def case_named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


# -- as questions


def cpu_questions() -> list[Question]:
    return [_cpu_question(c) for c in CASES]


def _cpu_question(case: Case) -> Question:
    techniques = tuple(u.technique for u in case.uses)
    job = job_of(case)
    compute = "bfloat16" if AUTOCAST in case.uses else "float32"
    return Question(
        name=case.name,
        build=("cpu", case.name),
        techniques=techniques,
        compute=compute,
        batch=job.batch_size,
        optimizer="sgd" if SGD in case.uses else "adamw",
        shape=(case.length,) if case.length else SHAPES.get(case.model),
        facts=_cpu_facts(case, compute) if case.length else None,
    )


def _cpu_facts(case: Case, compute: str) -> Facts:
    gated, causal = case.model == "llama", case.model in ("gpt2", "llama")
    with torch.device("meta"):
        model = MODELS[case.model]()
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    return Facts(
        params=sum(p.numel() for p in model.parameters()),
        block_params=sum(p.numel() for p in blocks[0].parameters()),
        layers=LAYERS,
        hidden=WIDTH,
        heads=HEADS,
        kv_heads=KV_HEADS if gated else HEADS,
        head_dim=WIDTH // HEADS,
        ffn=GATED_FFN if gated else FFN,
        vocab=VOCABULARY[case.model],
        gated=gated,
        causal=causal,
        tied=not gated,
        length=case.length,
        batch=case.batch,
        compute=compute,
        attention_dropout=case.model == "bert",
        recompute="full" if FULL in case.uses else "",
    )


def rank_question(row: Row) -> Question:
    uses = {u.technique: u.settings for u in row.plan.uses}
    sharding = next(k for k in uses if k in SHARDING)
    own = uses[sharding]
    half = own.get("precision") == "bf16"
    compute = "bfloat16" if half else "float32"
    job = getattr(rank_jobs, row.job)()
    parts = int(uses.get("gradient-accumulation", {}).get("micro_batches", 1))
    lacks = {
        "parameters kept whole": own.get("reshard") is False,
        "offload": own.get("offload") not in (None, False, "none"),
        "gradients kept whole": parts > 1 and own.get("sync") == "last",
        "deeper prefetch": int(own.get("prefetch", 1)) > 1,
    }
    batch = job.batch_size // row.plan.ranks // parts
    return Question(
        name=row.name,
        build=("ranks", row.job),
        compute=compute,
        batch=batch,
        ranks=row.plan.ranks,
        techniques=(*uses, *(k for k, v in lacks.items() if v)),
        sharding=f"{sharding}{own.get('stage', '')}",
        shape=SHAPES.get(row.job, (rank_jobs.LENGTH,)),
        bucket_elements=int(own.get("reduce_bucket_elements", 0)),
        facts=None
        if row.job in SHAPES
        else _rank_facts(
            row.job,
            batch,
            compute,
            weights="bfloat16" if half and sharding == "zero" else "float32",
            recompute="full" if "activation-checkpointing" in uses else "",
        ),
    )


def _rank_facts(job: str, batch: int, compute: str, *, weights: str, recompute: str) -> Facts:
    model = _gpt_of(job)
    assert model is not None
    width = model.embed.embedding_dim
    heads = width // 32
    return Facts(
        params=sum(p.numel() for p in model.parameters()),
        block_params=sum(p.numel() for p in model.blocks[0].parameters()),
        layers=len(model.blocks),
        hidden=width,
        heads=heads,
        kv_heads=heads,
        head_dim=32,
        ffn=4 * width,
        vocab=rank_jobs.VOCABULARY,
        gated=False,
        causal=True,
        tied=model.head.weight is model.embed.weight,
        length=rank_jobs.LENGTH,
        batch=batch,
        compute=compute,
        weights=weights,
        recompute=recompute,
    )


# -- published runs


def published_setups(file: Path) -> list[Setup]:
    """Training steps of quality A whose allocated memory is given, and whose rows are sound."""
    sound = [row for row in read(file) if row["quality"] == "A" and not problems(row)]
    found = [(row, setup_of(row)) for row in sound]
    return [
        s
        for row, s in found
        if s.measured is not None
        and s.measured.kind == "allocated"
        and s.scope == "train_step"
        and not contradictions(row, s)
    ]


def published_bytes(setup: Setup) -> float:
    """As memfit's own page compares it."""
    assert setup.measured is not None
    return setup.measured.size_bytes / setup.measured.scale


def published_question(setup: Setup) -> Question:
    arch = setup.arch
    sizes = arch is not None and setup.code != "timm" and arch.moe is None and arch.mla is None
    one_sample = (setup.length,) if setup.length else None
    names = {
        "compile": setup.compiled,
        "fp8": setup.float8,
        "context-parallel": setup.ranks["cp"] > 1,
        "expert-parallel": setup.ranks["ep"] > 1,
        setup.optimizer: setup.optimizer not in ("adamw", "sgd"),
        "selective-checkpointing": setup.recompute not in ("", "full"),
        "activation-checkpointing": setup.recompute == "full",
        "lora": setup.lora is not None,
        "parameters kept whole": setup.sharding == "fsdp2" and not setup.reshard,
        "offload": bool(setup.offload),
        "fused loss or layers": setup.code in ("liger", "foak"),
    }
    return Question(
        name=setup.id,
        build=("facts",),
        techniques=tuple(k for k, v in names.items() if v),
        compute=setup.compute,
        batch=setup.micro_batch,
        ranks=math.prod(setup.ranks[k] for k in ("dp", "tp", "pp", "cp")),
        sharding="fsdp2" if setup.sharding == "fsdp1" else setup.sharding,
        optimizer=setup.optimizer,
        shape=one_sample,
        facts=_published_facts(setup, arch) if arch is not None and sizes else None,
    )


def _published_facts(setup: Setup, arch: Arch) -> Facts:
    gated, lora = arch.mlp == "swiglu", setup.lora
    block = (
        2 * arch.hidden * (arch.heads + arch.kv_heads) * arch.head_dim
        + (3 if gated else 2) * arch.hidden * arch.ffn
        + 2 * arch.hidden
    )
    words = arch.vocab * arch.hidden
    megatron = setup.code == "megatron"  # keeps an fp32 master beside its bf16 weights
    return Facts(
        params=arch.layers * block + (1 if arch.tied else 2) * words + arch.hidden,
        block_params=block,
        layers=arch.layers,
        hidden=arch.hidden,
        heads=arch.heads,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        ffn=arch.ffn,
        vocab=arch.vocab,
        gated=gated,
        causal=True,
        tied=arch.tied,
        length=setup.length,
        batch=setup.micro_batch,
        compute=setup.compute,
        weights=setup.parameters,
        states="float32" if megatron else setup.parameters,
        recompute=setup.recompute,
        lora_rank=lora.rank if lora else 0,
        lora_targets=tuple(sorted(lora.targets)) if lora else (),
        quantized=bool(lora and lora.base),
        double=bool(lora and lora.double),
        tensor_parallel=setup.ranks["tp"],
        pipeline=setup.ranks["pp"],
        accumulation=setup.micro_batches,
    )
