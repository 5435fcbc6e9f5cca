"""The science models of the survey's Table 1, each with the training memory that memfit predicts.

    python benchmarks/survey.py [NAME ...]   predict those of benchmarks/survey.toml, record, write the tables
    python benchmarks/survey.py --page       the tables in docs/survey.md from the records only

Nothing is downloaded: models are built from shapes, on fake tensors. Every predicted number in the tables
comes from benchmarks/records/survey.jsonl; of several records of a model the latest counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS, MODELS = HERE / "records" / "survey.jsonl", HERE / "survey.toml"
PAGE = HERE.parent / "docs" / "survey.md"
BEGIN, END = "<!-- written by benchmarks/survey.py -->", "<!-- end -->"
MACHINE = "H100-SXM"
PLANS = {
    "plain": {},
    "saved": {"bf16-autocast": {}, "activation-checkpointing": {}},
}
_LARGEST_GIB = 10  # from which no decimals are shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of models in survey.toml; default all")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    models = read_models()
    predictable = [m["name"] for m in models if "job" in m]
    if unknown := sorted(set(options.names) - set(predictable)):
        parser.error(f"no model {', '.join(unknown)}: {', '.join(predictable)}")
    for model in models:
        if not options.page and "job" in model and model["name"] in (options.names or predictable):
            record = predict(model)
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)
    write_page(models, read_records())


def read_models() -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = tomllib.loads(MODELS.read_text(encoding="utf-8"))["model"]
    return models


def read_records() -> dict[str, dict[str, Any]]:
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.is_file() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def predict(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a model: its parameters, and for each plan of PLANS the highest number of bytes of
    live tensors, or the reason why the plan cannot be applied."""
    import torch

    import memfit
    from memfit.jobs.registry import load
    from memfit.trace.tracer import fake_model
    from memfit.types.errors import UserError
    from memfit.types.job import JobRef

    sizes = {key: model[key] for key in ("size", "batch", "length") if key in model}
    job = load(JobRef(spec=model["job"], **sizes))
    parameters = sum(p.numel() for p in fake_model(job).parameters())
    peaks: dict[str, Any] = {}
    started = time.monotonic()
    for name, plan in PLANS.items():
        try:
            prediction = memfit.estimate(job, plan=plan, machine=MACHINE, probe=False)
            peaks[name] = prediction.allocated_bytes.value
        except UserError as error:
            peaks[name] = str(error)
    return {
        "name": model["name"],
        "job": model["job"],
        **sizes,
        "parameters": parameters,
        "peaks": peaks,
        "seconds": round(time.monotonic() - started, 1),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
    }


def write_page(models: list[dict[str, Any]], records: Mapping[str, dict[str, Any]]) -> None:
    """Replace what is between BEGIN and END in docs/survey.md by the tables."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(models, records)}\n{END}{after}", encoding="utf-8")


def tables(models: list[dict[str, Any]], records: Mapping[str, dict[str, Any]]) -> str:
    listed = [m for m in models if "survey" in m]
    others = [m for m in models if "survey" not in m]
    dates = sorted({r["date"] for r in records.values()})
    head = (
        f"Predicted for one {MACHINE}, whether it fits there or not: the peak of live tensors, GiB, of a "
        f"step of one process with AdamW. Last record {dates[-1] if dates else 'none'}."
    )
    parts = [
        head,
        "**Models of the survey's Table 1**",
        "\n".join(memory_rows(listed, records)),
        "**Other science models**",
        "\n".join(memory_rows(others, records)),
        "**What stands for each model, and where to look it up**",
        "\n".join(source_rows(models)),
    ]
    return "\n\n".join(parts) + "\n"


def memory_rows(models: list[dict[str, Any]], records: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of memory, with the survey's column if a model of it has that number."""
    has_survey = any("survey" in m for m in models)
    yield (
        "| model | field | parameters, published | parameters, built | samples × length | "
        + ("the survey's estimate | " if has_survey else "")
        + "plain float32 | bf16 autocast, checkpointing |"
    )
    yield "|---|---|--:|--:|--:|" + ("--:|" if has_survey else "") + "--:|--:|"
    for model in models:
        record = records.get(model.get("same_as", model["name"]))
        cells = [model["name"], model["field"], model["published"]]
        cells += [_count(record.get("parameters")), _shape(record)] if record else ["", ""]
        cells += [model["survey"]] if has_survey else []
        if record:
            cells += [_gib(record["peaks"].get(name)) for name in PLANS]
        else:
            cells += ["unknown", "unknown"]
        yield f"| {' | '.join(cells)} |"


def source_rows(models: list[dict[str, Any]]) -> Iterator[str]:
    yield "| model | predicted from | shape | reference |"
    yield "|---|---|---|---|"
    jobs = {m["name"]: m for m in models}
    for model in models:
        stand_in = jobs[model.get("same_as", model["name"])]
        job = f"`{' --size '.join(filter(None, (stand_in.get('job', ''), stand_in.get('size', ''))))}`"
        is_unknown = "job" not in stand_in
        shape = f"unknown: {model['why']}" if is_unknown else model["shape"]
        yield f"| {model['name']} | {'' if is_unknown else job} | {shape} | {model['reference']} |"


def _shape(record: Mapping[str, Any]) -> str:
    batch, length = record.get("batch", ""), record.get("length", "")
    return f"{batch} × {length:,}" if length else str(batch)


def _count(parameters: int | None) -> str:
    if parameters is None:
        return ""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return f"{parameters / 1e3:.3g} k"


def _gib(peak: int | str | None) -> str:
    if not isinstance(peak, int):
        return "unknown" if peak is None else "not possible"
    gib = peak / 2**30
    return f"{gib:,.0f}" if gib >= _LARGEST_GIB else f"{gib:.2g}"


if __name__ == "__main__":
    main()
