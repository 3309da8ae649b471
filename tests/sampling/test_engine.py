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
from llama_jax.nn import LSTM, LatentAttention, Mamba2, Mixer, NGram, Rope, SparseLatentAttention
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
# Prompts and counts are such that the caches have 16 or 64 positions.
GREEDY = SamplingConfig(9, 0.0)
DRAWN = SamplingConfig(5, 1.5, top_k=9, repetition_penalty=1.3)


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


def forward(model: Model, text: Sequence[int]) -> np.ndarray:
    """The logits at each token of a text; one program serves texts of all lengths."""
    return np.asarray(model(jnp.asarray([[*text, *[0] * (64 - len(text))]])))[0, : len(text)]


def logprobs_of(model: Model, prompt: Sequence[int], new: list[int]) -> np.ndarray:
    """The log-probabilities of all tokens at each new one, by a full forward."""
    logits = forward(model, [*prompt, *new])[len(prompt) - 1 : -1]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def assert_greedy(model: Model, prompt: Sequence[int], new: list[int]) -> None:
    """Every new token is the most probable one after those before it."""
    assert new == logprobs_of(model, prompt, new).argmax(-1).tolist()


@pytest.fixture(scope="module")
def prompts(two_layers: DecoderConfig) -> Prompts:
    """Short and long ones; the last three begin alike, one as another's text goes on."""
    rng = np.random.default_rng(0)
    found = [tuple(rng.integers(0, two_layers.vocab_size, n).tolist()) for n in (5, 1, 30, 3, 7, 33)]
    return [*found, (*found[2], 3, 1), found[2][:20]]


@pytest.fixture(scope="module")
def requests(prompts: Prompts) -> list[Request]:
    """Of all lengths, greedy ones and drawn ones with controls."""
    drawn = [{"seed": 2**40 + 1}, {"seed": 5, "temperature": 1.0, "top_k": 20, "repetition_penalty": 1.1}]
    first, second = (dataclasses.replace(DRAWN, **own) for own in drawn)
    settings = [GREEDY, first, GREEDY, second]
    counts = (4, 15, 6, 3, 9, 9, 7, 16)
    return [
        Request(prompt, dataclasses.replace(settings[i % 4], max_new_tokens=count), row=i)
        for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]


@pytest.fixture(scope="module")
def expected(model: Model, requests: list[Request]) -> list[list[int]]:
    return [alone(model, request.prompt, request.config, request.row) for request in requests]


@pytest.mark.parametrize(("rows", "prefill_chunk"), [pytest.param(2, 512, marks=pytest.mark.slow), (4, 16)])
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
    prompt = requests[4].prompt
    assert_greedy(model, prompt, alone(model, prompt, GREEDY))


@pytest.mark.slow
def test_a_mesh_changes_nothing(make_model, two_layers, requests: list[Request], expected: list[list[int]]):
    engine = Engine(make_model(two_layers, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})), rows=4, decode_chunk=4)
    tickets = [engine.add(request) for request in requests[:4]]
    found = run(engine)
    assert [ids(found[ticket, 0]) for ticket in tickets] == expected[:4]


def test_samples_share_their_prompt(model: Model, prompts: Prompts, monkeypatch: pytest.MonkeyPatch):
    """Sample i is drawn as prompt number row + i, and more samples than rows are fine; the prompt is run once."""
    counted: list[int] = []

    def counting(*arguments):
        counted.append(int(arguments[5].sum()))
        return loop.prefill(*arguments)

    monkeypatch.setattr(prefill, "prefill", counting)
    config = dataclasses.replace(DRAWN, num_samples=5)
    engine = Engine(model, rows=2, prefix_bytes=0)
    ticket = engine.add(Request(prompts[2], config, row=3))
    found = run(engine)
    assert sum(counted) == len(prompts[2]) - 1
    one = dataclasses.replace(config, num_samples=1)
    texts = [ids(found[ticket, sample]) for sample in range(5)]
    assert texts == [alone(model, prompts[2], one, row=3 + sample) for sample in range(5)]
    assert len({tuple(text) for text in texts}) == 5
    options = {"max_new_tokens": 5, "temperature": 1.5, "top_k": 9, "repetition_penalty": 1.3}
    several = generate(model, [list(prompts[2])], num_samples=5, **options)
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
            options = {"temperature": 1.0 + seed / 10, "top_k": 3 + seed, "seed": seed}
            engine.add(Request(prompts[5][:n], dataclasses.replace(DRAWN, **options)))
        run(engine)

    some((30, 31, 32, 29), 0)
    before = compiled()
    some((28, 32, 29), 1)
    some((32, 30, 32, 31), 2)
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
    assert [len(entry.top) for piece in found[tickets[2], 0] for entry in piece.logprobs or ()] == [0] * 9
    pieces = found[tickets[0], 0]
    logged = [entry for piece in pieces for entry in piece.logprobs or ()]
    assert [entry.token for entry in logged] == ids(pieces)
    logprobs = logprobs_of(model, prompts[0], ids(pieces))
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
        (Request((1,) * 60, GREEDY), r"60 tokens and max_new_tokens=9 .* 64 positions: take at most 4"),
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
    assert len(stopped[1][0].token_ids) < 15


def test_one_text_goes_on_while_a_long_prompt_is_run(model: Model, prompts: Prompts):
    engine = Engine(model, rows=2, prefill_chunk=4, decode_chunk=2)
    short = engine.add(Request(prompts[1], SamplingConfig(15, 0.0)))
    engine.step()
    engine.add(Request(prompts[5], GREEDY))
    steps = [engine.step() for _ in range(7)]  # 32 tokens take 8 of them
    assert all([piece.ticket for piece in pieces] == [short] for pieces in steps)


@pytest.fixture(scope="module")
def attentions(two_layers: DecoderConfig) -> dict[str, Mixer]:
    rope = Rope(theta=10000.0, scaling=None)
    return {
        "latent": LatentAttention(4, None, 16, 8, 4, 8, rope, 1e-6),
        "sparse": SparseLatentAttention(4, 16, 16, 8, 4, 8, rope, 1e-6, 2, 8, 6),
        "window": dataclasses.replace(two_layers.attention, window=5),
    }


@pytest.mark.quick("window")
@pytest.mark.parametrize("kind", ["latent", "sparse", "window"])
def test_rounded_keys_and_values_change_logits_by_little(kind: str, attentions, tiny_config, make_model):
    model = make_model(dataclasses.replace(tiny_config, attention=attentions[kind]))
    tokens = np.random.default_rng(1).integers(0, 40, (3, 12)).astype(np.int32)

    def last(module, tokens):
        found = []
        for dtype in ("float32", "int8"):
            cache = module.init_cache(3, 16, dtype)
            hidden, cache = module.extend(tokens, cache=cache, lengths=jnp.zeros(3, jnp.int32))
            found.append(module.logits(hidden))
        return found

    exact, rounded = map(np.asarray, model.run(last, tokens))
    error = np.sqrt(((rounded - exact) ** 2).mean()) / exact.std()
    assert 0 < error < (0.3 if kind == "sparse" else 0.1)  # another key may be chosen


@pytest.mark.slow
def test_rows_in_int8_are_as_alone(attentions, two_layers: DecoderConfig, make_model):
    """With every kind of attention in a layer of its own; the last row begins as the first."""
    others = tuple(LayerOverride((i,), attentions[kind]) for i, kind in enumerate(("sparse", "window"), 1))
    model = make_model(dataclasses.replace(two_layers, num_layers=3, attention=attentions["latent"], overrides=others))
    tokens = np.random.default_rng(1).integers(0, 40, (3, 18)).astype(np.int32)
    tokens[2, :17] = tokens[0, :17]
    engine = Engine(model, rows=2, cache_dtype="int8")
    tickets = [engine.add(Request(tuple(row.tolist()), GREEDY)) for row in tokens]
    found = run(engine)
    for ticket, row in zip(tickets, tokens, strict=True):
        one = Engine(model, rows=1, cache_dtype="int8", prefix_bytes=0)
        ticket_alone = one.add(Request(tuple(row.tolist()), GREEDY))
        assert ids(found[ticket, 0]) == ids(run(one)[ticket_alone, 0])


@pytest.fixture(scope="module")
def windowed(two_layers: DecoderConfig) -> DecoderConfig:
    """A window in the first layer, and all keys in the second."""
    own = dataclasses.replace(two_layers.attention, window=6)
    return dataclasses.replace(two_layers, overrides=(LayerOverride((0,), own),))


@pytest.mark.slow
def test_layers_with_a_window_keep_only_it(windowed: DecoderConfig, make_model, requests: list[Request]):
    """Refilled rows, chunks, known beginnings, a batch that grows: each text is that of full forwards."""
    model = make_model(windowed)
    engine = Engine(model, rows=4, prefill_chunk=16, decode_chunk=4)
    greedy = [Request(request.prompt, SamplingConfig(request.config.max_new_tokens, 0.0)) for request in requests]
    tickets = [engine.add(request) for request in greedy[:5]]
    pieces = engine.step() + engine.step()
    tickets += [engine.add(request) for request in greedy[5:]]
    found = run(engine)
    for ticket, request in zip(tickets, greedy, strict=True):
        new = ids([piece for piece in pieces if piece.ticket == ticket] + found[ticket, 0])
        assert_greedy(model, request.prompt, new)
    # The conversation goes on: its text is known, although the first layer has its end alone.
    text = (*request.prompt, *new, 3, 1, 4)
    engine.add(Request(text, GREEDY))
    (piece, *_) = engine.step()
    assert_greedy(model, text, piece.token_ids)
    shapes = [layer["k"].shape[2] for layer in engine._batch.cache]  # type: ignore[union-attr]
    assert shapes[0] == 7
    assert shapes[1] >= len(text)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"axes": {"data": 2, "fsdp": 2, "tensor": 2}}, {"draft": "prompt"}])
def test_windows_on_a_mesh_and_with_guesses(options: dict, windowed, make_model, prompts: Prompts):
    model = make_model(windowed, make_mesh(options["axes"]) if "axes" in options else None)
    engine = Engine(model, rows=4, decode_chunk=4, speculation=Speculation.of(model, options.get("draft")))
    tickets = [engine.add(Request(prompt, SamplingConfig(24, 0.0))) for prompt in prompts]
    found, one = run(engine), make_model(windowed)
    for ticket, prompt in zip(tickets, prompts, strict=True):
        assert_greedy(one, prompt, ids(found[ticket, 0]))


@pytest.mark.slow
def test_models_with_states(two_layers: DecoderConfig, make_model, prompts: Prompts):
    """They run their prompts whole, a short one with a long one's padding, and take part in everything else."""
    others = LayerOverride((1,), NGram(3, 24)), LayerOverride((2,), Mamba2(4, 4, 8))
    model = make_model(dataclasses.replace(two_layers, num_layers=3, attention=LSTM(16), overrides=others))
    engine = Engine(model, rows=2, prefill_chunk=4)
    tried = [prompts[i] for i in (2, 0, 1)]
    tickets = [engine.add(Request(prompt, dataclasses.replace(GREEDY, logprobs=0))) for prompt in tried]
    found = run(engine)
    for ticket, prompt in zip(tickets, tried, strict=True):
        new, logged = ids(found[ticket, 0]), [x for piece in found[ticket, 0] for x in piece.logprobs or ()]
        expected = logprobs_of(model, prompt, new)
        assert new == expected.argmax(-1).tolist()
        np.testing.assert_allclose([x.logprob for x in logged], expected.max(-1), atol=1e-4)
    with pytest.raises(UserError, match="cache_dtype=int8 is for attention"):
        Engine(model, cache_dtype="int8")


@pytest.mark.slow
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
        engine.add(Request(tuple(story[:length]), SamplingConfig(128 - length, 0.0), row=length))
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
