"""Each function of torch that memfit replaces while it traces, trains or observes exists, with the parameters
that memfit's own version expects. Tried with torch 2.13 and 2.15. A failure names the function and the file
that replaces it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import memfit

SOURCE = Path(memfit.__file__).parent
BUILTIN = None  # functions of C++ have no signature to compare

# file that patches -> function -> its parameters; those in brackets only in some versions of torch
PATCHED: dict[str, dict[str, str | None]] = {
    "capture/device_redirect.py": {
        "torch.amp.GradScaler.__init__": (
            "self device init_scale growth_factor backoff_factor growth_interval enabled"
        ),
        "torch.load": "f map_location pickle_module weights_only mmap pickle_load_args",
        "torch.nn.DataParallel.forward": "self inputs kwargs",
        "torch.optim.optimizer._default_to_fused_or_foreach": "params differentiable use_fused",
        "torch.optim.Optimizer._accelerator_graph_capture_health_check": "self",
        "torch.Tensor.to": BUILTIN,
        "torch.Tensor.cuda": BUILTIN,
        "torch.Tensor.cpu": BUILTIN,
        "torch.Tensor.type_as": BUILTIN,
        "torch.Tensor.type": BUILTIN,
        "torch.set_default_tensor_type": "t",
        "torch.autograd.graph.saved_tensors_hooks.__init__": "self pack_hook unpack_hook",
        "torch._subclasses.fake_tensor.FakeTensor.device": BUILTIN,
    },
    "capture/foreign_memory.py": {
        "torch.from_numpy": BUILTIN,
        "torch.frombuffer": BUILTIN,
        "torch.as_tensor": BUILTIN,
        "torch.asarray": BUILTIN,
        "torch.from_dlpack": "ext_tensor device copy",
    },
    "capture/script_patches.py": {
        "torch.nn.Parameter.__new__": "cls data requires_grad",
        "torch.nn.Module.__call__": "self args kwargs",
        "torch.nn.Module._apply": "self fn recurse",
        "torch.autograd.backward": "tensors grad_tensors retain_graph create_graph grad_variables inputs",
        "torch.autograd.grad": (
            "outputs inputs grad_outputs retain_graph create_graph only_inputs allow_unused "
            "is_grads_batched materialize_grads"
        ),
        "torch.amp.GradScaler._maybe_opt_step": "self optimizer optimizer_state args kwargs",
        "torch.nn.utils.clip_grad_norm_": "parameters max_norm norm_type error_if_nonfinite foreach",
        "torch.optim.Optimizer.__init__": "self params defaults",
        "torch.utils.data.DataLoader._get_iterator": "self",
        "torch.utils.data.dataloader._SingleProcessDataLoaderIter._next_data": "self",
    },
    "capture/script_ranks.py": {
        "torch.distributed.init_process_group": (
            "backend init_method timeout world_size rank store group_name pg_options device_id _ranks "
            "[enable_reconfigure]"
        ),
        "torch.distributed.new_group": (
            "ranks timeout backend pg_options use_local_synchronization group_desc device_id sort_ranks"
        ),
        "torch.distributed.get_backend": "group",
        "torch.distributed.all_reduce": "tensor op group async_op",
        "torch.distributed.all_gather": "tensor_list tensor group async_op",
        "torch.distributed.all_gather_object": "object_list obj group [weights_only]",
        "torch.distributed.gather_object": "obj object_gather_list dst group group_dst [weights_only]",
        "torch.multiprocessing.spawn.spawn": "fn args nprocs join daemon start_method",
        "torch.distributed.fsdp.fully_shard": (
            "module mesh reshard_after_forward shard_placement_fn mp_policy offload_policy ignored_params "
            "dp_mesh_dims"
        ),
        "torch.distributed.device_mesh.init_device_mesh": (
            "device_type mesh_shape mesh_dim_names backend_override"
        ),
    },
    "conformance/autograd_graph.py": {
        "torch.autograd.backward": "tensors grad_tensors retain_graph create_graph grad_variables inputs",
        "torch._C._autograd._push_saved_tensors_default_hooks": BUILTIN,
    },
    "conformance/clipping_probe.py": {
        "torch.nn.utils.clip_grad._clip_grads_with_norm_": "parameters max_norm total_norm foreach",
        "torch.nn.utils.clip_grads_with_norm_": "parameters max_norm total_norm foreach",
    },
    "conformance/gradient_probes.py": {
        "torch.autograd.backward": "tensors grad_tensors retain_graph create_graph grad_variables inputs",
        "torch.distributed.fsdp._fully_shard._fsdp_param_group.foreach_reduce": (
            "fsdp_params unsharded_grads reduce_scatter_group reduce_scatter_stream "
            "reduce_scatter_comm [orig_dtype] reduce_dtype device gradient_divide_factor "
            "all_reduce_group all_reduce_stream all_reduce_grads partial_reduce_output "
            "all_reduce_hook force_sum_reduction_for_comms [prepare_reduce_scatter_inputs]"
        ),
    },
    "conformance/stage_order.py": {
        "torch.distributed.pipelining.stage._PipelineStageBase.forward_one_chunk": (
            "self fwd_chunk_id args kwargs save_forward_output"
        ),
        "torch.distributed.pipelining.stage._PipelineStageBase.backward_one_chunk": (
            "self bwd_chunk_id loss full_backward last_backward"
        ),
        "torch.distributed.pipelining.stage._PipelineStageBase.backward_weight_one_chunk": (
            "self bwd_chunk_id last_backward"
        ),
    },
    "model/grouped_mm.py": {
        "torch._meta_registrations._meta_grouped_mm_common": (
            "mat_a mat_b scale_a scale_b offs bias scale_result out_dtype use_fast_accum"
        )
    },
    "runtime/gloo.py": {
        "torch.distributed.Work.wait": BUILTIN,
        "torch.distributed.ProcessGroup._allgather_base": BUILTIN,
        "torch.distributed._functional_collectives.wait_tensor": "tensor",
    },
    "techniques/parallel/pipeline_stages.py": {
        "torch.distributed.pipelining.schedules._batch_p2p": "p2p_ops desc",
    },
    "techniques/optimizers.py": {
        "torch.compile": (
            "model fullgraph dynamic backend mode options name disable recompile_limit isolate_recompiles "
            "[shapes_spec] [dynamic_shapes]"
        ),
    },
    "trace/autograd_patches.py": {
        "torch.prod": BUILTIN,
        "torch.Tensor.prod": BUILTIN,
        "torch.cumprod": BUILTIN,
        "torch.Tensor.cumprod": BUILTIN,
        "torch.nn.functional.linear": BUILTIN,
    },
    "trace/device_autocast.py": {"torch.clear_autocast_cache": BUILTIN},
    "trace/device_kernels.py": {
        "torch.amp.autocast_mode.autocast.__init__": "self device_type dtype enabled cache_enabled",
        "torch.is_autocast_enabled": BUILTIN,
        "torch.get_autocast_dtype": BUILTIN,
    },
    "trace/fake_copy.py": {
        "torch.jit.load": "f map_location _extra_files _restore_shapes",
        "torch.jit.save": "m f _extra_files",
    },
    "trace/fake_process_group.py": {
        "torch.nn.parallel.distributed._verify_param_shape_across_processes": "process_group tensors logger",
        "torch.distributed.device_mesh.DeviceMesh.__init__": (
            "self device_type mesh mesh_dim_names backend_override [preserve_rank_order] _init_backend _rank "
            "_layout _rank_map _root_mesh"
        ),
        "torch.distributed._functional_collectives._are_we_tracing": "",
        "torch.distributed.fsdp._fully_shard._fsdp_param._chunk_with_empty": "tensor num_chunks dim",
        "torch.nn.parallel.distributed.DistributedDataParallel._passing_sync_batchnorm_handle": "self module",
        "torch.nn.SyncBatchNorm.forward": "self input",
    },
    "trace/stream_patches.py": {
        "torch.cpu.Stream": "priority",
        "torch.cpu.Event": "",
        "torch.cpu.stream": "stream",
        "torch.cpu.current_stream": "device",
        "torch.accelerator.current_stream": "device",
        "torch._C._distributed_c10d.Work.wait": BUILTIN,
    },
    "trace/tracer.py": {
        "torch.nn.Module._apply": "self fn recurse",
        "torch.autograd.profiler.record_function.__enter__": "self",
        "torch.autograd.profiler.record_function.__exit__": "self exc_type exc_value traceback",
        "torch.Tensor.pin_memory": BUILTIN,
        "torch.get_rng_state": "",
        "torch.UntypedStorage.resize_": BUILTIN,
        "torch.distributed.tensor._sharding_prop.ShardingPropagator._propagate_tensor_meta_non_cached": (
            "self op_schema"
        ),
    },
    "trace/truncated_model.py": {"torch.nn.Module.__init__": "self args kwargs"},
    "trace/update_replay.py": {
        "torch.optim.adam.adam": (
            "params grads exp_avgs exp_avg_sqs max_exp_avg_sqs state_steps foreach capturable "
            "differentiable fused grad_scale found_inf has_complex decoupled_weight_decay amsgrad beta1 "
            "beta2 lr weight_decay eps maximize"
        ),
        "torch.optim.sgd.sgd": (
            "params d_p_list momentum_buffer_list has_sparse_grad foreach fused grad_scale found_inf "
            "weight_decay momentum lr dampening nesterov maximize"
        ),
    },
    "trace/value_patches.py": {
        "torch._VF._pad_packed_sequence": BUILTIN,
        "torch.ctc_loss": BUILTIN,
        "torch.tensor_split": BUILTIN,
        "torch.Tensor.tensor_split": BUILTIN,
        "torch.Tensor.numpy": BUILTIN,
        "torch._subclasses.fake_tensor.FakeTensor.tolist": "self",
    },
}
# What these patch belongs to another library or to the user's model; those libraries' own tests load them.
NOT_TORCH = {
    "capture/sandbox.py",
    "conformance/cross_rank_dependence.py",
    "engines/accelerate/step.py",
    "engines/megatron/step.py",
    "jobs/opened_files.py",
    "techniques/parallel/context_parallel.py",
    "trace/evoformer_kernel.py",
}


def _found(name: str) -> Any:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@pytest.mark.parametrize(
    ("file", "name", "parameters"),
    [(file, name, parameters) for file, names in PATCHED.items() for name, parameters in names.items()],
)
def test_a_patched_function_of_torch_is_as_it_was(file: str, name: str, parameters: str | None) -> None:
    try:
        function = _found(name)
    except (ImportError, AttributeError):
        pytest.fail(f"torch has no {name} any more: memfit/{file} replaces it")
    if parameters is not BUILTIN:
        now = list(inspect.signature(function).parameters)
        known = parameters.split()
        always = [name for name in known if not name.startswith("[")]
        unknown = set(now) - {name.strip("[]") for name in known}
        changed = f"the parameters of {name} changed: memfit/{file} replaces it"
        assert not unknown, changed
        assert [name for name in now if name in always] == always, changed


def test_every_module_that_patches_is_named_here() -> None:
    patching = set()
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(ast.unparse(n).startswith("mock.patch") for n in ast.walk(tree) if isinstance(n, ast.Call)):
            patching.add(path.relative_to(SOURCE).as_posix())
    assert patching == PATCHED.keys() | NOT_TORCH
