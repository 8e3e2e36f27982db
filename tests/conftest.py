"""Where kernels run in the tests, --device=auto|cuda|simulator|interpreter (auto: cuda where there is one), and in how
many processes: on a CPU as many as there are cores, unless -n says otherwise."""

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import pytest


def pytest_addoption(parser):
    parser.addoption("--device", default="auto", choices=("auto", "cuda", "simulator", "interpreter"))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "interpreter":
        for item in items:
            if "bfloat16" in item.nodeid or item.get_closest_marker("not_in_interpreter"):
                item.add_marker(pytest.mark.skip(reason="Triton's interpreter is wrong on bfloat16 and far addresses"))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """As with `-n N --dist worksteal`, where pytest-xdist is installed and nothing asks for one process: named tests, a
    debugger, output as it comes, or a GPU, of which there is one."""
    option = config.option
    if hasattr(config, "workerinput") or getattr(option, "numprocesses", 0) is not None:
        return
    one_process = option.usepdb or option.trace or option.capture == "no" or option.collectonly
    if one_process or any("::" in argument for argument in config.args) or device_kind(config) == "cuda":
        return
    workers = worker_count()
    if workers > 1:
        option.numprocesses = workers
        if option.dist == "no":
            option.dist = "worksteal"


@pytest.fixture(autouse=True)
def decisions_are_made_again():
    """Tests change launch tables and what backends there are."""
    from gptkernels import remembered

    remembered.forget()


@pytest.fixture(scope="session", autouse=True)
def share_files(tmp_path_factory):
    """A folder of the processes that run these tests side by side"""
    folder = tmp_path_factory.getbasetemp()
    os.environ["GPTKERNELS_TESTS_SHARE"] = str(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


def worker_count() -> int:
    """One to a core, as far as the memory goes: each holds torch, transformers and a few models."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (3 << 30), 16))


def share_cores(workers: int) -> None:
    """Processes that run side by side, and theirs, have the cores between them."""
    each = str(max(1, len(os.sched_getaffinity(0)) // workers))
    for name in ("PTXEMU_THREADS", "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, each)


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        share_cores(config.workerinput["workercount"])
    config.addinivalue_line("markers", "not_in_interpreter: needs what Triton's interpreter does not do right")
    # Triton reads this when kernels are defined, which is when gptkernels is imported.
    if config.getoption("--device") == "interpreter":
        assert "triton" not in sys.modules, "--device=interpreter must come before Triton is imported"
        os.environ["TRITON_INTERPRET"] = "1"
    if device_kind(config) == "simulator":
        from gptkernels import simulator

        # Whoever loads the CUDA library first decides which CUDA runtime it finds: let that be the simulator's.
        simulator.cuda_unavailable()


@dataclass(frozen=True)
class Where:
    """A place where kernels run: a GPU, or the simulator as one architecture on one schedule."""

    kind: str
    arch: int = 0
    seed: int = 0

    def __str__(self):
        return f"sm{self.arch}-seed{self.seed}" if self.kind == "simulator" else self.kind

    @property
    def device(self):
        import torch

        return torch.device("cuda" if self.kind == "cuda" else "cpu")

    def active(self):
        from gptkernels import simulator

        return simulator.use(self.arch, self.seed) if self.kind == "simulator" else nullcontext()

    def require(self, backend: str) -> None:
        """Skips, with the reason, what cannot run here. A CUDA library that could be built and was not is a failure."""
        from gptkernels import simulator

        if self.kind == "interpreter":
            if backend == "cuda":
                pytest.skip("the interpreter runs Triton kernels only")
            return
        if self.kind != "simulator":
            return
        if simulator.unavailable():
            pytest.skip(simulator.unavailable())
        reason = simulator.cuda_unavailable() if backend == "cuda" else None
        if reason:
            skip_without_library(reason)


def skip_without_library(reason: str) -> None:
    """Where the CUDA library could have been built, its absence is a failure."""
    import torch

    from gptkernels import cuda_build

    if cuda_build.find_nvcc() and not torch.version.cuda:
        pytest.fail(f"nvcc is here, so the CUDA library should be: {reason}")
    pytest.skip(reason)


def device_kind(config) -> str:
    kind = config.getoption("--device")
    if kind != "auto":
        return kind
    import torch

    return "cuda" if torch.cuda.is_available() else "simulator"


def pytest_generate_tests(metafunc):
    """`where`: each of a few places; `anywhere`: the first of them."""
    kind = device_kind(metafunc.config)
    if kind == "simulator":
        places = [Where(kind, 80, 0), Where(kind, 90, 1)]
    else:
        places = [Where(kind)]
    for name, chosen in (("where", places), ("anywhere", places[-1:])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, chosen, ids=str, indirect=True)


@pytest.fixture
def where(request):
    with request.param.active():
        yield request.param


@pytest.fixture
def anywhere(request):
    with request.param.active():
        yield request.param


@pytest.fixture(autouse=True)
def same_random_numbers():
    import torch

    torch.manual_seed(0)


def pytest_report_header(config):
    from gptkernels import cuda_library, simulator

    kind = device_kind(config)
    missing = simulator.cuda_unavailable() if kind == "simulator" else cuda_library.missing()
    return [
        f"kernels run on: {kind}",
        f"simulator: {simulator.unavailable() or 'installed'}",
        f"CUDA library: {missing or 'built from the sources at hand'}",
    ]
