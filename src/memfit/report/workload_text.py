"""The line that every answer begins with: model, parameters, batch × length, machine."""

from __future__ import annotations

from memfit.report.quantities import number_text
from memfit.report.words import Words, load_words
from memfit.types.workload import Workload


def workload_text(workload: Workload, words: Words | None = None) -> str:
    """Return the line that describes the workload: model, number of parameters, batch size and length (or
    shape) of a sample, and the machine if it is given. If the batch or the length is a default, the line says
    so and names the command-line option that sets it. ``words`` None: in English."""
    words = words or load_words("en")
    count = workload.parameter_count
    parameters = number_text(count, "parameters" if count >= 1000 else "count")
    batch = _batch(workload, words)
    text = words.get("workload.line", model=workload.model, parameters=parameters, batch=batch)
    if workload.machine:
        text = words.get("workload.on", line=text, machine=words.of(workload.machine))
    if workload.assumed:
        options = ", ".join(f"--{name}" for name in workload.assumed)
        names = words.get("workload.and").join(words.get(f"workload.{name}") for name in workload.assumed)
        text = words.get("workload.assumed", line=text, names=names, options=options)
    return text


def _batch(workload: Workload, words: Words) -> str:
    if workload.length is not None:
        unit = words.name("length_unit", workload.length_unit)
        return f"{workload.batch_size:,} × {workload.length:,} {unit}"
    return " × ".join(f"{n:,}" for n in (workload.batch_size, *workload.sample_shape))
