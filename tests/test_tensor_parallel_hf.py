"""Models of transformers cut between processes equal themselves in one: trained, generating, and by their own plan."""

import pytest
import tensor_hf_cases as cases
from gang import Gang

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gang():
    with Gang(2) as members:
        yield members


@pytest.mark.parametrize("name", [name for name in cases.MODELS if name != "Qwen 3, not tied"])
def test_accelerated_and_cut(gang, name):
    gang.run("tensor_hf_cases:compare", name, True)


@pytest.mark.parametrize("name", ["GPT-2", "Qwen 3"])
def test_cut_as_it_is(gang, name):
    gang.run("tensor_hf_cases:compare", name, False)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Qwen 3", "Gemma 2"])
def test_it_generates_what_one_process_does(gang, name):
    for greedy, sampled, heads in gang.run("tensor_hf_cases:generated", name):
        assert greedy
        assert sampled
        assert heads == [2, 2]


@pytest.mark.parametrize("name", ["Llama", "Qwen 3, not tied"])
def test_cut_by_transformers_and_then_accelerated(gang, name):
    gang.run("tensor_hf_cases:by_their_own_means", name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Mixtral", "model must have a plan of colwise, rowwise, packed_heads, replicated_with_grad_allreduce for its"),
        (
            "with a hook",
            "model must have linear layers of their own weights, but model.layers.0.self_attn.q_proj has a",
        ),
        ("OPT", "model must have a plan for tensor parallelism (_tp_plan), which OPTForCausalLM has not"),
        ("Llama of 3 heads", "num_attention_heads must be divisible by the 2 ranks of tensor parallelism, not 3"),
        ("Llama of few keys", "num_key_value_heads must be divisible by the 2 ranks of tensor parallelism, not 1"),
    ],
)
def test_refusals(gang, name, message):
    for found in gang.run("tensor_hf_cases:refusal", name):
        assert found.startswith(message)


def test_all_take_the_weights_of_the_first(gang):
    assert max(gang.run("tensor_hf_cases:other_weights")) < 1e-4
