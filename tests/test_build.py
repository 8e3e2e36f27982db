"""Building and loading the CUDA library: what is keyed, what is refused, what is said when something is missing."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptkernels import cuda_build, cuda_library

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def library(cache, key=None, mode=0o700):
    """A stand-in for a built library, in the cache."""
    key = key or f"{cuda_build.source_hash()}-{sys.implementation.cache_tag}-cuda13.0-80"
    folder = cache / "libraries" / key
    for path in (cache, cache / "libraries", folder):
        path.mkdir(mode=0o700, exist_ok=True)
    (folder / "_cuda.so").write_bytes(b"")
    folder.chmod(mode)
    return folder / "_cuda.so"


def test_no_torch_header_in_csrc():
    for path in cuda_build.source_files():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_setup_needs_no_torch():
    text = (ROOT / "setup.py").read_text()
    assert len(text.splitlines()) <= 80
    assert not re.search(r"^\s*(import|from) torch", text, re.M)
    code = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_path('gptkernels/cuda_build.py')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_cache_is_keyed_by_the_sources(cache):
    built = library(cache)
    library(cache, key=f"0123456789abcdef-{sys.implementation.cache_tag}-cuda13.0-80")
    library(cache, key=f"{cuda_build.source_hash()}-cpython-27-cuda13.0-80")
    assert cuda_build.cached_libraries() == [built]


def test_an_empty_cache_is_no_error(cache):
    assert cuda_build.cached_libraries() == []


@pytest.mark.parametrize("victim", ["", "libraries", "key"])
def test_a_cache_that_others_can_write_is_refused(cache, victim):
    built = library(cache)
    folder = {"": cache, "libraries": cache / "libraries", "key": built.parent}[victim]
    folder.chmod(0o777)
    with pytest.raises(cuda_build.BuildError, match="writable by others"):
        cuda_build.cached_libraries()
    folder.chmod(0o700)
    assert cuda_build.cached_libraries() == [built]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_cache_of_another_user_is_refused(cache):
    library(cache)
    os.chown(cache / "libraries", 12345, 12345)
    with pytest.raises(cuda_build.BuildError, match="belongs to another user"):
        cuda_build.cached_libraries()


def test_a_link_to_a_cache_is_refused(cache, tmp_path):
    library(cache)
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(cuda_build.BuildError, match="is a link"):
        cuda_build.cached_libraries()


def test_a_refused_cache_does_not_stop_the_package(cache, monkeypatch):
    library(cache)
    cache.chmod(0o777)
    cuda_library._find.cache_clear()
    monkeypatch.setattr(cuda_library.importlib.util, "find_spec", lambda name: None)
    assert "writable by others" in cuda_library.missing()
    cuda_library._find.cache_clear()


def test_the_lock_has_a_timeout(cache, tmp_path):
    lock = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
         "print('held', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == b"held\n"
        started = time.monotonic()
        with pytest.raises(cuda_build.BuildError, match="another build has held"), cuda_build.locked(lock, 0.3):
            pass
        assert 0.3 <= time.monotonic() - started < 5
    finally:
        holder.kill()
    holder.wait()
    with cuda_build.locked(lock, 5):
        pass


def test_archs_are_checked(monkeypatch):
    monkeypatch.setenv("GPTKERNELS_CUDA_ARCHS", "80; 90a,100a")
    assert cuda_build.archs() == ["80", "90a", "100a"]
    assert cuda_build.arch_flags(Path("x_sm90.cu"), cuda_build.archs()).count("-gencode") == 1
    assert cuda_build.arch_flags(Path("x.cu"), cuda_build.archs()).count("-gencode") == 3
    monkeypatch.setenv("GPTKERNELS_CUDA_ARCHS", "80; rm -rf /")
    with pytest.raises(cuda_build.BuildError, match="must look like"):
        cuda_build.archs()
    monkeypatch.delenv("GPTKERNELS_CUDA_ARCHS")
    assert cuda_build.archs() == ["80", "90a"]


def test_a_source_that_is_compiled_several_times(tmp_path, monkeypatch):
    (tmp_path / "many.cu").write_text("// Compiled for each SIZE of 64 96.\nint size() { return SIZE; }\n")
    (tmp_path / "one.cu").write_text("// Compiled once.\nint one() { return 1; }\n")
    monkeypatch.setattr(cuda_build, "source_directory", lambda: tmp_path)
    text = cuda_build.ninja_file(tmp_path / "out.so", "nvcc")
    objects = dict(re.findall(r"build (\S+\.o): .*\n  extra = (.*)", text))
    assert sorted(objects) == ["many.cu-DSIZE_64.o", "many.cu-DSIZE_96.o", "one.cu.o"]
    assert objects["many.cu-DSIZE_96.o"].endswith(" -DSIZE=96")
    assert "-DSIZE" not in objects["one.cu.o"]
    assert all(name in text.splitlines()[-1] for name in objects)


LAUNCHED = re.compile(r"attention_([fb]wd)_launch<[^;]*, (true|false)>\(")


def test_the_instantiations_are_those_that_are_called():
    folder = cuda_build.source_directory() / "attention"
    text = (folder / "attention.cu").read_text()
    called = re.findall(r"with_head_dim<([\d, ]+)>\(([^;]*attention_([fb]wd)_launch.*?)\}\);", text, re.S)
    launched = [(sizes, name, bent) for sizes, work, _ in called for name, bent in LAUNCHED.findall(work)]
    assert sorted((name, bent) for _, name, bent in launched) == [
        *(("bwd", "false"), ("bwd", "true"), ("fwd", "false"), ("fwd", "true")),
    ]
    for sizes, direction, bent in launched:
        file = f"attention_{direction}_{'bent_' if bent == 'true' else ''}sm90.cu"
        assert cuda_build.variants(folder / file) == [f"-DHEAD_DIM={size}" for size in sizes.split(", ")], file


def test_without_nvcc(cache, tmp_path, monkeypatch, capsys):
    from gptkernels import cli

    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    assert cli.main(["build"]) == 1
    assert "nvcc was not found. Install the CUDA toolkit" in capsys.readouterr().err
    monkeypatch.setattr(cuda_library.importlib.util, "find_spec", lambda name: None)
    cuda_library._find.cache_clear()
    assert "nvcc was not found" in cuda_library.missing()
    assert cli.main(["info"]) == 0
    assert "install the CUDA toolkit (nvcc), then run: gptkernels build" in capsys.readouterr().out
    cuda_library._find.cache_clear()


def test_a_compile_error_is_told(cache, tmp_path, monkeypatch):
    if not cuda_build.find_nvcc():
        pytest.skip("needs nvcc")
    source = tmp_path / "csrc"
    source.mkdir()
    (source / "broken.cu").write_text("__global__ void broken() { undeclared = 1; }\n")
    monkeypatch.setattr(cuda_build, "source_directory", lambda: source)
    with pytest.raises(cuda_build.BuildError, match=r'(?s)compiling failed.*"undeclared" is undefined'):
        cuda_build.build_into_cache()


def test_building_from_scratch(cache, tmp_path, monkeypatch):
    """A small library, really built: private folders, an incremental second build, another key for other sources."""
    if not cuda_build.find_nvcc():
        pytest.skip("needs nvcc")
    source = tmp_path / "csrc"
    source.mkdir()
    (source / "module.cpp").write_text(
        "#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_cuda, m) { m.attr(\"answer\") = 42; }\n"
    )  # fmt: skip
    monkeypatch.setattr(cuda_build, "source_directory", lambda: source)
    monkeypatch.setenv("GPTKERNELS_CUDA_ARCHS", "90a")
    built = cuda_build.build_into_cache()
    assert built in cuda_build.cached_libraries()
    assert (cache.stat().st_mode & 0o777, built.parent.stat().st_mode & 0o777) == (0o700, 0o700)
    started = time.monotonic()
    assert cuda_build.build_into_cache() == built
    assert time.monotonic() - started < 3
    (source / "kernel.cu").write_text("__global__ void nothing() {}\n")
    assert cuda_build.build_into_cache() != built
