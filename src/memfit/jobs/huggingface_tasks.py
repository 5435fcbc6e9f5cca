"""What a Hugging Face model is trained for in an ``hf:`` job, and random batches for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.jobs.builtin.batches import as_tensors, step_rng
from memfit.types.errors import UserError

if TYPE_CHECKING:
    import torch

CAUSAL: Final = "causal-lm"
MASKED: Final = "masked-lm"
CLASSES: Final = "classification"
IMAGES: Final = "image-classification"
SEQ2SEQ: Final = "seq2seq"
SPEECH: Final = "speech-to-text"
_ENDINGS: Final = {
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
    "ForMaskedLM": MASKED,
    "ForSequenceClassification": CLASSES,
    "ForImageClassification": IMAGES,
}
# Task -> the class of transformers that builds a model with the head for it. The masked task comes before the
# causal one: bidirectional models have a causal head too, but not the reverse.
_AUTO_MODELS: Final = {
    SPEECH: "AutoModelForSpeechSeq2Seq",
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
    MASKED: "AutoModelForMaskedLM",
    CAUSAL: "AutoModelForCausalLM",
    CLASSES: "AutoModelForSequenceClassification",
    IMAGES: "AutoModelForImageClassification",
}
# What a configuration must state for a batch of the task.
_NEEDS: Final = {
    SPEECH: ("vocab_size", "num_mel_bins", "max_source_positions"),
    CLASSES: ("vocab_size", "num_labels"),
    IMAGES: ("image_size", "num_channels", "num_labels"),
}


def task_of(config: Any, name: str) -> str:
    """Return the task of the job: "causal-lm", "masked-lm", "classification" (of sequences),
    "image-classification", "seq2seq" (encoder and decoder of text) or "speech-to-text".

    It is that of the first architecture in the configuration whose name ends in ForCausalLM, LMHeadModel,
    ForMaskedLM, ForSequenceClassification or ForImageClassification. Without one, it is the first task for
    which transformers has a model of this type. Models with encoder and decoder are tried in the order
    speech-to-text, seq2seq; all others in the order masked-lm, causal-lm, classification,
    image-classification. A task is skipped if the configuration lacks a setting that its batches need, such
    as vocab_size. Raises UserError if there is no task. ``name``: of the model, for the message.
    """
    for architecture in getattr(config, "architectures", None) or ():
        for ending, task in _ENDINGS.items():
            if architecture.endswith(ending) and _states_needs(config, task):
                return task
    with_decoder = getattr(config, "is_encoder_decoder", False)
    for task in _AUTO_MODELS:
        if (task in (SPEECH, SEQ2SEQ)) != with_decoder or not _states_needs(config, task):
            continue
        if type(config) in auto_model(task)._model_mapping:
            return task
    raise UserError(
        f"{name} ({type(config).__name__}) has no head for which memfit has a loss",
        allowed="architectures with a masked-LM, causal-LM, sequence-classification, image-classification, "
        "sequence-to-sequence or speech-to-text head; not several encoders side by side, such as CLIP",
        hint="a file of your own can train any model: FILE.py:NAME, see docs/estimate.md",
    )


def _needs(task: str) -> tuple[str, ...]:
    return _NEEDS.get(task, ("vocab_size",))


def _states_needs(config: Any, task: str) -> bool:
    return all(hasattr(config, setting) for setting in _needs(task))


def must_make_batches(config: Any, task: str, name: str) -> None:
    """Raise UserError if a setting that batches of ``task`` need, such as vocab_size, is not a whole number
    of at least 1; for image_size, two of them are allowed, too. ``name``: of the model, for the message."""
    for setting in _needs(task):
        value = getattr(config, setting)
        is_pair = setting == "image_size" and isinstance(value, list | tuple) and len(value) == 2
        if any(not isinstance(number, int) or number < 1 for number in (value if is_pair else [value])):
            raise UserError(
                f"{name} has the setting {setting} {value!r}, with which no batch can be made",
                allowed="a whole number of at least 1" + (", or two" if setting == "image_size" else ""),
            )


def auto_model(task: str) -> Any:
    """Return the class of transformers whose ``from_config`` builds a model with the head for ``task``, such
    as AutoModelForCausalLM for "causal-lm"."""
    import transformers

    return getattr(transformers, _AUTO_MODELS[task])


def random_batch(
    config: Any, task: str, shape: tuple[int, ...], at: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Return a random batch for ``task``. ``shape``: (batch, length of the sequences), for "speech-to-text"
    of the targets; (batch, length of the sequences, length of the targets) for "seq2seq"; (batch,) for
    images. ``at``: (step, seed); equal ones give equal batches.

    The inputs are ``input_ids`` (batch, length) without the padding token; ``pixel_values`` (batch, channels,
    height, width); or ``input_features`` (batch, mel bins, frames), twice as many frames as the encoder has
    positions. ``labels``: a random class for each sequence or image (batch,); else tokens, for "causal-lm"
    the inputs, for "masked-lm" the inputs that `_masked_labels` chooses and -100 elsewhere, for "seq2seq" and
    "speech-to-text" random ones (batch, length of the targets).
    """
    rng = step_rng(*at)
    if task == IMAGES:
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = rng.random((shape[0], config.num_channels, height, width), dtype=np.float32)
        return as_tensors({"pixel_values": pixels, "labels": rng.integers(0, config.num_labels, shape[0])})
    tokens = _tokens(config, rng, shape[:2])
    if task == SPEECH:
        frames = (shape[0], config.num_mel_bins, 2 * config.max_source_positions)
        return as_tensors({"input_features": rng.random(frames, dtype=np.float32), "labels": tokens})
    if task == CLASSES:
        return as_tensors({"input_ids": tokens, "labels": rng.integers(0, config.num_labels, size=shape[0])})
    if task == SEQ2SEQ:
        labels = _tokens(config, rng, (shape[0], shape[2]))
    else:
        labels = tokens if task == CAUSAL else _masked_labels(tokens, rng)
    return as_tensors({"input_ids": tokens, "labels": labels})


def _tokens(config: Any, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return random tokens of this shape, without the padding token: padding would make the lengths of
    sequences, and the rows that classifiers use, unequal."""
    pad = getattr(config, "pad_token_id", None)
    tokens = rng.integers(0, config.vocab_size, size=shape)
    tokens[tokens == pad] = 0 if pad != 0 else 1
    return tokens


def _masked_labels(tokens: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return ``tokens`` (batch, length) as labels, with -100 (no label) at all but 15 % of the positions of
    each row. These are random, equally many in every row so that micro-batches have equal weights, and at
    least one."""
    order = rng.random(tokens.shape).argsort(axis=1)
    return np.where(order < max(1, round(0.15 * tokens.shape[1])), tokens, -100)
