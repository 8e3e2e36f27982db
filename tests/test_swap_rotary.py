"""Rotary positions of models on gptkernels.rope: decided by trying, in the attention's own forward."""

import copy

import pytest
import torch
from test_swap_trial import DECODER, EXPERTS, NO_WINDOW, TOKENS

import gptkernels as gk
from gptkernels.dispatch import recording
from gptkernels.swap import rotary

transformers = pytest.importorskip("transformers")

HEADS = {"head_dim": 16}
# Model and options -> how its heads are rotated; every layer's are.
MODELS = {
    "Llama": {},
    "Qwen3": HEADS,
    "Gemma": HEADS,
    "Gemma2": HEADS,
    "Phi3": {},
    "Phi": {"partial_rotary_factor": 0.5},
    "Cohere": {},
    "Glm": HEADS,
    "GptOss": {**HEADS, "num_local_experts": 4},
    "Olmo2": {},
    "StableLm": {},
    "Qwen2Moe": {**EXPERTS, **NO_WINDOW},
}


def made(name: str, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**TOKENS, **DECODER, **MODELS.get(name, {}), **options})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = made(name)
    fast = copy.deepcopy(model)
    report = gk.accelerate(fast, norm=False, mlp=False, loss=False)
    assert report.counts()["rotary"] == 2
    tokens = torch.randint(3, 61, (2, 10))
    with recording() as calls:
        found = fast(tokens).logits
    assert [op for op, _ in calls].count("rope") == 2
    expected = model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(expected)
    for out in (found, expected):
        out.backward(cotangent)
    grads = dict(fast.named_parameters())
    for parameter, truth in model.named_parameters():
        torch.testing.assert_close(grads[parameter].grad, truth.grad, rtol=1e-4, atol=1e-5)
    report.undo()
    with recording() as calls, torch.no_grad():
        assert torch.equal(fast(tokens).logits, model(tokens).logits)
    assert not calls


def test_generation_continues_where_it_was():
    model = made("Llama")
    fast = copy.deepcopy(model)
    gk.accelerate(fast)
    prompt = torch.randint(3, 61, (2, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    assert torch.equal(fast.generate(prompt, **options), model.generate(prompt, **options))


def test_a_llama_runs_on_our_kernels_alone():
    """RMSNorm, QK-norm, rotary positions, attention, the gated MLP and the loss."""
    model = made("Qwen3")
    fast = copy.deepcopy(model)
    report = gk.accelerate(fast)
    assert not report.left
    assert report.counts() == {"attention": 2, "rotary": 2, "norm": 9, "mlp": 2, "loss": 1}
    assert {row.became.split(",")[0] for row in report.replaced} == {
        *("gptkernels.rms_norm", "gptkernels.rope", "gptkernels.attention", "gptkernels.gated_mlp"),
        "gptkernels.linear_cross_entropy",
    }
    tokens = torch.randint(3, 61, (2, 10))
    with recording() as calls:
        loss = fast.train()(tokens, labels=tokens).loss
    ops = [op for op, _ in calls]
    assert {op: ops.count(op) for op in ops} == {
        **{"rms_norm": 9, "rope": 2, "attention": 2, "gated_mlp": 2},
        "linear_cross_entropy": 1,
    }
    torch.testing.assert_close(loss, model.train()(tokens, labels=tokens).loss, rtol=1e-5, atol=1e-5)


def test_it_compiles_in_one_graph():
    torch._dynamo.reset()
    model = made("Phi").model
    gk.accelerate(model)
    hidden, seen = torch.randn(2, 10, 64), []
    positions = model.rotary_emb(hidden, torch.arange(10).unsqueeze(0))
    attention = model.layers[0].self_attn

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        expected = attention(hidden, position_embeddings=positions, attention_mask=None)[0]
        compiled = torch.compile(attention, fullgraph=True, backend=backend)
        found = compiled(hidden, position_embeddings=positions, attention_mask=None)[0]
    torch.testing.assert_close(found, expected)
    assert sum("rope_fwd" in target for target in seen) == 1


def test_other_functions_stay():
    """One that rotates otherwise, and calls that rope does not take."""

    def reversed_angles(q, k, cos, sin, unsqueeze_dim=1):
        return gk.rope(q, k, cos, -sin)

    assert not rotary.rotations(reversed_angles, 16)
    assert not rotary.rotations(lambda q, k, cos, sin: (q, k), 16)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    known = rotary.rotations(apply_rotary_pos_emb, 16)
    assert known[16, 16] == (16, 16, False)
    function = rotary.ours(apply_rotary_pos_emb, known, "auto")
    q, tables = torch.randn(2, 3, 5, 16), torch.randn(2, 2, 5, 16)
    for arguments, options, taken in (
        ((q, q, *tables), {}, True),
        ((q, q, *tables[:, :1]), {}, True),
        ((q.bfloat16(), q.bfloat16(), *tables), {}, False),
        ((q.double(), q.double(), *tables.double()), {}, False),
        ((q.transpose(1, 2), q.transpose(1, 2), *tables), {"unsqueeze_dim": 2}, False),
    ):
        with recording() as calls:
            found = function(*arguments, **options)
        assert bool(calls) == taken
        torch.testing.assert_close(found, apply_rotary_pos_emb(*arguments, **options))
