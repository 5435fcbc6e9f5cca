"""Caches of keys and values in models of Hugging Face, which serve generation and not training."""

from __future__ import annotations

import functools

from memfit.techniques.base import Workbench


def turn_off_caches(bench: Workbench) -> None:
    """Set use_cache of Hugging Face configurations to False until the step is closed, as transformers does
    with gradient checkpointing. A block that runs again would find its own keys and values in the cache.
    torch.compile would compile each block by itself, because each writes to another place of the cache, and
    would give up after a few."""
    for config in {id(c): c for m in bench.model.modules() if (c := getattr(m, "config", None))}.values():
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False
            bench.closers.append(functools.partial(setattr, config, "use_cache", True))
