"""Attention in configurations drawn at random, the same ones in every run unless --hypothesis-seed says otherwise."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_attention import assert_attention_parity, key_start, make, make_packed

from gptkernels import simulator


@st.composite
def configurations(draw):
    kv_heads = draw(st.sampled_from([1, 2]))
    packed = draw(st.booleans())
    config = {
        "head_size": draw(st.sampled_from([64, 80])),
        "dtype": draw(st.sampled_from(["float16", "bfloat16"])),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 140)),
        "softcap": draw(st.none() | st.sampled_from([1.0, 30.0])),
        "sinks": draw(st.booleans()),
        "slopes": draw(st.booleans()),
        "return_lse": draw(st.booleans()),
        "scale": draw(st.none() | st.sampled_from([0.02, 0.5])),
        "torch_seed": draw(st.integers(0, 2**31)),
        "schedule": draw(st.integers(0, 2**31)),
    }
    if packed:
        config["documents"] = draw(st.lists(st.integers(0, 100), min_size=1, max_size=5))
    else:
        config["batch"] = draw(st.integers(1, 2))
        config["queries"] = draw(st.integers(1, 150))
        config["keys"] = draw(st.just(config["queries"]) | st.integers(1, 150))
        config["starts"] = draw(st.none() | st.lists(st.integers(0, 160), min_size=2, max_size=2))
    return config


def run(backend, config):
    torch.manual_seed(config["torch_seed"])
    where = type("Where", (), {"device": torch.device("cpu")})
    shape = {"heads": config["heads"], "kv_heads": config["kv_heads"], "head_size": config["head_size"]}
    shape["dtype"] = getattr(torch, config["dtype"])
    if "documents" in config:
        tensors = make_packed(where, config["documents"], **shape)
    else:
        tensors = make(where, config["queries"], config["keys"], batch=config["batch"], **shape)
        if config["starts"]:
            tensors["key_start"] = key_start(where, *config["starts"][: config["batch"]])
    if config["sinks"]:
        tensors["sinks"] = torch.randn(config["heads"]).requires_grad_()
    if config["slopes"]:
        tensors["alibi_slopes"] = torch.rand(config["heads"])
    options = {name: config[name] for name in ("causal", "window", "scale", "softcap", "return_lse")}
    with simulator.use(90, config["schedule"]):
        assert_attention_parity(tensors, backend, **options)


def report(backend, config):
    return f'reproduce: cd tests && python -c "import test_attention_random as t; t.run({backend!r}, {config!r})"'


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_random(backend):
    if simulator.unavailable():
        pytest.skip(simulator.unavailable())

    @settings(
        max_examples=50,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(configurations())
    def check(config):
        try:
            run(backend, config)
        except Exception as error:
            raise AssertionError(report(backend, config)) from error

    check()
