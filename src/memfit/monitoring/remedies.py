"""What to change after a training ran out of memory, and what to record if its cause is not known."""

from __future__ import annotations

from typing import Final

from memfit.monitoring.diagnosis import DeathCause

_TITLES: Final = {
    DeathCause.TENSORS_TOO_LARGE: "the tensors of a step are too large for the memory",
    DeathCause.FRAGMENTATION: "enough memory was free, but in pieces that were too small (fragmentation)",
    DeathCause.LEAK: "memory grew from step to step (leak)",
    DeathCause.LONGER_SAMPLE: "one step needed more than those before it, as a longer sample does",
    DeathCause.EVALUATION: "the evaluation needed more memory than the training",
    DeathCause.OPTIMIZER_STEP: "the optimizer's step did not fit; the first one adds its state",
    DeathCause.CHECKPOINT: "saving or loading a checkpoint needed the memory",
    DeathCause.LATE_GROWTH: "it needed more memory after steps that had fitted",
    DeathCause.OUTSIDE_TORCH: "memory outside torch's allocator ran out, or took too much",
    DeathCause.HOST_KILLED: "the process was killed because memory of the host ran out",
    DeathCause.SHARED_MEMORY: "shared memory (/dev/shm) was too small",
    DeathCause.NOT_MEMORY: "the training did not end because memory ran out",
    DeathCause.UNKNOWN: "the evidence does not say why it ended",
}
_SMALLER: Final = "`memfit plan` finds the techniques that make the step fit, with what each costs in time"
_STATE_TOO_LARGE: Final = (
    "the optimizer's state and temporary tensors do not fit: a smaller state (8-bit Adam, Adafactor), "
    "sharding, foreach=False or fused=True help"
)
_EVALUATION: Final = (
    "evaluate under torch.no_grad() or inference_mode(), with a smaller batch, and move outputs to the host "
    "after each batch (Trainer: eval_accumulation_steps)"
)
_KEPT_TENSORS: Final = (
    "look for tensors that are kept from step to step: a sum of losses without .item() or .detach(), a list "
    "of outputs, retain_graph=True"
)
_SHARDED_STATE: Final = (
    "save sharded, or gather the state on the host (offload_to_cpu); load with map_location='cpu', and "
    "delete the loaded state afterwards"
)
_EXPANDABLE: Final = (
    "set PYTORCH_ALLOC_CONF=expandable_segments:True (torch before 2.10: PYTORCH_CUDA_ALLOC_CONF)"
)
_LESS_ON_HOST: Final = (
    "give the job more host memory, or use fewer DataLoader workers, a smaller prefetch_factor, no pin_memory"
)
_SHM: Final = (
    "raise the size of /dev/shm (docker run --shm-size=16g or --ipc=host), or use fewer DataLoader workers"
)
_ADVICE: Final = {
    DeathCause.TENSORS_TOO_LARGE: (_SMALLER, "a smaller batch or shorter samples also need less"),
    DeathCause.FRAGMENTATION: (
        _EXPANDABLE,
        "pad samples to few different sizes, and begin with the largest, so that its blocks are reused",
    ),
    DeathCause.LEAK: (_KEPT_TENSORS,),
    DeathCause.LONGER_SAMPLE: (
        "limit or bucket the length of samples, or make batches of equal token counts",
        "`memfit estimate --lengths FILE` says what the lengths of your data imply",
    ),
    DeathCause.EVALUATION: (_EVALUATION,),
    DeathCause.OPTIMIZER_STEP: (_STATE_TOO_LARGE, _SMALLER),
    DeathCause.CHECKPOINT: (_SHARDED_STATE,),
    DeathCause.LATE_GROWTH: (
        "find out what grows: `memfit watch -- COMMAND` records memory after each step",
    ),
    DeathCause.OUTSIDE_TORCH: (
        "end other processes on the device (nvidia-smi shows them), or leave memory for libraries",
        "torch.cuda.set_per_process_memory_fraction(0.9) keeps some for communication and kernels",
    ),
    DeathCause.HOST_KILLED: (_LESS_ON_HOST, "offload to the host and datasets held in memory also count"),
    DeathCause.SHARED_MEMORY: (_SHM,),
}
_ON_HOST: Final = (
    "the memory of the host ran out, not that of a device: fewer DataLoader workers need less, too"
)
_SNAPSHOT: Final = (
    "torch.cuda.memory._record_memory_history(max_entries=100000) before the training, and "
    "torch.cuda.memory._dump_snapshot('oom.pickle') when it fails; then `memfit autopsy oom.pickle`"
)
_WATCH: Final = "`memfit watch -- COMMAND`, then `memfit autopsy` with its file"
_KERNEL_LOG: Final = (
    "the kernel's log: `dmesg -T | memfit autopsy -`, or the state that the scheduler reports"
)


def title_of(cause: DeathCause) -> str:
    """Return the cause as a sentence without a full stop."""
    return _TITLES[cause]


def advice_for(cause: DeathCause, memory: str) -> tuple[str, ...]:
    """Return what to change, the most useful first; nothing if the cause is unknown or not memory.
    ``memory``: which memory ran out, "host", "device" or "" if unknown."""
    advice = _ADVICE.get(cause, ())
    is_tensor = cause in (DeathCause.TENSORS_TOO_LARGE, DeathCause.LATE_GROWTH, DeathCause.LEAK)
    return (*advice, _ON_HOST) if memory == "host" and is_tensor else advice


def capture_for(cause: DeathCause, memory: str) -> tuple[str, ...]:
    """Return what to record next time, so that the cause becomes certain; nothing if the cause is not memory.
    ``memory``: which memory ran out, "host", "device" or "" if unknown."""
    if cause is DeathCause.NOT_MEMORY:
        return ()
    if cause is DeathCause.HOST_KILLED:
        return (_KERNEL_LOG, _WATCH)
    return (_WATCH,) if memory == "host" else (_SNAPSHOT, _WATCH)
