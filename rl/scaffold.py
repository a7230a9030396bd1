"""Files to start from: a reward of each level, judged by a function or by a model, with its test."""

from __future__ import annotations

import keyword
import sys
from dataclasses import dataclass
from pathlib import Path

from conf.errors import ConfigError

NAME = "NAME_OF_IT"
"""Stands for the name in the texts below, which are full of braces."""
ABOUT = '"""A reward for `grove train`: docs/rewards.md has what a function may ask for and return."""\n'


@dataclass(frozen=True, slots=True)
class Shape:
    """The texts of a reward's file and of its test."""

    reward: str
    test: str


STEP = Shape(
    '''

def NAME_OF_IT(step, letters=20):
    """1 for a call of so many letters, less for a longer one; nothing to say of a step that is no call.

    `letters` is rewards.sources.NAME_OF_IT.args.letters, and `--arg letters=30` of `grove check-reward`.
    """
    if step.facts.tool_ok is None:
        return None
    return min(1.0, letters / max(1, len(step.action_text)))
''',
    """from types import SimpleNamespace

from NAME_OF_IT import NAME_OF_IT


def a_step(text, tool_ok=True):
    return SimpleNamespace(action_text=text, facts=SimpleNamespace(tool_ok=tool_ok))


def test_a_short_call_earns_all_and_a_long_one_its_share():
    assert NAME_OF_IT(a_step("12345"), letters=10) == 1.0
    assert NAME_OF_IT(a_step("1" * 20), letters=10) == 0.5


def test_a_step_without_a_call_is_not_judged():
    assert NAME_OF_IT(a_step("42", tool_ok=None)) is None
""",
)

TRAJECTORY = Shape(
    '''

def NAME_OF_IT(trajectory, answer):
    """1 for the right answer in one step, less for every further step; 0 for a wrong one; None without an answer."""
    found = trajectory[-1].facts.answer
    if found is None:
        return None
    return float(found.strip().lower() == answer.strip().lower()) / len(trajectory)
''',
    """from types import SimpleNamespace

from NAME_OF_IT import NAME_OF_IT


def steps(*answers):
    return [SimpleNamespace(facts=SimpleNamespace(answer=answer)) for answer in answers]


def test_the_right_answer_earns_less_the_later_it_comes():
    assert NAME_OF_IT(steps("42"), answer="42") == 1.0
    assert NAME_OF_IT(steps(None, "42"), answer="42") == 0.5
    assert NAME_OF_IT(steps(None, "41"), answer="42") == 0.0


def test_a_trajectory_without_an_answer_is_not_judged():
    assert NAME_OF_IT(steps(None), answer="42") is None
""",
)

PAIR = Shape(
    '''

def NAME_OF_IT(step, other):
    """1 where `step` is better than `other`, which was tried at the same fork, -1 where it is worse, 0 for equals.

    It is asked in both orders, and a step's score is the mean over all it is compared with.
    """
    mine, theirs = quality(step), quality(other)
    return float(mine > theirs) - float(mine < theirs)


def quality(step):
    """A call that worked before one that did not; then the shorter one."""
    return (step.facts.tool_ok is True, -len(step.action_text))
''',
    """from types import SimpleNamespace

from NAME_OF_IT import NAME_OF_IT


def a_step(text, tool_ok=True):
    return SimpleNamespace(action_text=text, facts=SimpleNamespace(tool_ok=tool_ok))


def test_a_call_that_worked_wins_and_then_the_shorter_one():
    assert NAME_OF_IT(a_step("a long call"), a_step("short", tool_ok=False)) == 1.0
    assert NAME_OF_IT(a_step("a long call"), a_step("short")) == -1.0


def test_the_other_order_says_the_opposite_and_equals_nothing():
    assert NAME_OF_IT(a_step("short"), a_step("a long call")) == 1.0
    assert NAME_OF_IT(a_step("same"), a_step("same")) == 0.0
""",
)

TREE = Shape(
    '''
from collections import Counter


def NAME_OF_IT(tree):
    """Share of the tree's trajectories that gave the same answer: a majority vote, without a reference.

    Returns the score of each trajectory by the row of its last step; one that is left out is not judged.
    """
    answers = {row: tree.nodes[row].facts.answer for row in tree.trained_leaves()}
    votes = Counter(answers.values())
    return {row: votes[answer] / len(answers) for row, answer in answers.items() if answer is not None}
''',
    """from NAME_OF_IT import NAME_OF_IT
from rewards.drawn import parse_tree
from rollout.types import StopReason


def test_a_trajectory_earns_the_share_that_agrees_with_it():
    tree = parse_tree("question -> search -> (Rome, Rome, Oslo, Rome)")  # rows 1 to 4 are the answers
    assert NAME_OF_IT(tree) == {1: 0.75, 2: 0.75, 3: 0.25, 4: 0.75}


def test_a_trajectory_without_an_answer_is_not_judged():
    tree = parse_tree("question -> (Rome, mumble)", stops={"mumble": StopReason.malformed})
    assert NAME_OF_IT(tree) == {0: 0.5}
""",
)

ASKS = '''
from rewards.models.replies import ask
from rewards.templates import READING, form_of, SHOWN

SCHEMA = {
    "type": "object",
    "properties": PROPERTIES,
    "required": [FIELD],
    "additionalProperties": False,
}
"""A model whose replies do not fit it, three times, has given no score; that is not a 0."""
ASKED = f"""\\
TASK
{READING}
Reply with a JSON object like {form_of(SCHEMA)}"""


'''

SCORE = ('{"score": {"type": "number", "minimum": 0, "maximum": 10}}', '"score"')
SCORES = (
    '{"scores": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 10}}}',
    '"scores"',
)
BETTER = ('{"better": {"enum": ["first", "second", "neither"]}}', '"better"')

FAKE = '''import asyncio
import json

import pytest

from NAME_OF_IT import NAME_OF_IT
from rewards.drawn import parse_tree
from rewards.models.base import ModelError, Reply


class FakeModel:
    """Says what it is told to and remembers what it was asked."""

    def __init__(self, reply):
        self.reply = reply

    async def chat(self, messages, **settings):
        self.asked = messages[-1]["content"]
        return Reply(text=json.dumps(self.reply))


TREE = parse_tree("question -> search -> (Rome, Oslo)")  # rows 0, 1 and 2
SEARCH, ROME, OSLO = TREE.nodes


def judged(model, **arguments):
    return asyncio.run(NAME_OF_IT(**arguments, question="question", model=model))


'''


def _asking(task: str, reply: tuple[str, str], shown: str, function: str, test: str) -> Shape:
    """A shape that asks a model."""
    properties, field = reply
    head = ASKS.replace("TASK", task).replace("PROPERTIES", properties).replace("FIELD", field)
    return Shape(head.replace("SHOWN", shown) + function, FAKE + test)


STEP_MODEL = _asking(
    "You grade one step of an agent that answers a question with tools: 0 is useless, 10 could not be better.",
    SCORE,
    "shown, shown_steps",
    '''async def NAME_OF_IT(step, question, model):
    """How good a model finds the step, from 0 to 1."""
    text = shown("question", question, 2000) + "\\n" + shown_steps("step", [step], 4000)
    reply = await ask(model, [{"role": "system", "content": ASKED}, {"role": "user", "content": text}], SCHEMA)
    return reply["score"] / 10
''',
    """def test_a_step_earns_a_tenth_of_its_points():
    model = FakeModel({"score": 7})
    assert judged(model, step=SEARCH) == 0.7
    assert "search" in model.asked and "Rome" not in model.asked


def test_a_reply_of_another_form_is_no_score():
    with pytest.raises(ModelError, match="does not fit its form"):
        judged(FakeModel({"score": 11}), step=SEARCH)
""",
)

TRAJECTORY_MODEL = _asking(
    "You grade how an agent went about a question, step by step: 0 is useless, 10 could not be better.",
    SCORE,
    "shown, shown_steps",
    '''async def NAME_OF_IT(trajectory, question, model):
    """How good a model finds the whole trajectory, from 0 to 1."""
    text = shown("question", question, 2000) + "\\n" + shown_steps("steps", trajectory, 8000)
    reply = await ask(model, [{"role": "system", "content": ASKED}, {"role": "user", "content": text}], SCHEMA)
    return reply["score"] / 10
''',
    """def test_a_trajectory_earns_a_tenth_of_its_points():
    model = FakeModel({"score": 7})
    assert judged(model, trajectory=[SEARCH, ROME]) == 0.7
    assert "search" in model.asked and "Rome" in model.asked


def test_a_reply_of_another_form_is_no_score():
    with pytest.raises(ModelError, match="does not fit its form"):
        judged(FakeModel({"score": 11}), trajectory=[SEARCH, ROME])
""",
)

PAIR_MODEL = _asking(
    "An agent answers a question with tools. You say which of two steps, tried at the same place, helps it more.",
    BETTER,
    "shown, shown_steps",
    '''async def NAME_OF_IT(step, other, question, model):
    """1 where a model finds `step` better than `other`, which was tried at the same fork, -1 where worse, else 0.

    It is asked in both orders, so that a liking for the first cancels; a step's score is the mean over all others.
    """
    steps = shown_steps("first", [step], 4000) + "\\n" + shown_steps("second", [other], 4000)
    text = shown("question", question, 2000) + "\\n" + steps
    reply = await ask(model, [{"role": "system", "content": ASKED}, {"role": "user", "content": text}], SCHEMA)
    return {"first": 1.0, "second": -1.0, "neither": 0.0}[reply["better"]]
''',
    """@pytest.mark.parametrize(("better", "score"), [("first", 1.0), ("second", -1.0), ("neither", 0.0)])
def test_the_better_step_earns_one(better, score):
    model = FakeModel({"better": better})
    assert judged(model, step=ROME, other=OSLO) == score
    assert model.asked.index("Rome") < model.asked.index("Oslo")


def test_a_reply_of_another_form_is_no_score():
    with pytest.raises(ModelError, match="does not fit its form"):
        judged(FakeModel({"better": "both"}), step=ROME, other=OSLO)
""",
)

TREE_MODEL = _asking(
    "You grade answers to a question, each from 0, surely wrong, to 10, surely right. Give a score for each, in order.",
    SCORES,
    "shown",
    '''async def NAME_OF_IT(tree, question, model):
    """How sure a model is of each trajectory's answer, from 0 to 1, when it sees all of them: one request for a tree.

    Returns the score of each trajectory by the row of its last step; one that is left out is not judged.
    """
    answers = {row: tree.nodes[row].facts.answer for row in tree.trained_leaves()}
    answers = {row: answer for row, answer in answers.items() if answer}
    if not answers:
        return None
    texts = [shown(f"answer {number}", answer, 500) for number, answer in enumerate(answers.values(), start=1)]
    text = "\\n".join([shown("question", question, 2000), *texts])
    reply = await ask(model, [{"role": "system", "content": ASKED}, {"role": "user", "content": text}], SCHEMA)
    if len(reply["scores"]) != len(answers):
        raise ValueError(f"the model gave {len(reply['scores'])} scores for {len(answers)} answers")
    return {row: score / 10 for row, score in zip(answers, reply["scores"], strict=True)}
''',
    """def test_each_trajectory_earns_what_its_answer_is_worth():
    model = FakeModel({"scores": [9, 2]})
    assert judged(model, tree=TREE) == {1: 0.9, 2: 0.2}
    assert model.asked.index("Rome") < model.asked.index("Oslo")


def test_too_few_scores_are_none_at_all():
    with pytest.raises(ValueError, match="1 scores for 2 answers"):
        judged(FakeModel({"scores": [9]}), tree=TREE)


def test_a_reply_of_another_form_is_no_score():
    with pytest.raises(ModelError, match="does not fit its form"):
        judged(FakeModel({"scores": [11, 2]}), tree=TREE)
""",
)

SHAPES = {
    ("step", False): STEP,
    ("trajectory", False): TRAJECTORY,
    ("pair", False): PAIR,
    ("tree", False): TREE,
    ("step", True): STEP_MODEL,
    ("trajectory", True): TRAJECTORY_MODEL,
    ("pair", True): PAIR_MODEL,
    ("tree", True): TREE_MODEL,
}
"""By what it scores, and whether a model judges."""


def new_reward(name: str, folder: Path, *, level: str = "step", model: bool = False) -> list[Path]:
    """Write NAME.py with a reward of that name, and test_NAME.py.

    Args:
        level: one of conf.subject.LEVELS.
        model: let a model judge.
    Returns: the two files.
    Raises: ConfigError for a name that is none, or a file that is there already.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(
            f'"{name}" cannot be the name of a Python function. Use letters, digits and "_", as in brevity.'
        )
    if name in sys.stdlib_module_names:
        raise ConfigError(
            f'"{name}.py" would hide the module "{name}" of Python from everything that is started here. '
            f"Give another name, as my_{name}."
        )
    shape = SHAPES[level, model]
    files = {folder / f"{name}.py": ABOUT + shape.reward, folder / f"test_{name}.py": shape.test}
    for file in files:
        if file.exists():
            raise ConfigError(f'"{file}" is there already and is not written over. Give another name, or move it away.')
    for file, text in files.items():
        file.write_text(text.replace(NAME, name), encoding="utf-8")
    return list(files)
