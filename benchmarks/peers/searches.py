"""Plan searches of peers, each in the process of an environment that has it.

    python -m peers.searches PEER SOURCE < question.json

A question (peers_search.py) holds the sizes of a transformer, the devices and the batch. A layout, the words
that all plans are said in: ``tensor``, ``sequence`` (the tensor-parallel ranks share norms), ``stages``,
``virtual``, ``data``, ``zero`` (stage), ``micro`` (samples of a micro-batch), ``recompute`` (none, attention,
full, or how many of the blocks in full) and ``offload``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Question = Mapping[str, Any]
Layout = dict[str, Any]
GIB = 2**30


class Refused(Exception):
    """Why a peer cannot be asked."""


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _commit(source: str) -> str:
    told = subprocess.run(
        ["git", "-C", source, "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True
    )
    return f"commit {told.stdout.strip()}" if told.returncode == 0 else "a copy of its repository"


# -- Calculon ---------------------------------------------------------------------------------------------

_CALCULON = {"A100-80GB-SXM": "a100_80g.json", "H100-SXM": "h100_80g_nvl8.json"}
_NARROW = ["--no-tp-overlap", "--no-dp-overlap"]


def _calculon_files(question: Question, source: str, folder: Path, offload: bool) -> tuple[Path, Path]:
    """It has no gates and no grouped queries: a gated MLP is a plain one of as many parameters."""
    wide = question["ffn"] * 3 // 2 if question["gated"] else question["ffn"]
    application = {
        "hidden": question["hidden"],
        "feedforward": wide,
        "seq_size": question["length"],
        "attn_heads": question["heads"],
        "attn_size": question["hidden"] // question["heads"],
        "num_blocks": question["layers"],
    }
    system = json.loads((Path(source) / "systems" / _CALCULON[question["gpu"]]).read_text())
    if not offload:
        system["mem2"]["GiB"] = 0
    for name, content in (("application.json", application), ("system.json", system)):
        (folder / name).write_text(json.dumps(content))
    return folder / "application.json", folder / "system.json"


def calculon(question: Question, source: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        whole = _calculon_run(question, source, folder, offload=True, options=["-d"])
        narrow = _calculon_run(question, source, folder, offload=False, options=[*_NARROW, "-d"])
        told = {"whole_space": whole["considered"], "narrow_space": narrow["considered"]}
        if narrow["considered"] > question["limit"]:
            reason = f"{narrow['considered']:,} executions even without offload and overlap"
            return {"refused": reason, **told}
        begun = time.perf_counter()
        found = _calculon_run(question, source, folder, offload=False, options=_NARROW)
        seconds = time.perf_counter() - begun
        best = json.loads((folder / "best.json").read_text())["0"]
    return {
        **told,
        "seconds": seconds,
        "considered": found["considered"],
        "good": found["good"],
        "layout": _from_calculon(best["execution"]),
        "own_s": best["stats"]["total_time"],
        "own_gib": best["stats"]["proc_mem_tier1_cap_req"] / GIB,
        "raw": best["execution"],
    }


def _calculon_run(
    question: Question, source: str, folder: Path, offload: bool, options: list[str]
) -> dict[str, int]:
    application, system = _calculon_files(question, source, folder, offload)
    given = [str(application), str(question["gpus"]), str(question["batch"]), "float16", str(system)]
    command = [
        sys.executable,
        str(Path(source) / "bin" / "calculon"),
        "loe",
        *given,
        str(folder / "best.json"),
        "-c",
        str(question["cores"]),
        *options,
    ]
    env = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    said = done.stdout + done.stderr
    numbers = {k: int(n) for k, n in re.findall(r"(Total|Good) executions: (\d+)", said)}
    return {"considered": numbers["Total"], "good": numbers.get("Good", 0)}


def _from_calculon(execution: Mapping[str, Any]) -> Layout:
    kept = ("weight", "activations", "optimizer")
    return {
        "tensor": execution["tensor_par"],
        "sequence": execution["tensor_par_comm_type"] == "rs_ag",
        "stages": execution["pipeline_par"],
        "virtual": execution["pipeline_interleaving"],
        "data": execution["data_par"],
        "zero": int(execution["optimizer_sharding"]),
        "micro": execution["microbatch_size"],
        "recompute": execution["activation_recompute"].replace("attn_only", "attention"),
        "offload": [k for k in kept if execution[f"{k}_offload"]],
    }


def calculon_costs(question: Question, source: str) -> dict[str, Any]:
    """Its model of each of ``question["layouts"]``."""
    sys.path.insert(0, source)
    import logging

    from calculon import System  # type: ignore[import-not-found]
    from calculon.llm.llm import Llm  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as made:
        application, system = _calculon_files(question, source, Path(made), offload=False)
        app, syst = (json.loads(p.read_text()) for p in (application, system))
    syst["mem1"]["GiB"] = 10**9  # what does not fit has a time too
    found: list[dict[str, Any]] = []
    for layout in question["layouts"]:
        try:
            model = Llm(Llm.Application(app), logging.getLogger("quiet"))
            machine = System(syst)
            model.compile(machine, Llm.Execution.from_json(_to_calculon(layout, question)))
            model.run(machine)
            stats = model.get_stats_json(False)
            found.append({"seconds": stats["total_time"], "gib": stats["proc_mem_tier1_cap_req"] / GIB})
        except (Refused, Llm.Error, AssertionError) as error:
            found.append({"refused": (str(error) or type(error).__name__)[:160]})
    return {"costs": found}


def _to_calculon(layout: Layout, question: Question) -> dict[str, Any]:
    if layout.get("context", 1) > 1:
        raise Refused("has no context parallelism")
    if layout["offload"]:
        raise Refused("asked without offload")
    several, inside = layout["data"] > 1, layout["tensor"] * layout["data"] <= question["per_host"]
    if layout["recompute"] not in ("none", "attention", "full"):
        raise Refused("recomputes all blocks or none")
    return {
        "num_procs": question["gpus"],
        "tensor_par": layout["tensor"],
        "pipeline_par": layout["stages"],
        "data_par": layout["data"],
        "tensor_par_net": 0,
        "pipeline_par_net": int(question["gpus"] > question["per_host"]),
        "data_par_net": int(several and not inside),
        "batch_size": question["batch"],
        "microbatch_size": layout["micro"],
        "datatype": "float16",
        "fused_activation": True,
        "attention_type": "multihead",
        "activation_recompute": layout["recompute"].replace("attention", "attn_only"),
        "pipeline_interleaving": layout["virtual"],
        "optimizer_sharding": several and layout["zero"] > 0,
        "tensor_par_comm_type": "rs_ag" if layout["sequence"] and layout["tensor"] > 1 else "ar",
        "tensor_par_overlap": "none",
        "seq_par_ag_redo": False,
        "data_par_overlap": False,
        "weight_offload": False,
        "activations_offload": False,
        "optimizer_offload": False,
        "training": True,
    }


# -- llm-analysis -----------------------------------------------------------------------------------------

_LLM_ANALYSIS = {"A100-80GB-SXM": "a100-sxm-80gb", "H100-SXM": "h100-sxm-80gb"}
_RECOMPUTED = {"none": "NONE", "attention": "ATTN_COMPUTE", "full": "FULL"}


def llm_analysis(question: Question, source: str) -> dict[str, Any]:
    """It answers for one layout; the loop over layouts is here, over everything that it has a setting for."""
    begun, best, considered, good = time.perf_counter(), None, 0, 0
    for layout in _llm_layouts(question):
        considered += 1
        with contextlib.suppress(Refused, AssertionError):
            told = _llm_cost(layout, question, source)
            good += told["gib"] <= 80e9 / GIB
            if told["gib"] <= 80e9 / GIB and (best is None or told["seconds"] < best[0]["seconds"]):
                best = (told, layout)
    if best is None:
        raise Refused("nothing that it thinks fits")
    return {
        "seconds": time.perf_counter() - begun,
        "considered": considered,
        "good": good,
        "layout": best[1],
        "own_s": best[0]["seconds"],
        "own_gib": best[0]["gib"],
    }


def _llm_layouts(question: Question) -> Iterator[Layout]:
    degrees = [d for d in divisors(question["per_host"]) if question["heads"] % d == 0]
    for tensor, stages in itertools.product(degrees, divisors(question["gpus"])):
        data = question["gpus"] // (tensor * stages)
        if question["gpus"] % (tensor * stages) or question["layers"] % stages or question["batch"] % data:
            continue
        for micro, zero, recompute, sequence in itertools.product(
            divisors(question["batch"] // data), range(4), _RECOMPUTED, (False, True)
        ):
            if (data > 1 or not zero) and (tensor > 1 or not sequence):
                yield {
                    "tensor": tensor,
                    "sequence": sequence,
                    "stages": stages,
                    "virtual": 1,
                    "data": data,
                    "zero": zero,
                    "micro": micro,
                    "recompute": recompute,
                    "offload": [],
                }


def llm_analysis_costs(question: Question, source: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    for layout in question["layouts"]:
        try:
            found.append(_llm_cost(layout, question, source))
        except (Refused, AssertionError) as error:
            found.append({"refused": (str(error) or type(error).__name__)[:160]})
    return {"costs": found}


@functools.cache
def _llm_parts(source: str) -> Any:
    if source:
        sys.path.insert(0, source)
    import logging

    from llm_analysis import analysis, config  # type: ignore[import-not-found]

    logging.disable(logging.CRITICAL)
    return analysis, config


def _llm_cost(layout: Layout, question: Question, source: str) -> dict[str, Any]:
    analysis, config = _llm_parts(source)
    if layout["recompute"] not in _RECOMPUTED or layout.get("context", 1) > 1:
        raise Refused("has no such recomputation, or no context parallelism")
    model = config.ModelConfig(
        name="asked",
        num_layers=question["layers"],
        n_head=question["heads"],
        hidden_dim=question["hidden"],
        vocab_size=question["vocab"],
        max_seq_len=question["length"],
        num_key_value_heads=question["kv_heads"],
        ffn_embed_dim=question["ffn"],
        expansion_ratio=question["ffn"] / question["hidden"],
        **({"mlp_gated_linear_units": question["gated"]} if source else {}),
    )
    asked = analysis.LLMAnalysis(
        model,
        config.get_gpu_config_by_name(_LLM_ANALYSIS[question["gpu"]]),
        config.get_dtype_config_by_name("w16a16e16"),
        config.ParallelismConfig(
            tp_size=layout["tensor"],
            pp_size=layout["stages"],
            dp_size=layout["data"],
            sp_size=layout["tensor"] if layout["sequence"] else 1,
        ),
        flops_efficiency=0.5,
        hbm_memory_efficiency=0.9,
    )
    told = asked.training(
        batch_size_per_gpu=layout["micro"],
        global_batch_size=question["batch"],
        seq_len=question["length"],
        activation_recomputation=analysis.ActivationRecomputation[_RECOMPUTED[layout["recompute"]]],
        ds_zero=analysis.DSZeRO(layout["zero"]),
        layernorm_dtype_bytes=2,
        flash_attn=True,
        **({} if source else {"mlp_gated_linear_units": question["gated"]}),
    )
    peak = told.get("estimated_peak_memory_per_gpu", told.get("(weight+op_state+grad+act)_memory_per_gpu"))
    return {"seconds": told["latency_per_iter"], "gib": peak / GIB}


# -- Galvatron --------------------------------------------------------------------------------------------


# No pipeline, no Ulysses, two micro-batches a step.
_GALVATRON_NARROW = [
    "search_engine.search_space_info.max_pp_deg=1",
    "search_engine.search_space_info.disable_sp=1",
    "+search_engine.batch_size_info.settle_chunk=2",
]


def galvatron(question: Question, source: str) -> dict[str, Any]:
    """Its search over the profiles that its repository has, without its runtime (which needs CUDA)."""
    name = question.get("galvatron")
    if not name:
        raise Refused("its repository has a profile of Llama-2-7B on one host only; another is made on GPUs")
    models = Path(source) / "galvatron" / "models"
    overrides = [
        f"search_engine.model_info.model_config_path={models}/model_configs/{name}.yaml",
        "search_engine.profiling_info.time_profile_mode=batch",
        f"SEQ_LENGTH={question['length']}",
        f"MEMORY_CONSTRAINT={question['gib']}",
        f"search_engine.batch_size_info.settle_bsz={question['batch']}",
    ]
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "out"
        out.mkdir()
        lines = [
            f"LOG_DIR={made}/logs",
            f"+search_engine.options_info.output_config_path={out}",
        ]
        command = [
            sys.executable,
            "-c",
            _GALVATRON,
            str(models / "gpt"),
            "scripts/search_dist.yaml",
            *overrides,
            *lines,
        ]
        env = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{made}"}
        _galvatron_core(source, made)
        whole, _ = _galvatron_run(command, models / "gpt", env, question["patience"])
        narrow, seconds = whole, question["patience"]
        if not list(out.glob("*.json")):
            narrow, seconds = _galvatron_run([*command, *_GALVATRON_NARROW], models / "gpt", env, 900)
        files = sorted(out.glob("*.json"))
        if not files:
            raise Refused((narrow.strip().splitlines() or ["it said nothing"])[-1][:200])
        plan = json.loads(files[0].read_text())
    found = _from_galvatron(plan, narrow, question)
    return found | {"seconds": seconds, "whole_space": _galvatron_tasks(whole)}


def _galvatron_run(
    command: list[str], folder: Path, env: dict[str, str], limit_s: float
) -> tuple[str, float]:
    """What it said, even where it did not end, and seconds."""
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            env=env,
            cwd=folder,
            check=False,
            text=True,
            timeout=limit_s,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said = str(done.stdout)
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else ""
    return said, time.perf_counter() - begun


def _galvatron_tasks(said: str) -> int:
    tasks = re.search(r"sequential search with (\d+) tasks", said)
    return int(tasks[1]) if tasks else 0


def _galvatron_core(source: str, folder: str) -> None:
    """Its dynamic program in C++, as its setup.py builds it."""
    import pybind11  # type: ignore[import-not-found]

    paths = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    out = Path(folder) / f"galvatron_dp_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [
        "g++",
        "-O3",
        "-shared",
        "-std=c++11",
        "-fPIC",
        *paths,
        str(Path(source) / "csrc" / "dp_core.cpp"),
        "-o",
        str(out),
    ]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        raise Refused("its dynamic program needs a C++ compiler")


# Its search imports its runtime for names that it never calls; what that needs of CUDA is made up here.
_GALVATRON = """
import importlib.abc, importlib.machinery, os, sys, types
class Meta(type):
    def __getattr__(cls, name):
        if name.startswith("__"): raise AttributeError(name)
        return Meta(name, (Anything,), {})
class Anything(metaclass=Meta):
    def __init__(self, *given, **named): pass
    def __call__(self, *given, **named): return self
    def __getattr__(self, name): return Anything()
class Empty(types.ModuleType):
    __path__, __version__ = [], "0"
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return Meta(name, (Anything,), {})
class MadeUp(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "flash_attn"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec): return Empty(spec.name)
    def exec_module(self, module): pass
import torch
sys.meta_path.append(MadeUp())
home = sys.argv[1]
sys.path.insert(0, home)
sys.argv = [os.path.join(home, "search_dist.py"), *sys.argv[2:]]
script = compile(open(sys.argv[0]).read(), sys.argv[0], "exec")
exec(script, {"__name__": "__main__", "__file__": sys.argv[0]})
"""


def _from_galvatron(plan: Mapping[str, Any], said: str, question: Question) -> dict[str, Any]:
    each = {
        k: [int(x) for x in str(plan[k]).split(",")] for k in ("tp_sizes_enc", "dp_types_enc", "checkpoint")
    }
    tensor, stages = max(each["tp_sizes_enc"]), plan["pp_deg"]
    data = question["gpus"] // (tensor * stages)
    again, blocks = sum(each["checkpoint"]), len(each["checkpoint"])
    strategies = re.search(r"layer_strategy_list.size:(\d+)", said)
    cost = re.search(r"Minized timecost = (\S+) .*Memory cost = (\[[^\]]*\]|\S+)", said)
    return {
        "considered": _galvatron_tasks(said),
        "counted": f"dynamic programs, each over {strategies[1] if strategies else '?'} strategies a layer",
        "layout": {
            "tensor": tensor,
            "sequence": True,
            "stages": stages,
            "virtual": 1,
            "data": data,
            "zero": 3 if sum(each["dp_types_enc"]) * 2 > blocks else 2,
            "micro": plan["global_bsz"] // plan["chunks"] // data,
            "recompute": {0: "none", blocks: "full"}.get(again, f"{again} of {blocks} blocks"),
            "offload": [],
        },
        "own_s": float(cost[1]) if cost else None,
        "raw": dict(plan),
        "own_gib": max(map(float, re.findall(r"[\d.]+", cost[2]))) / 1024 if cost else None,
    }


# -- DeepSpeed's autotuner --------------------------------------------------------------------------------

_TRAIN = """
import argparse, deepspeed, torch
p = argparse.ArgumentParser(); p.add_argument("--local_rank", type=int, default=0)
args = deepspeed.add_config_arguments(p).parse_args()
engine, *_ = deepspeed.initialize(args=args, model=torch.nn.Linear(64, 64), model_parameters=None)
for _ in range(8):
    loss = engine(torch.zeros(engine.train_micro_batch_size_per_gpu(), 64, device=engine.device)).sum()
    engine.backward(loss); engine.step()
"""
_LAUNCH = "from deepspeed.launcher.runner import main; main()"
_CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "optimizer": {"type": "AdamW"},
    "bf16": {"enabled": True},
    "autotuning": {"enabled": True, "arg_mappings": {}},
}


def autotuner(question: Question, source: str) -> dict[str, Any]:
    """Its own launcher, on a model of one layer: whether it starts at all here."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "train.py").write_text(_TRAIN)
        (folder / "config.json").write_text(json.dumps(_CONFIG))
        command = [
            str(folder / "deepspeed"),
            "--autotuning",
            "run",
            "train.py",
            "--deepspeed_config",
            "config.json",
        ]
        launcher = folder / "deepspeed"  # it calls itself by this name
        launcher.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{_LAUNCH}' \"$@\"\n")
        launcher.chmod(0o755)
        env = {**os.environ, "PATH": f"{made}{os.pathsep}{os.environ.get('PATH', '')}"}
        begun = time.perf_counter()
        job = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = job.communicate(timeout=question["patience"])
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGTERM)  # its jobs with it
            job.communicate()
            raise Refused(
                f"it started a job here to measure the model, without a GPU, which gave nothing in "
                f"{question['patience']} s"
            ) from None
        seconds = time.perf_counter() - begun
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "rror:" in line]
    last = re.sub(r"^\[[^]]*\] *", "", (errors or lines or ["it said nothing"])[-1])
    raise Refused(f"rc {job.returncode} after {seconds:.0f} s: {last[:220]}")


SEARCHES: dict[str, Callable[[Question, str], dict[str, Any]]] = {
    "calculon": calculon,
    "llm-analysis": llm_analysis,
    "galvatron": galvatron,
    "deepspeed": autotuner,
    "calculon-costs": calculon_costs,
    "llm-analysis-costs": llm_analysis_costs,
}


def main() -> None:
    peer, source = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    question = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = SEARCHES[peer](question, source)
        except Refused as reason:
            answer = {"refused": str(reason)}
    name = peer.removesuffix("-costs")
    answer["version"] = _commit(source) if source else importlib.metadata.version(name)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
