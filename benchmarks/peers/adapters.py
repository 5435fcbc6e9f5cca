"""One peer in a process of its own: questions in as JSON, one answer a question out.

    python -m peers.adapters PEER [SOURCE] < questions.json > answers.json

An answer is {"name", "bytes", "missing", "seconds"} or {"name", "refused"}; ``missing``: what of the row
the peer has no setting for. The first line of a peer here says what its own documentation says it predicts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from peers.facts import Facts, Question, from_json

Answer = tuple[int, list[str]]
PRECISION = ("bf16-autocast", "bf16-parameters")
# What other people's code raises on what it does not know: the table shows it in that cell.
FOREIGN = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    KeyError,
    AttributeError,
    IndexError,
    ImportError,
    OSError,
    NotImplementedError,
    ZeroDivisionError,
)
BYTES = {"float32": 4, "bfloat16": 2}


class Refused(Exception):
    """The peer cannot express the row at all."""


def transformer(question: Question) -> Facts:
    if question.facts is None:
        raise Refused("takes sizes of a dense transformer only")
    return question.facts


def lacking(question: Question, *covered: str) -> list[str]:
    """What the plan changes that none of the peer's settings says."""
    known = (*covered, *PRECISION, "ddp", "fsdp2", "zero", "gradient-accumulation", "sgd")
    return [t for t in question.techniques if t not in known]


def module_of(question: Question) -> Any:
    """The row's own module in float32; for a published run Hugging Face's of the same sizes."""
    if question.build[0] == "cpu":
        from peers.rows import case_named, job_of

        return job_of(case_named(question.build[1])).build_model()
    if question.build[0] == "ranks":
        import rank_jobs

        return getattr(rank_jobs, question.build[1])().build_model()
    return _hugging_face(transformer(question))


def _hugging_face(facts: Facts) -> Any:
    import transformers

    sizes = {
        "vocab_size": facts.vocab,
        "hidden_size": facts.hidden,
        "intermediate_size": facts.ffn,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "tie_word_embeddings": facts.tied,
    }
    if facts.gated:
        llama = transformers.LlamaConfig(
            **sizes, num_key_value_heads=facts.kv_heads, head_dim=facts.head_dim, use_cache=False
        )
        return transformers.LlamaForCausalLM(llama)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))


# -- peers


def accelerate(question: Question, source: str) -> Answer:
    """Memory of training with Adam at a batch of 1, from the size of the model alone."""
    import torch
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    if question.ranks > 1:
        raise Refused("knows one device only")
    if question.optimizer != "adamw" or "lora" in question.techniques:
        raise Refused("knows training of all parameters with Adam only")
    with torch.device("meta"), init_empty_weights():
        size, _ = calculate_maximum_sizes(module_of(question))
    used = estimate_training_usage(size, "float32" if question.compute == "float32" else "float16")
    missing = lacking(question) + ["a batch above 1"] * (question.batch > 1)
    if question.facts and question.facts.weights != "float32":
        missing.append("parameters in 16 bits")
    return int(max(used.values())), missing


def deepspeed(question: Question, source: str) -> Answer:
    """Model states only (parameters, gradients, optimizer) of ZeRO 2 and 3 in mixed 16-bit precision."""
    import torch
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    if question.stage < 2 or question.ranks < 2:
        raise Refused("knows ZeRO stages 2 and 3 only")
    if question.facts and (question.facts.tensor_parallel > 1 or question.facts.pipeline > 1):
        raise Refused("knows data parallelism only")
    with torch.device("meta"):
        model = module_of(question)
    params = sum(p.numel() for p in model.parameters())
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    ranks = {"num_gpus_per_node": question.ranks, "cpu_offload": False}
    whole = "parameters kept whole" in question.techniques
    if question.stage == 2 or whole:
        _, used = stage_1_and_2.estimate_zero2_model_states_mem_needs(params, **ranks)
    else:
        _, used, _ = stage3.estimate_zero3_model_states_mem_needs(
            params, largest, cpu_offload_params=False, **ranks
        )
    missing = lacking(question, "parameters kept whole", "activation-checkpointing")
    if question.compute == "float32":
        missing.append("arithmetic in float32")
    if question.facts and question.facts.states != "float32":
        missing.append("optimizer states in 16 bits")
    return used, missing


_LLAMA_NAMES = {**{k: f"{k}_proj" for k in ("q", "k", "v", "o", "gate", "up", "down")}, "head": "lm_head"}
_NEOX_NAMES = {**dict.fromkeys("qkv", "query"), "o": "attention.dense"}


def kitsune(question: Question, source: str) -> Answer:
    """Peak GPU memory of training any module of one input."""
    import torch
    from kitsune.predict import LoRAConfig, estimate_lora_memory, estimate_multi_gpu, predict_memory

    if question.shape is None:
        raise Refused("takes one input tensor")
    missing, facts = lacking(question, "lora"), question.facts
    if facts and facts.weights != "float32" and not facts.lora_rank:
        lacks = "float32 master weights" if facts.states == "float32" else "optimizer states in 16 bits"
        missing.append(lacks)
    if facts and (facts.tensor_parallel > 1 or facts.pipeline > 1):
        raise Refused("knows data parallelism only")
    with torch.device("meta" if question.build[0] == "facts" else "cpu"):
        model = module_of(question)
    if facts and facts.weights == "bfloat16" and not facts.quantized:  # it divides float32 by 8 for 4 bits
        model = model.to(torch.bfloat16)
    if facts:
        model = _of_floats(model, masked=facts.gated)
    given = {"input_shape": question.shape, "dtype": question.compute}
    if facts and facts.lora_rank:
        roles = _LLAMA_NAMES if facts.gated else _NEOX_NAMES  # it asks for substrings of layers' names
        config = LoRAConfig(
            rank=facts.lora_rank,
            use_qlora=facts.quantized,
            target_modules=tuple(roles[t] for t in facts.lora_targets if t in roles),
        )
        found: Any = estimate_lora_memory(model, batch_size=question.batch, config=config, **given)
    elif question.sharding:
        strategy = {"ddp": "ddp", "zero1": "zero1", "zero2": "zero2"}.get(question.sharding, "zero3")
        if "parameters kept whole" in question.techniques:
            strategy, missing = "zero2", [m for m in missing if m != "parameters kept whole"]
        found = estimate_multi_gpu(
            model,
            total_batch_size=question.batch * question.ranks,
            optimizer=question.optimizer,
            strategy=strategy,
            world_size=question.ranks,
            **given,
        )
    else:
        found = predict_memory(model, batch_size=question.batch, optimizer=question.optimizer, **given)
    return found.total_bytes - found.overhead_bytes, missing


def _of_floats(model: Any, *, masked: bool) -> Any:
    """It makes inputs of floats, with which an embedding fails; so they are made whole numbers first. Hugging
    Face's Llama asks its positions for values, which meta tensors have not, unless it is given a mask."""
    import torch

    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, words: torch.Tensor) -> Any:
            if not masked:
                return self.model(words.abs().long())
            mask = torch.ones(words.shape[0], 1, words.shape[1], words.shape[1], device=words.device)
            return self.model(words.abs().long(), attention_mask=mask.bool())

    return Words()


def llm_analysis(question: Question, source: str) -> Answer:
    """Memory of training a transformer on a GPU: weights, gradients, optimizer, activations."""
    if source:
        sys.path.insert(0, source)
    from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis
    from llm_analysis.config import DtypeConfig, GPUConfig, ModelConfig, ParallelismConfig

    facts = transformer(question)
    if facts.lora_rank:
        raise Refused("trains all parameters")
    # It knows weights of 16 bits at most, and gradients of the size of the master weights. What it calls
    # other bytes of the optimizer makes the sum right: moments, and the rest of weights of 32 bits.
    half = facts.compute == "bfloat16"
    state = {"float32": 8, "bfloat16": 4}[facts.states] if question.optimizer == "adamw" else 0
    grad = BYTES[facts.states]
    kept = (2 if facts.weights == "float32" else 4) if half and facts.states == "float32" else 0
    weight_bits = 16 if half else 8 * BYTES[facts.weights]
    model = ModelConfig(
        name="row",
        num_layers=facts.layers,
        n_head=facts.heads,
        hidden_dim=facts.hidden,
        vocab_size=facts.vocab,
        max_seq_len=facts.length,
        num_key_value_heads=facts.kv_heads,
        ffn_embed_dim=facts.ffn,
        expansion_ratio=facts.ffn / facts.hidden,
        **({"mlp_gated_linear_units": facts.gated} if source else {}),
    )
    analysis = LLMAnalysis(
        model,
        GPUConfig("row", 500, 1000, 100, 1e-6, 100),
        DtypeConfig("row", weight_bits, 8 * BYTES[facts.compute], weight_bits),
        ParallelismConfig(
            tp_size=facts.tensor_parallel,
            pp_size=facts.pipeline,
            dp_size=question.ranks // facts.tensor_parallel // facts.pipeline,
        ),
    )
    stage = 2 if "parameters kept whole" in question.techniques else question.stage
    summary = analysis.training(
        batch_size_per_gpu=facts.batch,
        gradient_accumulation_steps=1,
        seq_len=facts.length,
        activation_recomputation=ActivationRecomputation["FULL" if facts.recompute == "full" else "NONE"],
        ds_zero=DSZeRO(stage),
        master_weights_dtype_bytes=grad,
        other_op_bytes=state + kept - grad,
        layernorm_dtype_bytes=BYTES[facts.compute],
        flash_attn=not facts.attention_dropout,
        softmax_dropout=facts.attention_dropout,
        **({} if source else {"mlp_gated_linear_units": facts.gated}),
    )
    key = "estimated_peak_memory_per_gpu"
    peak = summary.get(key, summary.get("(weight+op_state+grad+act)_memory_per_gpu"))
    return int(peak), lacking(question, "activation-checkpointing", "parameters kept whole")


def eleutherai(question: Question, source: str) -> Answer:
    """Memory a GPU needs to train a transformer: model, gradients, optimizer, activations, communication."""
    facts = transformer(question)
    if facts.lora_rank:
        raise Refused("trains all parameters")
    if question.optimizer != "adamw":
        raise Refused("knows AdamW, Muon and SGD with momentum")
    whole = "parameters kept whole" in question.techniques
    stage = 2 if whole else question.stage
    low = BYTES[facts.compute]
    given = {
        "num-gpus": question.ranks,
        "tensor-parallel-size": facts.tensor_parallel,
        "pipeline-parallel-size": facts.pipeline,
        "zero-stage": stage,
        "batch-size-per-gpu": facts.batch,
        "zero-allgather-bucket-size": question.bucket_elements,
        "zero3-max-live-params": facts.block_params,
        "sequence-length": facts.length,
        "vocab-size": facts.vocab,
        "hidden-size": facts.hidden,
        "num-attention-heads": facts.heads,
        "num-layers": facts.layers,
        "ffn-expansion-factor": facts.ffn / facts.hidden,
        "num-mlp-linears": 3 if facts.gated else 2,
        "kv-size-ratio": facts.kv_heads / facts.heads,
        "low-prec-bytes-per-val": low,
        "bytes-per-grad-ele": BYTES[facts.states],
    }
    flags = ["--checkpoint-activations"] * (facts.recompute == "full")
    flags += ["--disable-mixed-precision"] * (facts.compute == "float32")
    flags += ["--partition-activations"] * (facts.tensor_parallel > 1)
    script = types.ModuleType("calc_transformer_mem")
    path = Path(source)
    exec(compile(path.read_text(), str(path), "exec"), script.__dict__)
    args = script.config_parser().parse_args([*flags, *(f"--{k}={v}" for k, v in given.items())])
    gib = _local_at_return(lambda: script.calc_mem(args), "calc_mem", "per_gpu_mem_gib")
    missing = lacking(question, "activation-checkpointing", "parameters kept whole")
    if facts.states != "float32":
        missing.append("optimizer states in 16 bits")
    if not (facts.attention_dropout or facts.recompute):
        missing.append("attention that keeps no score matrix")
    return int(gib * 2**30), missing


def _local_at_return(call: Callable[[], Any], function: str, name: str) -> float:
    """It prints its result in GiB to two places only; this is the number before printing."""
    found = [math.nan]

    def watch(frame: types.FrameType, event: str, arg: object) -> None:
        if event == "return" and frame.f_code.co_name == function:
            found[0] = frame.f_locals[name]

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found[0]


def fitcheck(question: Question, source: str) -> Answer:
    """Peak of fine-tuning a dense decoder with a gated MLP on one GPU, whole, by LoRA or by QLoRA."""
    from fitcheck import ModelConfig, TrainingConfig, estimate, get_gpu

    facts = transformer(question)
    if not (facts.gated and facts.causal):
        raise Refused("knows decoders with a gated MLP only")
    if question.ranks > 1:
        raise Refused("knows one device only")
    if "head" in facts.lora_targets:
        raise Refused("has no adapter on the head")
    model = ModelConfig(
        name="row",
        num_params=facts.params,
        hidden_size=facts.hidden,
        num_layers=facts.layers,
        num_attention_heads=facts.heads,
        num_kv_heads=facts.kv_heads,
        intermediate_size=facts.ffn,
        vocab_size=facts.vocab,
        head_dim=facts.head_dim,
        tie_word_embeddings=facts.tied,
    )
    training = TrainingConfig(
        precision={"float32": "fp32", "bfloat16": "bf16"}[facts.compute],
        quantization="nf4" if facts.quantized else "none",
        double_quant=facts.double,
        optimizer={"adamw": "adamw", "adamw-8bit": "adam8bit", "sgd": "sgd"}[question.optimizer],
        optimizer_dtype={"float32": "fp32", "bfloat16": "bf16"}[facts.states],
        batch_size=facts.batch,
        seq_len=facts.length,
        lora_rank=facts.lora_rank or None,
        lora_targets=[f"{t}_proj" for t in facts.lora_targets],
        grad_checkpoint=facts.recompute == "full",
        flash_attn=True,
        grad_accum_steps=facts.accumulation,
    )
    report = estimate(model, training, get_gpu("row", 10**6))
    missing = lacking(question, "activation-checkpointing", "lora")
    if facts.states != "float32" and not facts.lora_rank:
        missing.append("training without fp32 master weights")
    return int((report.total_mib - report.overhead_mib) * 2**20), missing


def mem_tracker(question: Question, source: str) -> Answer:
    """Peak of the tensors that a training step makes, on any module, by running it under a dispatch mode."""
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.utils import _pytree

    from memfit.jobs.training_step import TrainingStep

    def watched(job: Any, plan: Any, world: Any, tracker: Any) -> Any:
        with tracker:  # so that it knows what ZeRO makes beside the module's own tensors
            step = TrainingStep(job, plan, world=world)
        batch, terms = step.local(job.make_batch(0, 0))
        tracker.track_external(step.model, *_pytree.tree_leaves(batch))
        return step, batch, terms

    return _tracked(question, lambda *asked: (tracker := MemTracker(), watched(*asked, tracker)))


def fsdp_tracker(question: Question, source: str) -> Answer:
    """Peak of a step of an FSDP2 model on one of the ranks, by running it under a dispatch mode."""
    import torch
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    from memfit.jobs.training_step import TrainingStep

    if question.sharding != "fsdp2":
        raise Refused("knows FSDP2 only")

    def watched(job: Any, plan: Any, world: Any) -> Any:
        step = TrainingStep(job, plan, world=world)
        batch, terms = step.local(job.make_batch(0, 0))
        tracker = FSDPMemTracker(step.model, cast(torch.optim.Optimizer, step.optimizer))
        tracker.track_inputs((batch,))
        return tracker, (step, batch, terms)

    return _tracked(question, watched)


def _tracked(question: Question, watched: Callable[[Any, Any, Any], Any]) -> Answer:
    """Two steps on real tensors; ``watched`` makes (tracker, (step, batch, terms per rank)) of job, plan and
    world. Of several ranks the first, on a process group that only pretends."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from memfit.techniques.rank_mesh import make_world
    from memfit.types.trace import Phase

    if question.build[0] == "facts":
        raise Refused("runs the step itself; that of a published run asks for its GPUs")
    if question.sharding == "ddp":
        raise Refused("torch's process group that only pretends has no value for DDP's reduction")
    job, plan = _case(question)
    if question.ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=question.ranks, store=FakeStore())
    try:
        tracker, (step, batch, terms) = watched(job, plan, make_world(plan, rank=0, device="cpu"))

        def on_phase(phase: Phase) -> None:
            if phase is Phase.FORWARD:
                tracker.reset_mod_stats()

        with tracker:
            for _ in range(2):
                step.run(batch, on_phase, terms_per_rank=terms)
        return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]), []
    finally:
        if question.ranks > 1:
            dist.destroy_process_group()


# -- memfit and the truth


def truth(question: Question, source: str) -> Answer:
    """The highest live bytes of real steps, as benchmarks/memory_truth.py measures them."""
    from memory_truth import _one

    job, plan = _case(question)
    peaks = [_one(job, plan, _counter())["peaks"]["peak"] for _ in range(2)]
    return peaks[-1], []  # in the first, kernels set up their caches


def memfit(question: Question, source: str) -> Answer:
    """A trace on fake tensors, with the scratch memory of kernels from probing each alone."""
    from memory_truth import _predicted

    from memfit.cost.memory import memory_profile

    job, plan = _case(question)
    return memory_profile(*_predicted(job, plan, {}, _counter())).peak_bytes, []


def unprobed(question: Question, source: str) -> Answer:
    """A trace on fake tensors: no kernel runs."""
    from memfit.cost.memory import memory_profile
    from memfit.trace.tracer import trace
    from memfit.types.machine import Calibration

    job, plan = _case(question)
    return memory_profile(trace(job, plan, steps=2), Calibration()).peak_bytes, []


def _case(question: Question) -> tuple[Any, Any]:
    if question.build[0] == "ranks":
        import memory_truth_ranks
        import rank_jobs

        row = next(r for r in memory_truth_ranks.ROWS if r.name == question.name)
        return getattr(rank_jobs, row.job)(), row.plan
    from peers.rows import case_named, job_of

    case = case_named(question.build[1])
    return job_of(case), case.plan


@functools.cache
def _counter() -> Any:
    from memfit.runtime.counting_allocator import CountingAllocator

    counter = CountingAllocator()
    counter.install()
    return counter


def memfit_published(question: Question, source: str) -> Answer:
    """As benchmarks/published.py predicts it."""
    from published.predict import predict

    from memfit.types.errors import UserError
    from peers.rows import published_setups

    setup = next(s for s in published_setups(Path(source)) if s.id == question.name)
    try:
        return predict(setup).allocated_bytes, []
    except UserError as error:
        raise Refused(str(error)) from None


PEERS: dict[str, Callable[[Question, str], Answer]] = {
    "accelerate": accelerate,
    "deepspeed": deepspeed,
    "MemTracker": mem_tracker,
    "FSDPMemTracker": fsdp_tracker,
    "torch-kitsune": kitsune,
    "llm-analysis": llm_analysis,
    "eleutherai": eleutherai,
    "fitcheck-llm": fitcheck,
    "truth": truth,
    "memfit": memfit,
    "memfit-unprobed": unprobed,
    "memfit-published": memfit_published,
}
DISTRIBUTIONS = {"MemTracker": "torch", "FSDPMemTracker": "torch"}


def answers(peer: str, source: str, questions: Iterable[Question]) -> list[dict[str, Any]]:
    return [_answer(peer, source, q) for q in questions]


def _version(peer: str, source: str) -> str:
    """Of the package; of a copy of its repository the commit."""
    if source and Path(source).exists():
        folder = source if Path(source).is_dir() else str(Path(source).parent)
        command = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
        told = subprocess.run(command, check=False, capture_output=True, text=True)
        return f"commit {told.stdout.strip()}" if told.returncode == 0 else "a copy of its repository"
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(peer, peer))
    except importlib.metadata.PackageNotFoundError:
        return ""


def _answer(peer: str, source: str, question: Question) -> dict[str, Any]:
    begun = time.perf_counter()
    try:
        used, missing = PEERS[peer](question, source)
    except Refused as reason:
        return {"name": question.name, "refused": str(reason)}
    except FOREIGN as error:
        return {"name": question.name, "refused": f"{type(error).__name__}: {str(error)[:160]}"}
    took_s = time.perf_counter() - begun
    return {"name": question.name, "bytes": used, "missing": missing, "seconds": round(took_s, 3)}


def main() -> None:
    peer, source = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    questions = [from_json(q) for q in json.load(sys.stdin)]
    with contextlib.suppress(ImportError):  # some environments have no torch
        import torch

        torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        found = {"version": _version(peer, source), "answers": answers(peer, source, questions)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
