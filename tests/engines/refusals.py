"""Which set-ups the libraries themselves refuse, in a process of its own: they keep global state.

Reads a JSON object of name -> {file: text} and writes one of name -> the error, null where there is none.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import yaml

from memfit.engines.deepspeed.step import import_deepspeed


def trial(files: Mapping[str, str]) -> None:
    trainer, config = files.get("trainer.json"), files.get("ds.json")
    if trainer is not None:
        _trainer(json.loads(trainer), json.loads(config) if config is not None else None)
    elif config is not None:
        _deepspeed(json.loads(config))
    else:
        _fsdp(yaml.safe_load(files["accelerate.yaml"])["fsdp_config"])


def _trainer(arguments: dict[str, Any], config: dict[str, Any] | None) -> None:
    from transformers import TrainingArguments

    given = arguments | {"output_dir": tempfile.mkdtemp(), "use_cpu": True}
    made = TrainingArguments(**given, **({"deepspeed": config} if config is not None else {}))
    if config is not None:
        made.hf_deepspeed_config.trainer_config_finalize(made, None, 10)


def _deepspeed(config: dict[str, Any]) -> None:
    """A step without the update: an error may be raised when the engine is made, or in the step."""
    deepspeed = import_deepspeed("cpu")
    model = torch.nn.Linear(8, 8)
    own = {} if "optimizer" in config else {"optimizer": torch.optim.AdamW(model.parameters())}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, **own)
    engine.backward(engine(torch.ones(4, 8, dtype=next(engine.parameters()).dtype)).float().sum())


def _fsdp(section: Mapping[str, Any]) -> None:
    from accelerate import FullyShardedDataParallelPlugin

    os.environ |= {f"FSDP_{k.removeprefix('fsdp_').upper()}": str(v) for k, v in section.items()}
    FullyShardedDataParallelPlugin(fsdp_version=int(section["fsdp_version"]))


def main() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    told: dict[str, str | None] = {}
    for name, files in json.load(sys.stdin).items():
        kept = dict(os.environ)
        try:
            trial(files)
            told[name] = None
        except Exception as error:  # noqa: BLE001  whatever it is, it is the library's refusal
            told[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for key in os.environ.keys() - kept.keys():
            del os.environ[key]
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
