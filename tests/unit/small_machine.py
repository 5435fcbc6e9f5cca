"""A machine of one processor, with assumed figures, for searches and predictions in tests."""

from __future__ import annotations

from memfit.types.machine import Device, Fact, Machine


def fact(value: float) -> Fact:
    return Fact(value=value, source="a test", date="2026-01-01", kind="assumed")


def processor(**peak_flops: float) -> Machine:
    """Return the machine. ``peak_flops``: dtype -> operations per second."""
    device = Device(
        name="test",
        kind="cpu",
        memory_bytes=fact(2**30),
        bandwidth_bytes_s=fact(1e9),
        peak_flops={dtype: fact(value) for dtype, value in peak_flops.items()},
        power_w=fact(10.0),
    )
    return Machine(name="test", device=device)
