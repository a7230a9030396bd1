"""The rule judge of the hop-search task: does a step move along the chain?"""

from __future__ import annotations

from collections.abc import Sequence

from rewards.sources.outcome import normalized
from rollout.tree import Node
from rollout.types import StepFacts, StepKind

ADVANCES = 1.0
WRONG_TOOL = 0.0
USELESS = -0.5
MALFORMED = -1.0


def progress(
    step: Node, trajectory: Sequence[Node], relations: Sequence[str], people: Sequence[str], answer: str
) -> float:
    """How a step moves along the chain of relations.

    +1 the call finds the next person, or the answer is right; 0 the right request to the wrong tool; -0.5 a well-formed
    call that finds nothing new, or a wrong answer; -1 malformed. Useless calls do not leave the chain: the next right
    request still counts, so a detour costs what its own steps cost.

    Args:
        step: the step.
        trajectory: steps from the first to `step`.
        relations: the chain, one relation per hop.
        people: the person before each hop and the answer at the end, one more than relations.
        answer: the reference answer.
    """
    facts = step.facts
    if facts.kind is StepKind.malformed:
        return MALFORMED
    if facts.kind is StepKind.answer:
        return ADVANCES if normalized(facts.answer or "") == normalized(answer) else USELESS
    hops = _hops_done([node.facts for node in trajectory[:-1]], relations, people)
    if not _asks_for_hop(facts, hops, relations, people):
        return USELESS
    return ADVANCES if facts.tool_ok else WRONG_TOOL


def _hops_done(before: Sequence[StepFacts], relations: Sequence[str], people: Sequence[str]) -> int:
    hops = 0
    for facts in before:
        hops += bool(facts.tool_ok) and _asks_for_hop(facts, hops, relations, people)
    return hops


def _asks_for_hop(facts: StepFacts, hops: int, relations: Sequence[str], people: Sequence[str]) -> bool:
    if hops == len(relations):
        return False
    wanted = {"relation": relations[hops], "person": people[hops]}
    return all(normalized(str(facts.arguments.get(name, ""))) == normalized(value) for name, value in wanted.items())
