"""The server as its clients meet it: OpenAI's client, raw requests, clients that leave, and what is refused."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from lm_eval.models.openai_completions import LocalCompletionsAPI
from serving_app import KEY, serving

from llama_jax import generate, generate_text
from llama_jax.__main__ import main
from llama_jax.checkpoint import LanguageModel, load, save
from llama_jax.data.chat import ChatML
from llama_jax.evaluation import HarnessLM, score
from llama_jax.models import Compute, from_params
from llama_jax.sampling import SamplingConfig, chat, complete
from llama_jax.serving import Service
from llama_jax.serving.requests import NOT_SERVED, Limits, completion, parsed

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SHORT = {"prompt": "one", "max_tokens": 3, "temperature": 0}
MESSAGES: list[Any] = [{"role": "user", "content": "one fish"}]


@pytest.fixture(scope="module")
def ai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=300) as found:
        yield found


def test_completions_are_those_of_generate_text(ai: openai.OpenAI, lm: LanguageModel):
    prompts = ["one fish", "red fish, blue"]
    found = ai.completions.create(model="fish", prompt=prompts, max_tokens=9, temperature=0)
    assert [choice.text for choice in found.choices] == generate_text(lm, prompts, max_new_tokens=9, temperature=0)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.usage is not None
    expected = complete(lm, prompts, SamplingConfig(max_new_tokens=9, temperature=0))
    assert [choice.finish_reason for choice in found.choices] == [one.finish_reason for one in expected]
    assert found.usage.completion_tokens == sum(len(one.token_ids) for one in expected)
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode_prompt(prompts[0])
    again = ai.completions.create(model="fish", prompt=ids, max_tokens=9, temperature=0, echo=True)
    assert again.choices[0].text == prompts[0] + found.choices[0].text


def test_samples_and_seeds(ai: openai.OpenAI, lm: LanguageModel):
    first, again = (
        [choice.text for choice in ai.completions.create(model="fish", prompt="two", max_tokens=8, n=3, seed=5).choices]
        for _ in range(2)
    )
    assert first == again
    assert len(set(first)) > 1
    assert first[0] == generate_text(lm, "two", max_new_tokens=8, temperature=1.0, seed=5)[0]
    free = {ai.completions.create(model="fish", prompt="two", max_tokens=8).choices[0].text for _ in range(4)}
    assert len(free) > 1


def test_streams_are_the_whole_text_in_pieces(ai: openai.OpenAI, lm: LanguageModel):
    chunks = list(
        ai.completions.create(
            model="fish",
            prompt="red",
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert len(texts) > 2
    assert ["".join(texts)] == generate_text(lm, "red", max_new_tokens=20, temperature=0)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_a_text_and_is_left_out(ai: openai.OpenAI, lm: LanguageModel, stream: bool):
    (whole,) = generate_text(lm, "red", max_new_tokens=20, temperature=0)
    stop = whole[4:7]
    options = {"model": "fish", "prompt": "red", "max_tokens": 20, "temperature": 0, "stop": ["never this", stop]}
    found: Any = ai.completions.create(**options, stream=stream)  # type: ignore[call-overload]
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_chats_are_those_of_chat(ai: openai.OpenAI, lm: LanguageModel):
    expected = chat(lm, MESSAGES, template=ChatML(), max_new_tokens=11, temperature=0)
    found = ai.chat.completions.create(model="fish", messages=MESSAGES, max_completion_tokens=11, temperature=0, n=2)
    assert [choice.message.content for choice in found.choices] == [expected] * 2
    parts: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "fish"}]}
    ]
    stream = ai.chat.completions.create(model="fish", messages=parts, max_tokens=11, temperature=0, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (COMPLETIONS, b"{", 400, "not valid JSON"),
        (COMPLETIONS, b"[" * 100_000, 400, "not valid JSON"),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, "not valid JSON"),
        (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "not valid JSON"),
        (COMPLETIONS, b"[]", 400, "must be a JSON object"),
        (COMPLETIONS, b" " * (9 << 20), 413, "larger than"),
        (COMPLETIONS, {}, 400, "prompt must be a text"),
        (COMPLETIONS, {"prompt": []}, 400, "has no prompt"),
        (COMPLETIONS, {"prompt": [1, 100_000]}, 400, "token id 100000"),
        (COMPLETIONS, {"prompt": ["a", 3]}, 400, "must be a text"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 500}, 400, "take at most 12"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_new_tokens=0 must be at least 1"),
        (COMPLETIONS, {"prompt": "a" * 1000}, 400, "shorten the prompt"),
        (COMPLETIONS, {"prompt": "a", "temprature": 0}, 400, "did you mean temperature"),
        (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, 400, "must be a number"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported"),
        (COMPLETIONS, {"prompt": "a", "num_beams": 4}, 400, "num_beams is not supported"),
        (COMPLETIONS, {"prompt": "a", "n": 1000}, 400, "at most 128"),
        (COMPLETIONS, {"prompt": "a", "stream": "yes"}, 400, "must be true or false"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"99999": 1}}, 400, "99999"),
        (COMPLETIONS, {"prompt": "a", "model": "bird"}, 404, "no model 'bird'"),
        (COMPLETIONS, {"prompt": ["a"] * 100}, 400, "more than 68"),
        (CHAT, {"messages": []}, 400, "must end with the message to answer"),
        (CHAT, {"messages": ["hi"]}, 400, "messages must be a list"),
        (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "tools is not supported"),
        (CHAT, {"messages": MESSAGES, "top_logprobs": 3}, 400, "needs logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "images"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "xml"}}, 400, "response_format must have the type"),
        ("/v1/nothing", {}, 404, "there is no /v1/nothing"),
    ],
)
def test_mistakes_have_a_status_and_a_sentence(
    client: httpx.Client, path: str, body: bytes | dict, status: int, words: str
):
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    for raw in (
        [body] if isinstance(body, bytes) else [json.dumps({"stream": x, **body}).encode() for x in (False, True)]
    ):
        found = client.post(path, content=raw)
        assert (found.status_code, found.json()["error"]["type"]) == (status, kind)
        assert words in found.json()["error"]["message"]


def test_nothing_is_answered_without_the_key_or_to_another_site(url: str, client: httpx.Client):
    body = {"prompt": "a", "max_tokens": 1}
    with httpx.Client(base_url=url, timeout=300) as stranger:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            found = stranger.post(COMPLETIONS, json=body, headers=header)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        assert stranger.get("/metrics").status_code == 401
        assert stranger.get("/health").json() == {"status": "ok"}
    for header in ({"Host": "rebound.example"}, {"Origin": "http://elsewhere.example"}, {"Origin": "null"}):
        assert client.post(COMPLETIONS, json=body, headers=header).status_code == 403
    found = client.post(COMPLETIONS, json=body, headers={"Origin": url})
    assert found.status_code == 200
    assert "access-control-allow-origin" not in found.headers


def test_streams_at_once_are_unmixed_and_clients_may_leave(client: httpx.Client, served: tuple[str, Service]):
    """The texts are those that the same requests get one after the other."""
    bodies = [
        {"prompt": f"{first} {second} fish", "max_tokens": 12 + i, "seed": i, "stream": True}
        for i, (first, second) in enumerate(itertools.product(("one", "two", "red", "blue"), repeat=2))
    ]

    def run(i: int, *, leaves: bool = False) -> str | None:
        text = ""
        with client.stream("POST", COMPLETIONS, json=bodies[i]) as found:
            assert found.status_code == 200
            for line in found.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    if leaves:
                        return None
        return text

    def run_at_once(i: int) -> str | None:
        if i % 8 == 1:
            assert client.post(COMPLETIONS, content=b"{").status_code == 400
        return run(i, leaves=i % 8 == 3)

    alone = [run(i) for i in range(len(bodies))]
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(run_at_once, range(len(bodies))))
    assert together == [None if i % 8 == 3 else text for i, text in enumerate(alone)]
    assert len(set(alone)) == len(alone)
    until(lambda: not served[1].worker.busy)


def test_a_client_that_leaves_frees_its_row_and_a_full_queue_refuses(
    client: httpx.Client, served: tuple[str, Service], lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
):
    raw = json.dumps(SHORT).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Length: {len(raw)}\r\n\r\n"
    worker, held = served[1].worker, threading.Event()
    step = worker._engine.step
    monkeypatch.setattr(worker, "_rows", 1)
    monkeypatch.setattr(worker, "_max_queue", 1)
    monkeypatch.setattr(worker._engine, "step", lambda: step() if held.wait(0.01) else [])
    before = metrics(client)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        try:
            with socket.create_connection(("127.0.0.1", client.base_url.port or 0)) as first:
                first.sendall(head.encode() + raw)
                until(lambda: worker.num_running == 1)
                second = pool.submit(client.post, COMPLETIONS, json=SHORT)
                until(lambda: worker.num_waiting == 1)
                third = client.post(COMPLETIONS, json=SHORT)
                assert (third.status_code, third.headers["retry-after"]) == (429, "1")
                assert third.json()["error"]["type"] == "rate_limit_error"
            until(lambda: worker.num_waiting == 0)  # the second has the row of the first
        finally:
            held.set()
        assert [second.result().json()["choices"][0]["text"]] == generate_text(
            lm, "one", max_new_tokens=3, temperature=0
        )
    left = 'llama_jax_requests_total{path="/v1/completions",status="499"}'
    assert metrics(client)[left] - before.get(left, 0) == 1


def test_an_engine_that_fails_is_replaced(
    client: httpx.Client, served: tuple[str, Service], caplog: pytest.LogCaptureFixture
):
    served[1].worker._engine.step = lambda: 1 / 0  # type: ignore[method-assign]
    failed = client.post(COMPLETIONS, json=SHORT)
    assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
    assert "ZeroDivisionError" in caplog.text
    assert client.post(COMPLETIONS, json=SHORT).status_code == 200


@pytest.mark.parametrize(("state", "word"), [("draining", "stopping"), ("ended", "failed")])
def test_a_server_that_stops_refuses(
    client: httpx.Client, served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch, state: str, word: str
):
    monkeypatch.setattr(served[1].worker, state, True)
    found = client.post(COMPLETIONS, json=SHORT)
    assert (found.status_code, found.headers["retry-after"]) == (503, "10")
    found = client.get("/health")
    assert (found.status_code, found.json()) == (503, {"status": word})


def metrics(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(x) for name, x in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics_count_what_was_done(client: httpx.Client):
    before = metrics(client)
    body = {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 6, "ignore_eos": True}
    assert client.post(COMPLETIONS, json=body).status_code == 200
    assert client.post(COMPLETIONS, json={}).status_code == 400
    after = metrics(client)
    grown = {name.removeprefix("llama_jax_"): x - before.get(name, 0) for name, x in after.items()}
    assert grown['requests_total{path="/v1/completions",status="200"}'] == 1
    assert grown['requests_total{path="/v1/completions",status="400"}'] == 1
    assert (grown["prompt_tokens_total"], grown["generated_tokens_total"]) == (5, 12)
    assert (after["llama_jax_rows"], after["llama_jax_rows_running"]) == (4, 0)
    assert grown["time_to_first_token_seconds_count"] == 2
    assert grown['time_to_first_token_seconds_bucket{le="+Inf"}'] == 2
    assert grown["time_between_tokens_seconds_count"] == 10


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_model(ai: openai.OpenAI, lm: LanguageModel):
    (one,) = complete(lm, ["red"], SamplingConfig(max_new_tokens=5, temperature=0, logprobs=2))
    assert one.logprobs is not None
    expected = [entry.logprob for entry in one.logprobs]
    options: dict[str, Any] = {"model": "fish", "prompt": "red", "max_tokens": 5, "temperature": 0, "logprobs": 2}
    found = ai.completions.create(**options).choices[0]
    logprobs = found.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx(expected, abs=1e-5)
    assert "".join(logprobs.tokens or []) == found.text
    assert logprobs.text_offset == [len("".join((logprobs.tokens or [])[:i])) for i in range(5)]
    assert [max(top.values()) for top in logprobs.top_logprobs or []] == pytest.approx(expected, abs=1e-5)  # greedy
    streamed = [chunk.choices[0].logprobs for chunk in ai.completions.create(**options, stream=True)]
    assert [x for part in streamed if part for x in part.token_logprobs or []] == pytest.approx(expected, abs=1e-5)
    chatted = ai.chat.completions.create(
        model="fish",
        messages=MESSAGES,
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
    ).choices[0]
    assert chatted.logprobs is not None
    content = chatted.logprobs.content or []
    assert [len(entry.top_logprobs) for entry in content] == [2] * len(content)
    assert "".join(entry.token for entry in content) == chatted.message.content
    assert all(entry.top_logprobs[0].logprob == pytest.approx(entry.logprob) for entry in content)


def test_prompts_are_scored_as_lm_eval_asks_for(client: httpx.Client, lm: LanguageModel):
    """Its `local-completions` gives the log-likelihoods of our own `LM`."""
    asks: Any = object.__new__(LocalCompletionsAPI)  # its __init__ needs packages for what is not used here
    asks.model = "fish"
    pairs = [([1, 20, 33], [50, 7]), ([9], [4]), ([7, 7, 30, 2, 9, 11], [5, 60, 61, 62])]
    pairs.append(([3, 8], greedy := generate(lm, [[3, 8]], max_new_tokens=3)[0, 2:].tolist()))
    outputs = client.post(COMPLETIONS, json=asks._create_payload([a + b for a, b in pairs], generate=False)).json()
    found = asks.parse_logprobs(outputs, ctxlens=[len(a) for a, _ in pairs])
    expected = HarnessLM(lm)._loglikelihood_tokens([(None, *pair) for pair in pairs])
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected] == [False] * 3 + [True]
    assert len(greedy) == 3
    body = {"prompt": [[3, 8], [9]], "echo": True, "logprobs": 0, "max_tokens": 0}
    logprobs = [choice["logprobs"] for choice in client.post(COMPLETIONS, json=body).json()["choices"]]
    assert [found["top_logprobs"] for found in logprobs] == [[None, {}], [None]]
    assert logprobs[0]["token_logprobs"][1] == pytest.approx(score(lm, [[3]], [[8]])[0][0], abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_echoed_with_its_log_probabilities(ai: openai.OpenAI, lm: LanguageModel, stream: bool):
    """With and without new tokens after it: they are those of the whole text, and nothing is before its first token."""
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode_prompt("red fish")
    (new,) = complete(lm, ["red fish"], SamplingConfig(max_new_tokens=2, temperature=0, logprobs=3))
    (scores,) = score(lm, [ids[:1]], [[*ids[1:], *new.token_ids]])
    for max_tokens in (0, 2):
        options: dict[str, Any] = {"model": "fish", "prompt": "red fish", "echo": True, "logprobs": 3, "temperature": 0}
        answer: Any = ai.completions.create(**options, max_tokens=max_tokens, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        count = len(ids) + max_tokens
        assert "".join(choice.text for choice in choices) == "red fish" + (new.completion if max_tokens else "")
        assert choices[-1].finish_reason == "length"
        logprobs = [choice.logprobs for choice in choices if choice.logprobs]
        found, tops, tokens, offsets = (
            [x for part in logprobs for x in getattr(part, name)]
            for name in ("token_logprobs", "top_logprobs", "tokens", "text_offset")
        )
        assert (found[0], tops[0], len(found)) == (None, None, count)
        assert found[1:] == pytest.approx(scores[: count - 1], abs=1e-4)
        assert all(
            1 <= len(top) <= 3 and max(top.values()) >= own for own, top in zip(found[1:], tops[1:], strict=True)
        )
        assert offsets == [len("".join(tokens[:i])) for i in range(count)]
        if not stream:
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), max_tokens)


def test_an_encoder_decoder_answers_and_scores_no_prompt(lm: LanguageModel, random_params: Callable):
    config: Any = load(Path(__file__).parent.parent / "parity" / "goldens" / "t5_v1_0").config
    assert lm.tokenizer is not None
    config = dataclasses.replace(config, vocab_size=lm.tokenizer.vocab_size)
    model = from_params(config, random_params(config), Compute(dtype="float32"), None)
    t5 = LanguageModel(config, model, lm.tokenizer)
    with serving(t5, rows=2, max_model_len=32) as (url, _), httpx.Client(base_url=url, timeout=300) as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        prompts = ["one fish", "red fish, blue fish"]
        body = {"prompt": prompts, "max_tokens": 31, "temperature": 0}  # as many as fit, whatever the prompt's length
        found = client.post(COMPLETIONS, json=body).json()
        assert [x["text"] for x in found["choices"]] == generate_text(t5, prompts, max_new_tokens=31, temperature=0)
        for wrong, words in (
            ({"echo": True, "logprobs": 1}, "does not predict its prompt"),
            ({"max_tokens": 32}, "take at most 31"),
            ({"prompt": "fish" * 40}, "shorten the prompt"),
        ):
            refused = client.post(COMPLETIONS, json=body | wrong)
            assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
            assert words in refused.json()["error"]["message"]


def test_answers_obey_their_format(ai: openai.OpenAI):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    found = ai.chat.completions.create(
        model="fish",
        messages=MESSAGES,
        max_tokens=60,
        response_format=form,
        extra_body={"seed": 3},
    ).choices[0]
    assert json.loads(found.message.content or "")["a"] in (1, 2)
    assert found.finish_reason == "stop"
    regex = ai.completions.create(model="fish", prompt="a", max_tokens=20, extra_body={"regex": "(red|blue) fish"})
    assert regex.choices[0].text in ("red fish", "blue fish")


def test_every_setting_of_sampling_is_a_field(lm: LanguageModel):
    values: dict[str, Any] = {
        "max_new_tokens": 3, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9,
        "repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1, "no_repeat_ngram_size": 2,
        "logit_bias": {"3": 1.0}, "banned_ids": [4], "forced_ids": [5], "min_new_tokens": 1, "ignore_eos": True,
        "stop_ids": [6], "stop": "a", "json_schema": None, "regex": "a+", "num_samples": 2, "logprobs": 1, "seed": 7,
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(SamplingConfig)}
    assert fields == values.keys() | NOT_SERVED
    raw = json.dumps({"prompt": "a", **values}).encode()
    asked = completion(lm, parsed(raw), Limits(length=64, max_new_tokens=64))
    assert asked.config == SamplingConfig.of(**values)


def test_models(ai: openai.OpenAI):
    (card,) = ai.models.list().data
    assert (card.id, card.object) == ("fish", "model")
    assert ai.models.retrieve("fish").to_dict()["max_model_len"] == 128
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("bird")


def until(holds, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_page_needs_no_network_and_shows_text_as_text(client: httpx.Client):
    found = client.get("/")
    page = found.text
    assert found.headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in found.headers["content-security-policy"]
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", page)


@contextlib.contextmanager
def process_of(lm: LanguageModel, folder: Path) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    save(lm, folder / "fish")
    command = [sys.executable, "-m", "llama_jax", "serve", str(folder / "fish"), "--port", "0", "--rows", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"serving fish at (\S+)/v1", process.stdout.readline())
        assert found is not None
        with httpx.Client(base_url=found[1], timeout=300) as client:
            yield process, client


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_exits_with_0(lm: LanguageModel, tmp_path: Path):
    with process_of(lm, tmp_path) as (process, client):
        assert process.stdout is not None
        text = ""
        body = {"prompt": "red", "max_tokens": 100, "ignore_eos": True, "temperature": 0, "stream": True}
        with client.stream("POST", COMPLETIONS, json=body) as answer:
            for line in answer.iter_lines():
                if not text:
                    process.send_signal(signal.SIGTERM)
                    assert process.stdout.readline().startswith("stopping: 1 texts")
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        assert [text] == generate_text(lm, "red", max_new_tokens=100, temperature=0, ignore_eos=True)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once(lm: LanguageModel, tmp_path: Path):
    with process_of(lm, tmp_path) as (process, client), concurrent.futures.ThreadPoolExecutor() as pool:
        assert process.stdout is not None
        many = {"prompt": ["red"] * 60, "n": 128, "max_tokens": 100, "ignore_eos": True}
        answer = pool.submit(client.post, COMPLETIONS, json=many)
        until(lambda: metrics(client)["llama_jax_rows_running"] > 0)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline().startswith("stopping: ")
        assert client.get("/health").status_code == 503  # it waits for the texts
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
        assert isinstance(answer.exception(10), httpx.TransportError)


def test_serve_refuses_before_it_loads(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    assert main(["serve", "nowhere", "--rows", "0"]) == 2
    assert capsys.readouterr().err == "error: rows=0 must be at least 1\n"
    for name in [name for name in sys.modules if name.startswith("llama_jax.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "nowhere"]) == 2
    assert capsys.readouterr().err == "error: serve needs uvicorn: pip install 'llama_jax[serve]'\n"
