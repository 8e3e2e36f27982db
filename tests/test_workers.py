"""How many processes `pytest` runs the tests in."""

import os
from types import SimpleNamespace
from unittest import mock

import conftest
import pytest

ALONE = {"usepdb": False, "trace": False, "capture": "fd", "collectonly": False}


def chosen(cores=4, args=("tests",), device="simulator", dist="no", **options):
    """-> -n and --dist as they are after our say"""
    option = SimpleNamespace(**{**ALONE, "numprocesses": None, "dist": dist, **options})
    config = SimpleNamespace(option=option, args=list(args), getoption=lambda name: device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
        patch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10 << 20}.get)
        conftest.pytest_cmdline_main(config)
    return option.numprocesses, option.dist


def test_one_to_a_core():
    assert chosen() == (4, "worksteal")
    assert chosen(dist="loadfile") == (4, "loadfile")
    assert chosen(cores=1) == (None, "no")


def test_no_more_than_the_memory_holds():
    assert chosen(cores=64) == (13, "worksteal")


@pytest.mark.parametrize(
    "alone",
    [
        {"args": ["tests/test_x.py::test_y"]},
        {"device": "cuda"},
        {"usepdb": True},
        {"trace": True},
        {"capture": "no"},
        {"collectonly": True},
    ],
    ids=lambda alone: next(iter(alone)),
)
def test_one_process_where_that_is_asked_for(alone):
    assert chosen(**alone) == (None, "no")


def test_what_was_asked_for_stays():
    assert chosen(numprocesses=3, dist="load") == (3, "load")
    assert chosen(numprocesses=0) == (0, "no")


def test_without_xdist():
    config = SimpleNamespace(option=SimpleNamespace(**ALONE), args=["tests"])
    conftest.pytest_cmdline_main(config)
    assert not hasattr(config.option, "numprocesses")


@pytest.mark.parametrize(("workers", "each"), [(2, "4"), (8, "1"), (16, "1")])
def test_workers_have_the_cores_between_them(monkeypatch, workers, each):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "5"}):
        os.environ.pop("PTXEMU_THREADS", None)
        conftest.share_cores(workers)
        assert os.environ["OMP_NUM_THREADS"] == "5"
        assert os.environ["PTXEMU_THREADS"] == each
