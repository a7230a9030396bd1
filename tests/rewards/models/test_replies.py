import asyncio
import json

import pytest

from rewards.models.base import ModelError, Reply
from rewards.models.replies import AGAIN_TEMPERATURE, ask, parsed

SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 10}},
    "required": ["score"],
}
ASKED = [{"role": "user", "content": "how good?"}]


class Scripted:
    """Says what it is told to, and notes how it was asked."""

    identity = "scripted"

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    async def chat(self, messages, **arguments):
        self.asked.append(arguments)
        return Reply(text=self.replies.pop(0))


def asked(model, **arguments):
    return asyncio.run(ask(model, ASKED, SCHEMA, **arguments))


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 7}',
        '  \n{"score": 7}\n',
        'Here it is:\n```json\n{"score": 7}\n```',
        '```\n{"score": 7}\n```\nI hope this helps.',
        'First I thought ```json\n{"score": 2}\n``` but no:\n```json\n{"score": 7}\n```',
        'The score is {"score": 7}.',
        'From {"score": 2} over {a, b} to {"score": 7} I went.',
        '<think>{"score": 2} or more?</think>{"score": 7}',
        'no start of a thought, {"score": 2}</think>\n\n```json\n{"score": 7}\n```',
        '{"score": 7, "why": {"score": 2}}',
    ],
)
def test_the_object_of_a_reply_is_found(text):
    assert parsed(text, SCHEMA)["score"] == 7


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the reply is empty"),
        (" \n ", "the reply is empty"),
        ('<think>{"score": 7}</think>', "the reply is all thought and no verdict"),
        ("seven", 'the reply holds no JSON object: "seven"'),
        ("[7]", "the reply holds no JSON object"),
        ('{"score": 7', "the reply holds no JSON object"),
        ('{"score": NaN}', "the reply holds no JSON object"),
        ("{" * 100_000, "the reply holds no JSON object"),
        ('{"a":' * 5_000, "the reply holds no JSON object"),
        ('{"score": 11}', "the reply does not fit its form: $.score: 11 is greater than the maximum of 10"),
        ('{"score": true}', "the reply does not fit its form: $.score: True is not of type 'integer'"),
        ('{"score": "7"}', "the reply does not fit its form: $.score: '7' is not of type 'integer'"),
        ('{"points": 7}', "the reply does not fit its form: 'score' is a required property"),
    ],
)
def test_a_reply_without_a_fitting_object_has_a_reason(text, reason):
    with pytest.raises(ModelError) as error:
        parsed(text, SCHEMA)
    assert str(error.value).startswith(reason)
    assert len(str(error.value)) < 250


def test_an_object_that_does_not_fit_gives_no_way_to_one_quoted_before_it():
    with pytest.raises(ModelError, match="'score' is a required property"):
        parsed('the answer said {"score": 10}, so my verdict is {"grade": 1}', SCHEMA)


def test_a_reply_that_fits_is_asked_for_once_with_what_is_configured():
    model = Scripted('{"score": 7}')
    assert asked(model, seed=5) == {"score": 7}
    assert model.asked == [{"schema": SCHEMA, "temperature": None, "seed": 5}]


def test_after_a_reply_that_does_not_fit_the_model_is_asked_with_another_seed_and_some_temperature():
    model = Scripted("seven", json.dumps({"score": 99}), '{"score": 7}')
    assert asked(model, seed=5) == {"score": 7}
    assert [each["seed"] for each in model.asked] == [5, 6, 7]
    assert [each["temperature"] for each in model.asked] == [None, AGAIN_TEMPERATURE, AGAIN_TEMPERATURE]


def test_the_last_fault_is_the_reason():
    with pytest.raises(ModelError, match=r'^the reply holds no JSON object: "eight" \(2 tries\)$'):
        asked(Scripted("seven", "eight"), tries=2)
    with pytest.raises(ModelError, match=r'^the reply holds no JSON object: "seven"$'):
        asked(Scripted("seven"), tries=1)


def test_a_model_that_breaks_is_not_asked_again_here():
    class Broken(Scripted):
        async def chat(self, messages, **arguments):
            self.asked.append(arguments)
            raise TimeoutError("late")

    model = Broken()
    with pytest.raises(TimeoutError, match="late"):
        asked(model)
    assert len(model.asked) == 1
