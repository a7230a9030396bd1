"""Packages that only some tasks need: `pip install --no-deps -r requirements/envs.txt`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from conf.errors import ConfigError


def import_optional(name: str, stand_ins: Mapping[str, Sequence[str]] | None = None) -> Any:
    """The module `name` of an optional package.

    Args:
        name: the module, e.g. "textworld".
        stand_ins: modules that `name` imports and this task never uses, which need a compiler to install; where one is
            missing, an empty module takes its place, with these classes of warnings.
    Raises: ConfigError when the package is not installed.
    """
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f'This task needs the package "{package}", which is not installed: pip install --no-deps -r '
            "requirements/envs.txt (the extra `envs`)."
        )
    for missing, warned in (stand_ins or {}).items():
        if missing not in sys.modules and importlib.util.find_spec(missing) is None:
            module = ModuleType(missing, f"Stands for {missing}, which is not installed.")
            for each in warned:
                setattr(module, each, type(each, (UserWarning,), {}))
            sys.modules[missing] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old syntax in packages that nobody here can change
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f'The package "{package}" cannot be imported ({error}): install all of requirements/envs.txt.'
            ) from error
