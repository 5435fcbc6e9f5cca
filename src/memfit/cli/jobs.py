"""``memfit jobs``: list the built-in jobs."""

from __future__ import annotations

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JsonOptions
from memfit.cli.output import emit, print_table


def jobs(output: JsonOptions) -> None:
    """List the built-in jobs: what each trains on what data, and its sizes, the default size first."""
    quiet_libraries()
    from memfit.jobs.registry import DEFAULT, describe

    descriptions = describe()
    if output.json:
        keys = ("name", "title", "sizes", "data_source")
        emit({"default": DEFAULT, "jobs": [{key: getattr(job, key) for key in keys} for job in descriptions]})
        return
    print_table(
        ("job", "sizes", "what is trained, on what"),
        ((job.name, ", ".join(job.sizes), f"{job.title}\n{job.data_source}") for job in descriptions),
    )
    print("Your own: FILE.py:NAME, a Job in a Python file, or hf:PATH_OR_NAME, a Hugging Face configuration.")
