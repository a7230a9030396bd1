"""Finds a user's own function or class from the name a config gives it."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from conf.errors import ConfigError

ENTRY_POINTS = "grove.plugins"
"""Group of the entry points by which an installed package gives its functions short names."""


def load_object(spec: str, *, key: str) -> Any:
    """The object that `spec` names.

    Args:
        spec: "file.py:name", "package.module:name", "package.module.name", or the bare name of an entry point of
            `ENTRY_POINTS` that an installed package has.
        key: config key the spec came from, for messages.
    Raises: ConfigError when the file, module or name does not exist, or importing it raises.
    """
    place, colon, name = spec.rpartition(":")
    if not colon:
        place, _, name = spec.rpartition(".")
    if name and not place and not colon:
        place, name = _entry_point(name, key)
    if not place or not name:
        raise ConfigError(f'{key}="{spec}" names no function: write "file.py:name" or "package.module:name".')
    module = _load_file(Path(place), key) if place.endswith(".py") else _load_module(place, key)
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [each for each in vars(module) if not each.startswith("_")], n=1)
        hint = f' Did you mean "{place}:{near[0]}"?' if near else ""
        raise ConfigError(f'{key}="{spec}": {place} defines no "{name}".{hint}')
    return getattr(module, name)


def _entry_point(name: str, key: str) -> tuple[str, str]:
    """Module and attribute of an installed package's entry point."""
    found = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
    if name not in found:
        known = f"installed packages offer {', '.join(sorted(found))}" if found else "no installed package offers any"
        raise ConfigError(
            f'{key}="{name}" names no function: write "file.py:name" or "package.module:name". A bare name is an entry '
            f'point of the group "{ENTRY_POINTS}", and {known}.'
        )
    return found[name].module, found[name].attr


def _load_file(path: Path, key: str) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f'{key}: there is no file "{path}". Give a path relative to the folder you start grove in.')
    # One module per file: a class and its instances must share one identity, and pickle needs a stable name.
    name = f"grove_plugin_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f'{key}: importing "{path}" raised {type(error).__name__}: {error}') from error
    return module


def _load_module(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(f'{key}: importing "{name}" raised {type(error).__name__}: {error}') from error
