"""accelerate() on gated MLPs: by what they compute, whatever they and their parts are called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gptkernels as gk
from gptkernels import dispatch

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32}
FAMILIES = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Granite", "Cohere", "Phi3", "Glm"), "silu"),
    **dict.fromkeys(("Gemma", "Gemma2", "Gemma3"), "gelu_tanh"),
}


def model_of(name: str, **options) -> nn.Module:
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**SIZES, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(tokens).logits
    logits.backward(torch.linspace(-1, 1, logits.numel()).view_as(logits))
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_transformers(name):
    model = model_of(name)
    tokens = torch.randint(3, 64, (2, 7))
    expected = gradients(model, tokens)
    report = gk.accelerate(model, attention=False, norm=False, loss=False)
    assert [(row.part, row.became) for row in report.replaced] == [("mlp", "gptkernels.gated_mlp")]
    with dispatch.recording() as calls:
        found = gradients(model, tokens)
    assert [(op, call.activation) for op, call in calls] == [("gated_mlp", FAMILIES[name])]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    report.undo()
    assert torch.equal(gradients(model, tokens)["logits"], expected["logits"])


def test_shared_experts_and_what_is_left_of_the_others():
    options = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    model, tokens = model_of("Qwen2Moe", **options), torch.randint(3, 64, (2, 7))
    expected = model(tokens).logits
    report = gk.accelerate(model)
    assert [row.path for row in report.replaced if row.part == "mlp"] == ["model.layers.0.mlp.shared_expert"]
    assert [row.reason for row in report.left if row.path.endswith("experts")] == [
        "it gives each token experts of its own, for which gptkernels has no products"
    ]
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


class Apart(nn.Module):
    names = "gate_proj", "up_proj", "down_proj"

    def __init__(self, bias: bool = True):
        super().__init__()
        for name, size in zip(self.names, ((16, 24), (16, 24), (24, 16)), strict=True):
            setattr(self, name, nn.Linear(*size, bias))

    def act(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(up(x) * self.act(gate(x)))


class First(Apart):
    names = "w1", "w3", "w2"


class Packed(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(16, 48, bias), nn.Linear(24, 16, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.gelu(gate) * up)


class GptOss(Packed):
    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        gate, up = both[..., ::2].clamp(max=7), both[..., 1::2].clamp(-7, 7)
        return self.down_proj((up + 1) * gate * torch.sigmoid(1.702 * gate))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "activation"), [(Apart, "relu"), (First, "relu"), (Packed, "gelu"), (GptOss, "gpt_oss")]
)
def test_by_what_they_compute(kind, activation, bias):
    model = nn.ModuleDict({"mlp": kind(bias)})
    plain, x = copy.deepcopy(model), (torch.randn(2, 5, 16) * 4).requires_grad_()
    gk.accelerate(model)
    with dispatch.recording() as calls:
        out = model.mlp(x)
    assert [(op, call.activation) for op, call in calls] == [("gated_mlp", activation)]
    grads = torch.autograd.grad(out.sum(), (x, *model.parameters()))
    expected = plain.mlp(x)
    torch.testing.assert_close(out, expected)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), (x, *plain.parameters())), strict=True):
        torch.testing.assert_close(a, b)


class Quick(Apart):
    """As gelu_tanh to 1 in 50"""

    def act(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Swapped(Packed):
    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.gelu(gate) * up)


class Scaled(Apart):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class DropsOut(Apart):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.1, self.training))


@pytest.mark.parametrize("kind", [Quick, Swapped, Scaled, DropsOut])
def test_other_formulas_are_left(kind):
    model = nn.ModuleDict({"mlp": kind().eval(), "other": Apart()})
    report = gk.accelerate(model)
    assert [row.path for row in report.replaced] == ["other"]
    assert [row.reason for row in report.left] == ["it computes none of the gated MLPs that gptkernels has"]


def test_what_is_more_than_its_weights_is_left():
    model = nn.ModuleDict({name: Apart() for name in ("dropout", "float64", "hooked", "good")})
    model.dropout.dropout = nn.Dropout(0.1)
    model.float64.double()
    model.hooked.up_proj.register_forward_hook(lambda *_: None)
    report = gk.accelerate(model)
    reasons = {row.path: row.reason for row in report.left}
    assert [row.path for row in report.replaced] == ["good"]
    assert reasons["dropout"] == "it also has dropout"
    assert reasons["float64"].startswith("it is float64")
    assert reasons["hooked"] == "has a Linear with hooks or weights of its own kind"


def test_layers_that_change_afterwards_are_called():
    model, x = nn.ModuleDict({"mlp": Apart()}), torch.randn(3, 16)
    gk.accelerate(model)
    model.mlp.down_proj.register_forward_hook(lambda *arguments: 2 * arguments[-1])
    expected = 2 * F.linear(F.relu(model.mlp.gate_proj(x)) * model.mlp.up_proj(x), *model.mlp.down_proj.parameters())
    torch.testing.assert_close(model.mlp(x), expected)


def test_models_without_memory():
    with torch.device("meta"):
        model = model_of("Phi3")
    assert gk.accelerate(model).counts()["mlp"] == 1
