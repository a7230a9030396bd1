"""Do the calls agree with those of a reference trace?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rewards.matching import Call, assigned, assigned_greedily, similarity, step_rewards, transported
from rewards.sources.calls import calls_of
from rewards.sources.outcome import token_f1
from rollout.tree import Node
from rollout.types import StepKind

METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "assigned": assigned,
    "greedy": assigned_greedily,
    "transported": transported,
}


class Match:
    """MatchTIR's reward of a step (arXiv 2601.10712), in [0, 1]: the mean over its calls of what each is worth.

    A call is worth its similarity to the reference call that it is matched with (`rewards.matching`), and nothing where
    all reference calls are taken; at an answer the step is worth the overlap of words with the reference answer
    (`token_f1`). A step that has neither a call nor an answer is not applicable, and so is an answer where the task has
    no reference answer.

    Our reading: the paper matches all calls of a finished trajectory at once. A step of a tree belongs to many
    trajectories, so here the calls of the path **up to and including the step** are matched: what is known when the
    step is taken, one value however many trajectories share it, and no loss because of a call that comes later. The
    two agree on a trajectory's last step, and by the first two methods wherever no later call competes for a reference
    call that an earlier one was matched with. With `transported` a call's mass is one over the calls made so far, so
    that early steps weigh more than in the paper, where it is one over all calls of the trajectory.
    """

    def __init__(self, method: str = "assigned"):
        """Choose the matching.

        Args:
            method: `assigned`, the best one-to-one assignment; `greedy`, that of the authors' code; or `transported`.
        Raises: ValueError for another name.
        """
        if method not in METHODS:
            raise ValueError(f'method="{method}" is no matching of calls. Use {", ".join(METHODS)}.')
        self._reward_of_calls = METHODS[method]

    def __call__(
        self, step: Node, trajectory: Sequence[Node], trace: Sequence[Mapping[str, Any]], answer: str
    ) -> float | None:
        """What the step is worth.

        Args:
            step: the step.
            trajectory: steps from the first to `step`.
            trace: the reference calls in any order, each {"tool": name, "arguments": values by name}.
            answer: the reference answer; "" where there is none.
        Raises: ValueError for a trace that does not have this form, which is a failed score.
        """
        if step.facts.kind is StepKind.answer:
            return token_f1(step.facts, answer) if answer.strip() else None
        if not calls_of(step):
            return None
        calls = [call for each in trajectory for call in calls_of(each)]
        step_of_call = [place for place, each in enumerate(trajectory) for _ in calls_of(each)]
        rewards = self._reward_of_calls(similarity(calls, [_reference_call(each) for each in trace]))
        return step_rewards(rewards, step_of_call, len(trajectory))[-1]


def _reference_call(call: Any) -> Call:
    if not isinstance(call, Mapping) or not isinstance(call.get("tool"), str):
        raise ValueError(f'a call of the trace is {str(call)[:80]!r}; write {{"tool": name, "arguments": {{...}}}}')
    arguments = call.get("arguments") or {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f'the arguments of the trace\'s call of "{call["tool"]}" are no mapping from name to value')
    return call["tool"], arguments
