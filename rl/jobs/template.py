"""Filling the templates of batch scripts and manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError

from conf.errors import ConfigError

FOLDER = Path(__file__).parent / "templates"


def filled(own: str, name: str, values: dict[str, Any]) -> str:
    """A template with its values.

    Args:
        own: the user's file; "" for Grove's.
        name: of Grove's.
    Raises: ConfigError when the user's file is no template, or asks for a value that there is not.
    """
    path = Path(own) if own else FOLDER / name
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["text"] = json.dumps  # a text of JSON is one of YAML
    try:
        return environment.from_string(path.read_text(encoding="utf-8")).render(values)
    except (TemplateError, OSError) as error:
        raise ConfigError(f"the template {path} cannot be filled ({error}). There are: {', '.join(values)}.") from error
