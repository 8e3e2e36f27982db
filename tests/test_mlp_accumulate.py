"""Weight gradients added to what is there already, within the product, in every backend."""

import pytest
import torch

import gptkernels as gk
from gptkernels.ops.mlp import accumulate_gradient

SIZES = {"x": (40, 64), "fc_weight": (128, 64), "fc_bias": (128,), "proj_weight": (64, 128), "proj_bias": (64,)}


def leaves(dtype):
    scale = {"x": 1.0, "fc_weight": 0.1, "proj_weight": 0.1}
    tensors = {name: torch.randn(size) * scale.get(name, 1.0) for name, size in SIZES.items()}
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}


def gradients(tensors, cotangent, **options):
    gk.mlp(**tensors, **options).backward(cotangent)
    return {name: x.grad for name, x in tensors.items()}


@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
@pytest.mark.parametrize("save", ["all", "preact", "input"])
def test_gradients_are_added_unrounded(anywhere, backend, save):
    anywhere.require(backend)
    dtype, device = torch.bfloat16, anywhere.device
    tensors = {name: x.detach().to(device).requires_grad_() for name, x in leaves(dtype).items()}
    cotangent = torch.randn(40, 64, device=device).to(dtype)
    exact = {name: x.detach().float().requires_grad_() for name, x in tensors.items()}
    expected = gradients(exact, cotangent.float(), backend="eager" if device.type == "cpu" else "auto")
    earlier = torch.randn(128, 64, device=device), torch.randn(64, 128, device=device).to(dtype)
    sums = [total.clone() for total in earlier]
    accumulate_gradient(tensors["fc_weight"], sums[0])
    accumulate_gradient(tensors["proj_weight"], sums[1])
    found = gradients(tensors, cotangent, backend=backend, save=save)
    assert found["fc_weight"] is None
    assert found["proj_weight"] is None
    for name in ("x", "fc_bias", "proj_bias"):
        torch.testing.assert_close(found[name].float(), expected[name], rtol=0.05, atol=0.1)
    # The float32 sum has no trace of bfloat16 but what went into the product: the activation's gradient, rounded.
    added = sums[0] - earlier[0]
    assert (added - expected["fc_weight"]).norm() < 4e-3 * expected["fc_weight"].norm()
    assert (added.to(dtype).float() != added).float().mean() > 0.5
    torch.testing.assert_close((sums[1] - earlier[1]).float(), expected["proj_weight"], rtol=0.05, atol=0.15)

    accumulate_gradient(tensors["fc_weight"], None)
    again = gradients(tensors, cotangent, backend=backend, save=save)
    assert again["fc_weight"].dtype == dtype
    assert again["proj_weight"] is None


def test_into_the_gradient_of_earlier_micro_batches():
    model = gk.nn.MLP(64, 128)
    parts = torch.randn(3, 40, 64)
    for part in parts:
        model(part).sum().backward()
    expected = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    model(parts[0]).sum().backward()
    for weight in (model.fc.weight, model.proj.weight):
        accumulate_gradient(weight, weight.grad)
    for part in parts[1:]:
        model(part).sum().backward()
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.grad, expected[name])


def test_frozen_weights_add_nothing():
    tensors = leaves(torch.float32)
    total = torch.zeros(128, 64)
    accumulate_gradient(tensors["fc_weight"], total)
    tensors["fc_weight"].requires_grad_(False)
    gradients(tensors, torch.randn(40, 64))
    assert not total.any()


def test_transposed_weights():
    weight = torch.randn(64, 128).requires_grad_()
    tensors, cotangent = leaves(torch.float32), torch.randn(40, 64)
    view = weight.mT
    total = torch.zeros(128, 64)
    accumulate_gradient(view, total)
    gk.mlp(**tensors | {"fc_weight": view}).backward(cotangent)
    assert weight.grad is None
    accumulate_gradient(view, None)
    gk.mlp(**tensors | {"fc_weight": view}).backward(cotangent)
    torch.testing.assert_close(total.mT, weight.grad)


def test_bad_sums():
    weight = torch.nn.Parameter(torch.randn(8, 4))
    with pytest.raises(ValueError, match="total must have shape"):
        accumulate_gradient(weight, torch.zeros(4, 8))
    with pytest.raises(TypeError, match="total must"):
        accumulate_gradient(weight, torch.zeros(8, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="total must not require"):
        accumulate_gradient(weight, torch.zeros(8, 4, requires_grad=True))


def test_not_under_compile():
    model = gk.nn.MLP(64, 128)
    accumulate_gradient(model.fc.weight, torch.zeros(128, 64))
    with pytest.raises(Exception, match="accumulates its gradient"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(4, 64))
