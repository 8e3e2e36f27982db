"""Generation: the cache changes nothing but the time, sampling keeps what it says, rows do not see each other."""

from dataclasses import replace

import pytest
import torch

from gptkernels.models import GPT, GPTConfig
from gptkernels.models.generation import KVCache, Sampling, generate, stream

LLAMA = {"norm": "rms", "rotary": 100.0, "heads": 4, "kv_heads": 2, "gated": True, "qk_norm": True}
WINDOWS = {"dense": None, "banded": 5, "alternating": 5}


def small(kind: str, **changes) -> GPT:
    pattern = {"dense": ("dense",), "banded": ("banded",), "alternating": ("dense", "banded")}[kind]
    torch.manual_seed(1)
    config = GPTConfig(
        vocabulary=97,
        context=64,
        layers=3,
        width=64,
        heads=2,
        pattern=pattern,
        window=WINDOWS[kind],
        tied=False,
        init_std=0.2,
        position_std=0.5,
    )
    return GPT(replace(config, **changes)).eval()


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, LLAMA], ids=["pre", "post", "llama"])
def test_same_tokens_with_and_without_cache(kind, changes):
    model = small(kind, **changes)
    # Shorter than the window, as long as it, and longer; what follows passes it by far.
    prompts = [torch.randint(97, (length,)) for length in (1, 5, 17, 4)]
    cached = model.generate(prompts, 30, temperature=0)
    assert [len(row) for row in cached] == [31, 35, 47, 34]
    for with_cache, without in zip(cached, model.generate(prompts, 30, temperature=0, use_cache=False), strict=True):
        assert torch.equal(with_cache, without)
    assert len(set(cached[2].tolist()[17:])) > 3, "a model that repeats one token proves nothing"


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt", "llama"])
def test_cached_hidden_states_are_those_of_the_whole_sequence(kind, changes):
    model = small(kind, **changes)
    tokens = torch.randint(97, (2, 40))
    whole = model.hidden(tokens)
    cache = KVCache(model, torch.tensor([20, 20]), 40)
    with torch.no_grad():
        parts = [model.hidden(tokens[:, :20], cache=cache)]
        parts += [model.hidden(tokens[:, t : t + 1], cache=cache) for t in range(20, 40)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_rings_hold_the_window_and_no_more():
    model = small("alternating")
    cache = KVCache(model, torch.tensor([20]), 40)
    with torch.no_grad():
        model.hidden(torch.randint(97, (1, 20)), cache=cache)
    assert [layer.k.shape[2] for layer in cache.layers] == [40, 5, 40]


def test_rows_do_not_depend_on_their_neighbours():
    model = small("alternating")
    prompts = [torch.randint(97, (length,)) for length in (3, 19)]
    together = model.generate(prompts, 20, temperature=0)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(model.generate([prompt], 20, temperature=0)[0], row)


def test_shared_layers_have_caches_of_their_own():
    model = small("banded", share_layers=True)
    prompts = [torch.randint(97, (9,))]
    first = model.generate(prompts, 20, temperature=0)[0]
    assert torch.equal(first, model.generate(prompts, 20, temperature=0, use_cache=False)[0])


def test_stop_token_ends_rows():
    model = small("dense")
    prompts = torch.randint(97, (2, 6))
    free = model.generate(prompts, 20, temperature=0)
    stop = free[0, 6 + 4].item()
    first = (free[0, 6:] == stop).nonzero()[0].item()
    ended = model.generate(list(prompts), 20, temperature=0, stop=stop)
    assert torch.equal(ended[0], free[0, : 6 + first + 1])
    filled = model.generate(prompts, 20, temperature=0, stop=stop)
    assert torch.equal(filled[0, : 6 + first + 1], ended[0])
    assert (filled[0, 6 + first :] == stop).all()


def test_stream_is_generate():
    model = small("dense")
    prompts = torch.randint(97, (2, 6))
    steps = list(stream(model, prompts, 7, temperature=0))
    assert torch.equal(torch.stack(steps, 1), generate(model, prompts, 7, temperature=0)[:, 6:])
    assert model.training is False


def test_seeded_samples_repeat_and_differ():
    model = small("dense")
    prompts = torch.randint(97, (1, 6))

    def sample(seed):
        return model.generate(prompts, 25, generator=torch.Generator().manual_seed(seed)).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_sampling_keeps_what_transformers_keeps():
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(5, 50) * 3
    for temperature, top_k, top_p in [(0.7, None, None), (1.0, 7, None), (1.3, None, 0.8), (0.9, 20, 0.6)]:
        expected = warpers.TemperatureLogitsWarper(temperature)(None, logits)
        if top_k:
            expected = warpers.TopKLogitsWarper(top_k)(None, expected)
        if top_p:
            expected = warpers.TopPLogitsWarper(top_p)(None, expected)
        actual = Sampling(temperature, top_k, top_p).probabilities(logits)
        torch.testing.assert_close(actual, expected.softmax(-1))


def test_top_p_keeps_the_token_that_reaches_it():
    weights = Sampling(top_p=0.6).probabilities(torch.tensor([[0.5, 0.3, 0.2]]).log())
    torch.testing.assert_close(weights, torch.tensor([[0.625, 0.375, 0.0]]))
    assert Sampling(top_p=0.01).probabilities(torch.randn(4, 9)).count_nonzero() == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 60}, "context of 64"),
        ({"temperature": -1}, "temperature must"),
        ({"top_k": 0}, "top_k must"),
        ({"top_p": 0.0}, "top_p must"),
        ({"prompts": []}, "prompts must"),
        ({"prompts": [torch.zeros(0, dtype=torch.int64)]}, "prompts must"),
        ({"prompts": torch.zeros(1, 3)}, "prompts must"),
    ],
)
def test_bad_options(options, message):
    arguments = {"prompts": torch.zeros(1, 6, dtype=torch.int64), "max_new_tokens": 5} | options
    with pytest.raises(ValueError, match=message):
        small("dense").generate(**arguments)


def test_masked_models_do_not_generate():
    with pytest.raises(ValueError, match="objective"):
        small("dense", objective="masked").generate(torch.zeros(1, 3, dtype=torch.int64), 2)
