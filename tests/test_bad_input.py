"""Wrong calls get an error that names the argument, what it was and what is accepted."""

import re
import threading

import pytest
import torch

import gptkernels as gk

X = torch.randn(4, 32)
HALF = X.half()
W = torch.randn(32)
SPARSE = torch.eye(32).to_sparse()


def layer_norm(x=X, weight=W, bias=None, **options):
    return gk.layer_norm(x, weight, bias, **options)


def add_layer_norm(x=X, residual=X, weight=W, bias=None, **options):
    return gk.add_layer_norm(x, residual, weight, bias, **options)


def rms_norm(x=X, weight=W, **options):
    return gk.rms_norm(x, weight, **options)


def add_rms_norm(x=X, residual=X, weight=W, **options):
    return gk.add_rms_norm(x, residual, weight, **options)


# (op, arguments, exception, words of the message)
CASES = [
    (layer_norm, {"x": X.tolist()}, TypeError, "x must be a tensor, not list"),
    (layer_norm, {"x": None}, TypeError, "x must be a tensor, not NoneType"),
    (layer_norm, {"x": X.double()}, TypeError, "x must be float16, bfloat16, float32, not float64"),
    (layer_norm, {"x": X.int()}, TypeError, "x must be .* not int32"),
    (layer_norm, {"x": X.bool()}, TypeError, "x must be .* not bool"),
    (layer_norm, {"x": X.to(torch.complex64)}, TypeError, "x must be .* not complex64"),
    (layer_norm, {"x": SPARSE}, TypeError, "x must be a dense .* not torch.sparse_coo"),
    (layer_norm, {"x": torch.tensor(1.0)}, ValueError, r"x must have a last dimension .* not shape \(\)"),
    (layer_norm, {"x": torch.empty(3, 0), "weight": torch.empty(0)}, ValueError, r"last dimension .* \(3, 0\)"),
    (layer_norm, {"weight": None}, TypeError, "weight must be a tensor, not NoneType"),
    (layer_norm, {"weight": 1.0}, TypeError, "weight must be a tensor, not float"),
    (layer_norm, {"weight": W.double()}, TypeError, "weight must be float32, not float64"),
    (layer_norm, {"weight": W.half()}, TypeError, "weight must be float32, not float16"),
    (layer_norm, {"x": HALF, "weight": W.bfloat16()}, TypeError, "weight must be float16, float32, not bfloat16"),
    (layer_norm, {"weight": torch.randn(31)}, ValueError, r"weight must have shape \(32,\) .* not \(31,\)"),
    (layer_norm, {"weight": torch.randn(4, 32)}, ValueError, r"weight must have shape \(32,\) .* not \(4, 32\)"),
    (layer_norm, {"weight": torch.randn(())}, ValueError, r"weight must have shape \(32,\) .* not \(\)"),
    (layer_norm, {"weight": W.to("meta")}, ValueError, "weight must be on cpu like the other tensors, not on meta"),
    (layer_norm, {"bias": 0.0}, TypeError, "bias must be a tensor, not float"),
    (layer_norm, {"bias": W.half()}, TypeError, "bias must be float32, not float16"),
    (layer_norm, {"x": HALF, "bias": W.half()}, TypeError, "bias must be float32, not float16"),
    (layer_norm, {"bias": torch.randn(33)}, ValueError, r"bias must have shape \(32,\) .* not \(33,\)"),
    (layer_norm, {"bias": W.to("meta")}, ValueError, "bias must be on cpu like the other tensors, not on meta"),
    (layer_norm, {"eps": 0}, ValueError, "eps must be > 0, not 0"),
    (layer_norm, {"eps": -1e-5}, ValueError, "eps must be > 0, not -1e-05"),
    (layer_norm, {"eps": float("nan")}, ValueError, "eps must be > 0, not nan"),
    (layer_norm, {"eps": "1e-5"}, TypeError, "eps must be a number, not str"),
    (layer_norm, {"eps": None}, TypeError, "eps must be a number, not NoneType"),
    (layer_norm, {"eps": True}, TypeError, "eps must be a number, not bool"),
    (layer_norm, {"eps": torch.tensor(1e-5)}, TypeError, "eps must be a number, not Tensor"),
    (layer_norm, {"backend": "cudnn"}, ValueError, "backend must be one of auto, cuda, triton, eager, not 'cudnn'"),
    (layer_norm, {"backend": None}, ValueError, "backend must be one of .* not None"),
    (layer_norm, {"backend": "triton"}, gk.UnsupportedError, "triton: runs on CUDA tensors, not cpu"),
    (layer_norm, {"backend": "cuda"}, gk.UnsupportedError, "cuda: runs on CUDA tensors, not cpu"),
    (add_layer_norm, {"residual": None}, TypeError, "residual must be a tensor, not NoneType"),
    (add_layer_norm, {"residual": X[:3]}, ValueError, r"residual must have shape \(4, 32\) .* not \(3, 32\)"),
    (add_layer_norm, {"residual": X[0]}, ValueError, r"residual must have shape \(4, 32\) .* not \(32,\)"),
    (add_layer_norm, {"residual": HALF}, TypeError, "residual must be float32, not float16"),
    (add_layer_norm, {"x": HALF, "residual": X.bfloat16()}, TypeError, "residual must be float16, float32, not bfl"),
    (add_layer_norm, {"residual": X.to("meta")}, ValueError, "residual must be on cpu .* not on meta"),
    (add_layer_norm, {"dropout": 1.0}, ValueError, "dropout must be >= 0 and < 1, not 1.0"),
    (add_layer_norm, {"dropout": -0.1}, ValueError, "dropout must be >= 0 and < 1, not -0.1"),
    (add_layer_norm, {"dropout": float("nan")}, ValueError, "dropout must be >= 0 and < 1, not nan"),
    (add_layer_norm, {"dropout": "0.1"}, TypeError, "dropout must be a number, not str"),
    (add_layer_norm, {"dropout": True}, TypeError, "dropout must be a number, not bool"),
    (add_layer_norm, {"eps": 0.0}, ValueError, "eps must be > 0"),
    (add_layer_norm, {"weight": torch.randn(31)}, ValueError, r"weight must have shape \(32,\)"),
    (rms_norm, {"x": X.tolist()}, TypeError, "x must be a tensor, not list"),
    (rms_norm, {"x": X.double()}, TypeError, "x must be float16, bfloat16, float32, not float64"),
    (rms_norm, {"x": torch.tensor(1.0)}, ValueError, r"x must have a last dimension .* not shape \(\)"),
    (rms_norm, {"weight": 1.0}, TypeError, "weight must be a tensor, not float"),
    (rms_norm, {"x": HALF, "weight": W.bfloat16()}, TypeError, "weight must be float16, float32, not bfloat16"),
    (rms_norm, {"weight": torch.randn(31)}, ValueError, r"weight must have shape \(32,\) .* not \(31,\)"),
    (rms_norm, {"weight": W.to("meta")}, ValueError, "weight must be on cpu like the other tensors, not on meta"),
    (rms_norm, {"eps": 0}, ValueError, "eps must be > 0, not 0"),
    (rms_norm, {"eps": None}, TypeError, "eps must be a number, not NoneType"),
    (rms_norm, {"offset": "1"}, TypeError, "offset must be a number, not str"),
    (rms_norm, {"offset": float("inf")}, ValueError, "offset must be finite, not inf"),
    (rms_norm, {"offset": float("nan")}, ValueError, "offset must be finite, not nan"),
    (rms_norm, {"offset": 1.0, "weight": None}, ValueError, "offset must be 0 without a weight, not 1.0"),
    (rms_norm, {"cast": "olmo"}, ValueError, "cast must be one of llama, gemma, gpt_oss, not 'olmo'"),
    (rms_norm, {"cast": []}, ValueError, "cast must be one of llama, gemma, gpt_oss, not"),
    (rms_norm, {"backend": "cudnn"}, ValueError, "backend must be one of auto, cuda, triton, eager, not 'cudnn'"),
    (rms_norm, {"backend": "cuda"}, gk.UnsupportedError, "cuda: runs on CUDA tensors, not cpu"),
    (add_rms_norm, {"residual": None}, TypeError, "residual must be a tensor, not NoneType"),
    (add_rms_norm, {"residual": X[:3]}, ValueError, r"residual must have shape \(4, 32\) .* not \(3, 32\)"),
    (add_rms_norm, {"residual": HALF}, TypeError, "residual must be float32, not float16"),
    (add_rms_norm, {"dropout": 1.0}, ValueError, "dropout must be >= 0 and < 1, not 1.0"),
]


@pytest.mark.parametrize(("op", "arguments", "exception", "words"), CASES, ids=range(len(CASES)))
def test_error_names_the_argument(op, arguments, exception, words):
    with pytest.raises(exception, match=words) as caught:
        op(**arguments)
    assert type(caught.value) is exception


# Unusual calls that have a right answer.
GOOD = {
    "one dimension": (torch.randn(32), W),
    "five dimensions": (torch.randn(2, 1, 3, 1, 32), W),
    "no rows": (torch.randn(0, 32), W),
    "last dimension not contiguous": (torch.randn(32, 5).t(), W),
    "weight with a stride": (X, torch.randn(64)[::2]),
    "expanded weight": (X, torch.ones(1).expand(32)),
    "half rows, float parameters": (HALF, W),
    "channels last": (torch.randn(2, 6, 4, 32).to(memory_format=torch.channels_last), W),
    "requires grad on weight only": (X, W.clone().requires_grad_()),
    "nothing requires grad": (X, W),
    "a Parameter": (torch.nn.Parameter(X), torch.nn.Parameter(W)),
    "one element": (torch.randn(1, 1), torch.randn(1)),
}


@pytest.mark.parametrize("name", GOOD)
def test_unusual_but_right(name):
    x, weight = GOOD[name]
    y = gk.layer_norm(x, weight)
    expected = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight.float())
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert y.requires_grad == (x.requires_grad or weight.requires_grad)
    torch.testing.assert_close(y.float(), expected, atol=2e-3 if x.dtype == torch.half else 1e-5, rtol=2e-3)


def test_explain_names_every_reason():
    choice = gk.explain(gk.layer_norm, X, W, backend="cuda")
    assert choice.backend is None
    assert re.search(r"no backend runs this call\n  cuda: runs on CUDA tensors", str(choice))
    assert gk.explain(gk.layer_norm, X, W).backend == "eager"
    with pytest.raises(TypeError, match="explain takes an op of gptkernels"):
        gk.explain(torch.nn.functional.relu, X)
    with pytest.raises(ValueError, match="eps must be > 0"):
        gk.explain(gk.layer_norm, X, W, eps=0)


def test_explain_does_not_run_the_op(anywhere):
    anywhere.require("triton")
    x, weight = X.to(anywhere.device), W.to(anywhere.device)
    long = torch.empty(1, 70000, device=x.device), torch.empty(70000, device=x.device)
    assert gk.explain(gk.layer_norm, x, weight, backend="triton").backend == "triton"
    assert "65536" in gk.explain(gk.layer_norm, *long, backend="triton").reasons["triton"]


def test_explain_is_nobody_elses_business():
    expected, stop, failures = gk.layer_norm(X, W), threading.Event(), []

    def run_ops():
        while not stop.is_set():
            try:
                torch.testing.assert_close(gk.layer_norm(X, W), expected)
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=run_ops) for _ in range(4)]
    for thread in threads:
        thread.start()
    choices = {gk.explain(gk.layer_norm, X, W).backend for _ in range(300)}
    stop.set()
    for thread in threads:
        thread.join()
    assert choices == {"eager"}
    assert not failures


def test_a_named_backend_never_falls_back(anywhere):
    anywhere.require("triton")
    x = torch.randn(2, 70000, device=anywhere.device)
    weight = torch.randn(70000, device=anywhere.device)
    for backend in ("triton", "cuda"):
        with pytest.raises(gk.UnsupportedError, match=r"layer_norm: no backend supports this call\n  " + backend):
            gk.layer_norm(x, weight, backend=backend)
    assert gk.layer_norm(x, weight).shape == x.shape
