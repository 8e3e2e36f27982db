"""A sample of what tests/mutate_attention.py does in full: each removal of a wait, fence or barrier must be caught, and
each bug planted in what the kernels make of the options."""

import pytest

from gptkernels import cuda_build, simulator

if simulator.cuda_unavailable():
    pytest.skip(simulator.cuda_unavailable(), allow_module_level=True)
if not cuda_build.find_nvcc():
    pytest.skip("needs nvcc", allow_module_level=True)

import mutate_attention
from mutate_attention import COARSE, PLANTED, PLANTED_BENT, TILES_BY_BLOCK_INDEX
from planted import Planted, removals, with_switches

EVERY = 12
PLACES, HARMLESS = removals("attention", mutate_attention.FILES, mutate_attention.STATEMENT, mutate_attention.HARMLESS)
REMOVALS = {name: place for name, place in PLACES.items() if name not in HARMLESS}
SAMPLE = list(REMOVALS)[::EVERY]
# Kernels of the backward pass start before those before them have ended.
SAMPLE += [name for name in REMOVALS if "wait_for_prerequisite" in name and name not in SAMPLE]
# One for each option
OPTIONS = (
    "every second row has no sink",
    "lse's gradient has the other sign",
    "blocks of queries on the right are left out",
    "queries are cut like keys",
)
BENT = ("the softcap has no derivative", "ALiBi has the other sign", "positions are one further, backward")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    bugs = {name: (REMOVALS[name],) for name in SAMPLE} | {name: (PLANTED[name],) for name in OPTIONS}
    bugs["tiles by block index"] = TILES_BY_BLOCK_INDEX
    with Planted(tmp_path_factory.mktemp("mutations"), "attention", mutate_attention.__file__, bugs) as planted:
        yield planted


def test_bugs_in_a_softcap_and_alibi_are_caught(tmp_path):
    bugs = {"coarse": (COARSE,), **{name: (PLANTED_BENT[name],) for name in BENT}}
    with Planted(tmp_path, "attention_bent", mutate_attention.__file__, bugs) as kernels:
        assert kernels.survives(None, "bent")
        assert kernels.survives("coarse", "bent")
        assert [name for name in BENT if kernels.survives(name, "bent")] == []


def test_what_is_planted_elsewhere_fits_the_sources():
    assert with_switches("attention", {name: (place,) for name, place in (PLANTED | PLANTED_BENT).items()})


def test_there_is_much_to_remove():
    assert len(REMOVALS) >= 80
    assert sum("wait_for_prerequisite" in name for name in SAMPLE) == 2


def test_bugs_are_caught(kernels):
    """In one test: they share a library, which takes a minute to build."""
    trials = {name: "options" if name in OPTIONS else "cases" for name in kernels.bugs}
    assert all(kernels.survives(None, trial) for trial in ("cases", "options"))
    assert [name for name, trial in trials.items() if kernels.survives(name, trial)] == []
