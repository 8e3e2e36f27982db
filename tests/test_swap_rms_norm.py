"""accelerate() on RMSNorms: by what they compute, whatever they are called, and to the same bits."""

import pytest
import torch
from test_rms_norm import DTYPES, MODULES, module_of
from torch import Tensor, nn

import gptkernels as gk
from gptkernels import dispatch

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_of_transformers(name):
    """Recognised in float32, where all kinds are alike, and right in the other dtypes."""
    module = nn.ModuleDict({"norm": module_of(name, 48, torch.float32)})
    for dtype in DTYPES:
        x = torch.randn(2, 5, 48).to(dtype)
        expected = module.to(dtype).norm(x)
        report = gk.accelerate(module.float())
        assert [(row.part, row.became) for row in report.replaced] == [("norm", "gptkernels.rms_norm")]
        with dispatch.recording() as calls:
            found = module.to(dtype).norm(x)
        assert [op for op, _ in calls] == ["rms_norm"]
        assert torch.equal(found, expected)
        report.undo()
        assert torch.equal(module.norm(x), expected)


KINDS = ["llama.LlamaRMSNorm", "gemma.GemmaRMSNorm", "gpt_oss.GptOssRMSNorm", "t5.T5LayerNorm"]


@pytest.mark.parametrize("name", KINDS)
def test_dtypes_that_differ(name):
    """Where the original's result has another dtype than x, or the kernels do not take the weight, it runs itself."""
    module = nn.ModuleDict({"norm": module_of(name, 48, torch.bfloat16).float()})
    pairs = (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)
    inputs = [(weight, torch.randn(3, 48).to(dtype)) for weight, dtype in pairs]
    expected = [module.to(weight).norm(x) for weight, x in inputs]
    gk.accelerate(module.float())
    for (weight, x), right in zip(inputs, expected, strict=True):
        found = module.to(weight).norm(x)
        assert found.dtype == right.dtype
        assert torch.equal(found, right)


def test_heads_of_queries_and_keys():
    """Qwen3's, inside of its attention"""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    model, tokens = Qwen3ForCausalLM(config).eval(), torch.randint(0, 64, (1, 7))
    expected = model(tokens).logits
    report = gk.accelerate(model)
    norms = [row.path.rsplit(".", 1)[-1] for row in report.replaced if row.part == "norm"]
    assert sorted(norms) == ["input_layernorm", "k_norm", "norm", "post_attention_layernorm", "q_norm"]
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x.float(), (32,), self.weight.float(), self.eps).type_as(x)


class EpsOutsideRMSNorm(OwnRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.eps)).type_as(x)


class RoundedRMSNorm(OwnRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def test_by_what_they_compute():
    model = nn.ModuleDict({"own": OwnRMSNorm(), "outside": EpsOutsideRMSNorm(), "rounded": RoundedRMSNorm()})
    report = gk.accelerate(model)
    assert [row.path for row in report.replaced] == ["own"]
    reason = "it computes none of the RMSNorms that gptkernels has"
    assert {row.path: row.reason for row in report.left} == {"outside": reason, "rounded": reason}
