"""A sample of what tests/mutate_attention.py does in full: each removal of a wait, fence or barrier must be caught, and
each bug planted in what the kernels make of the options."""

from pathlib import Path

import pytest

from gptkernels import cuda_build, simulator

if simulator.cuda_unavailable():
    pytest.skip(simulator.cuda_unavailable(), allow_module_level=True)
if not cuda_build.find_nvcc():
    pytest.skip("needs nvcc", allow_module_level=True)

import mutate_attention
from kernel_variants import Builder

EVERY = 12
REMOVALS = [
    (file, line, removed, text)
    for file in mutate_attention.FILES
    for line, removed, harmless, text in mutate_attention.mutants(file)
    if not harmless
]
# One for each option
SAMPLE = (
    "every second row has no sink",
    "lse's gradient has the other sign",
    "blocks of queries on the right are left out",
    "queries are cut like keys",
)


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return Builder(tmp_path_factory.mktemp("mutations"), "attention")


def test_there_is_much_to_remove():
    assert len(REMOVALS) >= 80


def test_nothing_removed(builder):
    unchanged = builder.build("unchanged", {})
    assert mutate_attention.survives(unchanged)
    assert mutate_attention.survives(unchanged, "--run-options")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_planted_bug_is_caught(builder, name):
    library = builder.build(name.replace(" ", "_"), mutate_attention.planted(name))
    assert not mutate_attention.survives(library, "--run-options")


def test_a_bug_planted_in_the_softcap_is_caught(tmp_path):
    """One for all of mutate_attention.PLANTED_BENT: each takes a library of its own."""
    bug = mutate_attention.planted("the softcap has no derivative")
    assert not mutate_attention.survives(Builder(tmp_path, "attention_bent").build("planted", bug), "--run-bent")


def test_what_is_planted_elsewhere_fits_the_sources():
    assert all(mutate_attention.planted(name) for name in mutate_attention.PLANTED | mutate_attention.PLANTED_BENT)


def test_a_first_tile_by_block_index_hangs(builder):
    """On a busy GPU, where those that it waits for may not have started."""
    edits = {}
    for file, taken, instead in (
        ("attention_bwd_kernel.cuh", "args.params.dq_in_order ? take_tile() : blockIdx.x", "blockIdx.x"),
        ("attention_bwd_passes.cuh", "params.dq_in_order ? 0 : ctas", "ctas"),
    ):
        text = (cuda_build.source_directory() / "attention" / file).read_text()
        assert text.count(taken) == 1
        edits[file] = text.replace(taken, instead)
    assert not mutate_attention.survives(builder.build("by_block_index", edits))


@pytest.mark.parametrize("file", ["attention_bwd_kernel.cuh", "attention_bwd_passes.cuh"])
def test_a_missing_wait_for_the_kernel_before_is_caught(builder, file):
    """Kernels of the backward pass start before those before them have ended."""
    text = (cuda_build.source_directory() / "attention" / file).read_text()
    assert text.count("wait_for_prerequisite();") == 1
    edited = text.replace("wait_for_prerequisite();", "")
    assert not mutate_attention.survives(builder.build(f"early_{Path(file).stem}", {file: edited}))


@pytest.mark.parametrize(
    ("file", "line", "removed", "text"), [pytest.param(*r, id=f"{r[0]}:{r[1]}") for r in REMOVALS[::EVERY]]
)
def test_a_removal_is_caught(builder, file, line, removed, text):
    library = builder.build(f"{Path(file).stem}_{line}", {file: text})
    assert not mutate_attention.survives(library), f"{file}:{line}: nobody noticed that {removed} is gone"
