"""The server as its clients meet it: OpenAI's client, raw requests, clients that leave, and what is refused."""

import concurrent.futures
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving_app import KEY, serving

from llama_jax import generate_text
from llama_jax.checkpoint import LanguageModel
from llama_jax.data.chat import ChatML
from llama_jax.sampling import SamplingConfig, chat, complete
from llama_jax.serving import Service

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "one fish"}]


@pytest.fixture(scope="module")
def ai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as found:
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
    found = ai.chat.completions.create(model="fish", messages=MESSAGES, max_completion_tokens=11, temperature=0, n=2)  # type: ignore[arg-type]
    assert [choice.message.content for choice in found.choices] == [expected] * 2
    parts = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "fish"}]}]
    stream = ai.chat.completions.create(model="fish", messages=parts, max_tokens=11, temperature=0, stream=True)  # type: ignore[arg-type]
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
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_have_a_status_and_a_sentence(
    client: httpx.Client, path: str, body: bytes | dict, status: int, words: str, stream: bool
):
    if isinstance(body, dict):
        body = json.dumps({"stream": stream, **body}).encode()
    found = client.post(path, content=body)
    assert (found.status_code, found.json()["error"]["type"]) == (
        status,
        "not_found_error" if status == 404 else "invalid_request_error",
    )
    assert words in found.json()["error"]["message"]


def test_nothing_is_answered_without_the_key_or_to_another_site(url: str):
    body = {"prompt": "a", "max_tokens": 1}
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        found = httpx.post(f"{url}{COMPLETIONS}", json=body, headers=header)
        assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{url}/metrics").status_code == 401
    right = {"Authorization": f"Bearer {KEY}"}
    for header in ({"Host": "rebound.example"}, {"Origin": "http://elsewhere.example"}, {"Origin": "null"}):
        assert httpx.post(f"{url}{COMPLETIONS}", json=body, headers=right | header).status_code == 403
    found = httpx.post(f"{url}{COMPLETIONS}", json=body, headers=right | {"Origin": url})
    assert found.status_code == 200
    assert "access-control-allow-origin" not in found.headers
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_streams_at_once_are_unmixed_and_clients_may_leave(url: str, served: tuple[str, Service], lm: LanguageModel):
    prompts = [" ".join(["one", "two", "red", "blue"][(i >> k) % 4] for k in (0, 1, 2)) + " fish" for i in range(32)]
    headers = {"Authorization": f"Bearer {KEY}"}

    def run(i: int) -> str | None:
        body = {"prompt": prompts[i], "max_tokens": 12 + i % 3, "seed": i, "stream": True}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            if i % 8 == 1:
                assert client.post(COMPLETIONS, content=b"{").status_code == 400
            with client.stream("POST", COMPLETIONS, json=body) as found:
                assert found.status_code == 200
                text = ""
                for line in found.iter_lines():
                    if not line or line == "data: [DONE]":
                        continue
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    if i % 8 == 3:
                        return None
        return text

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        found = list(pool.map(run, range(32)))
    for i, text in enumerate(found):
        if text is not None:
            alone = generate_text(lm, prompts[i], max_new_tokens=12 + i % 3, temperature=1.0, seed=i)
            assert [text] == alone, i
    until(lambda: not served[1].worker.busy)


def test_a_client_that_leaves_frees_its_row_and_a_full_queue_refuses(lm: LanguageModel):
    body = {"prompt": "one", "max_tokens": 3, "temperature": 0}
    raw = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
    with (
        serving(lm, rows=1, max_queue=1, api_key=None) as (url, service),
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        held, step = threading.Event(), service.worker._engine.step
        service.worker._engine.step = lambda: step() if held.wait(0.01) else []  # type: ignore[method-assign]
        try:
            with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) as first:
                first.sendall(head.encode() + raw)
                until(lambda: service.worker.num_running == 1)
                second = pool.submit(httpx.post, f"{url}{COMPLETIONS}", json=body, timeout=60)
                until(lambda: service.worker.num_waiting == 1)
                third = httpx.post(f"{url}{COMPLETIONS}", json=body, timeout=60)
                assert (third.status_code, third.headers["retry-after"]) == (429, "1")
                assert third.json()["error"]["type"] == "rate_limit_error"
            until(lambda: service.worker.num_waiting == 0)  # the second has the row of the first
        finally:
            held.set()
        expected = generate_text(lm, "one", max_new_tokens=3, temperature=0)
        assert second.result().json()["choices"][0]["text"] == expected[0]
        assert 'status="499"} 1' in httpx.get(f"{url}/metrics").text


def test_an_engine_that_fails_is_replaced(lm: LanguageModel, caplog: pytest.LogCaptureFixture):
    with serving(lm, api_key=None) as (url, service):
        service.worker._engine.step = lambda: 1 / 0  # type: ignore[method-assign]
        body = {"prompt": "one", "max_tokens": 3, "temperature": 0}
        failed = httpx.post(f"{url}{COMPLETIONS}", json=body)
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        assert "ZeroDivisionError" in caplog.text
        assert httpx.post(f"{url}{COMPLETIONS}", json=body, timeout=60).status_code == 200


def test_a_server_that_stops_refuses(lm: LanguageModel):
    with serving(lm, api_key=None) as (url, service):
        service.worker.draining = True
        found = httpx.post(f"{url}{COMPLETIONS}", json={"prompt": "one"})
        assert (found.status_code, found.headers["retry-after"]) == (503, "10")
        assert httpx.get(f"{url}/health").status_code == 503


def test_metrics_count_what_was_done(lm: LanguageModel):
    with serving(lm, api_key=None, rows=3) as (url, _):
        body = {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 6, "ignore_eos": True}
        assert httpx.post(f"{url}{COMPLETIONS}", json=body, timeout=60).status_code == 200
        assert httpx.post(f"{url}{COMPLETIONS}", json={}).status_code == 400
        found = httpx.get(f"{url}/metrics").text
    samples = dict(line.rsplit(" ", 1) for line in found.splitlines() if not line.startswith("#"))
    assert samples['llama_jax_requests_total{path="/v1/completions",status="200"}'] == "1"
    assert samples['llama_jax_requests_total{path="/v1/completions",status="400"}'] == "1"
    assert (samples["llama_jax_prompt_tokens_total"], samples["llama_jax_generated_tokens_total"]) == ("5", "12")
    assert (samples["llama_jax_rows"], samples["llama_jax_rows_running"]) == ("3", "0")
    assert samples["llama_jax_time_to_first_token_seconds_count"] == "2"
    assert samples['llama_jax_time_to_first_token_seconds_bucket{le="+Inf"}'] == "2"
    assert samples["llama_jax_time_between_tokens_seconds_count"] == "10"


def test_models(ai: openai.OpenAI):
    (card,) = ai.models.list().data
    assert (card.id, card.object) == ("fish", "model")
    assert ai.models.retrieve("fish").to_dict()["max_model_len"] == 128
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("bird")


def until(holds, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_page_needs_no_network_and_shows_text_as_text(url: str):
    found = httpx.get(url)
    page = found.text
    assert found.headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in found.headers["content-security-policy"]
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", page)
