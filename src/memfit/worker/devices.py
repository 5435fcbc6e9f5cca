"""Look at the accelerators of this machine in a process of its own, because looking takes some of their
memory."""

from __future__ import annotations

import dataclasses
import json


def main() -> None:
    """Print one line of JSON: the accelerators of this machine, each with the fields of `Accelerator`."""
    from memfit.runtime.devices import describe_accelerators

    print(json.dumps([dataclasses.asdict(a) for a in describe_accelerators()]))
