"""Planted bugs in what the Triton kernels make of the options: each has to be noticed where they are compared."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from test_attention import assert_attention_parity, make
from test_attention_options import with_own_keys, with_sinks, with_slopes

import gptkernels.ops.attention
from gptkernels.ops.attention import triton_kernels
from gptkernels.parity import ParityError

FOLDER = Path(gptkernels.ops.attention.__file__).parent
numbers = itertools.count()


def mutant(tmp_path, file, right, wrong):
    """-> the module with `wrong` in place of `right`"""
    text = (FOLDER / f"{file}.py").read_text()
    assert right in text, "the source has changed: so must this test"
    text = text.replace(right, wrong).replace("from ..", "from gptkernels.ops.")
    text = text.replace("from .triton", "from gptkernels.ops.attention.triton")
    path = tmp_path / f"{file}_{next(numbers)}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def sinks(where):
    assert_attention_parity(with_sinks(where, make(where, 20, head_size=16), 2.0, -1.0), "triton", return_lse=True)


def high_sinks(where):
    assert_attention_parity(with_sinks(where, make(where, 20, head_size=16), 200.0, 1.0), "triton", return_lse=True)


def softcap(where):
    assert_attention_parity(make(where, 20, head_size=16), "triton", softcap=1.0)


def alibi(where):
    assert_attention_parity(with_slopes(where, make(where, 20, head_size=16), 2), "triton")


def band(where):
    tensors = make(where, 20, head_size=16)
    assert_attention_parity(tensors, "triton", causal=False, window=(3, 5))


def own_keys(where):
    assert_attention_parity(with_own_keys(where, [9, 30], [200, 5], head_size=16), "triton")


KERNELS = FORWARD, QUERIES, KEYS = "triton_fwd_kernel", "triton_bwd_dq_kernel", "triton_bwd_dkdv_kernel"
BLOCKS = "triton_blocks"
SINK = "tl.load(sinks_ptr + h).to(tl.float32)"
MUTATIONS = {
    "the sink is not in base 2": (FORWARD, f"{SINK} * LOG2E", SINK, sinks),
    "the sink is scaled as scores are": (FORWARD, f"{SINK} * LOG2E", f"{SINK} * scale", sinks),
    "the sink is not in the maximum": (FORWARD, "top = tl.maximum(peak, sink)", "top = peak", high_sinks),
    "queries' gradients forget the softcap": (
        QUERIES,
        "dscores = weights * (dweights - delta[:, None])\n    if SOFTCAP:",
        "dscores = weights * (dweights - delta[:, None])\n    if False:",
        softcap,
    ),
    "keys' gradients forget the softcap": (
        KEYS,
        "dscores = weights * (dweights - delta[None, :])\n    if SOFTCAP:",
        "dscores = weights * (dweights - delta[None, :])\n    if False:",
        softcap,
    ),
    "ALiBi is added": (BLOCKS, "scores -= slope", "scores += slope", alibi),
    "one key too many on the left": (BLOCKS, "position - key < behind", "position - key <= behind", band),
    "one key too many on the right": (BLOCKS, "key - position < ahead", "key - position <= ahead", band),
    "queries' documents are cut like keys": (
        FORWARD,
        "start, queries = rows_of(cu_seqlens_ptr",
        "start, queries = rows_of(cu_seqlens_k_ptr",
        own_keys,
    ),
    "keys' documents are cut like queries": (
        KEYS,
        "locate(cu_seqlens_k_ptr, documents, keys, tile, BLOCK_N)",
        "locate(cu_seqlens_ptr, documents, keys, tile, BLOCK_N)",
        own_keys,
    ),
    "lse's gradient is dropped": (QUERIES, "delta -= tl.load(dlse_ptr", "delta -= 0 * tl.load(dlse_ptr", sinks),
}


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_bugs_are_noticed(anywhere, name, tmp_path, monkeypatch):
    anywhere.require("triton")
    file, right, wrong, check = MUTATIONS[name]
    changed = mutant(tmp_path, file, right, wrong)
    for kernel in KERNELS:
        if file == BLOCKS:
            module = mutant(tmp_path, kernel, "from .triton_blocks", f"from {changed.__name__}")
        elif file == kernel:
            module = changed
        else:
            continue
        name = kernel.replace("triton", "attention")
        monkeypatch.setattr(triton_kernels, name, getattr(module, name))
    torch.manual_seed(0)
    with pytest.raises(ParityError):
        check(anywhere)
