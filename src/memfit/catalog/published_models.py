"""Published configurations of well-known models of the Hugging Face Hub: shapes only, no weights."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from memfit.catalog.tables import fact, table
from memfit.types.machine import Fact

_EXACT: Final = 1e-6  # repositories may store small buffers, such as the frequencies of rotary positions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """A model of models.toml. ``name``: a repository on the Hub, with its owner. ``same``: other names with
    the same shapes, with or without an owner. ``model_type``: the type in transformers. ``settings``: the
    settings of its published config.json that determine shapes and masks, name -> value. ``parameters``: the
    published number of parameters. ``tolerance``: the largest difference, relative to ``parameters``, of the
    model that is built, because the published number is rounded or counts another head. ``note``: how the
    model that is built differs from the repository's, or "". ``source`` and ``date`` (ISO): of the settings.
    """

    name: str
    same: tuple[str, ...]
    model_type: str
    settings: Mapping[str, Any]
    parameters: Fact
    tolerance: float
    note: str
    source: str
    date: str


@functools.cache
def published_models() -> tuple[PublishedModel, ...]:
    """Return all models of models.toml, in the order of the file."""
    content = table("models.toml")
    return tuple(_model(name, row, content["sources"]) for name, row in content["models"].items())


def _model(name: str, row: Mapping[str, Any], sources: Mapping[str, Any]) -> PublishedModel:
    value, key, *tolerance = row["parameters"]
    return PublishedModel(
        name=name,
        same=tuple(row.get("same", ())),
        model_type=row["type"],
        settings=row["settings"] | dict.fromkeys(row.get("none", ())),
        parameters=fact([value, key], sources),
        tolerance=tolerance[0] if tolerance else _EXACT,
        note=row.get("note", ""),
        source=sources[row["source"]]["source"],
        date=sources[row["source"]]["date"],
    )


def find_published(name: str) -> tuple[str, PublishedModel] | None:
    """Return the repository that ``name`` means and its model in models.toml, or None if it is not there.
    Case does not matter. The owner may be left out, unless repositories of that name have different shapes;
    then the result is None, too.
    """
    key = name.lower()
    if key in _by_name():
        return _by_name()[key]
    matches = {
        model.name: (repository, model)
        for full_name, (repository, model) in _by_name().items()
        if full_name.partition("/")[2] == key
    }
    return next(iter(matches.values())) if len(matches) == 1 else None


def similar_names(name: str) -> list[str]:
    """Return at most three names of models.toml that are most similar to ``name``, with their owners; empty
    if none is similar. Names are compared without their owners."""
    short_names: dict[str, str] = {}
    for full_name, (repository, _) in _by_name().items():
        short_names.setdefault(full_name.rpartition("/")[2], repository)
    matches = difflib.get_close_matches(name.lower().rpartition("/")[2], short_names, n=3, cutoff=0.6)
    return [short_names[match] for match in matches]


@functools.cache
def _by_name() -> dict[str, tuple[str, PublishedModel]]:
    """Return for each repository that models.toml names, also as one of the same shapes as a model there:
    its name in lower case -> (its name, the model)."""
    return {name.lower(): (name, model) for model in published_models() for name in (model.name, *model.same)}


def cached_folder(name: str) -> Path | None:
    """Return the folder with config.json of the repository ``name`` in this machine's cache of the Hugging
    Face Hub. None if config.json is not there, if ``name`` cannot be that of a repository, or if
    huggingface_hub is not installed."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        path = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # the name of a folder, such as one with three parts
        return None
    return Path(path).parent if isinstance(path, str) else None
