"""Requests that are continued together: each as if it were alone."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.config import UserError
from llama_jax.models import DecoderConfig, LayerOverride, Model
from llama_jax.nn import LSTM, LatentAttention, Mamba2, NGram, Rope, SparseLatentAttention
from llama_jax.parallel import make_mesh
from llama_jax.sampling import (
    Engine,
    Piece,
    Request,
    SamplingConfig,
    Speculation,
    Written,
    answers,
    generate,
    loop,
    prefill,
)

Prompts = list[tuple[int, ...]]
GREEDY = SamplingConfig(12, 0.0)


def run(engine: Engine) -> dict[tuple[int, int], list[Piece]]:
    pieces = defaultdict(list)
    while not engine.idle:
        for piece in engine.step():
            assert not any(before.finish_reason for before in pieces[piece.ticket, piece.sample])
            pieces[piece.ticket, piece.sample].append(piece)
    assert all(found[-1].finish_reason for found in pieces.values())
    return pieces


def ids(pieces: list[Piece]) -> list[int]:
    return [i for piece in pieces for i in piece.token_ids]


def alone(model: Model, prompt: Sequence[int], config: SamplingConfig, row: int = 0) -> list[int]:
    engine = Engine(model, rows=1, prefix_bytes=0)
    ticket = engine.add(Request(tuple(prompt), config, row=row))
    return ids(run(engine)[ticket, 0])


@pytest.fixture(scope="module")
def prompts(two_layers: DecoderConfig) -> Prompts:
    """Short and long ones; the last three begin alike, one as another's text goes on."""
    rng = np.random.default_rng(0)
    found = [tuple(rng.integers(0, two_layers.vocab_size, n).tolist()) for n in (5, 1, 30, 3, 7, 33)]
    return [*found, (*found[2], 3, 1), found[2][:20]]


@pytest.fixture(scope="module")
def requests(prompts: Prompts) -> list[Request]:
    """Of all lengths, greedy and drawn, with controls and without."""
    settings = [
        {"temperature": 0.0},
        {"temperature": 1.5, "seed": 2**40 + 1},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_k": 9, "seed": 5},
    ]
    counts = (4, 20, 6, 3, 12, 9, 7, 16)
    return [
        Request(prompt, SamplingConfig(max_new_tokens=count, **settings[i % 4]), row=i)  # type: ignore[arg-type]
        for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]


@pytest.fixture(scope="module")
def expected(model: Model, requests: list[Request]) -> list[list[int]]:
    return [alone(model, request.prompt, request.config, request.row) for request in requests]


@pytest.mark.parametrize(("rows", "prefill_chunk"), [(2, 512), (4, 16)])
def test_requests_are_continued_as_if_alone(
    model: Model, requests: list[Request], expected: list[list[int]], rows: int, prefill_chunk: int
):
    """Refilled rows, prompts in chunks and from known beginnings, a batch and a cache that grow, neighbours that go."""
    engine = Engine(model, rows=rows, prefill_chunk=prefill_chunk, decode_chunk=4)
    tickets = [engine.add(request) for request in requests[:5]]
    gone = engine.add(Request(requests[2].prompt, SamplingConfig(30, 0.0)))
    pieces = engine.step() + engine.step() + engine.step()
    engine.cancel(gone)
    tickets += [engine.add(request) for request in requests[5:]]
    found = run(engine)
    for ticket, request, tokens in zip(tickets, requests, expected, strict=True):
        early = [piece for piece in pieces if piece.ticket == ticket]
        assert ids(early + found[ticket, 0]) == tokens
        assert (early + found[ticket, 0])[-1].finish_reason == "length"
        assert len(tokens) == request.config.max_new_tokens
    assert (gone, 0) not in found
    engine.cancel(gone)  # has no effect
    # The engine goes on afterwards, and knows the prompts.
    ticket = engine.add(requests[6])
    assert ids(run(engine)[ticket, 0]) == expected[6]


def test_the_greedy_text_of_the_engine_is_that_of_full_forwards(model: Model, requests: list[Request]):
    tokens = np.zeros((1, 48), np.int32)
    prompt, count = requests[4].prompt, 12
    tokens[0, : len(prompt)] = prompt
    for position in range(len(prompt), len(prompt) + count):
        tokens[0, position] = np.asarray(model(jnp.asarray(tokens)))[0, position - 1].argmax()
    assert alone(model, prompt, GREEDY) == tokens[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_mesh_changes_nothing(axes: dict, make_model, two_layers, requests: list[Request], expected: list[list[int]]):
    engine = Engine(make_model(two_layers, make_mesh(axes)), rows=4, decode_chunk=4)
    tickets = [engine.add(request) for request in requests[:6]]
    found = run(engine)
    assert [ids(found[ticket, 0]) for ticket in tickets] == expected[:6]


def test_samples_share_their_prompt(model: Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch):
    """Sample i is drawn as prompt number row + i, and more samples than rows are fine; the prompt is run once."""
    counted: list[int] = []

    def counting(*arguments):
        counted.append(int(arguments[5].sum()))
        return loop.prefill(*arguments)

    monkeypatch.setattr(prefill, "prefill", counting)
    config = SamplingConfig(5, 1.5, num_samples=5)
    engine = Engine(model, rows=2, prefix_bytes=0)
    ticket = engine.add(Request(prompts[2], config, row=3))
    found = run(engine)
    assert sum(counted) == len(prompts[2]) - 1
    one = dataclasses.replace(config, num_samples=1)
    texts = [ids(found[ticket, sample]) for sample in range(5)]
    assert texts == [alone(model, prompts[2], one, row=3 + sample) for sample in range(5)]
    assert len({tuple(text) for text in texts}) == 5
    several = generate(model, [list(prompts[2])], max_new_tokens=5, temperature=1.5, num_samples=5)
    assert several.shape == (5, 35)
    assert several[3, 30:].tolist() == texts[0]


def test_known_beginnings_are_not_run_again(model: Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch):
    """Neither those of a prompt nor those of a conversation, until their memory is needed for others."""
    counted: list[int] = []

    def counting(*arguments):
        counted.append(int(arguments[5].sum()))
        return loop.prefill(*arguments)

    monkeypatch.setattr(prefill, "prefill", counting)
    engine = Engine(model, rows=2)
    first = engine.add(Request(prompts[2], GREEDY))
    answer = ids(run(engine)[first, 0])
    assert counted.pop() == 29
    talk = (*prompts[2], *answer, 4, 4, 7)
    second = engine.add(Request(talk, GREEDY))
    found = run(engine)
    assert counted.pop() == 3  # the last token of the answer and all of the new ones but the last
    assert ids(found[second, 0]) == alone(model, talk, GREEDY)
    engine = Engine(model, rows=2, prefix_bytes=1)
    for _ in range(2):
        engine.add(Request(prompts[2], GREEDY))
        run(engine)
    assert counted[-2:] == [29, 29]


def test_another_length_or_batch_compiles_nothing(model: Model, prompts: Prompts):
    programs = (loop._prefill, loop._advance, loop._place, loop._empty)

    def compiled() -> list[int]:
        return [program._cache_size() for program in programs]

    def some(lengths: Sequence[int], seed: int) -> None:
        engine = Engine(model, rows=4)
        for n in lengths:
            engine.add(Request(prompts[5][:n], SamplingConfig(9, 1.0 + seed / 10, top_k=3 + seed, seed=seed)))
        run(engine)

    some((20, 21, 22, 19), 0)
    before = compiled()
    some((18, 22, 17), 1)
    some((22, 20, 22, 21), 2)
    assert compiled() == before


def test_a_fault_ends_its_request_alone(model: Model, prompts: Prompts):
    def damaged(logits, written: Written):
        hit = (written.tokens[:, 0] == prompts[0][0]) & (written.lengths == len(prompts[0]) + 3)
        return jnp.where(hit[:, None], jnp.nan, logits)

    config = dataclasses.replace(GREEDY, controls=(damaged,))
    engine = Engine(model, rows=4)
    tickets = [engine.add(Request(prompt, config, row=row)) for row, prompt in enumerate(prompts[:3])]
    found = run(engine)
    last = found[tickets[0], 0][-1]
    assert last.finish_reason == "error"
    assert "the logits are not numbers (NaN or infinite) at new token 4 of prompt 0" in str(last.error)
    plain = [alone(model, prompt, GREEDY) for prompt in prompts[:3]]
    assert ids(found[tickets[0], 0]) == plain[0][:3]
    assert [ids(found[ticket, 0]) for ticket in tickets[1:]] == plain[1:]


def test_log_probabilities_are_those_of_the_full_forward(model: Model, prompts: Prompts):
    """Of the tokens of each row that asks for them, in chunks and with stops."""
    engine = Engine(model, rows=4, decode_chunk=3)
    wanted = (3, None, 0)
    tickets = [
        engine.add(Request(prompt, dataclasses.replace(GREEDY, logprobs=n)))
        for prompt, n in zip(prompts[:3], wanted, strict=True)
    ]
    found = run(engine)
    assert all(piece.logprobs is None for piece in found[tickets[1], 0])
    assert [len(entry.top) for piece in found[tickets[2], 0] for entry in piece.logprobs or ()] == [0] * 12
    pieces = found[tickets[0], 0]
    logged = [entry for piece in pieces for entry in piece.logprobs or ()]
    assert [entry.token for entry in logged] == ids(pieces)
    logits = np.asarray(model(np.array([[*prompts[0], *ids(pieces)]])))[0, len(prompts[0]) - 1 : -1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for entry, row in zip(logged, logprobs, strict=True):
        best = np.argsort(-row)[:3]
        assert [i for i, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], row[best], atol=1e-4)
        np.testing.assert_allclose(entry.logprob, row[entry.token], atol=1e-4)


def test_stops_are_each_request_s_own(model: Model, prompts: Prompts):
    free = alone(model, prompts[4], GREEDY)
    engine = Engine(model, rows=2)
    first = engine.add(Request(prompts[4], GREEDY, stop_ids=(free[3],)))
    second = engine.add(Request(prompts[4], GREEDY))
    found = run(engine)
    assert ids(found[first, 0]) == free[: free.index(free[3]) + 1]
    assert found[first, 0][-1].finish_reason == "stop"
    assert ids(found[second, 0]) == free


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request((), GREEDY), "a prompt without any token"),
        (Request((40,), GREEDY), "token id 40 is outside the model's vocabulary of 40"),
        (Request((1,) * 60, GREEDY), r"60 tokens and max_new_tokens=12 .* 64 positions: take at most 4"),
        (Request((1,), dataclasses.replace(GREEDY, regex="a")), "need a tokenizer"),
        (Request((1,), dataclasses.replace(GREEDY, banned_ids=(99,))), "99"),
    ],
)
def test_what_cannot_be_continued_is_refused_at_once(model: Model, request_: Request, sentence: str):
    engine = Engine(model)
    with pytest.raises(UserError, match=sentence):
        engine.add(request_)
    assert engine.idle


def test_many_prompts_come_back_in_order(model: Model, requests: list[Request], expected: list[list[int]]):
    counts: list[tuple[int, int]] = []
    again = requests * 3
    found = answers(model, again, rows=4, longest_first=True, progress=lambda done, total: counts.append((done, total)))
    assert [answer.token_ids for (answer,) in found] == expected * 3
    assert counts == [(i + 1, 24) for i in range(24)]
    stopped = list(answers(model, requests, rows=4, enough=lambda i, sample, ids: i == 1 and len(ids) >= 5))
    assert [answer.finish_reason for (answer,) in stopped] == ["length", "stop", *["length"] * 6]
    assert stopped[1][0].token_ids == expected[1][: len(stopped[1][0].token_ids)]
    assert len(stopped[1][0].token_ids) < 20


def test_one_text_goes_on_while_a_long_prompt_is_run(model: Model, prompts: Prompts):
    engine = Engine(model, rows=2, prefill_chunk=4, decode_chunk=2)
    short = engine.add(Request(prompts[1], SamplingConfig(20, 0.0)))
    engine.step()
    engine.add(Request(prompts[5], GREEDY))
    steps = [engine.step() for _ in range(7)]  # 32 tokens take 8 of them
    assert all([piece.ticket for piece in pieces] == [short] for pieces in steps)


@pytest.mark.parametrize("kind", ["latent", "sparse", "window"])
def test_every_attention_caches_int8(kind: str, two_layers: DecoderConfig, make_model):
    """Rounded keys and values change logits by little, and each row is as alone."""
    own = {
        "latent": LatentAttention(4, None, 16, 8, 4, 8, Rope(theta=10000.0, scaling=None), 1e-6),
        "sparse": SparseLatentAttention(4, 16, 16, 8, 4, 8, Rope(theta=10000.0, scaling=None), 1e-6, 2, 8, 6),
        "window": dataclasses.replace(two_layers.attention, window=5),
    }[kind]
    model = make_model(dataclasses.replace(two_layers, attention=own))
    tokens = np.random.default_rng(1).integers(0, 40, (3, 12)).astype(np.int32)

    def last(module, tokens, dtype):
        cache = module.init_cache(3, 16, dtype)
        hidden, cache = module.extend(tokens, cache=cache, lengths=jnp.zeros(3, jnp.int32))
        return module.logits(hidden)

    exact, rounded = (np.asarray(model.run(last, tokens, dtype=dtype)) for dtype in ("float32", "int8"))
    error = np.sqrt(((rounded - exact) ** 2).mean()) / exact.std()
    assert 0 < error < (0.3 if kind == "sparse" else 0.1)  # another key may be chosen
    engine = Engine(model, rows=2, cache_dtype="int8")
    tickets = [engine.add(Request(tuple(row.tolist()), GREEDY)) for row in tokens]
    found = run(engine)
    for ticket, row in zip(tickets, tokens, strict=True):
        one = Engine(model, rows=1, cache_dtype="int8")
        ticket_alone = one.add(Request(tuple(row.tolist()), GREEDY))
        assert ids(found[ticket, 0]) == ids(run(one)[ticket_alone, 0])


@pytest.fixture(scope="module")
def windowed(two_layers: DecoderConfig) -> DecoderConfig:
    """A window in the first layer, and all keys in the second."""
    own = dataclasses.replace(two_layers.attention, window=6)
    return dataclasses.replace(two_layers, overrides=(LayerOverride((0,), own),))


def test_layers_with_a_window_keep_only_it(windowed: DecoderConfig, make_model, requests: list[Request]):
    """Refilled rows, chunks, known beginnings, a batch that grows: each text is that of full forwards."""
    model = make_model(windowed)
    engine = Engine(model, rows=4, prefill_chunk=16, decode_chunk=4)
    tickets = [engine.add(request) for request in requests[:5]]
    pieces = engine.step() + engine.step()
    tickets += [engine.add(request) for request in requests[5:]]
    found = run(engine)
    for ticket, request in zip(tickets, requests, strict=True):
        early = [piece for piece in pieces if piece.ticket == ticket]
        text = [*request.prompt, *ids(early + found[ticket, 0])]
        if request.config.temperature == 0 and request.config.repetition_penalty == 1:
            logits = np.asarray(model(jnp.asarray([text])))[0, len(request.prompt) - 1 : -1]
            assert text[len(request.prompt) :] == logits.argmax(-1).tolist()
        assert text[len(request.prompt) :] == alone(model, request.prompt, request.config, request.row)
    # The conversation goes on: its text is known, although the first layer has its end alone.
    text = (*text, 3, 1, 4)
    engine.add(Request(text, GREEDY))
    (piece, *_) = engine.step()
    assert piece.token_ids == [int(np.asarray(model(jnp.asarray([text])))[0, -1].argmax())]
    shapes = [layer["k"].shape[2] for layer in engine._batch.cache]  # type: ignore[union-attr]
    assert shapes[0] == 7
    assert shapes[1] >= len(text)


@pytest.mark.parametrize(
    "options", [{"axes": {"data": 2, "fsdp": 2, "tensor": 2}}, {"draft": "prompt"}, {"cache": "int8"}]
)
def test_windows_on_a_mesh_with_guesses_and_rounded(options: dict, windowed, make_model, prompts: Prompts):
    mesh = make_mesh(options["axes"]) if "axes" in options else None
    model, dtype = make_model(windowed, mesh), options.get("cache")
    speculation = Speculation.of(model, options.get("draft"))
    engine = Engine(model, rows=4, decode_chunk=4, cache_dtype=dtype, speculation=speculation)
    tickets = [engine.add(Request(prompt, SamplingConfig(24, 0.0))) for prompt in prompts]
    found = run(engine)
    for ticket, prompt in zip(tickets, prompts, strict=True):
        if dtype:
            one = Engine(model, rows=1, cache_dtype=dtype, prefix_bytes=0)
            same = one.add(Request(prompt, SamplingConfig(24, 0.0)))
            assert ids(found[ticket, 0]) == ids(run(one)[same, 0])
        else:
            text = [*prompt, *ids(found[ticket, 0])]
            logits = np.asarray(model(jnp.asarray([text])))[0, len(prompt) - 1 : -1]
            assert text[len(prompt) :] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("network", [LSTM(16), NGram(3, 24), Mamba2(4, 4, 8)])
def test_models_with_states(network, two_layers: DecoderConfig, make_model, requests: list[Request]):
    """They run their prompts whole, and take part in everything else."""
    model = make_model(dataclasses.replace(two_layers, attention=network))
    engine = Engine(model, rows=2, prefill_chunk=4)
    tickets = [engine.add(request) for request in requests[:4]]
    found = run(engine)
    for ticket, request in zip(tickets, requests, strict=False):
        assert ids(found[ticket, 0]) == alone(model, request.prompt, request.config, request.row)
    with pytest.raises(UserError, match="cache_dtype=int8 is for attention"):
        Engine(model, cache_dtype="int8")


def test_real_weights_tell_their_story(shared_data: Path):
    """In refilled rows of eight devices, after a shared beginning, character by character; in int8 within bounds."""
    folder = shared_data / "llama2c"
    expected = (folder / "stories260K_expected_greedy200.txt").read_text().strip()
    files = folder / "stories260K.bin", folder / "tok512.bin"
    lm = llama_jax.load(files[0], tokenizer=files[1], mesh=make_mesh({"fsdp": 4, "tensor": 2}), dtype="float32")
    assert lm.tokenizer is not None
    story = lm.tokenizer.encode_prompt(expected, special=False)
    engine = Engine(lm, rows=2, decode_chunk=16, prefill_chunk=32)
    for length in (1, 40, 90):
        engine.add(Request(tuple(story[:length]), SamplingConfig(120, 0.0), row=length))
    found = run(engine)
    for ticket, length in enumerate((1, 40, 90)):
        told = lm.tokenizer.decode([*story[:length], *ids(found[ticket, 0])]).strip()
        assert told[: len(expected)] == expected[: len(told)]

    def logits(module, tokens, dtype):
        cache = module.init_cache(1, tokens.shape[1], dtype)
        return module.logits(module.extend(tokens, cache=cache, lengths=jnp.zeros(1, jnp.int32))[0])

    text = np.array([story[:128]], np.int32)
    exact, rounded = (
        np.asarray(jax.nn.log_softmax(jnp.asarray(lm.model.run(logits, text, dtype=dtype))))
        for dtype in ("float32", "int8")
    )
    divergence = (np.exp(exact) * (exact - rounded)).sum(-1)
    assert 0 < divergence.mean() < 2e-3
    assert divergence.max() < 2e-2
