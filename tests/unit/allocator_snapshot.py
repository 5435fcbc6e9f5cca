"""A small caching allocator that writes snapshots as torch.cuda.memory._snapshot() returns them."""

from __future__ import annotations

from typing import Any

_LIBRARY = "/opt/env/lib/python3.11/site-packages/torch/nn/modules/module.py"


class SnapshotWriter:
    """Segments of the requested sizes; a freed block stays in its segment and is reused if it is large
    enough. ``capacity_bytes``: of the device."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._segments: list[list[dict[str, Any]]] = []
        self._trace: list[dict[str, Any]] = []
        self._address = 1 << 40

    def allocate(
        self, size: int, line: int = 10, function: str = "forward", file: str = "/me/train.py"
    ) -> Any:
        """Return the block, or None after an event "oom" if no memory is left."""
        frames = [
            {"filename": "??", "line": 0, "name": "c10::alloc"},
            *([{"filename": _LIBRARY, "line": 1773, "name": "_call_impl"}] if function == "forward" else []),
            {"filename": file, "line": line, "name": function},
        ]
        block = self._free_block(size)
        if block is None and self._reserved() + size > self._capacity_bytes:
            self._release_free_segments()
        if block is None and self._reserved() + size > self._capacity_bytes:
            event = {"device_free": self._capacity_bytes - self._reserved(), "addr": 0}
            self._record("oom", size, frames, event)
            return None
        if block is None:
            block = {"address": self._address, "size": size, "state": "inactive"}
            self._segments.append([block])
            self._address += size
            self._record("segment_alloc", size, frames, {"addr": block["address"]})
        block |= {"state": "active_allocated", "requested_size": size, "frames": frames}
        self._record("alloc", size, frames, {"addr": block["address"]})
        return block

    def free(self, block: Any) -> None:
        block["state"] = "inactive"
        event = {"addr": block["address"]}
        for action in ("free_requested", "free_completed"):
            self._record(action, block["size"], block.get("frames", []), event)
        self._merge_free_blocks()

    def snapshot(self) -> dict[str, Any]:
        segments = [
            {
                "device": 0,
                "address": blocks[0]["address"],
                "total_size": sum(b["size"] for b in blocks),
                "allocated_size": sum(b["size"] for b in blocks if b["state"] != "inactive"),
                "segment_type": "large",
                "stream": 0,
                "blocks": blocks,
            }
            for blocks in self._segments
        ]
        return {"segments": segments, "device_traces": [self._trace], "allocator_settings": {}}

    def _free_block(self, size: int) -> dict[str, Any] | None:
        """Return a free block of this size, which may be the first part of a larger one."""
        for blocks in self._segments:
            for i, block in enumerate(blocks):
                if block["state"] == "inactive" and block["size"] >= size:
                    rest = block["size"] - size
                    if rest:
                        tail = {"address": block["address"] + size, "size": rest, "state": "inactive"}
                        blocks.insert(i + 1, tail)
                    block["size"] = size
                    return block
        return None

    def _merge_free_blocks(self) -> None:
        for blocks in self._segments:
            for i in range(len(blocks) - 1, 0, -1):
                if blocks[i]["state"] == blocks[i - 1]["state"] == "inactive":
                    blocks[i - 1]["size"] += blocks.pop(i)["size"]

    def _release_free_segments(self) -> None:
        self._segments = [s for s in self._segments if any(b["state"] != "inactive" for b in s)]

    def _reserved(self) -> int:
        return sum(b["size"] for blocks in self._segments for b in blocks)

    def _record(self, action: str, size: int, frames: list[Any], more: dict[str, int]) -> None:
        time_us = 1_700_000_000_000_000 + len(self._trace)
        event = {"action": action, "size": size, "stream": 0, "time_us": time_us, "frames": frames}
        self._trace.append({**event, **more})


def train(
    writer: SnapshotWriter,
    steps: int,
    *,
    leak: int = 0,
    sizes: list[int] | None = None,
    state: int = 400,
) -> bool:
    """Train for some steps of several activations; ``leak``: bytes kept from each step; ``sizes``: of the
    activations of each step. Return whether memory was enough."""
    parameters = [writer.allocate(100, line=5, function="<module>") for _ in range(4)]
    assert None not in parameters
    for step in range(steps):
        size = sizes[step] if sizes else 100
        activations = []
        for layer in range(6):
            block = writer.allocate(size, line=20 + layer)
            if block is None:
                return False
            activations.append(block)
        if leak and writer.allocate(leak, line=31, function="train") is None:
            return False
        for block in reversed(activations):
            writer.free(block)
        if step == 0:
            path = "/opt/env/lib/python3.11/site-packages/torch/optim/adamw.py"
            for _ in range(4):
                if writer.allocate(state // 4, line=152, function="_init_group", file=path) is None:
                    return False
    return True
