"""Keep the settings of the user's own configuration files in an export, except those that the plan decides.

The exported files are rendered twice: for the plan that the user's files describe, and for the exported plan.
Settings that differ between the two are taken from the exported plan, all others from the user's file. If
none differ, a user's file in the exported format is copied byte for byte. Files that memfit's worker reads
take all settings of the exported plan, except a few that are left to the user.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memfit.engines import accelerate, deepspeed, megatron
from memfit.engines.registry import render
from memfit.export import openfold, torchtitan, trainer
from memfit.export.base import Files, Handover, UserFiles, UserSettings
from memfit.export.script_steps import script_files
from memfit.lint import to_plan
from memfit.lint.clipping import NORMS, clipping_setting
from memfit.lint.launch_script import option_values
from memfit.lint.parse import FILE_ARGUMENTS, Options, Setup, read, read_data
from memfit.lint.rules_hugging_face import ONLY_IN_DEEPSPEED_FILE
from memfit.techniques.rank_mesh import layout
from memfit.types.errors import UserError
from memfit.types.launch import RunSpec

Leaves = dict[tuple[str, ...], Any]
_MISSING = object()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """The format of an exported file. ``load`` parses its text to nested settings, and ``dump`` renders
    these. ``kind``: the field of a Setup that holds the user's settings for this file. ``suffixes``: the
    user's files with one of these suffixes may be copied as they are; empty for files of command-line
    options, which are always rendered. ``free``: dotted paths of settings, such as
    "zero_optimization.reduce_scatter", that the user decides even in a file for memfit's worker; the plan
    decides all others there."""

    kind: str
    load: Callable[[str], dict[str, Any]]
    dump: Callable[[dict[str, Any]], str]
    suffixes: tuple[str, ...] = ()
    free: frozenset[str] = frozenset()


def _json_text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"


def _yaml(text: str) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(text))


def _yaml_text(data: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False)


def toml_text(data: Mapping[str, Any], above: str = "") -> str:
    """Return ``data`` as TOML, with plain values before nested tables. ``above``: the dotted name of the
    table that ``data`` is the content of, "" for the whole file."""
    tables = {name: value for name, value in data.items() if isinstance(value, Mapping)}
    lines = [f"{_toml_key(name)} = {_toml_value(v)}\n" for name, v in data.items() if name not in tables]
    head = f"[{above}]\n" if above and (lines or not tables) else ""
    parts = [head + "".join(lines)] if head or lines else []
    parts += [toml_text(t, f"{above}.{_toml_key(n)}".removeprefix(".")) for n, t in tables.items()]
    return "\n".join(parts)


def _toml_key(name: str) -> str:
    return name if name and all(c.isalnum() or c in "_-" for c in name) else json.dumps(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(n)} = {_toml_value(v)}" for n, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.isoformat() if hasattr(value, "isoformat") else json.dumps(value)


_FREE_OF_DEEPSPEED = frozenset(
    {
        "gradient_clipping",
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_optimization.contiguous_gradients",
        "zero_optimization.reduce_scatter",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.round_robin_gradients",
        "zero_optimization.stage3_max_reuse_distance",
        "zero_optimization.offload_optimizer.nvme_path",
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.offload_param.pin_memory",
    }
)
_DEEPSPEED = _Format(
    kind="deepspeed", load=json.loads, dump=_json_text, suffixes=(".json",), free=_FREE_OF_DEEPSPEED
)
_FORMATS: Mapping[str, _Format] = {
    deepspeed.CONFIG: _DEEPSPEED,
    openfold.DEEPSPEED: _DEEPSPEED,
    accelerate.CONFIG: _Format(
        kind="accelerate",
        load=_yaml,
        dump=_yaml_text,
        suffixes=(".yaml", ".yml"),
        free=frozenset(
            {
                "compute_environment",
                "debug",
                "downcast_bf16",
                "machine_rank",
                "main_training_function",
                "num_machines",
                "rdzv_backend",
                "same_network",
                "use_cpu",
            }
        ),
    ),
    megatron.CONFIG: _Format(
        kind="megatron",
        load=megatron.parse,
        dump=megatron.options_text,
        free=frozenset({"clip-grad", "seed", "hidden-dropout", "attention-dropout", "train-iters"}),
    ),
    trainer.ARGUMENTS: _Format(kind="trainer", load=json.loads, dump=_json_text, suffixes=(".json",)),
    torchtitan.TOML: _Format(kind="torchtitan", load=tomllib.loads, dump=toml_text, suffixes=(".toml",)),
    openfold.CHANGES: _Format(kind="openfold_config", load=json.loads, dump=_json_text, suffixes=(".json",)),
    openfold.ARGUMENTS: _Format(kind="openfold", load=megatron.parse, dump=megatron.options_text),
}


def read_user_files(
    paths: Sequence[Path], *, ranks: int | None = None, for_worker: bool = False
) -> UserFiles:
    """Read the user's configuration files ``paths`` and convert them to a plan. ``ranks``: the number of
    processes that train; None if the files say it. ``for_worker``: whether memfit's worker will read the
    exported files, as in UserFiles. Raises UserError if a file cannot be read or converted
    (`memfit.lint.parse.read`, `to_plan.convert`), if neither the files nor ``ranks`` say how many processes
    train, if the files say another number than ``ranks``, or if the Trainer's arguments and DeepSpeed's
    settings clip gradients to different norms."""
    setup = read(paths)
    if ranks is not None and setup.ranks not in (None, ranks):
        raise UserError(
            f"--ranks {ranks} is given, but the files of --from say that {setup.ranks} processes train",
            hint="leave out --ranks",
        )
    if setup.ranks is None and ranks is None:
        raise UserError(
            f"nothing in {', '.join(setup.files)}, given with --from, says how many processes train",
            allowed="--ranks N, the number of processes",
        )
    setup = dataclasses.replace(setup, ranks=ranks or setup.ranks)
    config, arguments = setup.deepspeed, setup.trainer
    if config is not None and arguments is not None:
        norms = config.number(NORMS["deepspeed"]), arguments.number(NORMS["trainer"])
        if None not in norms and norms[0] != norms[1]:
            raise UserError(
                f"{Path(config.file).name} clips gradients to a norm of {norms[0]:g} ({NORMS['deepspeed']}), "
                f"{Path(arguments.file).name} to {norms[1]:g} ({NORMS['trainer']}): the Trainer refuses this",
                allowed=f'the same norm in both, or {NORMS["deepspeed"]} "auto", which takes the Trainer\'s',
            )
    return UserFiles(
        setup=setup, carried=to_plan.convert(setup), clipping=clipping_setting(setup), for_worker=for_worker
    )


Target = Callable[[Handover], Files]


def with_engine_settings(handover: Handover) -> Handover:
    """Return ``handover`` with the user's settings, if it has ``user_files``, merged into the engine's
    configuration files, and with ``kept`` set to the result. If a script of the user trains, the engine's
    files are first replaced by those that `script_files` returns. Raises UserError as `keep_settings`
    does."""
    config = handover.config
    if handover.script:
        config = dataclasses.replace(config, files=script_files(config))
    if handover.user_files is None:
        return dataclasses.replace(handover, config=config)

    def rendered(spec: RunSpec) -> Files:
        launch = render(spec)
        return script_files(launch) if handover.script else launch.files

    settings = _merge_settings(handover.user_files, config.spec, rendered, _OF_ENGINES)
    return dataclasses.replace(
        handover, kept=settings, config=dataclasses.replace(config, files=settings.files)
    )


def with_target_settings(handover: Handover, target: Target) -> Handover:
    """Return ``handover``, which must have ``user_files``, with a new ``kept``. Its ``files`` are all files
    of the export, with the user's settings merged into those that the target itself has, such as
    training_args.json; its other fields also contain those of the former ``kept``. ``target``: the function
    that renders all files of the export. Raises UserError as ``target`` and `keep_settings` do."""
    assert handover.user_files is not None

    def rendered(spec: RunSpec) -> Files:
        files = dict(render(spec).files) | {n: t for n, t in handover.config.files.items() if n in _FORMATS}
        return target(
            dataclasses.replace(handover, config=dataclasses.replace(handover.config, spec=spec, files=files))
        )

    of_target = _FORMATS.keys() - _OF_ENGINES
    settings = _merge_settings(handover.user_files, handover.config.spec, rendered, of_target)
    engine_settings = handover.kept or settings
    combined = UserSettings(
        files=settings.files,
        sources={**engine_settings.sources, **settings.sources},
        changed=tuple(dict.fromkeys((*engine_settings.changed, *settings.changed))),
        not_carried=tuple(dict.fromkeys((*engine_settings.not_carried, *settings.not_carried))),
    )
    return dataclasses.replace(handover, kept=combined)


def _merge_settings(
    user_files: UserFiles, spec: RunSpec, rendered: Callable[[RunSpec], Files], names: Collection[str]
) -> UserSettings:
    """Return the result of merging the user's settings into those files of ``rendered(spec)`` whose names are
    in ``names``. Its ``files`` are all files of ``rendered(spec)``.

    If the user's files set gradient clipping, it stays as it is. If only the job sets it, it is written. If
    neither does, nothing is written, so that the library's default applies. In a file of which the user has
    none, and for memfit's worker, ``spec.clip`` is always written. Raises UserError as ``rendered`` and
    `keep_settings` do.
    """
    clip = None if user_files.clipping.explicit else user_files.job_clip
    new_files = rendered(dataclasses.replace(spec, clip=spec.clip if user_files.for_worker else clip))
    added_files = rendered(spec)
    for name in names & new_files.keys():
        if getattr(user_files.setup, _FORMATS[name].kind) is None:
            new_files = {**new_files, name: added_files[name]}
    batch = user_files.carried.batch or spec.batch_size
    user_spec = dataclasses.replace(spec, plan=user_files.carried.plan, batch_size=batch, clip=None)
    try:
        user_plan_files = rendered(user_spec)
    except UserError:  # the target cannot express the files' own plan: the exported plan decides everything
        user_plan_files = {}
    ranks = layout(spec.plan).data
    own_files = {name: text for name, text in new_files.items() if name in names}
    settings = keep_settings(
        own_files, user_plan_files, user_files.setup, data_ranks=ranks, for_worker=user_files.for_worker
    )
    return dataclasses.replace(settings, files={**new_files, **settings.files})


_OF_ENGINES = frozenset({deepspeed.CONFIG, accelerate.CONFIG, megatron.CONFIG})


def keep_settings(
    files: Files, before: Files, setup: Setup, *, data_ranks: int, for_worker: bool = False
) -> UserSettings:
    """Return the result of merging the user's settings into ``files``, rendered for the exported plan (name
    -> text). ``before``: the same files for the plan that the user's files describe; empty if they cannot be
    rendered, and then the plan decides all settings that ``files`` have. ``setup``: the user's files.
    ``data_ranks``: number of ranks that see different samples. ``for_worker``: True if memfit's worker reads
    the files; then all settings of the plan are written, and "auto" is replaced by a value. Raises UserError
    if the user's file names another file of settings that cannot be used."""
    merged_files, sources = dict(files), {}
    changed: list[str] = []
    not_carried: list[str] = []
    for name, text in files.items():
        file_format = _FORMATS.get(name)
        options: Options | None = getattr(setup, file_format.kind) if file_format is not None else None
        if file_format is None or options is None:
            continue
        user, user_text, omitted = _user_data(file_format, options, setup, name)
        user_plan_leaves = _leaves(file_format.load(before[name])) if name in before else {}
        free_paths = file_format.free if for_worker else None
        new_leaves = _leaves(file_format.load(text))
        merged, changes = _merge_leaves(user, new_leaves, user_plan_leaves, free=free_paths)
        changes += _make_consistent(name, merged, files, data_ranks, bool(changes))
        norm = setup.deepspeed.number(NORMS["deepspeed"]) if setup.deepspeed is not None else None
        if name == trainer.ARGUMENTS and norm is not None and NORMS["trainer"] not in merged:
            merged[NORMS["trainer"]] = norm  # the Trainer refuses DeepSpeed's if its own default is another
            changes.append(_change((NORMS["trainer"],), _MISSING, norm))
        is_unchanged = not changes and user_text is not None and not for_worker
        merged_files[name] = user_text if is_unchanged and user_text is not None else file_format.dump(merged)
        sources[name] = options.file
        changed += [f"{name}: {what}" for what in changes]
        not_carried += omitted
    return UserSettings(
        files=merged_files, sources=sources, changed=tuple(changed), not_carried=tuple(not_carried)
    )


# Options of torchrun, deepspeed and accelerate launch, which the exported script sets itself.
_OF_LAUNCHERS = frozenset(
    {
        "nproc_per_node",
        "nnodes",
        "node_rank",
        "master_addr",
        "master_port",
        "rdzv_backend",
        "rdzv_endpoint",
        "rdzv_id",
        "rdzv_conf",
        "standalone",
        "max_restarts",
        "local_addr",
        "tee",
        "num_gpus",
        "num_nodes",
        "hostfile",
        "include",
        "exclude",
        "config_file",
        "num_processes",
        "num_machines",
        "machine_rank",
        "main_process_ip",
        "main_process_port",
        "no_python",
        "module",
    }
)


def _user_data(
    file_format: _Format, options: Options, setup: Setup, name: str
) -> tuple[dict[str, Any], str | None, list[str]]:
    """Return (the user's settings for the exported file ``name``; the text of the user's file if it may be
    copied as it is, else None; for each setting that is left out because its value is known only when the
    user's script runs, one text). Options of launchers, such as nnodes, which the exported script sets
    itself, are left out without a text. Arguments of the Trainer that name a file of settings, which is not
    in the export, hold these settings instead. Raises UserError if such a file does not exist or does not end
    in .json."""
    path = Path(options.file)
    other_kinds = (
        getattr(setup, kind) for kind in ("accelerate", "trainer", "openfold") if kind != file_format.kind
    )
    # These settings stand within another library's file.
    if any(o is not None and o.file == options.file for o in other_kinds):
        return copy.deepcopy(dict(options.data)), None, []
    text, data = read_data(path)
    if data is not None and file_format.suffixes:
        sections = _sections_of_text(data, options, setup)
        is_copyable = path.suffix in file_format.suffixes and not sections
        return copy.deepcopy(data | sections), text if is_copyable else None, []
    values = option_values(text) if data is None else _flat(data)
    values = {n: words for n, words in values.items() if n not in _OF_LAUNCHERS}
    unknown_names = {n for n, words in values.items() if n in options.unsure or any("$" in w for w in words)}
    omitted = [
        f"--{n} of {path.name}: its value is known only when the script runs" for n in sorted(unknown_names)
    ]
    known_values = {n: w for n, w in values.items() if n not in unknown_names}
    if name == trainer.ARGUMENTS:
        arguments = {n: _parse_words(words) for n, words in known_values.items()}
        return copy.deepcopy(arguments | _sections_of_text(arguments, options, setup)), None, omitted
    options_text = {
        n.replace("_", "-") if name == megatron.CONFIG else n: " ".join(w) for n, w in known_values.items()
    }
    return options_text, None, omitted


def _sections_of_text(data: Mapping[str, Any], options: Options, setup: Setup) -> dict[str, Any]:
    """Return the settings that are text in ``data``, the content of the user's file, but mappings in
    ``options``, which was read from it: arguments of the Trainer that are JSON text or name a JSON file, such
    as fsdp_config. Raises UserError if a file that they name does not exist, as its settings would be
    lost."""
    for name in FILE_ARGUMENTS:
        if data.get(name) in setup.missing:
            raise UserError(
                f"{name} of {options.file} is {data[name]}, which is neither valid JSON nor the name of an "
                "existing .json file, so its settings cannot be kept",
                hint="correct the name, or write the settings in its place, as valid JSON",
            )
    texts = (name for name, value in data.items() if isinstance(value, str))
    return {name: value for name in texts if isinstance(value := options.raw(name), Mapping)}


def _flat(data: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the options in ``data``, the content of a YAML file of Megatron-LM's arguments, as name with
    underscores -> the words of its value. If ``data`` has a section MODEL_ARGS, only the options in it are
    returned. An option that is true has no words; options that are false are left out."""
    arguments = data.get("MODEL_ARGS") if isinstance(data.get("MODEL_ARGS"), Mapping) else data
    assert isinstance(arguments, Mapping)
    values = {str(n).lstrip("-").replace("-", "_"): v for n, v in arguments.items()}
    return {n: () if v is True else tuple(str(v).split()) for n, v in values.items() if v is not False}


def _parse_words(words: tuple[str, ...]) -> Any:
    """Convert the words after an option to the value that the Trainer's own parser makes of them: True for no
    word, a number, boolean or text for one, a list for several."""

    def one(word: str) -> Any:
        for kind in (int, float):
            try:
                return kind(word)
            except ValueError:
                continue
        return {"true": True, "false": False}.get(word.lower(), word)

    return True if not words else one(words[0]) if len(words) == 1 else [one(w) for w in words]


def _leaves(data: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Leaves:
    leaves: Leaves = {}
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, (*prefix, str(name)))
        else:
            leaves[(*prefix, str(name))] = value
    return leaves


def _merge_leaves(
    user: dict[str, Any], new_leaves: Leaves, old_leaves: Leaves, *, free: frozenset[str] | None
) -> tuple[dict[str, Any], list[str]]:
    """Put the settings that the plan decides into the user's settings ``user``. Return ``user`` and one text
    for each change. ``new_leaves``: path -> value in the file rendered for the exported plan. ``old_leaves``:
    the same for the plan that the user's files describe.

    If ``free`` is None, the plan decides the settings whose value differs between ``old_leaves`` and
    ``new_leaves``; those that only ``old_leaves`` has are removed. Otherwise it decides all of
    ``new_leaves``, except those whose dotted path is in ``free`` and that the user sets to another value than
    "auto"; settings that the user does not have are then added without a text.
    """
    changes: list[str] = []
    for path, value in new_leaves.items():
        current = _get(user, path)
        if free is None:
            decides = old_leaves.get(path, _MISSING) != value
        else:
            decides = current is _MISSING or current == "auto" or ".".join(path) not in free
        if decides and current != value:
            changes += [] if current is _MISSING and free is not None else [_change(path, current, value)]
            _set(user, path, value)
    for path in old_leaves.keys() - new_leaves.keys():
        if free is None and (current := _get(user, path)) is not _MISSING:
            (_get(user, path[:-1]) if path[:-1] else user).pop(path[-1])
            changes.append(_change(path, current, _MISSING))
    return user, changes


def _change(path: tuple[str, ...], current: Any, value: Any) -> str:
    old_text, new_text = (
        "not set" if v is _MISSING else json.dumps(v, default=str) for v in (current, value)
    )
    return f"{'.'.join(path)}: {old_text} -> {new_text}"


def _get(data: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        if not isinstance(data, Mapping) or part not in data:
            return _MISSING
        data = data[part]
    return data


def _set(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(data.get(part), dict):
            data[part] = {}
        data = data[part]
    data[path[-1]] = value


def _make_consistent(
    name: str, merged: dict[str, Any], files: Files, data_ranks: int, differs: bool
) -> Iterator[str]:
    """Change settings in ``merged``, the content of the exported file ``name``, that contradict others, and
    yield one text for each change.

    DeepSpeed's file: half precision is switched off if the plan has none, and all but bf16 if several kinds
    are on. If train_batch_size is not micro-batch x accumulation steps x ``data_ranks``, and both factors are
    numbers in the file, it is removed.

    The Trainer's or Accelerate's file, if DeepSpeed's file is exported too: its name is set. Accelerate's
    settings that DeepSpeed's file holds instead are then removed, for which no text of their own is yielded.

    Accelerate's file without DeepSpeed's: FSDP1 becomes FSDP2 if ``differs``: the plan has changed settings
    of this file.
    """
    if name in (deepspeed.CONFIG, openfold.DEEPSPEED):
        yield from _deepspeed_consistent(merged, files[name], data_ranks)
    elif name == trainer.ARGUMENTS and "deepspeed" in json.loads(files[name]):
        if merged.get("deepspeed") != deepspeed.CONFIG:
            merged["deepspeed"] = deepspeed.CONFIG
            yield f"deepspeed: {deepspeed.CONFIG}"
    elif name == accelerate.CONFIG and deepspeed.CONFIG in files:
        section_data = merged.get("deepspeed_config") or {}
        section = {n: v for n, v in section_data.items() if n not in ONLY_IN_DEEPSPEED_FILE}
        section |= {"deepspeed_config_file": deepspeed.CONFIG}
        merged.pop("mixed_precision", None)
        if section != section_data:
            merged["deepspeed_config"] = section
            yield f"deepspeed_config.deepspeed_config_file: {deepspeed.CONFIG}"
    elif name == accelerate.CONFIG and differs and merged.get("fsdp_config", {}).get("fsdp_version") == 1:
        yield from _as_fsdp2(merged["fsdp_config"])


_FSDP1_ONLY = (
    "fsdp_sharding_strategy",
    "fsdp_use_orig_params",
    "fsdp_backward_prefetch",
    "fsdp_forward_prefetch",
    "fsdp_sync_module_states",
)


def _as_fsdp2(section: dict[str, Any]) -> Iterator[str]:
    """Convert ``section``, Accelerate's fsdp_config, in place from FSDP1 to FSDP2, for which the prediction
    holds, and yield one text for each change. Settings that only FSDP1 has are removed."""
    section["fsdp_version"] = 2
    yield "fsdp_config.fsdp_version: 1 -> 2"
    for name in _FSDP1_ONLY:
        if (value := section.pop(name, None)) is not None:
            yield f"fsdp_config.{name}: {json.dumps(value)} -> not set"


def _deepspeed_consistent(merged: dict[str, Any], rendered: str, data_ranks: int) -> Iterator[str]:
    is_bf16 = json.loads(rendered)["bf16"]["enabled"]
    enabled = [n for n in ("fp16", "bf16", "bfloat16", "amp") if (_get(merged, (n, "enabled")) is True)]
    superfluous = [n for n in enabled if not is_bf16 or (n != "bf16" and len(enabled) > 1)]
    for section in superfluous:
        merged[section]["enabled"] = False
        yield f"{section}.enabled: true -> false"
    micro, steps = (merged.get(n) for n in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"))
    total_batch = merged.get("train_batch_size")
    factors = [n for n in (micro, steps) if isinstance(n, int)]
    if isinstance(total_batch, int) and len(factors) == 2 and total_batch != math.prod(factors) * data_ranks:
        del merged["train_batch_size"]
        yield f"train_batch_size: {total_batch} -> not set"
