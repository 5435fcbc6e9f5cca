"""DeepSpeed's ZeRO and FairScale's sharded data parallelism."""
