"""DeepSpeed's ZeRO and FairScale's sharded data parallelism."""

# Buffers in host memory through which optimizer state on NVMe passes, each for one sub-group: master copy,
# gradient and Adam's two moments (DeepSpeed's buffer_count).
BUFFER_COUNT = 4
