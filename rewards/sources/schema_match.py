"""Does the answer have the form that was asked for?"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, validators

from conf.errors import first_line
from rollout.types import StepFacts

RUNS_APART = True
"""Scored in a process that a deadline can kill: a `pattern` of the schema may backtrack for hours on some answer."""
FENCED = re.compile(r"```(?:json)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
NUM_SCHEMAS = 256
"""Validators kept: a data set has few schemas or one a row."""


def json_schema(facts: StepFacts, schema: Mapping[str, Any] | bool | str) -> float:
    """1 when the final answer is JSON that satisfies a schema, else 0; 0 without an answer.

    The whole answer is read as JSON, or, where it holds blocks fenced by ```json, the last one of them. NaN and
    Infinity are no JSON. The draft is the one that the schema's "$schema" names, else 2020-12; `format` is not checked.

    Args:
        facts: of the trajectory's last step.
        schema: a JSON schema, or its text.
    Raises: ValueError for a schema that is not valid, or that refers to another document: nothing is fetched. Both are
        failed scores.
    """
    validator = _validator(schema if isinstance(schema, str) else json.dumps(schema))
    if facts.answer is None:
        return 0.0
    blocks = FENCED.findall(facts.answer)
    try:
        found = json.loads(blocks[-1] if blocks else facts.answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return float(_is_valid(validator, found))


def _is_valid(validator: Any, found: Any) -> bool:
    try:
        return validator.is_valid(found)
    except RecursionError:
        return False  # nested deeper than Python can follow: no schema that ends asks for it
    except Exception as error:
        # jsonschema's own wrapper of an unresolvable reference is private
        raise ValueError(f"the schema cannot be followed ({error}); write what it refers to into it") from error


@lru_cache(NUM_SCHEMAS)
def _validator(text: str) -> Any:
    try:
        schema: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f'the schema "{text[:80]}" is no JSON: {error}') from error
    if not isinstance(schema, dict | bool):
        raise ValueError(f'the schema "{text[:80]}" is a {type(schema).__name__}; it must be an object, true or false')
    kind = validators.validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)  # pyright: ignore[reportArgumentType]
    except Exception as error:
        raise ValueError(f'the schema "{text[:80]}" is not valid: {first_line(error)}') from error
    # This registry knows the published meta-schemas alone; the library's default would ask the network for the rest.
    return kind(schema, registry=validators.SPECIFICATIONS)  # pyright: ignore[reportAttributeAccessIssue]


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
