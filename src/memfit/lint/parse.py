"""Read configuration files and launch scripts of DeepSpeed, Accelerate, the Trainer, Megatron-LM, torchtitan,
OpenFold, Axolotl, LLaMA-Factory, Lightning and MACE. The keys or flags in a file identify its library; a
.toml file can only be torchtitan's."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memfit.files.read import parse_json, parse_toml, parse_yaml, read_text
from memfit.lint.launch_script import Script, read_script
from memfit.lint.shipped_deepspeed import shipped_configuration
from memfit.lint.tables import read_table
from memfit.types.errors import UserError

Found = Iterator[dict[str, Any]]  # one dict per finding: the values that fill the text of the rule

KINDS = {
    "deepspeed": "DeepSpeed JSON",
    "accelerate": "Accelerate YAML",
    "trainer": "Hugging Face TrainingArguments as JSON, YAML or command-line flags",
    "megatron": "Megatron-LM arguments as a script or YAML",
    "torchtitan": "torchtitan TOML",
    "openfold": "OpenFold arguments of train_openfold.py as a script",
    "openfold_config": "OpenFold's JSON of changed settings",
    "axolotl": "Axolotl YAML",
    "llamafactory": "LLaMA-Factory YAML or command-line flags",
    "lightning": "YAML of Lightning's command line",
    "mace": "mace_run_train flags as a script or YAML",
}
_MOST_BYTES = 1 << 20  # larger files are refused: they are data given by mistake, not configurations

# Keys that identify a library. A file's kind is the one of whose keys it has the most.
_MARKS: dict[str, frozenset[str]] = {
    kind: frozenset(keys) for kind, keys in read_table("marks.toml")["most"].items()
}
# Files of these front ends have many keys of other libraries too. Kind -> (keys of which each of its files
# has one, keys of which it has at least two more).
_FRONT_ENDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    kind: (frozenset(keys["one_of"]), frozenset(keys["more"]))
    for kind, keys in read_table("marks.toml")["front_end"].items()
}
_MACE_PROGRAMS = read_table("marks.toml")["programs"]["mace"]
# Arguments of Lightning's Trainer, of which the section trainer of a file of its command line has one.
_LIGHTNING = frozenset(read_table("marks.toml")["lightning"]["trainer"])
_SCRIPTS = ("megatron", "trainer", "openfold")
# Top-level names of OpenFold's configuration. A change of it is a flat key such as "globals.chunk_size".
OPENFOLD_PARTS = frozenset({"data", "globals", "model", "relax", "loss", "ema"})
# Recognizes OpenFold's keys. "model." alone is not enough: keys of other networks start with "model.layers.".
_FOLD = re.compile(r"(data|globals|relax|loss|ema|model\.(template|heads|\w+_(embedder|msa|stack|module)))\.")
_TITAN = {"job", "model", "training", "parallelism", "activation_checkpoint", "optimizer", "lr_scheduler"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The settings of one file. ``data``: these settings, with sections as nested mappings; the methods take
    a dotted path, such as "fp16.enabled". ``file``: path of the file; ``env``: environment variables that a
    script exports or that ENV_VARS of Megatron-LM's test cases sets; ``unsure``: settings that a script gives
    within a branch or a loop, or twice with different values. ``defaults``: True if options that are not
    given have Megatron-LM's own defaults; False if Megatron-LM's options are written with underscores, as
    front ends write them, which may have other defaults."""

    file: str
    data: Mapping[str, Any]
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsure: frozenset[str] = frozenset()
    defaults: bool = True

    def raw(self, path: str) -> Any:
        """Return the value at ``path`` as written, also "auto" or an unknown variable such as "$BATCH"; None
        if it is not given or null."""
        node: Any = self.data
        for part in path.split("."):
            if not isinstance(node, Mapping):
                return None
            node = node.get(part)
        return node

    def get(self, path: str) -> Any:
        """Return the value at ``path``, or None if it is not given, null, empty text, left to the library
        ("auto"), or known only when the script runs (see `undetermined`)."""
        value = self.raw(path)
        return None if value in ("auto", "") or self.undetermined(path) else value

    def undetermined(self, path: str) -> bool:
        """Return whether ``path`` is given, but its value is known only when the script runs: it contains a
        variable ("$BATCH") or the output of a command, or ``path`` is in ``unsure``."""
        value = self.raw(path)
        return path in self.unsure or (isinstance(value, str) and ("$" in value or "`" in value))

    def number(self, path: str) -> float | None:
        """Return the value of `get` as a float, also if it is a number written as text. Return None if it is
        a boolean or no finite number."""
        value = self.get(path)
        try:
            number_value = None if isinstance(value, bool) or value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        return number_value if number_value is not None and math.isfinite(number_value) else None

    def count(self, path: str) -> int | None:
        """Return the value of `number` as an integer: 5 for 5.0 and "5". Return None if it is None or no
        whole number."""
        number_value = self.number(path)
        return int(number_value) if number_value is not None and number_value == int(number_value) else None

    def count_or(self, path: str, default: int) -> int | None:
        """Return ``default`` if no value is given or it is null, otherwise the result of `count`: None if the
        value is "auto" or known only when the script runs."""
        return default if self.raw(path) is None and path not in self.unsure else self.count(path)

    def on(self, path: str) -> bool:
        return str(self.get(path)).lower() in ("true", "1", "yes")

    def off(self, path: str) -> bool:
        return str(self.get(path)).lower() in ("false", "0", "no")

    def size(self, path: str) -> int | None:
        """Return the value of `count` if it is at least 1, otherwise None."""
        integer_value = self.count(path)
        return integer_value if integer_value is not None and integer_value >= 1 else None

    def texts(self, path: str) -> tuple[str, ...]:
        """Return, as strings, the items of the list at ``path`` or, if the value is text, its words, which
        are separated by spaces. Return an empty tuple for any other value, and for one that `get` returns as
        None."""
        value = self.get(path)
        words = value.split() if isinstance(value, str) else value if isinstance(value, list) else ()
        return tuple(str(w) for w in words)

    def section(self, path: str) -> Mapping[str, Any]:
        """Return the mapping at ``path``, or an empty one if the value there is no mapping."""
        value = self.raw(path)
        return value if isinstance(value, Mapping) else {}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The settings of one set-up. Each of the first eleven fields holds the settings of one kind of file,
    None if there are none of this kind; settings of DeepSpeed and Megatron-LM may also stand in another
    library's file, and a file of LLaMA-Factory also holds arguments of the Trainer. ``ranks``: the number of
    processes, None if unknown; ``parameters``: the number of parameters of the job's model, None if unknown;
    ``missing``: names of files that a file names and that do not exist or do not end in .json. The files of
    OpenFold's --experiment_config_json and of MACE's --config may end otherwise; the latter is missing, too,
    if it is not .yaml, .yml, .json or .toml. DeepSpeed's files that Axolotl and LLaMA-Factory ship are not
    missing. ``missing`` also has text of the Trainer's accelerator_config or fsdp_config that is no mapping
    in JSON."""

    deepspeed: Options | None = None
    accelerate: Options | None = None
    trainer: Options | None = None
    megatron: Options | None = None
    torchtitan: Options | None = None
    openfold: Options | None = None
    openfold_config: Options | None = None
    axolotl: Options | None = None
    llamafactory: Options | None = None
    lightning: Options | None = None
    mace: Options | None = None
    ranks: int | None = None
    parameters: int | None = None
    missing: tuple[str, ...] = ()

    @property
    def fsdp(self) -> Options | None:
        """The settings of the file that switches FSDP on; None if none does. These are Accelerate's if its
        distributed_type is FSDP, otherwise the Trainer's if its argument fsdp is neither empty nor off, or
        Axolotl's if its fsdp_config is not empty. The result then has only Axolotl's fsdp_config, its names
        without the prefix ``fsdp_`` and with a version, 1 unless the file says otherwise."""
        if self.accelerate is not None and str(self.accelerate.raw("distributed_type")).upper() == "FSDP":
            return self.accelerate
        trainer_uses_fsdp = (
            self.trainer is not None and bool(self.trainer.get("fsdp")) and not self.trainer.off("fsdp")
        )
        if trainer_uses_fsdp or self.axolotl is None:
            return self.trainer if trainer_uses_fsdp else None
        section = self.axolotl.section("fsdp_config")
        if not section:
            return None
        section = {str(k).removeprefix("fsdp_"): v for k, v in section.items()}
        version = self.axolotl.raw("fsdp_version") or section.get("version") or 1
        return dataclasses.replace(self.axolotl, data={"fsdp_config": {**section, "version": version}})

    @property
    def mixed_precision(self) -> str | None:
        """The mixed precision: "bf16", "fp16", "fp8" or "no". It is that which the Trainer's arguments switch
        on ("bf16" if they switch on bf16 and fp16), otherwise that of Accelerate's file, in small letters. If
        neither gives one, it is "no" if there are arguments of the Trainer, else None."""
        args, accelerate = self.trainer, self.accelerate
        if args is not None and (enabled := [n for n in ("bf16", "fp16") if args.on(n)]):
            return enabled[0]
        value = accelerate.get("mixed_precision") if accelerate is not None else None
        if value is None:
            return None if args is None else "no"
        return str(value).lower().replace("false", "no")  # YAML reads the word no as False

    @property
    def files(self) -> tuple[str, ...]:
        settings_by_kind = (getattr(self, kind) for kind in KINDS)
        return tuple(dict.fromkeys(options.file for options in settings_by_kind if options is not None))


def read(paths: Sequence[Path], *, ranks: int | None = None, parameters: int | None = None) -> Setup:
    """Read ``paths``, and the files of settings that they name, as one set-up. ``ranks``: the number of
    processes; None: the number that the files give, if they do. ``parameters``: see Setup. A named file that
    does not exist is listed in ``missing``, as Setup says. Raises UserError if a file, also a named one,
    cannot be read, is above 1 MiB (YAML and TOML: 262,144 characters), is no text in UTF-8, is not valid
    JSON, YAML or TOML or exceeds the other limits of `memfit.files.read`; if a file holds no keys or is of no
    known kind; if two of ``paths`` are of the same kind; if OpenFold's settings are nested keys, or a key
    lies below one that has a plain value; and if the file of OpenFold's --experiment_config_json is of
    another kind."""
    options_by_kind: dict[str, Options] = {}
    missing: list[str] = []
    for path in paths:
        kind, options = _read_one(path)
        if kind in options_by_kind:
            raise UserError(
                f"{options_by_kind[kind].file} and {options.file} are both {KINDS[kind]}",
                allowed="at most one file of each kind, such as one DeepSpeed JSON and one Accelerate YAML",
            )
        options_by_kind[kind] = options
    if (flags := options_by_kind.get("mace")) is not None:
        options_by_kind["mace"] = _with_config(flags, missing)
    if (factory := options_by_kind.get("llamafactory")) is not None:
        options_by_kind.setdefault("trainer", factory)
    if (options_of_trainer := options_by_kind.get("trainer")) is not None:
        options_by_kind["trainer"] = _with_mappings(options_of_trainer, missing)
    for kind, options in list(options_by_kind.items()):
        _follow(kind, options, options_by_kind, missing)
    _follow_changes(options_by_kind, missing)
    if ranks is None:
        ranks = _ranks(options_by_kind)
    return Setup(**options_by_kind, ranks=ranks, parameters=parameters, missing=tuple(missing))


def _read_one(path: Path) -> tuple[str, Options]:
    text = _text(path)
    data = _data(path, text)
    if (front_end := _front_end(data, text)) is not None:
        if isinstance(data, Script):
            return front_end, Options(file=str(path), data=data.flags, env=data.env, unsure=data.unsure)
        return front_end, Options(file=str(path), data=_section_of_fit(data))
    if isinstance(data, Script):
        kind = max(_SCRIPTS, key=lambda k: len(_MARKS[k] & data.flags.keys()))
        if not _MARKS[kind] & (data.flags.keys() | data.unsure):
            raise _unknown(path, "it contains no option of a training library")
        uses_library_defaults = not _MARKS["megatron"] & data.underscored
        return kind, Options(
            file=str(path), data=data.flags, env=data.env, unsure=data.unsure, defaults=uses_library_defaults
        )
    if isinstance(data.get("MODEL_ARGS"), Mapping):  # the form of Megatron-LM's own test cases
        variables = data.get("ENV_VARS")
        env = {k: str(v) for k, v in variables.items()} if isinstance(variables, Mapping) else {}
        return "megatron", Options(file=str(path), data=_snake(data["MODEL_ARGS"]), env=env)
    if path.suffix == ".toml":
        if len(_TITAN & data.keys()) < 2:
            raise _unknown(path, _keys_of(data))
        return "torchtitan", Options(file=str(path), data=data)
    if (changes := _changes(path, data)) is not None:
        return "openfold_config", Options(file=str(path), data=changes)
    settings = _snake(data)
    scores = {kind: _score(kind, marks, settings) for kind, marks in _MARKS.items()}
    kind = max(scores, key=lambda k: scores[k])
    if not scores[kind]:
        raise _unknown(path, _keys_of(data))
    underscored = {str(k) for k in data if "_" in str(k)}  # Megatron-LM's own parser accepts only hyphens
    uses_library_defaults = not _MARKS["megatron"] & underscored
    return kind, Options(file=str(path), data=_sections(kind, settings), defaults=uses_library_defaults)


def _front_end(data: Mapping[Any, Any] | Script, text: str) -> str | None:
    """Return "axolotl", "llamafactory", "mace" or "lightning" if ``data``, the content of a file, is settings
    of this front end, otherwise None. ``text``: the file as it is written."""
    keys = {str(key) for key in (data.flags if isinstance(data, Script) else data)}
    for kind, (any_of, two_of) in _FRONT_ENDS.items():
        is_allowed = kind != "axolotl" or not isinstance(data, Script)
        if is_allowed and keys & any_of and len(keys & (two_of | any_of)) > 2:
            return kind
    if isinstance(data, Script):
        return "mace" if any(program in text for program in _MACE_PROGRAMS) else None
    trainer = _section_of_fit(data).get("trainer")
    return "lightning" if isinstance(trainer, Mapping) and _LIGHTNING & trainer.keys() else None


def _section_of_fit(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the section "fit" of ``data`` if it has a section trainer: Lightning's command line accepts the
    settings of several subcommands in one file. Otherwise return ``data``."""
    fit = data.get("fit")
    return dict(fit if isinstance(fit, Mapping) and "trainer" in fit else data)


def _with_config(flags: Options, missing: list[str]) -> Options:
    """Return the flags of mace_run_train together with the settings of the YAML file that its flag --config
    names; flags take precedence. If the file does not exist or its suffix is not .yaml, .yml, .json or .toml,
    add its name to ``missing``. Raises UserError if it cannot be read or parsed, or holds no keys."""
    name = flags.get("config")
    if name is None:
        return flags
    target = _find_file(flags, name)
    data = _data(target, _text(target)) if target is not None else None
    if not isinstance(data, dict):
        missing.append(str(name))
        return flags
    return dataclasses.replace(flags, data={**data, **flags.data})


def _changes(path: Path, data: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Convert OpenFold's flat keys in ``data``, such as "globals.chunk_size", to nested mappings. Return None
    for data of another library. As in OpenFold, a key such as "globals.eps" is set after its parents, here
    "globals", wherever it stands in ``data``. Raises UserError if the keys are nested already, or if a parent
    has a plain value. ``path`` names the file in the errors."""
    keys = [str(key) for key in data]
    if "globals" in keys and set(keys) <= OPENFOLD_PARTS:
        raise UserError(
            f"{path} contains OpenFold's settings as nested keys",
            allowed='flat keys, as OpenFold reads them: {"globals.chunk_size": 4} instead of '
            '{"globals": {"chunk_size": 4}}',
        )
    if not any(map(_FOLD.match, keys)):
        return None
    nested: dict[str, Any] = {}
    for key, value in sorted(data.items(), key=lambda item: str(item[0]).count(".")):
        *parents, last = str(key).split(".")
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(
                    f"{path} sets {key}, but also gives a key above it a plain value, not a mapping "
                    '("a" is above "a.b")',
                    allowed='either a plain value for a key such as "a", or keys below it such as "a.b"',
                )
        node[last] = value
    return nested


def read_data(path: Path) -> tuple[str, dict[str, Any] | None]:
    """Return the text of the file ``path`` and its data, with keys as written. The data is None for a file
    whose suffix is not .toml, .json, .yaml or .yml: it counts as a shell script. Raises UserError for a file
    that cannot be read, is above 1 MiB (YAML and TOML: 262,144 characters) or is no UTF-8 text, and for one
    whose suffix says TOML, JSON or YAML but which is not valid or holds a list or a single value instead of
    keys."""
    text = _text(path)
    data = _data(path, text)
    return text, None if isinstance(data, Script) else data


def _score(kind: str, marks: frozenset[str], data: Mapping[str, Any]) -> int:
    """Return how many of ``marks``, the keys that identify the library ``kind``, the top level of ``data``
    has. "fp16", "bf16" and "activation_checkpointing" do not count for DeepSpeed unless they are mappings,
    nor for the Trainer if they are mappings."""
    sections = {k for k in ("fp16", "bf16", "activation_checkpointing") if isinstance(data.get(k), Mapping)}
    switches = {"fp16", "bf16", "activation_checkpointing"} - sections
    ambiguous = switches if kind == "deepspeed" else sections if kind == "trainer" else set()
    return len((marks - ambiguous) & data.keys())


def _text(path: Path) -> str:
    return read_text(path, most_bytes=_MOST_BYTES, encoding="utf-8-sig")


# DeepSpeed parses its file as HJSON, which allows comments.
_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/\*.*?\*/', re.DOTALL)


def _data(path: Path, text: str) -> dict[str, Any] | Script:
    if path.suffix == ".toml":
        return parse_toml(text, what=str(path))
    if path.suffix not in (".json", ".yaml", ".yml"):
        return read_script(text)
    if path.suffix == ".json":
        without_comments = _COMMENT.sub(lambda m: m[0] if m[0].startswith('"') else "", text)
        data = parse_json(without_comments, what=str(path))
    else:
        data = parse_yaml(text, what=str(path))
    if not isinstance(data, dict):
        raise _unknown(path, f"it must contain keys with values, not a {type(data).__name__}")
    return data


def _unknown(path: Path, what_was_found: str) -> UserError:
    return UserError(
        f"{path} is not a configuration that memfit can read: {what_was_found}",
        allowed=f"a configuration of a training library, one of: {'; '.join(KINDS.values())}",
    )


def _keys_of(data: Mapping[str, Any]) -> str:
    return f"its keys (up to six) are {', '.join(map(str, list(data)[:6])) or 'none'}"


def _snake(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Return ``data`` with its top-level keys converted to Python names; ``--micro-batch-size`` and
    ``micro-batch-size`` become ``micro_batch_size``. Keys of nested mappings stay as they are."""
    return {str(k).lstrip("-").replace("-", "_"): v for k, v in data.items()}


def _sections(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    """For Accelerate and the Trainer, remove the prefixes fsdp_, megatron_lm_ and parallelism_config_ from
    the names of the settings in the sections fsdp_config, megatron_lm_config and parallelism_config: files
    have some names with the prefix and some without. Changes ``data`` in place and returns it; for other
    libraries it stays as it is."""
    prefixes = {
        "fsdp_config": "fsdp_",
        "megatron_lm_config": "megatron_lm_",
        "parallelism_config": "parallelism_config_",
    }
    for name, prefix in prefixes.items() if kind in ("accelerate", "trainer") else ():
        if isinstance(data.get(name), Mapping):
            data[name] = {str(k).removeprefix(prefix): v for k, v in data[name].items()}
    return data


def _follow(kind: str, options: Options, options_by_kind: dict[str, Options], missing: list[str]) -> None:
    """Add to ``options_by_kind`` the DeepSpeed or Megatron-LM settings that belong to the file ``options``,
    of kind ``kind``, unless ``options_by_kind`` has settings of that library already. Settings of Megatron-LM
    may stand in Accelerate's file; those of DeepSpeed may stand in the file itself or in a JSON file that it
    names. If the named file does not exist or its name does not end in .json, take the DeepSpeed file of this
    name that Axolotl or LLaMA-Factory ships, in a set-up of these; if there is none, add the name to
    ``missing``. Raises UserError as `_read_named_json` does."""
    reference: Any = None
    if kind in ("trainer", "axolotl"):
        reference = options.raw("deepspeed")
    elif kind == "accelerate" and str(options.raw("distributed_type")).upper() == "DEEPSPEED":
        precision = Setup(accelerate=options, trainer=options_by_kind.get("trainer")).mixed_precision
        reference = options.raw("deepspeed_config.deepspeed_config_file") or _as_deepspeed(options, precision)
    elif kind in ("megatron", "openfold"):
        reference = options.get("deepspeed_config") or options.get("deepspeed_config_path")
    elif kind == "accelerate" and str(options.raw("distributed_type")).upper() == "MEGATRON_LM":
        options_by_kind.setdefault("megatron", Options(file=options.file, data=_as_megatron(options)))
    if not reference or reference in ("none", True) or "deepspeed" in options_by_kind:
        return
    if isinstance(reference, Mapping):
        options_by_kind["deepspeed"] = Options(file=options.file, data=reference)
    elif (named := _read_named_json(options, reference, missing)) is not None:
        options_by_kind["deepspeed"] = named
    elif {"axolotl", "llamafactory"} & options_by_kind.keys() and (
        shipped := shipped_configuration(str(reference))
    ):
        options_by_kind["deepspeed"] = Options(file=f"{reference}, as the library ships it", data=shipped)
        missing.remove(str(reference))


def _follow_changes(options_by_kind: dict[str, Options], missing: list[str]) -> None:
    """Add to ``options_by_kind`` the settings in the file that OpenFold's --experiment_config_json names,
    unless it has such settings already. Add the name to ``missing`` if the file does not exist. Raises
    UserError if the file cannot be read or is not OpenFold's JSON of changed settings."""
    options = options_by_kind.get("openfold")
    name = options.get("experiment_config_json") if options is not None else None
    if options is None or not name or "openfold_config" in options_by_kind:
        return
    if (target := _find_file(options, name)) is None:
        missing.append(str(name))
        return
    kind, changes = _read_one(target)
    if kind != "openfold_config":
        raise UserError(
            f"{target}, which train_openfold.py's argument --experiment_config_json names, is {KINDS[kind]}",
            allowed=f'{KINDS["openfold_config"]}, with keys such as "globals.chunk_size"',
        )
    options_by_kind["openfold_config"] = changes


# Arguments of the Trainer that may be given as JSON text, and those of them that otherwise name a JSON file
# (transformers 5.24, training_args.py, _VALID_DICT_FIELDS and its uses; read 2026-11).
_MAPPINGS = (
    "accelerator_config",
    "activation_checkpointing_kwargs",
    "deepspeed",
    "fsdp_config",
    "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs",
)
FILE_ARGUMENTS = ("accelerator_config", "fsdp_config")


def _with_mappings(options: Options, missing: list[str]) -> Options:
    """Return the Trainer's arguments with mappings in place of those given as JSON text. accelerator_config
    and fsdp_config may instead name a JSON file: its content then takes the place of the name. If the file
    does not exist or its name does not end in .json, the name stays and is added to ``missing``. The same
    happens to text in these two that is no mapping in JSON; such text in other arguments just stays. Raises
    UserError as `_read_named_json` does."""
    data = dict(options.data)
    for name in _MAPPINGS:
        value = options.get(name)
        if not isinstance(value, str):
            continue
        if (mapping := _mapping(value)) is not None:
            data[name] = mapping
        elif name in FILE_ARGUMENTS and (named := _read_named_json(options, value, missing)) is not None:
            data[name] = named.data
    return dataclasses.replace(options, data=_sections("trainer", data))


def _mapping(text: str) -> dict[str, Any] | None:
    """Return the mapping that the JSON text ``text`` holds, or None if it is not valid or holds no
    mapping."""
    try:
        data = parse_json(text, what="an argument")
    except UserError:
        return None
    return data if isinstance(data, dict) else None


def _read_named_json(options: Options, name: Any, missing: list[str]) -> Options | None:
    """Return the content of the JSON file ``name`` that the file of ``options`` names. It is searched in each
    folder above that file, from the innermost, and in the current folder. If it does not exist, or its name
    does not end in .json, add ``name`` to ``missing`` and return None. Raises UserError if it cannot be read,
    is above 1 MiB, or does not hold keys in valid JSON."""
    target = _find_file(options, name)
    if target is None or target.suffix != ".json":
        missing.append(str(name))
        return None
    return Options(file=str(target), data=_data(target, _text(target)))  # type: ignore[arg-type]


def _find_file(options: Options, name: Any) -> Path | None:
    # Projects often name files relative to their root, so every folder above the file is tried.
    folders = (*Path(options.file).absolute().parents, Path.cwd())
    try:
        return next((folder / str(name) for folder in folders if (folder / str(name)).is_file()), None)
    except OSError:  # a text that is no file name, such as JSON of more than 255 bytes
        return None


def _as_deepspeed(options: Options, precision: str | None) -> dict[str, Any]:
    """Return the DeepSpeed configuration that Accelerate builds from its file ``options`` if this file names
    no DeepSpeed file (utils/dataclasses.py, DeepSpeedPlugin, Accelerate 1.15, 2026-11). ``precision``: the
    mixed precision of the whole set-up, None if unknown."""
    section = options.section("deepspeed_config")
    zero: dict[str, Any] = {"stage": section.get("zero_stage", 2)}
    for name in ("offload_optimizer", "offload_param"):
        device, path = section.get(f"{name}_device", "none"), section.get(f"{name}_nvme_path")
        zero[name] = {"device": device} | ({"nvme_path": path} if path else {})
    zero["stage3_gather_16bit_weights_on_model_save"] = section.get("zero3_save_16bit_model", False)
    data: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": section.get("gradient_accumulation_steps", 1),
        "zero_optimization": zero,
    }
    if section.get("gradient_clipping"):
        data["gradient_clipping"] = section["gradient_clipping"]
    if precision in ("bf16", "fp16", "fp8"):
        data["fp16" if precision == "fp16" else "bf16"] = {"enabled": True}
    return data


_MEGATRON_NAMES = {
    "tp_degree": "tensor_model_parallel_size",
    "pp_degree": "pipeline_model_parallel_size",
    "num_micro_batches": "num_micro_batches",
    "sequence_parallelism": "sequence_parallel",
    "recompute_activations": "recompute_activations",
    "use_distributed_optimizer": "use_distributed_optimizer",
}


def _as_megatron(options: Options) -> dict[str, Any]:
    section = options.section("megatron_lm_config")
    data = {_MEGATRON_NAMES[k]: v for k, v in section.items() if k in _MEGATRON_NAMES}
    precision = str(options.raw("mixed_precision"))
    return data | ({precision: True} if precision in ("bf16", "fp16") else {})


def _ranks(options_by_kind: Mapping[str, Options]) -> int | None:
    if (options := options_by_kind.get("accelerate")) is not None:
        return options.size("num_processes")
    if (options := options_by_kind.get("openfold")) is not None:
        counts = [1 if options.raw(n) is None else options.count(n) for n in ("gpus", "num_nodes")]
        return counts[0] * counts[1] if counts[0] and counts[1] else None
    if (options := options_by_kind.get("lightning")) is not None:
        return _devices_of_lightning(options)
    for options in (options_by_kind[k] for k in ("megatron", "trainer", "mace") if k in options_by_kind):
        nodes = 1 if options.raw("nnodes") is None else options.count("nnodes")
        processes_per_node = options.count("nproc_per_node") or options.count("num_gpus")
        if nodes and processes_per_node:
            return nodes * processes_per_node
    return None


def _devices_of_lightning(options: Options) -> int | None:
    """Return devices x nodes of Lightning's Trainer; None if the file leaves the devices of a node open, as
    "auto" and -1 do. The devices are a number or a list, in trainer.devices or, as in older releases,
    trainer.gpus; without num_nodes there is one node."""
    value, nodes = options.get("trainer.devices"), options.get("trainer.num_nodes")
    value = options.get("trainer.gpus") if value is None else value
    if isinstance(value, str) and "," in value:
        value = [part for part in value.split(",") if part.strip()]
    devices = len(value) if isinstance(value, list) else options.size("trainer.devices")
    if devices is None and not isinstance(value, list):
        devices = options.size("trainer.gpus")
    count = 1 if nodes is None else options.size("trainer.num_nodes")
    return devices * count if devices and count else None
