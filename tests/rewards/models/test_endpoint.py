import asyncio
import gc
import logging
import pickle
import threading
import time
from pathlib import Path

import judge_server
import pytest
from judge_server import JudgeServer, status

from conf.errors import ConfigError
from conf.schema import RewardModelConfig
from rewards.models.base import MarkedText, ModelError
from rewards.models.endpoint import EndpointModel

KEY = "sk-very-secret-17"
ASKED = [{"role": "user", "content": "is it right?"}]
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}


@pytest.fixture(autouse=True, scope="module")
def old_objects_are_not_collected():
    """Only what a test made is looked through after it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_leaks():
    """Neither a thread nor a socket outlives a test."""
    threads, sockets = threading.active_count(), open_sockets()
    yield
    gc.collect()  # a socket that nobody closed warns here, and a warning is an error
    assert threading.active_count() <= threads
    assert open_sockets() <= sockets


def open_sockets():
    return sum("socket:" in str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink())


def config(server, **changes):
    return RewardModelConfig(**{"path": "judge", "url": server.url, "timeout_s": 5.0, "max_retries": 2} | changes)


def model_of(server, **changes):
    return EndpointModel(config(server, **changes), backoff_s=0.001)


def said(model, **arguments):
    return asyncio.run(model.chat(ASKED, **arguments))


def reason_of(model, **arguments):
    with pytest.raises(ModelError) as error:
        said(model, **arguments)
    return str(error.value)


def test_a_reply_and_what_it_cost():
    with JudgeServer("yes it is") as server:
        reply = said(model_of(server))
    assert (reply.text, reply.prompt_tokens, reply.reply_tokens, reply.num_tries) == ("yes it is", 3, 3, 1)


def test_a_request_says_what_is_configured_and_what_the_caller_asks():
    with JudgeServer() as server:
        model = model_of(server, max_tokens=64, temperature=0.5)
        said(model)
        said(model, temperature=0.7, max_tokens=8, seed=3)
    first, second = server.requests
    assert first == {"model": "judge", "messages": ASKED, "temperature": 0.5, "max_tokens": 64}
    assert second == first | {"temperature": 0.7, "max_tokens": 8, "seed": 3}


def test_a_schema_is_asked_for_unless_the_server_does_not_know_how():
    with JudgeServer() as server:
        said(model_of(server), schema=SCHEMA)
        said(model_of(server, structured=False), schema=SCHEMA)
    asked, plain = server.requests
    assert asked["response_format"]["json_schema"] == {"name": "reply", "strict": True, "schema": SCHEMA}
    assert "response_format" not in plain


@pytest.mark.parametrize(
    "fault",
    [
        *(status(code) for code in (408, 409, 429, 500, 502, 503)),
        judge_server.GARBAGE,
        judge_server.HALF_A_JSON,
        judge_server.NO_CHOICES,
        judge_server.CLOSES_AT_ONCE,
        judge_server.CLOSES_MID_REPLY,
    ],
)
def test_what_may_pass_is_tried_again(fault):
    with JudgeServer("yes", faults=[fault, fault]) as server:
        assert said(model_of(server)).num_tries == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (status(500, "the GPU is on fire"), "the server said 500: the GPU is on fire (3 tries)"),
        (status(429, "slow down"), "the server said 429: slow down (3 tries)"),
        (judge_server.GARBAGE, "the server's reply is no JSON: \x00\x01 no json at all (3 tries)"),
        (judge_server.NO_CHOICES, "the server's reply has no choices"),
        (judge_server.CLOSES_AT_ONCE, "not reached: "),
        (judge_server.CLOSES_MID_REPLY, "not reached: "),
    ],
)
def test_what_does_not_pass_is_lost_after_the_last_try_with_its_reason(fault, reason):
    with JudgeServer(always=fault) as server:
        assert reason_of(model_of(server)).startswith(reason)
        assert server.num_requests == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (judge_server.CUT_AT_LENGTH, "the reply was cut at 1024 tokens; raise rewards.models.*.max_tokens"),
        (judge_server.CONTENT_FILTER, "the server's content filter withheld the reply"),
        (judge_server.REFUSAL, "the model refused: I will not judge this."),
        (judge_server.NO_TEXT, "the reply holds no text"),
        (judge_server.WEB_PAGE, "the server sent a web page"),
        (status(400, "unknown field response_format"), "set rewards.models.*.structured=false"),
        (status(400, "maximum context length is 2048"), "Shorten what the judge is shown"),
        (status(307, "elsewhere"), "It has moved"),
    ],
)
def test_what_would_be_the_same_again_is_asked_once_and_says_what_to_do(fault, reason):
    with JudgeServer(always=fault) as server:
        assert reason in reason_of(model_of(server))
        assert server.num_requests == 1


def test_a_wrong_model_name_and_a_wrong_address_are_named():
    with JudgeServer() as server:
        assert "The model `juge` does not exist." in reason_of(model_of(server, path="juge"))
        assert "Most end with /v1" in reason_of(model_of(server, url=server.url.removesuffix("/v1")))


def test_nobody_there_is_lost_after_the_last_try():
    with JudgeServer() as server:
        url = server.url
    model = EndpointModel(RewardModelConfig(path="judge", url=url, max_retries=1), backoff_s=0.001)
    assert reason_of(model).startswith("not reached: ConnectError: ")


@pytest.mark.parametrize("fault", [judge_server.NEVER_ANSWERS, judge_server.DRIPS])
def test_a_server_that_never_ends_its_answer_is_a_time_out(fault):
    with (
        JudgeServer(always=fault) as server,
        pytest.raises(TimeoutError, match=r"^no reply within 0\.1 s \(2 tries\)$"),
    ):
        said(model_of(server, timeout_s=0.1, max_retries=1))


def test_a_server_that_was_late_once_and_broken_then_is_no_time_out():
    with JudgeServer(faults=[judge_server.NEVER_ANSWERS], always=status(500)) as server:
        assert reason_of(model_of(server, timeout_s=0.1, max_retries=1)) == "the server said 500: made up (2 tries)"


def test_a_time_that_the_server_asks_for_is_waited():
    with JudgeServer("yes", faults=[status(429, retry_after="0.2")]) as server:
        begin = time.monotonic()
        said(model_of(server))
    assert time.monotonic() - begin >= 0.2


def test_a_time_too_long_to_wait_loses_the_request_at_once():
    with JudgeServer(always=status(429, retry_after="3600")) as server:
        assert "it asks to come back in 3600 s" in reason_of(model_of(server))
        assert server.num_requests == 1


def test_a_date_to_come_back_that_is_past_is_no_wait():
    with JudgeServer("yes", faults=[status(503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")]) as server:
        assert said(model_of(server)).num_tries == 2


def test_no_more_requests_are_on_their_way_at_once_than_allowed():
    async def many(model):
        await asyncio.gather(*(model.chat(ASKED) for _ in range(12)))

    with JudgeServer(latency_s=0.02) as server:
        asyncio.run(many(model_of(server, max_concurrent=3)))
    assert (server.num_requests, server.most_at_once) == (12, 3)


def test_requests_of_a_minute_are_spread_evenly():
    async def many(model):
        await asyncio.gather(*(model.chat(ASKED) for _ in range(5)))

    with JudgeServer() as server:
        begin = time.monotonic()
        asyncio.run(many(model_of(server, requests_per_minute=1200)))  # one in 50 ms
    assert time.monotonic() - begin >= 4 * 0.05


def test_after_a_row_of_lost_requests_the_next_are_not_sent():
    with JudgeServer(always=status(500, "down")) as server:
        model = model_of(server, max_retries=0, breaker_failures=2)
        assert reason_of(model) == reason_of(model) == "the server said 500: down"
        assert reason_of(model).startswith("not asked: the last 2 requests to judge at 127.0.0.1:")
        assert server.num_requests == 2


def test_after_its_rest_a_server_is_asked_again():
    now = [0.0]
    with JudgeServer("yes", faults=[status(500)]) as server:
        cfg = config(server, max_retries=0, breaker_failures=1, breaker_rest_s=30.0)
        model = EndpointModel(cfg, clock=lambda: now[0])
        assert "500" in reason_of(model)
        now[0] = 10.0
        assert reason_of(model).endswith("one is tried in 20 s")
        now[0] = 30.0
        assert said(model).text == "yes"
        assert said(model).text == "yes"


def test_a_request_that_cannot_be_written_does_not_use_up_the_one_try_after_a_rest():
    now = [0.0]
    with JudgeServer("yes", faults=[status(500)]) as server:
        cfg = config(server, max_retries=0, breaker_failures=1, breaker_rest_s=30.0)
        model = EndpointModel(cfg, clock=lambda: now[0])
        assert "500" in reason_of(model)
        now[0] = 30.0
        with pytest.raises(TypeError):
            asyncio.run(model.chat([{"role": "user", "content": object()}]))
        assert said(model).text == "yes"


def test_a_refusal_does_not_count_as_a_lost_request():
    with JudgeServer(faults=[status(400)] * 3) as server:
        model = model_of(server, max_retries=0, breaker_failures=2)
        for _ in range(3):
            assert "400" in reason_of(model)
        assert said(model).text == "yes"


def test_a_request_nobody_waits_for_any_more_leaves_no_mark():
    async def given_up(model):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await model.chat(ASKED)
        return await model.chat(ASKED)

    with JudgeServer("yes", faults=[judge_server.NEVER_ANSWERS]) as server:
        model = model_of(server, breaker_failures=1, max_concurrent=1)
        assert asyncio.run(given_up(model)).text == "yes"


def test_one_model_serves_one_event_loop_after_another():
    with JudgeServer() as server:
        model = model_of(server)
        assert [said(model).text for _ in range(3)] == ["yes"] * 3
        with asyncio.Runner() as runner:
            runner.run(model.chat(ASKED))
            said_meanwhile = [None]

            def in_another_thread():
                said_meanwhile[0] = said(model).text

            thread = threading.Thread(target=in_another_thread)
            thread.start()
            thread.join()
            assert runner.run(model.chat(ASKED)).text == said_meanwhile[0] == "yes"


def test_connections_stay_open_in_a_loop_and_close_when_told():
    async def twice_and_closed(model):
        before = open_sockets()
        await model.chat(ASKED)
        opened = open_sockets()
        await model.chat(ASKED)
        assert open_sockets() == opened > before
        await model.aclose()
        await model.aclose()
        return (await model.chat(ASKED)).text

    with JudgeServer() as server:
        assert asyncio.run(twice_and_closed(model_of(server))) == "yes"


# Log-probabilities of choices


def test_choices_are_told_by_their_log_probabilities():
    with JudgeServer(logprobs={"+": -0.1, "-": -2.4, "x": -5.0}) as server:
        assert asyncio.run(model_of(server).choose(ASKED, ["-", "+"])) == {"-": -2.4, "+": -0.1}
    assert (server.requests[0]["max_tokens"], server.requests[0]["top_logprobs"]) == (1, 20)


def test_a_choice_that_the_server_does_not_tell_is_no_choice():
    with (
        JudgeServer(logprobs={"+": -0.1, "-": -2.4}) as server,
        pytest.raises(ModelError, match='"maybe" is not among'),
    ):
        asyncio.run(model_of(server).choose(ASKED, ["+", "maybe"]))


def test_a_server_without_log_probabilities_says_so():
    with JudgeServer() as server, pytest.raises(ModelError, match="tells no log-probabilities"):
        asyncio.run(model_of(server).choose(ASKED, ["+", "-"]))


def test_an_endpoint_scores_no_steps():
    with JudgeServer() as server, pytest.raises(ModelError, match="is an endpoint and scores no steps"):
        asyncio.run(model_of(server).score_steps([MarkedText(question="q", steps=("a",))]))


# The key


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    caplog.set_level(logging.DEBUG)
    with JudgeServer(key=KEY) as server:
        model = model_of(server, api_key_env="MY_KEY")
        assert said(model).text == "yes"
        monkeypatch.delenv("MY_KEY")
        assert said(model).text == "yes"  # read once, when it was made
    shown = [repr(model), model.identity, repr(vars(model)), caplog.text]
    assert not any(KEY in text for text in shown)


def test_a_model_is_pickled_without_its_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with JudgeServer(key=KEY) as server:
        model = model_of(server, api_key_env="MY_KEY")
        said(model)
        pickled = pickle.dumps(model)
        assert KEY.encode() not in pickled
        assert said(pickle.loads(pickled)).text == "yes"
        monkeypatch.delenv("MY_KEY")
        with pytest.raises(ConfigError, match="the environment variable MY_KEY is not set"):
            pickle.loads(pickled)


def test_a_server_that_wants_no_key_gets_none(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "another's")
    with JudgeServer() as server:
        said(model_of(server))
    assert "authorization" not in server.headers[0]
    assert "another's" not in server.headers[0].values()


def test_a_wrong_key_names_its_variable_and_never_itself(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with JudgeServer(key="sk-right") as server:
        reason = reason_of(model_of(server, api_key_env="MY_KEY"))
        assert server.num_requests == 1
    assert reason.startswith("the server said 401: Incorrect API key provided: Bearer ***. Is the key in MY_KEY right")
    with JudgeServer(key="sk-right") as server:
        assert "name that in rewards.models.*.api_key_env" in reason_of(model_of(server))


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_key_that_is_not_there_is_refused_by_the_name_of_its_variable(monkeypatch, value):
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ConfigError, match="the environment variable MY_KEY is not set or empty"):
        EndpointModel(RewardModelConfig(path="judge", url="https://example.com/v1", api_key_env="MY_KEY"))


def test_a_key_that_no_header_can_hold_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("MY_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ConfigError, match="MY_KEY holds white space") as error:
        EndpointModel(RewardModelConfig(path="judge", url="https://example.com/v1", api_key_env="MY_KEY"))
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "url", ["https://api.openai.com/v1", "http://localhost:8000/v1", "http://[::1]:8000/v1", "http://10.0.0.5/v1", "http://node7/v1"]
)  # fmt: skip
def test_a_key_goes_by_https_or_stays_in_the_house(monkeypatch, url):
    monkeypatch.setenv("MY_KEY", KEY)
    EndpointModel(RewardModelConfig(path="judge", url=url, api_key_env="MY_KEY"))


@pytest.mark.parametrize("url", ["http://api.openai.com/v1", "http://8.8.8.8/v1"])
def test_a_key_never_goes_over_the_open_network_in_the_clear(monkeypatch, url):
    monkeypatch.setenv("MY_KEY", KEY)
    with pytest.raises(ConfigError, match="is not encrypted"):
        EndpointModel(RewardModelConfig(path="judge", url=url, api_key_env="MY_KEY"))
    EndpointModel(RewardModelConfig(path="judge", url=url))  # nothing to lose


@pytest.mark.parametrize("url", ["", "api.openai.com/v1", "ftp://x/v1", "https://", "https://x:port/v1"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="is no address of a server"):
        EndpointModel(RewardModelConfig(path="judge", url=url))


@pytest.mark.parametrize("url", [f"https://me:{KEY}@x/v1", f"https://x/v1?key={KEY}"])
def test_an_address_with_a_secret_in_it_is_refused_unseen(url):
    with pytest.raises(ConfigError, match="holds a user name, a password or a query") as error:
        EndpointModel(RewardModelConfig(path="judge", url=url))
    assert KEY not in str(error.value)


def test_a_model_without_a_name_is_refused():
    with pytest.raises(ConfigError, match="path is empty"):
        EndpointModel(RewardModelConfig(url="https://x/v1"))


@pytest.mark.parametrize(("name", "value"), [("timeout_s", 0.0), ("max_concurrent", 0), ("max_retries", -1)])
def test_numbers_with_which_nothing_could_be_asked_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        EndpointModel(RewardModelConfig(path="judge", url="https://x/v1", **{name: value}))


def test_it_says_which_model_answers_where():
    cfg = RewardModelConfig(path="gpt-5-mini", url="https://api.openai.com/v1")
    assert EndpointModel(cfg).identity == "gpt-5-mini at api.openai.com"
    assert (
        EndpointModel(cfg)._body(ASKED, temperature=None, max_tokens=None, seed=None)["max_completion_tokens"] == 1024
    )


def test_a_request_carries_further_fields_and_leaves_out_a_temperature_that_the_model_refuses():
    with JudgeServer("fine") as server:
        said(model_of(server, extra_body={"reasoning_effort": "low"}, sends_temperature=False))
    assert server.requests[0]["reasoning_effort"] == "low"
    assert "temperature" not in server.requests[0]
