"""Makes a `Config` from YAML files and overrides, and reports everything that is wrong with them together.

Hydra finds the files (groups, experiments, defaults lists) and parses the overrides. Each file and override is then
checked against the records of conf/schema.py on its own, so that a message can name the place the mistake is in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.errors import ConfigError
from conf.keys import (
    CONFIG_DIR,
    did_you_mean,
    entry_kind,
    enum_choices,
    expected,
    field_kinds,
    group_choices,
    is_record,
    kind_of,
    nearest_keys,
)
from conf.reads import plain, watched_if_asked
from conf.schema import Config, SourceConfig

PRIMARY = "config"
"""Name of the file with the defaults list."""

UNREADABLE = (YAMLError, UnicodeDecodeError, OmegaConfBaseException)
"""What loading a file raises that is not YAML, or not YAML of plain values."""

INTERPOLATION = re.compile(r"(\\*)\$\{")
RESOLVER = re.compile(r"(?<!\\)\$\{[^}]*:")


@dataclass(frozen=True, slots=True)
class Layer:
    """What one file or one override says, as plain nested values."""

    origin: str
    """The file or override, for messages."""
    values: dict[str, Any]
    removed: str = ""
    """Dotted key of an entry to take away (an override "~key"); then `values` is empty."""


@dataclass(slots=True)
class _Complaints:
    """Mistakes found so far, each a sentence or two."""

    texts: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Note one mistake."""
        self.texts.append(text)

    def require_none(self) -> None:
        """Raise all of them as one error.

        Raises: ConfigError when there is any.
        """
        if self.texts:
            raise ConfigError(numbered(self.texts))


def numbered(texts: list[str]) -> str:
    """One complaint as it is, several as a numbered list under a headline."""
    if len(texts) == 1:
        return texts[0]
    lines = [f"  {number}. {text}" for number, text in enumerate(texts, start=1)]
    return "\n".join([f"{len(texts)} settings cannot be used:", *lines])


def compose(overrides: list[str], config_dir: str = "") -> Config:
    """The configuration of a run.

    Args:
        overrides: "group=choice" or "key=value" in Hydra's grammar, later ones win. New entries of dict-valued keys
            need no leading "+"; "~rewards.sources.name" takes an entry away.
        config_dir: a folder of the user's own groups and experiments, laid out as conf/; "" for none.
    Returns: the records of conf/schema.py with every interpolation resolved.
    Raises: ConfigError naming every unknown key, impossible value and unknown choice with the place it came from.
    """
    complaints = _Complaints()
    _check_config_dir(config_dir)
    choices, values = _sort_overrides(_parse(overrides, complaints), config_dir, complaints)
    # Grove's own files do not change while it runs; a user's may, between two calls.
    files = _file_layers(choices, config_dir) if config_dir else _own_layers(tuple(choices))
    return _build([*files, *values], complaints)


def from_yaml(path: str | Path, overrides: list[str] | None = None) -> Config:
    """A configuration that `to_yaml` or a run folder wrote, with overrides of single values on top.

    Its interpolations were resolved when it was made: a "${" that is left is text.

    Raises: ConfigError when the file cannot be read, or anything in it or in the overrides cannot be used.
    """
    complaints = _Complaints()
    choices, values = _sort_overrides(_parse(overrides or [], complaints), "", complaints)
    for choice in choices:
        complaints.add(
            f'"{choice}" chooses a file for a whole group, but the configuration in {path} is already made: only '
            f"single values can be changed, as {choice.partition('=')[0]}.name=..."
        )
    return _build([Layer(str(path), _escaped(_read_yaml(Path(path)))), *values], complaints)


def to_yaml(cfg: Config) -> str:
    """Every setting of a configuration, as `from_yaml` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(plain(cfg)))


# Overrides


def parsed(overrides: list[str]) -> list[Override]:
    """Overrides as Hydra reads them, those with several values for a sweep among them.

    Raises: ConfigError naming those that Hydra cannot read.
    """
    complaints = _Complaints()
    found = _parse(overrides, complaints)
    complaints.require_none()
    return found


def _parse(overrides: list[str], complaints: _Complaints) -> list[Override]:
    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            first_line = str(error).splitlines()[0]
            complaints.add(
                f'"{text}" cannot be read ({first_line}). Write key=value; quote a value with special characters '
                f"for the shell and for Grove: 'run.name=\"my run #1\"'."
            )
    return parsed


def _sort_overrides(
    overrides: list[Override], config_dir: str, complaints: _Complaints
) -> tuple[list[str], list[Layer]]:
    """Choices of group files, for Hydra, and values."""
    groups = group_choices(config_dir)
    choices, values = [], []
    for override in overrides:
        if override.is_sweep_override():
            complaints.add(
                f'"{override.input_line}" lists several values, but one run has one configuration. `grove train -m` '
                f"trains one run for each; or write a list as [a,b], or quote a text with commas: "
                f"'{override.key_or_group}=\"a, b\"'."
            )
        elif override.value() == {} and entry_kind(kind_of(override.key_or_group)) is not None:
            complaints.add(
                f'"{override.input_line}" would change nothing, for entries are added to those there are. Take them '
                f"away one by one with ~{override.key_or_group}.name, or choose a group file without them."
            )
        elif not _is_choice(override, groups):
            values.append(_override_layer(override))
        elif _choice_exists(override, groups, complaints):
            choices.append(cast(str, override.input_line))
    return choices, values


def _is_choice(override: Override, groups: Mapping[str, list[str]]) -> bool:
    return override.key_or_group in groups and not isinstance(override.value(), dict)


def _choice_exists(override: Override, groups: Mapping[str, list[str]], complaints: _Complaints) -> bool:
    group, choice = override.key_or_group, override.value()
    known = groups[group]
    if choice is None or choice in known:
        return True
    hint = did_you_mean(str(choice), known)
    complaints.add(f'{group}="{choice}" is no choice of {group}: there are {", ".join(known)}.{hint}')
    return False


def _override_layer(override: Override) -> Layer:
    origin = f'override "{override.input_line}"'
    if override.is_delete():
        return Layer(origin, {}, removed=override.key_or_group)
    return Layer(origin, _nested(override.key_or_group, override.value()))


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


# Files


def _check_config_dir(config_dir: str) -> None:
    if not config_dir:
        return
    folder = Path(config_dir)
    if not folder.is_dir():
        raise ConfigError(f'there is no folder "{config_dir}" to read your own configuration from: check --config-dir.')
    for file in sorted(folder.rglob("*.yaml")):
        name = file.relative_to(folder)
        if (CONFIG_DIR / name).is_file():
            raise ConfigError(
                f'"{file}" has the name of a file of Grove\'s own ({name.as_posix()}): which of the two a run means '
                f"would be a guess. Give yours another name."
            )


@cache
def _own_layers(choices: tuple[str, ...]) -> list[Layer]:
    return _file_layers(list(choices), "")


def _file_layers(choices: list[str], config_dir: str) -> list[Layer]:
    """The YAML files that the defaults list asks for, in the order they apply."""
    arguments = [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"] if config_dir else []
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            found = loader.compute_defaults_list(PRIMARY, arguments + choices, RunMode.RUN).defaults
    except (HydraException, *UNREADABLE) as error:
        reason = str(error).partition("Config search path")[0].strip()
        raise ConfigError(f"the defaults lists of the configuration files do not work out: {reason}") from error
    return [
        _file_layer(cast(str, each.config_path), each.package or "", config_dir)
        for each in found
        if not cast(str, each.config_path).startswith("hydra/")
    ]


def _file_layer(name: str, package: str, config_dir: str) -> Layer:
    own = CONFIG_DIR / f"{name}.yaml"
    file = own if own.is_file() else Path(config_dir) / f"{name}.yaml"
    values = {key: value for key, value in _read_yaml(file).items() if key != "defaults"}
    origin = f"conf/{name}.yaml" if file == own else str(file)
    return Layer(origin, _nested(package, values) if package else values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror or error}.") from error
    except UNREADABLE as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings by name, but it holds a {type(values).__name__}.")
    return cast(dict[str, Any], values)


def _escaped(value: Any) -> Any:
    """Plain values that OmegaConf will take as they stand."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value


# Checking and merging


def _build(layers: Iterable[Layer], complaints: _Complaints) -> Config:
    merged: dict[str, Any] = {}
    for layer in layers:
        if layer.removed:
            _remove(merged, layer, complaints)
        else:
            reader = _Reader(layer.origin, complaints)
            _merge(merged, reader.record(layer.values, Config, ""))
    complaints.require_none()
    try:
        made = OmegaConf.to_object(OmegaConf.merge(_defaults(), merged))
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{error.full_key or 'a setting'}: {reason}. Check its ${{...}}.") from error
    assert isinstance(made, Config), "the base of the merge is a Config"
    return watched_if_asked(made)


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _remove(merged: dict[str, Any], layer: Layer, complaints: _Complaints) -> None:
    parent, _, name = layer.removed.rpartition(".")
    entries: Any = merged
    for part in parent.split("."):
        entries = entries.get(part, {}) if isinstance(entries, dict) else {}
    if entry_kind(kind_of(parent)) is None:
        complaints.add(
            f"{layer.origin}: only an entry that has a name of its own, like ~rewards.sources.x, can be taken "
            f"away; {layer.removed} is a fixed setting."
        )
    elif name not in entries:
        there = ", ".join(entries) or "none"
        complaints.add(f'{layer.origin}: there is no "{name}" in {parent} to take away; there are: {there}.')
    else:
        del entries[name]


@dataclass(frozen=True, slots=True)
class _Reader:
    """Checks one layer against the records, keeping what is right and complaining of the rest."""

    origin: str
    complaints: _Complaints

    def record(self, values: Any, record: type, key: str) -> dict[str, Any]:
        """The values of one record, checked."""
        if not isinstance(values, dict):
            self._wrong(values, record, key)
            return {}
        if record is SourceConfig and "_target_" in values:
            values = {("target" if name == "_target_" else name): value for name, value in values.items()}
        checked: dict[str, Any] = {}
        for name, value in values.items():
            kind = field_kinds(record).get(str(name))
            if kind is None:
                self._unknown(_join(key, name), value)
            elif is_record(kind) or entry_kind(kind) is not None:
                checked[name] = self._section(value, kind, _join(key, name))
            elif self._is_right(record, name, value, _join(key, name), kind):
                checked[name] = value
        return checked

    def _section(self, value: Any, kind: Any, key: str) -> dict[str, Any]:
        # A YAML section whose lines are all commented out is read as null.
        if value is None and not self.origin.startswith("override"):
            return {}
        if is_record(kind):
            return self.record(value, kind, key)
        if not isinstance(value, dict):
            self._wrong(value, kind, key)
            return {}
        if is_record(entry_kind(kind)):
            return {
                str(name): self.record(entry, cast(type, entry_kind(kind)), _join(key, name))
                for name, entry in value.items()
            }
        return {str(name): entry for name, entry in value.items()}

    def _is_right(self, record: type, name: str, value: Any, key: str, kind: Any) -> bool:
        if isinstance(value, str) and RESOLVER.search(value):
            self.complaints.add(
                f'{key}="{value}" ({self.origin}) asks a resolver: a run is described by its configuration alone, and '
                f"nothing from the environment may end up in the files it writes. Use plain values or ${{other.key}}."
            )
            return False
        try:
            _probe(record)[name] = value
        except (OmegaConfBaseException, TypeError):
            self._wrong(value, kind, key)
            return False
        return True

    def _wrong(self, value: Any, kind: Any, key: str) -> None:
        shown = "null" if value is None else f'"{value}"' if isinstance(value, str) else value
        hint = did_you_mean(str(value), enum_choices(kind))
        if value is None:
            hint = (
                " To take an entry away write ~key." if is_record(kind) else ' There is no null; an empty text is "".'
            )
        self.complaints.add(f"{key}={shown} ({self.origin}): expected {expected(kind)}.{hint}")

    def _unknown(self, key: str, value: Any) -> None:
        # Of a mistyped section, the setting that was meant says more than the section alone.
        while isinstance(value, dict) and len(value) == 1:
            [(name, value)] = value.items()
            key = _join(key, name)
        near = nearest_keys(key)
        if "." not in key and not near:
            hint = did_you_mean(key, group_choices()).strip()
        else:
            hint = f"Did you mean {' or '.join(near)}?" if near else ""
        self.complaints.add(
            f"{key} ({self.origin}) is no setting: it would change nothing. "
            f"{hint or 'List all settings with: grove config --keys'}"
        )


@cache
def _defaults() -> DictConfig:
    """Every default, to merge onto; merging copies it."""
    return OmegaConf.structured(Config)


@cache
def _probe(record: type) -> DictConfig:
    """A record that values are tried on, to learn whether OmegaConf takes them."""
    return OmegaConf.structured(record)


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
