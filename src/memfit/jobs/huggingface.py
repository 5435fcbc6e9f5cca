"""``hf:PATH_OR_NAME``: the model of a Hugging Face configuration, found without a network.

A path is a folder with ``config.json``. A name is a model type known to transformers (its default
configuration), a repository of the Hub whose configuration memfit's table has, or a repository in this
machine's cache of the Hub. ``hf:llama?num_hidden_layers=2&hidden_size=64`` changes settings of any of these.
Weights are random unless ``--weights`` names a folder. The data are random: such a job is for memory and
speed, so it has no metric.
"""

from __future__ import annotations

import difflib
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from memfit.catalog.published_models import PublishedModel, cached_folder, find_published, similar_names
from memfit.files.read import parse_json, read_json
from memfit.jobs.huggingface_tasks import (
    IMAGES,
    SEQ2SEQ,
    SPEECH,
    auto_model,
    must_make_batches,
    random_batch,
    task_of,
)
from memfit.types.errors import UserError, first_line, suggest
from memfit.types.job import Dimension, Job, OptimizerChoice

if TYPE_CHECKING:
    import torch

PREFIX: Final = "hf:"
SIZES: Final = ("tiny", "paper")
_TINY_LENGTH, _PAPER_LENGTH = 128, 2048
_BATCH_SIZE: Final = 4
MOST_TOKENS: Final = 1 << 24
_RESERVED_POSITIONS: Final = 4  # additional rows in tables of positions, as in RoBERTa and OPT
_LENGTH_NAMES: Final = (
    "max_target_positions",
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
)
_DIMENSIONS: Final = {"layers": "num_hidden_layers", "hidden": "hidden_size"}


def make(
    name: str,
    *,
    size: str = "tiny",
    data: str | None = None,
    weights: str | None = None,
    batch: int | None = None,
    length: int | None = None,
    dimensions: Mapping[str, int] | None = None,
) -> Job:
    """Return the job of ``hf:name``, such as ``hf:meta-llama/Llama-3.1-8B`` or ``hf:FOLDER``, optionally with
    changed settings, as in ``llama?num_hidden_layers=2`` (`read_config`). It trains on random data.

    ``length``: tokens of a sequence; of a model with encoder and decoder, tokens of the source; of a speech
    model, tokens of the transcript. Without it, the size "tiny" uses 128 tokens and "paper" 2,048, or fewer
    if the model is made for fewer. Images have no length. ``batch``: samples of a step; without it, four. The
    job lists which of the two were not given in its ``assumed``. ``dimensions``: "layers" and "hidden"
    replace the settings num_hidden_layers and hidden_size, and nothing that depends on them; "target" is the
    number of tokens of the target of a model with encoder and decoder, by default ``length``. ``weights``: a
    folder of safetensors; by default random weights.

    Raises UserError as `read_config` and `task_of` do, and for any ``data``, an unknown dimension, a
    dimension "hidden" that is no multiple of the number of attention heads, a length or target for which the
    model has no positions or that is above MOST_TOKENS (16,777,216), a length of images, and settings of
    which no batch can be made (`must_make_batches`). Unusable ``weights``, and settings of which transformers
    cannot build a model, raise it when the model is built, at the latest.
    """
    if data is not None:
        raise UserError(
            f"{PREFIX}{name} trains on random data and does not accept --data",
            hint="leave out --data; to train on your data, make a job in a file of your own (FILE.py:NAME)",
        )
    config = read_config(name)
    task, batch_size = task_of(config, PREFIX + name), batch or _BATCH_SIZE
    if task == SEQ2SEQ and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0  # as T5's config.json has
    settable = dict(dimensions or {})
    target = settable.pop("target", None) if task == SEQ2SEQ else None
    _set_dimensions(config, settable, task, name)
    must_make_batches(config, task, PREFIX + name)
    if task == IMAGES:
        if length is not None:
            raise UserError(
                f"{PREFIX}{name} trains on images, which have no --length",
                hint=f"{PREFIX}{name.partition('?')[0]}?image_size=224 sets their size",
            )
        lengths: tuple[int, ...] = ()
    else:
        lengths = (_length(config, task, length, size, name),)
    if task == SEQ2SEQ:
        lengths = (*lengths, _length(config, task, target or lengths[0], size, name))
    options = {"batch": batch} if task == IMAGES else {"batch": batch, "length": length}
    return Job(
        name=_shown_name(name, config),
        title=f"{type(config).__name__.removesuffix('Config')} ({task})",
        size=size,
        build_model=lambda: _build(config, task, weights),
        make_batch=lambda step, seed: random_batch(config, task, (batch_size, *lengths), (step, seed)),
        loss=lambda model, part: model(**part).loss,
        batch_size=batch_size,
        tokens_per_batch=batch_size * sum(lengths[:1]),
        assumed=tuple(option for option, value in options.items() if value is None),
        optimizer=OptimizerChoice(learning_rate=1e-4),
        data_source={IMAGES: "random images", SPEECH: "random audio"}.get(task, "random tokens"),
        dimensions=(
            Dimension(name="batch", value=batch_size),
            *(Dimension(name=n, value=v) for n, v in zip(("length", "target"), lengths, strict=False)),
            *_dimensions(config),
        ),
    )


def _dimensions(config: Any) -> list[Dimension]:
    """Return the layers and the width of the network, if the configuration states them under their usual
    names. Only multiples of the number of heads are possible for the width. Models with encoder and decoder
    have no dimension "layers", because num_hidden_layers is the number of one of the two; models of several
    stages, such as Swin, have neither."""
    if hasattr(config, "depths"):
        return []
    multiples = {"hidden": int(getattr(config, "num_attention_heads", None) or 1)}
    return [
        Dimension(name=name, value=getattr(config, setting), multiple=multiples.get(name, 1))
        for name, setting in _DIMENSIONS.items()
        if isinstance(getattr(config, setting, None), int)
        and not (name == "layers" and getattr(config, "is_encoder_decoder", False))
    ]


def _set_dimensions(config: Any, dimensions: Mapping[str, int], task: str, name: str) -> None:
    allowed = {dimension.name: dimension.multiple for dimension in _dimensions(config)}
    of_data = {IMAGES: ("--batch",), SEQ2SEQ: ("--batch", "--length", "--dim target")}.get(
        task, ("--batch", "--length")
    )
    for dimension, value in dimensions.items():
        if dimension not in allowed:
            raise UserError(
                f"{PREFIX}{name} has no dimension {dimension!r}",
                allowed=", ".join((*of_data, *(f"--dim {a}" for a in allowed))),
                hint=suggest(dimension, allowed),
            )
        if value % allowed[dimension]:
            raise UserError(
                f"the dimension {dimension} of {PREFIX}{name} (--dim {dimension}) is set to {value}",
                allowed=f"multiples of {allowed[dimension]}, the model's number of attention heads",
            )
        _set(config, _DIMENSIONS[dimension], value)


def _shown_name(name: str, config: Any) -> str:
    """Return the job's name, such as ``hf:llama`` or ``hf:meta-llama/Llama-3.1-8B``; if settings were
    changed, with the number of layers and the width in place of the changes, such as ``hf:llama (2 layers of
    width 64)``, or with the changes themselves if the configuration does not state both. How the model that
    is built differs from the repository's is added in parentheses."""
    base, _, changes = name.partition("?")
    layers, width = (getattr(config, n, None) for n in ("num_hidden_layers", "hidden_size"))
    changed = f" ({layers} layers of width {width})" if changes else ""
    if changes and not (isinstance(layers, int) and isinstance(width, int)):
        changed = f"?{changes}"
    published = _find_published(base)
    if published is None:
        return f"{PREFIX}{base}{changed}"
    repository, model = published
    return f"{PREFIX}{repository}{changed}" + (f" ({model.note})" if model.note else "")


def _longest(config: Any) -> int | None:
    """Return the largest number of tokens of a sequence that the configuration states, under the first of its
    known names that has one, or None."""
    return next((int(n) for name in _LENGTH_NAMES if (n := getattr(config, name, None))), None)


def _length(config: Any, task: str, requested_length: int | None, size: str, name: str) -> int:
    """Return the number of tokens of a sequence: ``requested_length`` if it is given, else 128 for the size
    "tiny" and 2,048 for "paper", or fewer if the configuration states fewer or the model's table of positions
    has fewer.

    Rotary and relative positions do not limit a requested length. Raises UserError if more tokens are
    requested than the table has positions, or more than MOST_TOKENS, and as `_positions` does. ``name``: of
    the model, for the message.
    """
    config_length = _longest(config)
    length = requested_length or min(
        config_length or _PAPER_LENGTH, _TINY_LENGTH if size == "tiny" else _PAPER_LENGTH
    )
    if length > MOST_TOKENS:
        raise UserError(
            f"length {length} of {PREFIX}{name} is out of range",
            allowed=f"1 to {MOST_TOKENS} tokens in a sequence (--length, --dim target)",
        )
    allowed_length = length
    if config_length is not None and length > config_length - _RESERVED_POSITIONS:
        allowed_length = min(length, _positions(config, task, config_length) or length)
    if requested_length is not None and allowed_length < requested_length:
        raise UserError(
            f"length {requested_length} of {PREFIX}{name} is out of range",
            allowed=f"1 to {allowed_length} tokens, as many as the model has positions for (--length, or "
            "--dim target for the target of an encoder-decoder model)",
        )
    return allowed_length


def _positions(config: Any, task: str, longest: int) -> int | None:
    """Return how many positions the smallest of the model's tables of positions has for tokens; None if it
    has no table. To see this, the model is built on the meta device. Rows before the first position, which
    some models reserve, do not count. ``longest``: the number of tokens that the configuration states; a
    table has 0 to 4 rows more than this. Raises UserError if transformers cannot build the model."""
    import torch

    with torch.device("meta"):
        model = _untrained(config, task)
    sizes = range(longest, longest + _RESERVED_POSITIONS + 1)
    row_counts = []
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings in sizes:
            padding = -1 if module.padding_idx is None else module.padding_idx
            first_row = getattr(module, "offset", None) or padding + 1
            row_counts += (
                [module.num_embeddings - first_row] if module.num_embeddings != config.vocab_size else []
            )
    tables = [b for n, b in model.named_buffers() if "embed_pos" in n and b.dim() > 1 and len(b) in sizes]
    return min([*row_counts, *map(len, tables)], default=None)


def read_config(name: str) -> Any:
    """Return the configuration of ``name``: a folder with config.json; else a model type of transformers;
    else a model of the table of published configurations, without regard to case and with or without its
    owner; else a repository in this machine's cache of the Hugging Face Hub. Settings after a ``?``, as in
    ``llama?num_hidden_layers=2``, are changed, and the cache of keys and values for generation is turned off.
    Raises UserError if there is no such configuration or setting, if a setting does not accept its value, if
    the folder's configuration cannot be loaded, and if transformers cannot be imported or does not know the
    model type."""
    types = _model_types()
    name, _, changes = name.partition("?")
    if (Path(name).expanduser() / "config.json").is_file():
        config = _from_folder(Path(name).expanduser())
    elif name in types:
        config = types[name]()
    elif published := _find_published(name):
        config = _from_table(*published)
    elif folder := cached_folder(name):
        config = _from_folder(folder)
    else:
        raise _unknown_name(name)
    _change(config, changes, name)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # keys and values are cached for generation, not for training
    return config


def _model_types() -> Any:
    """Return model type -> class of its configuration, of the installed transformers. Raises UserError if
    transformers cannot be imported."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise UserError(
            f"{PREFIX} jobs are built by transformers, which cannot be imported: {first_line(error)}",
            hint="pip install transformers",
        ) from error
    return CONFIG_MAPPING


def _find_published(name: str) -> tuple[str, PublishedModel] | None:
    """Return the repository and the model of the table of published configurations that ``name``, without
    settings, means. Return None if there is none, or if ``name`` is a folder with config.json or a model
    type. Raises UserError if transformers cannot be imported."""
    if (Path(name).expanduser() / "config.json").is_file() or name in _model_types():
        return None
    return find_published(name)


def _from_table(repository: str, model: PublishedModel) -> Any:
    types = _model_types()
    if model.model_type not in types:
        import transformers

        raise UserError(
            f"{PREFIX}{repository} is of the model type {model.model_type}, which transformers "
            f"{transformers.__version__} does not have",
            hint="pip install --upgrade transformers",
        )
    return types[model.model_type](**model.settings)


def _unknown_name(name: str) -> UserError:
    models = similar_names(name) or ["meta-llama/Llama-3.1-8B", "bert-base-uncased"]
    types = difflib.get_close_matches(name, list(_model_types()), n=3) or ["gpt2", "llama", "bert"]
    repository = name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else "OWNER/NAME"
    return UserError(
        f"no Hugging Face configuration {name!r}",
        allowed=f"a model that `memfit list models` lists, such as {' or '.join(models)}; a model type of "
        f"transformers, such as {' or '.join(types)}; a model in this machine's cache of the Hugging Face "
        "Hub; a folder with config.json",
        hint=f"for any other model, download its config.json, for example by `hf download {repository} "
        f"config.json --local-dir FOLDER`, and give {PREFIX}FOLDER",
    )


def _change(config: Any, changes: str, name: str) -> None:
    """Set the settings ``changes``, such as ``a=1&b=2``, in the configuration. Values are read as JSON, else
    taken as text. Raises UserError for a setting that the configuration does not have, and for a value that
    it refuses, such as text for a number."""
    for key, text in urllib.parse.parse_qsl(changes, keep_blank_values=True):
        if not hasattr(config, key):
            raise UserError(
                f"the job {PREFIX}{name}?{key}=... changes the setting {key!r}, which the configuration of "
                f"{name} does not have",
                hint=suggest(key, config.to_dict()),
            )
        try:
            value = parse_json(text, what=key)
        except UserError:
            value = text
        try:
            _set(config, key, value)
        except _refusals() as error:
            raise UserError(
                f"the job {PREFIX}{name}?{key}={text[:40]} is refused by the configuration of {name}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error


def _refusals() -> tuple[type[Exception], ...]:
    """Return the errors by which configurations of transformers refuse a value."""
    from huggingface_hub import errors

    strict: type[Exception] = getattr(errors, "StrictDataclassError", ValueError)  # of newer versions
    return OSError, ValueError, KeyError, TypeError, AttributeError, strict


def _set(config: Any, setting: str, value: Any) -> None:
    """Set ``setting`` of the configuration to ``value``. If this changes num_hidden_layers, lists with an
    entry for each layer, such as layer_types, get as many entries, by repeating their shortest period."""
    layers = getattr(config, "num_hidden_layers", None)
    setattr(config, setting, value)
    changed = getattr(config, "num_hidden_layers", None)
    if changed == layers or not isinstance(changed, int):
        return
    for name, entries in list(vars(config).items()):
        if "layer" in name and isinstance(entries, list) and len(entries) == layers:
            period = next(n for n in range(1, layers + 1) if entries[n:] == entries[:-n])
            setattr(config, name, [entries[i % period] for i in range(changed)])


def _from_folder(folder: Path) -> Any:
    from transformers import AutoConfig

    read_json(folder / "config.json")  # transformers would wait for a pipe, or read without an end
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except _refusals() as error:
        raise UserError(
            f"{folder}/config.json cannot be loaded: {first_line(error)}",
            allowed="the configuration of a model type that the installed transformers has",
        ) from error


def _untrained(config: Any, task: str) -> torch.nn.Module:
    try:
        model: torch.nn.Module = auto_model(task).from_config(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "negative dimension" not in str(error):
            raise  # such as memory that ran out
        raise UserError(
            f"transformers cannot build a model with these settings of {type(config).__name__}: "
            f"{type(error).__name__}: {first_line(error)[:200]}",
            hint="correct config.json, or the settings after the ? of hf:NAME?SETTING=VALUE",
        ) from error
    return model


def _build(config: Any, task: str, weights: str | None) -> torch.nn.Module:
    from memfit.jobs.weights import load_weights

    model = _untrained(config, task)
    if weights:
        load_weights(model, weights, may_miss=("classifier", "score") if task == "classification" else ())
    return model
