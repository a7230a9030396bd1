"""Trees written as text, to test rewards and credit on: `parse_tree("q -> a -> (a1, a2)")`.

The first word is the prompt, every other word is a step of exactly one sampled token, `->` continues a step and
brackets fork it. Words stay in `Node.action_text`, so a test can speak of steps by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from rewards.types import Score, ScoredTree
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason

PROMPT_TOKEN = 1
FIRST_STEP_TOKEN = 10
OBSERVATION_TOKEN = 5


def parse_tree(
    text: str,
    *,
    facts: Mapping[str, StepFacts] | None = None,
    stops: Mapping[str, StopReason] | None = None,
    branches: Mapping[str, int] | None = None,
    pruned: Collection[str] = (),
    logprob: float = -1.0,
    observation_tokens: int = 0,
    version: int = 0,
    prompt_id: str = "test/0",
    answer: str = "",
    data: Mapping[str, Any] | None = None,
) -> Tree:
    """The tree that `text` draws, e.g. "q -> (a -> (a1, a2), b -> (b1, b2))" for two first steps with two leaves each.

    A word that nothing follows is a leaf and gives its own name as the answer; a word that is followed is a call of
    the tool "search" that returned. Equal words are the same token.

    Args:
        text: the drawing; its first word is the prompt.
        facts: name -> facts, where the defaults do not serve.
        stops: name -> why a leaf ended, `answered` where absent.
        branches: name -> `Node.branch` of the step and of all that follows it, 0 where absent.
        pruned: names of steps with kept=False.
        logprob: log-probability of every sampled token.
        observation_tokens: tokens of the environment's reply after every step that continues.
        version: weight version of every step.
        prompt_id: id of the prompt.
        answer: reference answer of the prompt.
        data: columns of the prompt.
    """
    words = re.findall(r"->|[(),]|[^\s(),>-]+", text)
    prompt = Prompt(
        id=prompt_id, token_ids=(PROMPT_TOKEN,), question=words[0], answer=answer, data=data or {"question": words[0]}
    )
    tree, token_ids, last = Tree(prompt=prompt), {}, len(words) - 1
    parent, forks, row = ROOT, [], ROOT
    for place, word in enumerate(words[1:], start=1):
        if word == "->":
            parent = row
        elif word == "(":
            forks.append(parent)
        elif word == ",":
            parent = forks[-1]
        elif word == ")":
            forks.pop()
        else:
            is_leaf = place == last or words[place + 1] != "->"
            stop = (stops or {}).get(word, StopReason.answered) if is_leaf else StopReason.continues
            inherited = 0 if parent == ROOT else tree.nodes[parent].branch
            row = tree.add(
                Node(
                    parent=parent,
                    action_ids=[token_ids.setdefault(word, FIRST_STEP_TOKEN + len(token_ids))],
                    action_logprobs=[logprob],
                    observation_ids=[] if is_leaf else [OBSERVATION_TOKEN] * observation_tokens,
                    facts=(facts or {}).get(word) or _default_facts(word, stop),
                    stop=stop,
                    version=version,
                    branch=(branches or {}).get(word, inherited),
                    kept=word not in pruned,
                    action_text=word,
                )
            )
    assert not forks, f"every bracket closes: {text}"
    return tree


def row_of(tree: Tree, name: str) -> int:
    """Row of the step called `name`, which must be the only one."""
    rows = [row for row, node in enumerate(tree.nodes) if node.action_text == name]
    assert len(rows) == 1, f"one step is called {name}, found {rows}"
    return rows[0]


def parse_scored(
    text: str,
    *,
    steps: Mapping[str, float | Score | None] | None = None,
    outcomes: Mapping[str, float | Score | None] | None = None,
    step_signal: str = "step",
    outcome_signal: str = "outcome",
    **tree_arguments: Any,
) -> ScoredTree:
    """A scored tree: `steps` are the values of one step source, `outcomes` those of one trajectory source, by name.

    None is "not applicable"; a Score is taken as it is. Each becomes a source and a signal of the same name.
    """
    tree = parse_tree(text, **tree_arguments)
    scored = ScoredTree(tree=tree)
    if steps is not None:
        scored.step_scores[step_signal] = _scores(tree, steps)
        scored.step_signals[step_signal] = _scores(tree, steps)
    if outcomes is not None:
        scored.leaf_scores[outcome_signal] = _scores(tree, outcomes)
        scored.leaf_signals[outcome_signal] = _scores(tree, outcomes)
    return scored


def call_facts(tool: str = "search", *, ok: bool = True, result: str = "found", **arguments: Any) -> StepFacts:
    """Facts of a step that called a tool."""
    return StepFacts(kind=StepKind.call, tool=tool, arguments=arguments, tool_ok=ok, result=result)


def answer_facts(answer: str) -> StepFacts:
    """Facts of a step that answered."""
    return StepFacts(kind=StepKind.answer, answer=answer)


def malformed_facts(error: str = "neither a call nor an answer") -> StepFacts:
    """Facts of a step that could not be read."""
    return StepFacts(kind=StepKind.malformed, error=error)


def _scores(tree: Tree, values: Mapping[str, float | Score | None]) -> dict[int, Score]:
    return {row_of(tree, name): _score(value) for name, value in values.items()}


def _score(value: float | Score | None) -> Score:
    if isinstance(value, Score):
        return value
    return Score.not_applicable() if value is None else Score(value)


def _default_facts(word: str, stop: StopReason) -> StepFacts:
    if stop is StopReason.answered:
        return answer_facts(word)
    if stop is StopReason.malformed:
        return malformed_facts()
    return call_facts(query=word)
