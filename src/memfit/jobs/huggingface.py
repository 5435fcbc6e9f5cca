"""``hf:PATH_OR_NAME``: the model of a Hugging Face configuration, from a local folder or of transformers.

Nothing is downloaded. A name is a model type known to transformers (its default configuration); a path is a
folder with ``config.json``. ``hf:llama?num_hidden_layers=2&hidden_size=64`` changes settings of either.
Weights are random unless ``--weights`` names a folder. Tokens are random: such a job is for memory and speed,
so it has no metric.
"""

from __future__ import annotations

import difflib
import json
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.jobs.builtin.batches import as_tensors, step_rng
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
_LENGTH_NAMES: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_DIMENSIONS: Final = {"layers": "num_hidden_layers", "hidden": "hidden_size"}
_ENDINGS: Final = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "classification",
}


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
    """Return the job of ``hf:name``, a folder with config.json or a model type of transformers, such as
    llama, optionally with changed settings, as in ``llama?num_hidden_layers=2``. It trains on random tokens.

    ``length``: tokens of a sequence. Without it, the size "tiny" uses 128 tokens and "paper" 2,048, or fewer
    if the model is made for fewer. ``batch``: sequences of a step; without it, four. The job lists which of
    the two were not given in its ``assumed``. ``dimensions``: "layers" and "hidden" replace the settings
    num_hidden_layers and hidden_size, and nothing that depends on them. ``weights``: a folder of
    safetensors; by default random weights. Raises UserError for any ``data``, an unknown name, setting or
    dimension, a broken ``config.json``, an architecture without a causal, masked or classification head, a
    length for which the model has no positions or that is above MOST_TOKENS (16,777,216), and unusable
    ``weights``, when the model is built.
    """
    if data is not None:
        raise UserError(f"{PREFIX}{name} trains on random tokens and does not accept --data")
    config = read_config(name)
    _set_dimensions(config, dimensions or {}, name)
    task, batch_size = task_of(config, name), batch or _BATCH_SIZE
    assumptions = tuple(o for o, value in (("batch", batch), ("length", length)) if value is None)
    length = _length(config, task, length, size, name)
    return Job(
        name=_shown_name(name, config),
        title=f"{type(config).__name__.removesuffix('Config')} ({task})",
        size=size,
        build_model=lambda: _build(config, task, weights),
        make_batch=lambda step, seed: _batch(config, task, (batch_size, length), (step, seed)),
        loss=lambda model, part: model(**part).loss,
        batch_size=batch_size,
        tokens_per_batch=batch_size * length,
        assumed=assumptions,
        optimizer=OptimizerChoice(learning_rate=1e-4),
        data_source="random tokens",
        dimensions=(
            Dimension(name="batch", value=batch_size),
            Dimension(name="length", value=length),
            *_dimensions(config),
        ),
    )


def _dimensions(config: Any) -> list[Dimension]:
    """Return the layers and the width of the network, if the configuration states them under their usual
    names. Only multiples of the number of heads are possible for the width."""
    multiples = {"hidden": int(getattr(config, "num_attention_heads", None) or 1)}
    return [
        Dimension(name=name, value=getattr(config, setting), multiple=multiples.get(name, 1))
        for name, setting in _DIMENSIONS.items()
        if isinstance(getattr(config, setting, None), int)
    ]


def _set_dimensions(config: Any, dimensions: Mapping[str, int], name: str) -> None:
    allowed = {dimension.name: dimension.multiple for dimension in _dimensions(config)}
    for dimension, value in dimensions.items():
        if dimension not in allowed:
            raise UserError(
                f"{PREFIX}{name} has no dimension {dimension!r}",
                allowed=", ".join(("batch", "length", *allowed)),
                hint=suggest(dimension, allowed),
            )
        if value % allowed[dimension]:
            raise UserError(
                f"the dimension {dimension} of {PREFIX}{name} is set to {value}",
                allowed=f"multiples of {allowed[dimension]}, its number of heads",
            )
        setattr(config, _DIMENSIONS[dimension], value)


def _shown_name(name: str, config: Any) -> str:
    """Return the job's name, such as ``hf:llama``; if settings were changed, with the number of layers and
    the width in place of the changes, such as ``hf:llama (2 layers of width 64)``."""
    base, changes, _ = name.partition("?")
    layers, width = (getattr(config, n, None) for n in ("num_hidden_layers", "hidden_size"))
    return f"{PREFIX}{base}" + (f" ({layers} layers of width {width})" if changes else "")


def _longest(config: Any) -> int | None:
    """Return the largest number of tokens of a sequence that the configuration states, under the first of its
    known names that has one, or None."""
    return next((int(n) for name in _LENGTH_NAMES if (n := getattr(config, name, None))), None)


def _length(config: Any, task: str, requested_length: int | None, size: str, name: str) -> int:
    """Return the number of tokens of a sequence: ``requested_length`` if it is given, else 128 for the size
    "tiny" and 2,048 for "paper", or fewer if the configuration states fewer or the model's table of positions
    has fewer.

    Rotary and relative positions do not limit a requested length. Raises UserError if more tokens are
    requested than the table has positions, or more than MOST_TOKENS.
    """
    config_length = _longest(config)
    length = requested_length or min(
        config_length or _PAPER_LENGTH, _TINY_LENGTH if size == "tiny" else _PAPER_LENGTH
    )
    if length > MOST_TOKENS:
        raise UserError(
            f"length {length} of {PREFIX}{name} is out of range",
            allowed=f"1 to {MOST_TOKENS} tokens in a sequence (--length)",
        )
    allowed_length = length
    if config_length is not None and length > config_length - _RESERVED_POSITIONS:
        allowed_length = min(length, _positions(config, task, config_length) or length)
    if requested_length is not None and allowed_length < requested_length:
        raise UserError(
            f"length {requested_length} of {PREFIX}{name} is out of range",
            allowed=f"1 to {allowed_length} tokens, as many as the model has positions for",
        )
    return allowed_length


def _positions(config: Any, task: str, longest: int) -> int | None:
    """Return how many positions the smallest of the model's tables of positions has for tokens; None if it
    has no table. Rows before the first position, which some models reserve, do not count. ``longest``: the
    number of tokens that the configuration states; a table has 0 to 4 rows more than this."""
    import torch

    with torch.device("meta"):
        model = _auto_models()[task].from_config(config)
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
    """Return the configuration of ``name``, a folder with config.json or a model type of transformers.
    Settings after a ``?``, as in ``llama?num_hidden_layers=2``, are changed, and the cache of keys and values
    for generation is turned off. Raises UserError if there is no such configuration or setting, or if the
    folder's configuration cannot be loaded."""
    from transformers import CONFIG_MAPPING

    name, _, changes = name.partition("?")
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        config = _from_folder(folder)
    elif name in CONFIG_MAPPING:
        config = CONFIG_MAPPING[name]()
    else:
        suggestions = difflib.get_close_matches(name, list(CONFIG_MAPPING), n=3)
        raise UserError(
            f"no Hugging Face configuration {name!r}",
            allowed="a folder with config.json, or a model type that transformers knows, "
            f"such as {', '.join(suggestions or ('gpt2', 'llama', 'bert'))}",
        )
    _change(config, changes, name)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # keys and values are cached for generation, not for training
    return config


def _change(config: Any, changes: str, name: str) -> None:
    """Set the settings ``changes``, such as ``a=1&b=2``, in the configuration. Values are read as JSON, else
    taken as text. Raises UserError for a setting that the configuration does not have."""
    for key, text in urllib.parse.parse_qsl(changes, keep_blank_values=True):
        if not hasattr(config, key):
            raise UserError(
                f"the job {PREFIX}{name}?{key}=... changes a setting, but the configuration of {name} has no "
                f"setting {key!r}",
                hint=suggest(key, config.to_dict()),
            )
        try:
            setattr(config, key, json.loads(text))
        except ValueError:
            setattr(config, key, text)


def _from_folder(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.json cannot be loaded: {first_line(error)}") from error


def task_of(config: Any, name: str) -> str:
    """Return the task of the job: "causal-lm", "masked-lm" or "classification".

    It is that of the first architecture in the configuration that has such a head. Without one, it is the
    first of masked-lm, causal-lm and classification for which transformers has a model of this type; models
    with encoder and decoder have none. Raises UserError if there is no task. ``name``: for the message.
    """
    for architecture in getattr(config, "architectures", None) or ():
        for ending, task in _ENDINGS.items():
            if architecture.endswith(ending):
                return task
    for task, auto in _auto_models().items():
        if type(config) in auto._model_mapping and not getattr(config, "is_encoder_decoder", False):
            return task
    raise UserError(
        f"{PREFIX}{name} ({type(config).__name__}) has no head for which memfit has a loss",
        allowed="architectures with a masked-LM, causal-LM or sequence-classification head",
        hint="a file of your own can train any model: FILE.py:NAME, see README",
    )


def _auto_models() -> Mapping[str, Any]:
    """Return task -> the class of transformers that builds a model with the head for it.

    The masked task comes first: bidirectional models have a causal head too, but not the reverse.
    """
    import transformers

    return {
        "masked-lm": transformers.AutoModelForMaskedLM,
        "causal-lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }


def _build(config: Any, task: str, weights: str | None) -> torch.nn.Module:
    from memfit.jobs.weights import load_weights

    model: torch.nn.Module = _auto_models()[task].from_config(config)
    if weights:
        load_weights(model, weights, may_miss=("classifier", "score") if task == "classification" else ())
    return model


def _batch(config: Any, task: str, shape: tuple[int, int], at: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return a batch of random tokens: ``input_ids`` (batch, length), without the padding token, and
    ``labels``: a random class for each sequence (batch,) if ``task`` is "classification"; else tokens (batch,
    length), for "causal-lm" all of them, for "masked-lm" those that `_some` chooses and -100 elsewhere.
    ``shape``: (batch, length). ``at``: (step, seed), on which alone the batch depends."""
    rng = step_rng(*at)
    pad = getattr(config, "pad_token_id", None)
    tokens = rng.integers(0, config.vocab_size, size=shape)
    # padding would make sequence lengths, and rows used by classifiers, unequal
    tokens[tokens == pad] = 0 if pad != 0 else 1
    if task == "classification":
        return as_tensors({"input_ids": tokens, "labels": rng.integers(0, config.num_labels, size=shape[0])})
    labels = tokens if task == "causal-lm" else _some(tokens, rng)
    return as_tensors({"input_ids": tokens, "labels": labels})


def _some(tokens: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return ``tokens`` (batch, length) as labels, with -100 (no label) at all but 15 % of the positions of
    each row. These are random, equally many in every row so that micro-batches have equal weights, and at
    least one."""
    order = rng.random(tokens.shape).argsort(axis=1)
    return np.where(order < max(1, round(0.15 * tokens.shape[1])), tokens, -100)
