"""What a reward's arguments are, by name, and what they contain."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from conf.subject import SERVICES
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt

MODEL, ENGINE = SERVICES
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a source's function."""

    rows: tuple[int, ...]
    """Rows whose scores it gives; `rollout.tree.ROOT` is the prompt."""
    other: int = ROOT
    """Row that a pair's first is compared with."""


class Arguments:
    """The arguments of all calls of one function about one tree."""

    def __init__(self, tree: Tree, args: Mapping[str, Any], services: Mapping[str, Any]) -> None:
        """Args: `args` of the function's own; `services`: what fills `model` and `engine`."""
        self._tree, self._args, self._services = tree, args, services

    def of(self, call: Call, names: Mapping[str, str]) -> dict[str, Any]:
        """Values of the arguments, by parameter; `names` says which parameter asks for which."""
        return {parameter: self._value(name, call) for parameter, name in names.items()}

    def _value(self, name: str, call: Call) -> Any:
        tree, row = self._tree, call.rows[0]
        match name:
            case "step":
                return tree.nodes[row]
            case "trajectory":
                return self._path(row)
            case "facts":
                return tree.nodes[row].facts
            case "siblings":
                return [tree.nodes[each] for each in self._children[tree.nodes[row].parent] if each != row]
            case "other":
                return tree.nodes[call.other]
            case "other_trajectory":
                return self._path(call.other)
            case "steps":
                return [tree.nodes[each] for each in call.rows]
            case "trajectories":
                return [self._path(each) for each in call.rows]
            case "rows":
                return list(call.rows)
            case "tree":
                return tree
            case "prompt":
                return tree.prompt
            case "question":
                return tree.prompt.question
            case "answer":
                return tree.prompt.answer
        if name in self._services:
            return self._services[name]
        return self._args[name] if name in self._args else tree.prompt.data[name]

    def digest(self, call: Call, names: Mapping[str, str], version: str) -> str:
        """Name of the content of a call: equal for calls that a function of `version` must answer alike.

        Content is what was said and done: tokens, texts, facts, the prompt and its columns. Log-probabilities, versions
        of weights and row numbers are none.
        """
        found = blake2b(version.encode(), digest_size=DIGEST_BYTES)
        for name in names.values():
            found.update(name.encode() + b"\0" + self._content(name, call))
        return found.hexdigest()

    def _content(self, name: str, call: Call) -> bytes:
        row = call.rows[0]
        match name:
            case "step" | "facts":
                return self._nodes[row]
            case "trajectory":
                return self._paths[row]
            case "siblings":
                others = [each for each in self._children[self._tree.nodes[row].parent] if each != row]
                return b"".join(sorted(self._nodes[each] for each in others))
            case "other":
                return self._nodes[call.other]
            case "other_trajectory":
                return self._paths[call.other]
            case "steps" | "trajectories" | "rows":
                return b"".join(self._paths[each] for each in call.rows)
            case "tree" | "engine":
                return self._whole
            case "prompt":
                return self._prompt
            case "question":
                return self._tree.prompt.question.encode(errors="surrogatepass")
            case "answer":
                return self._tree.prompt.answer.encode(errors="surrogatepass")
        if name in SERVICES or name in self._args:
            return b""  # part of the source's version
        return _digest(self._tree.prompt.data[name])

    def _path(self, row: int) -> list[Node]:
        return [self._tree.nodes[each] for each in self._tree.path(row)]

    @functools.cached_property
    def _children(self) -> dict[int, list[int]]:
        """parent -> rows, for `Tree.children` looks through the whole tree."""
        children: dict[int, list[int]] = {}
        for row, node in enumerate(self._tree.nodes):
            children.setdefault(node.parent, []).append(row)
        return children

    @functools.cached_property
    def _nodes(self) -> list[bytes]:
        return [
            _digest([node.action_ids, node.observation_ids, node.action_text, node.observation_text, node.facts])
            for node in self._tree.nodes
        ]

    @functools.cached_property
    def _paths(self) -> dict[int, bytes]:
        """Row -> content of the path to it; parents come before children."""
        paths = {ROOT: self._prompt}
        for row, node in enumerate(self._tree.nodes):
            paths[row] = blake2b(paths[node.parent] + self._nodes[row], digest_size=DIGEST_BYTES).digest()
        return paths

    @functools.cached_property
    def _prompt(self) -> bytes:
        prompt: Prompt = self._tree.prompt
        return _digest([prompt.token_ids, prompt.question, prompt.answer, dict(prompt.data)])

    @functools.cached_property
    def _whole(self) -> bytes:
        leaves = (self._paths[row] + bytes([self._tree.nodes[row].kept]) for row in self._tree.leaves())
        return blake2b(b"".join(sorted(leaves)), digest_size=DIGEST_BYTES).digest()


def _digest(content: Any) -> bytes:
    text = json.dumps(content, sort_keys=True, default=_plain)
    return blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return repr(value)
