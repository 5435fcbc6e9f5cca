"""What torchtitan's own config manager makes of command lines, in a process of its own.

    python parse_torchtitan.py < {"case": ["--job.config_file", ...]}

Prints, a case, the sections that were parsed, or what was said against it. torchtitan must be importable
(scripts/parsers.sh); its Triton kernels, data sets and TensorBoard, which only training uses, need not be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import types
from typing import Any
from unittest.mock import MagicMock

ABSENT = (
    "torchtitan.distributed.minimal_async_ep.kernels",  # 0.3
    "torchtitan.models.moe.kernels",  # 0.2
    "datasets",
    "datasets.distributed",
    "torch.utils.tensorboard",
)
SECTIONS = ("training", "parallelism", "optimizer", "compile", "activation_checkpoint")


class Absent(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def parsed(words: list[str]) -> dict[str, Any]:
    from torchtitan.config import ConfigManager

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            config = ConfigManager().parse_args(words)
    except (SystemExit, AssertionError, TypeError, ValueError) as error:
        return {"refused": f"{error}: {said.getvalue()}"}
    sections = {name: section(getattr(config, name)) for name in SECTIONS}
    if hasattr(config, "quantize"):  # 0.2
        sections |= {"model": section(config.model), "float8": section(config.quantize.linear.float8)}
    return {"sections": sections}


def section(given: Any) -> dict[str, Any]:
    """Its fields, and the name of its class: what is recomputed is a choice of classes in 0.3."""
    fields = dataclasses.fields(given) if given is not None else ()
    return {"class": type(given).__qualname__, **{f.name: getattr(given, f.name) for f in fields}}


if __name__ == "__main__":
    sys.modules.update({name: Absent(name) for name in ABSENT})
    print(json.dumps({name: parsed(words) for name, words in json.load(sys.stdin).items()}, default=str))
