"""What runs inside the jail beside a tested program: `rewards.sources.code` sends this file's text there.

It reads {"nonce", "program", "items"} from descriptor 3, runs the program as a module and then each item in its names:
{"run": statements} or {"value": expression}. For each it writes a line {"nonce", "item", "value"} to descriptor 4, once
it is done; nothing for one that raised. What a value should be is not known here.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Set
from decimal import Decimal
from fractions import Fraction
from typing import Any

MODULE = "solution"


def encoded(value: Any) -> list[Any]:
    """A value of Python's own types, and of types derived from them, as tagged JSON.

    Raises: TypeError for any other.
    """
    if value is None:
        return ["none"]
    if isinstance(value, bool):
        return ["bool", bool(value)]
    if isinstance(value, int):
        return ["int", hex(int(value))]
    if isinstance(value, float):
        return ["float", float.__repr__(value)]
    if isinstance(value, str):
        return ["str", str.__str__(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", repr(value.real), repr(value.imag)]
    if isinstance(value, Fraction | Decimal):
        return ["ratio", *map(hex, value.as_integer_ratio())]
    if isinstance(value, list):
        return ["list", [encoded(each) for each in list.__iter__(value)]]
    if isinstance(value, tuple):
        return ["tuple", [encoded(each) for each in tuple.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[encoded(key), encoded(each)] for key, each in dict.items(value)]]
    if isinstance(value, Set):
        return ["set", [encoded(each) for each in value]]
    raise TypeError(f"{type(value).__name__} is none of Python's own types")


def decoded(told: list[Any]) -> Any:
    """The value that `encoded` wrote.

    Raises: ValueError or TypeError for what it cannot have written.
    """
    match told:
        case ["none"]:
            return None
        case ["bool" | "str", value]:
            return value
        case ["int", digits]:
            return int(digits, 16)
        case ["float", digits]:
            return float(digits)
        case ["bytes", digits]:
            return bytes.fromhex(digits)
        case ["complex", real, imaginary]:
            return complex(float(real), float(imaginary))
        case ["ratio", above, below]:
            return Fraction(int(above, 16), int(below, 16))
        case ["list", values]:
            return [decoded(each) for each in values]
        case ["tuple", values]:
            return tuple(decoded(each) for each in values)
        case ["set", values]:
            return {decoded(each) for each in values}
        case ["dict", pairs]:
            return {decoded(key): decoded(each) for key, each in pairs}
    raise ValueError("no value of a test")


def main() -> None:
    """Run the program, then every item; end without the program's exit handlers."""
    with os.fdopen(3, "rb") as source:
        request = json.load(source)
    # Kept before the program can replace them.
    run, evaluate, prepare, show = exec, eval, compile, print
    write, dumps, finish, encode, answers = os.write, json.dumps, os._exit, encoded, os.dup(4)
    os.close(4)
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    names, nonce = module.__dict__, request.pop("nonce")
    run(prepare(request["program"], "solution.py", "exec"), names)
    for place, item in enumerate(request["items"]):
        try:
            if "value" in item:
                value = encode(evaluate(prepare(item["value"], "test", "eval"), names))
            else:
                run(prepare(item["run"], "test", "exec"), names)
                value = ["none"]
        except BaseException as error:  # also sys.exit: the test did not get to its end
            show(f"{type(error).__name__}: {error}"[:500], file=sys.stderr)
            continue
        line = dumps({"nonce": nonce, "item": place, "value": value}).encode() + b"\n"
        while line:
            line = line[write(answers, line) :]
    finish(0)


if __name__ == "__main__":
    main()
