"""A random attack on the public functions and on the command line: the right answer, or an error that names what is
wrong. The cases are the same in every run; `pytest tests/test_fuzz.py --hypothesis-seed=N` draws others."""

import contextlib
import inspect
import io
import json
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import gptkernels as gk
from gptkernels import cli
from gptkernels.models import GPT, GPTConfig, checkpoint
from gptkernels.ops.attention import reference as attention_reference
from gptkernels.ops.gated_mlp import reference as gated_mlp_reference
from gptkernels.ops.layer_norm import reference as layer_norm_reference
from gptkernels.ops.linear_cross_entropy import reference as loss_reference
from gptkernels.ops.linear_kl_div import reference as distillation_reference
from gptkernels.ops.mlp import reference as mlp_reference
from gptkernels.ops.rms_norm import reference as rms_norm_reference
from gptkernels.ops.rope import reference as rope_reference


def attack(config, cases: int):
    return settings(
        max_examples=cases,
        derandomize=config.getoption("hypothesis_seed", None) is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def good(op) -> dict:
    """Arguments of an ordinary call."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    heads = randn(2, 4, 9, 32), randn(2, 2, 9, 32), randn(2, 2, 9, 32)
    return {
        gk.layer_norm: {"x": randn(3, 5, 32), "weight": randn(32), "bias": randn(32), "eps": 1e-5},
        gk.add_layer_norm: {
            **{"x": randn(3, 32), "residual": randn(3, 32), "weight": randn(32), "bias": randn(32)},
            **{"eps": 1e-5, "dropout": 0.0},
        },
        gk.rms_norm: {"x": randn(3, 5, 32), "weight": randn(32), "eps": 1e-6, "offset": 1.0, "cast": "gemma"},
        gk.add_rms_norm: {
            **{"x": randn(3, 32), "residual": randn(3, 32), "weight": randn(32)},
            **{"eps": 1e-6, "offset": 0.0, "cast": "llama", "dropout": 0.0},
        },
        gk.rope: {
            **{"q": heads[0], "k": heads[1], "cos": randn(9, 16), "sin": randn(2, 9, 16)[0]},
            **{"rotary_dim": 32, "interleaved": False},
        },
        gk.attention: {
            **dict(zip("qkv", heads, strict=True)),
            **{"causal": True, "window": None, "scale": None, "dropout": 0.0, "key_start": None, "cu_seqlens": None},
            **{"cu_seqlens_k": None, "softcap": None, "sinks": None, "alibi_slopes": None, "return_lse": False},
        },
        gk.decode_attention: {
            **{"q": randn(2, 4, 1, 32), "k_cache": heads[1], "v_cache": heads[2]},
            **{"lengths": torch.tensor([9, 4], dtype=torch.int32), "window": None, "scale": None},
        },
        gk.mlp: {
            **{"x": randn(5, 16), "fc_weight": randn(24, 16), "fc_bias": randn(24), "proj_weight": randn(8, 24)},
            **{"proj_bias": randn(8), "activation": "gelu_tanh", "residual": None, "save": "preact"},
        },
        gk.gated_mlp: {
            **{"x": randn(5, 16), "gate_weight": randn(24, 16), "up_weight": randn(24, 16), "up_bias": randn(24)},
            **{"gate_bias": None, "down_weight": randn(8, 24), "down_bias": randn(8), "activation": "silu"},
            **{"residual": None, "save": "preact"},
        },
        gk.linear_cross_entropy: {
            **{"x": randn(7, 16), "weight": randn(33, 16), "targets": torch.arange(7) * 4},
            **{"ignore_index": -100, "reduction": "mean", "bias": randn(33), "label_smoothing": 0.1, "z_loss": 1e-3},
            **{"softcap": 5.0, "temperature": 0.7, "class_weight": randn(33).abs(), "return_z_loss": False},
        },
        gk.linear_log_probs: {
            **{"x": randn(7, 16), "weight": randn(33, 16), "targets": torch.arange(7) * 4, "bias": randn(33)},
            **{"temperature": 0.7},
        },
        gk.linear_kl_div: {
            **{"x": randn(7, 16), "weight": randn(33, 16), "teacher_x": randn(7, 8), "teacher_weight": randn(40, 8)},
            **{"targets": torch.arange(7) * 4, "vocabulary": None, "ignore_index": -100, "reduction": "mean"},
            **{"temperature": 0.7},
        },
    }[op]


REFERENCES = {
    gk.layer_norm: layer_norm_reference.layer_norm,
    gk.add_layer_norm: layer_norm_reference.add_layer_norm,
    gk.rms_norm: rms_norm_reference.rms_norm,
    gk.add_rms_norm: rms_norm_reference.add_rms_norm,
    gk.rope: rope_reference.rope,
    gk.attention: attention_reference.attention,
    gk.decode_attention: attention_reference.decode_attention,
    gk.mlp: mlp_reference.mlp,
    gk.gated_mlp: gated_mlp_reference.gated_mlp,
    gk.linear_cross_entropy: loss_reference.linear_cross_entropy,
    gk.linear_log_probs: loss_reference.linear_log_probs,
    gk.linear_kl_div: distillation_reference.linear_kl_div,
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool]
DTYPES += [torch.complex64, torch.uint8, torch.float8_e4m3fn]

ABSENT_TENSORS = ("key_start", "cu_seqlens", "cu_seqlens_k", "sinks", "alibi_slopes", "residual")

numbers = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, -(2**31), 2**63, -(2**70)]), st.floats(), st.floats(0, 1)
)
anything = st.one_of(
    numbers,
    st.none(),
    st.booleans(),
    st.sampled_from(["", "mean", "none", "sum", "silu", "relu", "all", "input", "auto", "eager", "gpu"]),
    st.sampled_from([[], [1.0], (), {}, object(), torch.float32, torch.device("cpu")]),
)


@st.composite
def odd_tensors(draw, like: torch.Tensor | None):
    """A tensor near what is wanted: another dtype, shape, layout, device or content."""
    x = torch.linspace(-2, 2, 32) if like is None else like
    for kind in draw(st.lists(st.integers(0, 9), min_size=1, max_size=2)):
        dims = st.lists(st.integers(0, 34), min_size=0, max_size=5)
        if kind == 0:
            x = x.to(draw(st.sampled_from(DTYPES)))
        elif kind == 1:
            shape = draw(dims)
            x = torch.zeros(shape if math.prod(shape) < 10**6 else shape[:2], dtype=x.dtype)
        elif kind == 2 and x.ndim:
            x = x.narrow(draw(st.integers(0, x.ndim - 1)), 0, 0)
        elif kind == 3:
            x = x.to("meta")
        elif kind == 4 and x.ndim > 1:
            x = x.transpose(0, draw(st.integers(0, x.ndim - 1)))
        elif kind == 5 and x.ndim:
            x = x[:1].expand(x.shape) if x.shape[0] else x
        elif kind == 6 and x.is_floating_point() and x.layout == torch.strided and not x.is_meta:
            x = x.clone().fill_(draw(st.sampled_from([math.nan, math.inf, 0.0, 1e30])))
        elif kind == 7 and x.ndim == 2 and not x.is_meta and x.dtype == torch.float32:
            x = x.to_sparse()
        elif kind == 8 and not x.is_floating_point() and not x.is_complex():
            x = torch.full(x.shape, draw(st.sampled_from([-(2**31), -1, 0, 100, 2**31 - 1]))).to(x.dtype)
        elif kind == 9 and x.ndim and x.layout == torch.strided:
            x = torch.stack((x, x), -1)[..., 0]
    return x


@st.composite
def calls(draw, op):
    arguments = dict(good(op))
    for name in draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        usual = arguments[name]
        if isinstance(usual, torch.Tensor) or name in ABSENT_TENSORS:
            arguments[name] = draw(st.one_of(odd_tensors(usual), odd_tensors(usual), anything))
        else:
            arguments[name] = draw(anything)
    return arguments


def assert_names_an_argument(op, message: str) -> None:
    assert any(re.search(rf"\b{name}\b", message) for name in inspect.signature(op).parameters), message


def assert_answered_or_refused(op, arguments: dict) -> None:
    try:
        out = op(**arguments)
    except (ValueError, TypeError, gk.UnsupportedError) as error:
        assert_names_an_argument(op, str(error))
        return
    outs = out if isinstance(out, tuple) else (out,)
    assert all(isinstance(x, torch.Tensor) for x in outs)
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    far = any((x.abs() > 1e6).any() for x in tensors if x.is_floating_point() and not x.is_meta)
    if any(x.is_meta for x in outs) or arguments.get("dropout") or far:
        return
    options = {name: x for name, x in arguments.items() if name not in ("backend", "save")}
    double = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in options.items()}
    expected = REFERENCES[op](**double)
    coarse = max(torch.finfo(x.dtype).eps for x in tensors if x.is_floating_point())
    coarse *= max(1.0, abs(arguments.get("scale") or 0))  # the larger the scores, the coarser what is exponentiated
    for actual, right in zip(outs, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert actual.shape == right.shape
        finite = right.isfinite() & (right.abs() < 1e4)
        torch.testing.assert_close(
            actual.double()[finite], right[finite], rtol=16 * coarse, atol=64 * coarse, check_dtype=False
        )


@pytest.mark.parametrize("op", REFERENCES, ids=lambda op: op.__name__)
def test_ops(op, request):
    @attack(request.config, 40)
    @given(calls(op))
    def run(arguments):
        assert_answered_or_refused(op, arguments)

    run()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Of every kind that a command takes, good ones and bad ones."""
    folder = tmp_path_factory.mktemp("files")
    model = GPT(GPTConfig(vocabulary=256, context=32, layers=1, width=32, heads=2))
    state = {"config": checkpoint.describe(model.config), "model": model.state_dict(), "tokenizer": {"kind": "bytes"}}
    checkpoint.save(folder / "model" / checkpoint.NAME, state)
    (folder / "text.txt").write_text("some text to learn from, again and again. " * 20)
    (folder / "empty.txt").write_text("")
    (folder / "odd.bin").write_bytes(b"abc")
    (folder / "tokens.bin").write_bytes(bytes(range(200)) * 4)
    (folder / "task.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    (folder / "list.json").write_text("[1, 2")
    (folder / "nested.json").write_text("[" * 100_000)
    (folder / "questions.jsonl").write_text(json.dumps({"context": "a", "choices": ["b", "c"], "answer": 0}))
    (folder / "bytes").write_bytes(bytes(range(256)))
    (folder / "folder").mkdir()
    return [*(str(path) for path in sorted(folder.iterdir())), str(folder / "absent"), "", "hf:", f"hf:{folder}"]


FLAGS = {
    "train": (
        ("--data", "--validation", "--tokenizer", "--init-from", "--task", "--context", "--window", "--dropout"),
        ("--save", "--backend", "--batch", "--micro-batch", "--learning-rate", "--min-learning-rate", "--warmup"),
        ("--weight-decay", "--clip", "--dtype", "--seed", "--parallel", "--device", "--resume", "--log-every"),
        ("--evaluate-every", "--checkpoint-every", "--dry-run"),
    ),
    "generate": (
        ("--checkpoint", "--prompt", "--tokens", "--temperature", "--top-k", "--top-p", "--seed", "--tokenizer"),
        ("--device",),
    ),
    "few-shot": (
        ("--checkpoint", "--questions", "--pool", "--shots", "--description", "--normalise", "--tokenizer", "--batch"),
        ("--seed", "--device"),
    ),
    "compare": (("--matters", "--all"),),
    "bench": (("--suite", "--op", "--backend", "--pass", "--shape", "--dtype", "--device", "--peers", "--seed"),),
}
BARE = ("--resume", "--dry-run", "--all")


def words(files: list[str]):
    return st.one_of(
        st.sampled_from(files),
        st.sampled_from(
            ["0", "1", "-1", "2", "7", "32", "1e9", "nan", "inf", "0.5", "x", "--", "-", "é", "\x00", "%s"]
        ),
        st.sampled_from(["classification", "entailment", "eager", "triton", "cuda", "cpu", "float32", "ddp", "length"]),
        st.sampled_from(["B1,H2,T8,D16", "B0", "T-1", "fwd", "bwd,both", "attention", "quick", "none", "all"]),
    )


@st.composite
def command_lines(draw, files):
    name = draw(st.sampled_from(sorted(FLAGS)))
    flags = [flag for group in FLAGS[name] for flag in group]
    line, given = [name], {"--model": "tiny", "--steps": "1", "--device": "cpu"} if name == "train" else {}
    if name == "generate":
        given = {"--checkpoint": files_named(files, "model"), "--prompt": "a", "--tokens": "2"}
    if name == "few-shot":
        given = {"--checkpoint": files_named(files, "model"), "--questions": files_named(files, "questions.jsonl")}
    if name == "compare":
        line += [draw(words(files)), draw(words(files))]
    for flag in draw(st.lists(st.sampled_from(flags), max_size=4, unique=True)):
        given[flag] = draw(words(files))
    if name == "train" and "--data" not in given:
        given["--data"] = files_named(files, "text.txt")
    if "--init-from" in given:
        del given["--model"]
    for flag, value in given.items():
        line += [flag] if flag in BARE else [f"{flag}={value}"]
    return [*line, "--dry-run"] if name == "bench" else line


def files_named(files: list[str], name: str) -> str:
    return next(path for path in files if path.endswith(f"/{name}"))


def test_command_lines(files, request):
    @attack(request.config, 60)
    @given(command_lines(files))
    def run(line):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = cli.main(line)
            except SystemExit as exit:  # argparse's
                status = exit.code
        assert status in (0, 1, 2)
        if status:
            said = err.getvalue().strip().splitlines()
            assert said, "it failed without a word"
            assert said[-1].startswith(f"gptkernels {line[0]}: ")
            assert "Traceback" not in err.getvalue()

    run()
