"""Tensor parallelism on 2 and 4 processes equals one process, sends what the formulas say, and no logits are whole."""

import pytest
import tensor_cases as cases
import torch
from gang import Gang

from gptkernels import cli
from gptkernels.models import GPT, GPTConfig, checkpoint

WIDTH, ROWS = cases.SIZES["width"], cases.ROWS * cases.TOKENS


@pytest.fixture(scope="module")
def two():
    with Gang(2) as gang:
        yield gang


@pytest.fixture(scope="module")
def four():
    with Gang(4) as gang:
        yield gang


def test_two_processes_equal_one(two):
    two.run("tensor_cases:compare_all", list(cases.CONFIGS))


def test_four_processes_equal_one(four):
    four.run("tensor_cases:compare_all", ["gpt2", "albert", "llama, biases"])


@pytest.mark.parametrize("sequence", [True, False])
def test_autocast(two, sequence):
    for exact, one, several in two.run("tensor_cases:under_autocast", sequence):
        assert abs(several - exact) <= 2 * abs(one - exact) + 1e-3


def test_padded_rows_and_losses_of_each_token(two):
    two.run("tensor_cases:with_padding")


@pytest.mark.parametrize(
    "bug",
    [
        "the bias on every rank",
        "no sum of shared gradients",
        "no maximum of all",
        "no sum of exponentials",
        "no sum of the loss's gradient",
    ],
)
def test_planted_bugs_are_caught(two, bug):
    assert two.run("tensor_cases:is_caught", bug) == [True, True]


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_what_a_block_sends(ranks, request):
    """Each collective's M C elements go (P - 1) / P times over the wire in a gather or a scatter, twice in a sum. The
    gradients of a block's norms and output biases, 6 C of them, are summed over cut rows."""
    gang = request.getfixturevalue(ranks)
    forward, step = (gang.run("tensor_cases:sent_per_block", True, backward)[0] for backward in (False, True))
    assert forward == {"all_gather": 2 * ROWS * WIDTH, "reduce_scatter": 2 * ROWS * WIDTH}
    twice = {name: 2 * count for name, count in forward.items()}
    assert step == {**twice, "all_reduce": 6 * WIDTH}
    assert gang.run("tensor_cases:sent_per_block", False, False)[0] == {"all_reduce": 2 * ROWS * WIDTH}
    assert gang.run("tensor_cases:sent_per_block", False, True)[0] == {"all_reduce": 4 * ROWS * WIDTH}


def test_logits_are_never_whole(two):
    """The most that any op makes are a quarter of the rows of half the vocabulary."""
    vocabulary, rows, tokens = 4001, 16, 32
    of_ranks = [-(-part // 8) * 8 for part in (2001, 2000)]  # whose rows begin at multiples of 8 elements
    expected = [rows * tokens // 4 * columns for columns in of_ranks]
    assert two.run("tensor_cases:largest_in_a_step", vocabulary, rows, tokens) == expected


@pytest.mark.parametrize("name", ["gpt3", "llama"])
def test_it_generates_what_one_process_does(two, name):
    config = {**cases.SIZES, **cases.CONFIGS[name]}
    heads = config.get("kv_heads", config["heads"])
    for greedy, sampled, cached in two.run("tensor_cases:generated", name):
        assert greedy
        assert sampled
        assert cached == 2 * (heads // 2) * 7 * (WIDTH // config["heads"])


def test_it_generates_without_a_cache(four):
    assert {result[:2] for result in four.run("tensor_cases:generated", "gpt3", False)} == {(True, True)}


def test_dropout_is_one_process_s_where_rows_are_whole(two):
    (one, first, other), (_, second, another) = two.run("tensor_cases:dropped", False)
    assert first == second == pytest.approx(one, rel=1e-6)
    assert other == another != first


def test_dropout_of_cut_rows_makes_one_loss(two):
    (one, first, other), (_, second, another) = two.run("tensor_cases:dropped", True)
    assert first == second != one
    assert other == another != first


def test_masks_of_heads_differ(two):
    first, second = two.run("tensor_cases:mask_of_attention")
    assert first != second


ODD = {
    "vocabulary": 67,
    "norm": "rms",
    "rotary": 1e4,
    "kv_heads": 2,
    "gated": True,
    "activation": "silu",
    "bias": False,
}


@pytest.mark.parametrize(
    ("parallel", "config"),
    [("tp=4", {}), ("fsdp,tp=2", ODD | {"tied": False}), ("fsdp,cp=2,tp=2", {})],
)
def test_training_is_one_process_s(four, tmp_path, parallel, config):
    """Twenty steps, with an odd vocabulary five more from the checkpoint, and that is one process's."""
    one, several = str(tmp_path / "one"), str(tmp_path / "several")
    for resume in (False, True) if "vocabulary" in config else (False,):
        expected = cases.trained("none", one, config, resume)
        for losses in four.run("tensor_cases:trained", parallel, several, config, resume):
            assert losses == pytest.approx(expected, rel=2e-5)
        assert expected[-1] < expected[0] - (0 if resume else 1), "a model that stands still proves nothing"
    state, other = (checkpoint.load(folder) for folder in (one, several))
    assert state["config"] == other["config"]
    for name, weight in state["model"].items():
        torch.testing.assert_close(other["model"][name], weight, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(
            other["optimizer"]["state"][name]["exp_avg"],
            state["optimizer"]["state"][name]["exp_avg"],
            atol=1e-4,
            rtol=0.01,
        )
    assert checkpoint.load_model(several)[0].parameter_count() == sum(x.numel() for x in state["model"].values())


def test_refusals_name_the_numbers(four):
    for config, reason in (
        ({"heads": 2}, "heads must be divisible by the 4 ranks of tensor parallelism, not 2"),
        ({"kv_heads": 2}, "kv_heads must be divisible by the 4 ranks of tensor parallelism, not 2"),
        ({"mlp_width": 66}, "mlp_width must be divisible by the 4 ranks of tensor parallelism, not 66"),
        ({"vocabulary": 5}, "vocabulary must have rows for each of the 4 ranks, ceil(V / 4) for all but the last one"),
    ):
        for message in four.run("tensor_cases:refusal", config):
            assert message.startswith(f"ValueError: {reason}")


@pytest.mark.parametrize(
    ("parallel", "compiled", "message"),
    [
        ("fsdp,tp=2", True, "--compile must be off with tp: torch.compile cannot trace a model that is cut"),
        ("ddp,tp=2", False, "--parallel ddp,tp=2 must be fsdp,...: ddp has no room for cut parameters"),
    ],
)
def test_training_that_is_refused(four, parallel, compiled, message):
    assert four.run("tensor_cases:refused_training", parallel, compiled) == [message] * 4


def test_a_cut_model_is_not_cut_again(two):
    assert (
        two.run("tensor_cases:refused_twice")
        == ["model must not be cut or sharded already: gk.parallel.tensor comes before fully_shard"] * 2
    )


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_models_of_transformers_on_four(four, name):
    pytest.importorskip("transformers")
    four.run("tensor_hf_cases:compare", name, True)
    assert four.run("tensor_hf_cases:generated", name) == [(True, True, [1, 1])] * 4


def test_fully_sharded_models_of_transformers(four):
    pytest.importorskip("transformers")
    four.run("tensor_hf_cases:with_fsdp", "Llama")


def test_generate_writes_what_one_process_does(tmp_path, capsys):
    torch.manual_seed(0)
    config = GPTConfig(vocabulary=256, context=32, layers=2, width=64, heads=4, pattern=("dense", "banded"), window=8)
    state = {"config": checkpoint.describe(config), "model": GPT(config).state_dict(), "tokenizer": {"kind": "bytes"}}
    checkpoint.save(tmp_path / checkpoint.NAME, state)
    alone = ["--checkpoint", str(tmp_path), "--prompt", "ab", "--tokens", "12", "--device", "cpu"]
    assert cli.main(["generate", *alone]) == 0
    with Gang(2) as gang:  # of its own: the command ends its process group
        assert gang.run("tensor_cases:written", str(tmp_path)) == [capsys.readouterr().out, ""]


def test_generate_in_several_processes_asks_for_tp(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["generate", "--checkpoint", str(tmp_path), "--prompt", "a"]) == 2
    assert capsys.readouterr().err == (
        "gptkernels generate: several processes need --parallel tp: without, each would do the same\n"
    )
