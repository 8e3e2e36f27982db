"""Every op takes DTensors: with any placements it gives what it gives on whole tensors, and moves nothing where it need
not."""

import pytest
import sharding_cases as cases
import torch
from gang import Gang
from torch.distributed.tensor import Partial, Replicate, Shard

from gptkernels import simulator


@pytest.fixture(scope="module")
def gang():
    with Gang(4) as members:
        yield members


@pytest.mark.parametrize("name", cases.CALLS)
def test_every_placement_gives_the_same(gang, name):
    assert min(gang.run("sharding_cases:every_placement", name)) >= 6


@pytest.mark.parametrize("name", cases.CALLS)
def test_rows_on_another_dimension_of_the_mesh(gang, name):
    gang.run("sharding_cases:two_dimensions", name)


SEQUENCE, BY_HEADS = {"x": Shard(1), "residual": Shard(1)}, {**dict.fromkeys("qkv", Shard(1)), "sinks": Shard(0)}
COLUMNS = {**dict.fromkeys(("fc_weight", "fc_bias", "gate_weight", "gate_bias", "up_weight", "up_bias"), Shard(0))}
COLUMNS |= {"proj_weight": Shard(1), "down_weight": Shard(1)}


@pytest.mark.parametrize(
    ("name", "placements", "results"),
    [
        ("layer_norm", SEQUENCE, [Shard(1)]),
        ("rms_norm", SEQUENCE, [Shard(1)]),
        ("add_layer_norm", SEQUENCE, [Shard(1)] * 2),
        ("add_rms_norm", SEQUENCE, [Shard(1)] * 2),
        ("rope", dict.fromkeys(("q", "k"), Shard(1)), [Shard(1)] * 2),
        ("attention", BY_HEADS, [Shard(1)] * 2),
        ("attention, documents", BY_HEADS, [Shard(1), Shard(0)]),
        ("decode_attention", dict.fromkeys(("q", "k_cache", "v_cache"), Shard(1)), [Shard(1)]),
        ("mlp", COLUMNS, [Partial()]),
        ("gated_mlp", COLUMNS, [Partial()]),
        ("loss, sum", {"x": Shard(1), "targets": Shard(1)}, [Partial()] * 2),
        ("loss, none", {"x": Shard(0), "targets": Shard(0)}, [Shard(0)]),
        ("kl_div, none", dict.fromkeys(("x", "teacher_x", "targets"), Shard(1)), [Shard(1)]),
        ("kl_div, sum", dict.fromkeys(("x", "teacher_x", "targets"), Shard(0)), [Partial()]),
        ("mlp", {}, [Replicate()]),
    ],
)
def test_the_usual_placements_move_nothing(gang, name, placements, results):
    assert gang.run("sharding_cases:moves_nothing", name, placements)[0] == [str(each) for each in results]


@pytest.mark.parametrize("backend", ["any", "triton", "cuda"])
def test_losses_of_a_cut_vocabulary_on_kernels_of_a_whole_one(gang, backend):
    missing = simulator.cuda_unavailable() if backend == "cuda" else simulator.unavailable()
    if backend != "any" and missing:
        pytest.skip(missing)
    gang.run("sharding_cases:losses_of_parts", backend)


@pytest.mark.parametrize("bug", ["the residual on every rank", "no partial gradients", "every rank's own mean"])
def test_planted_bugs_are_caught(gang, bug):
    assert gang.run("sharding_cases:is_caught", bug) == [True] * 4


def test_a_norm_s_weight_has_a_partial_gradient(gang):
    assert gang.run("sharding_cases:gradient_of_weight")[0] == str(Partial())


def test_dropout(gang):
    for whole in gang.run("sharding_cases:dropped", Replicate(), 7)[1:]:  # whose generators differ
        for mine, first in zip(whole, gang.run("sharding_cases:dropped", Replicate(), 7)[0], strict=True):
            assert torch.equal(mine, first)
    parts = gang.run("sharding_cases:dropped", Shard(0), 0)
    assert not torch.equal(parts[0][0], parts[1][0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("another mesh", "ValueError: v must be on the mesh of q"),
        ("a plain one", "TypeError: v must be a DTensor like q, k, or require no gradient"),
        (
            "one vocabulary, twice",
            "ValueError: weight must be cut by vocabulary in one dimension of the mesh, not in 2",
        ),
        ("no heads", "ValueError: q must have shape (B, heads, T, D), not (11, 16)"),
        ("its own error", "ValueError: window must be at least 1 (a query sees itself), not 0; None sees all keys"),
    ],
)
def test_refusals(gang, name, message):
    for found in gang.run("sharding_cases:refused", name):
        assert found.startswith(message)
