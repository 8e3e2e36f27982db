"""Compiles csrc/ into one pybind11 module with nvcc and ninja. Imports neither torch nor the rest of the package."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

DEFAULT_ARCHS = "80;90a"
# nvcc's own peak on the largest file here, with room to spare.
GIB_PER_JOB = 3
LOCK_TIMEOUT_S = 600.0


class BuildError(RuntimeError):
    """The CUDA library cannot be built here; the message says why and what to do."""


def source_directory() -> Path:
    """csrc/ beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def source_files() -> list[Path]:
    return sorted(p for p in source_directory().rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp"))


def source_hash() -> str:
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.relative_to(source_directory()).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_nvcc() -> str | None:
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if root and (Path(root) / "bin" / "nvcc").is_file():
            return str(Path(root) / "bin" / "nvcc")
    default = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.is_file() else None)


def toolkit_version(nvcc: str) -> str:
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace").stdout
    except OSError as error:
        raise BuildError(f"{nvcc} cannot be run: {error.strerror}") from None
    match = re.search(r"release (\d+\.\d+)", told)
    if not match:
        raise BuildError(f"{nvcc} --version did not name a release")
    return match.group(1)


def archs() -> list[str]:
    """Compute capabilities to build for, e.g. ["80", "90a"]; $GPTKERNELS_CUDA_ARCHS="80;90a;100a" chooses others."""
    chosen = re.split(r"[;,\s]+", os.environ.get("GPTKERNELS_CUDA_ARCHS", "").strip() or DEFAULT_ARCHS)
    wrong = [arch for arch in chosen if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong:
        raise BuildError(f"GPTKERNELS_CUDA_ARCHS must look like '80;90a', not {wrong[0]!r}")
    return chosen


def arch_flags(source: Path, chosen: list[str]) -> str:
    """Machine code and PTX for every arch; files named *_sm90.cu only mean something on sm_90a."""
    if source.stem.endswith("_sm90") and "90a" in chosen:
        chosen = ["90a"]
    return " ".join(f"-gencode arch=compute_{a},code=[sm_{a},compute_{a}]" for a in chosen)


def variants(source: Path) -> list[str]:
    """Definitions with which a source is compiled, each time to an object of its own, all of them at the same time: of
    `// Compiled for each NAME of 1 2.` in its first line, or none."""
    with source.open() as file:
        told = re.match(r"// Compiled for each (\w+) of ([\w ]+)\.$", file.readline())
    return [f"-D{told.group(1)}={value}" for value in told.group(2).split()] if told else [""]


def job_count() -> int:
    try:
        found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    free_gib = int(found.group(1)) / 2**20 if found else GIB_PER_JOB
    return max(1, min(os.cpu_count() or 1, int(free_gib / GIB_PER_JOB)))


def ninja_file(output: Path, nvcc: str) -> str:
    """The text of build.ninja: one object per variant of a .cu and .cpp file, one shared library."""
    import pybind11

    csrc, chosen = source_directory(), archs()
    includes = f"-I{csrc} -isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
    defines = f"-DGPTKERNELS_SOURCE_HASH={source_hash()} -DGPTKERNELS_ARCHS={'.'.join(chosen)}"
    lines = [
        f"nvcc = {nvcc}",
        f"flags = -std=c++17 -O3 -Xcompiler -fPIC -Xcompiler -fvisibility=hidden -cudart shared {includes}",
        "rule compile",
        "  command = $nvcc -c $flags $extra -MD -MF $out.d $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc -shared -cudart shared $in -o $out",
    ]
    objects = []
    for source in source_files():
        if source.suffix not in (".cu", ".cpp"):
            continue
        extra = arch_flags(source, chosen) if source.suffix == ".cu" else ""
        if source.name == "build_info.cpp":
            extra = defines
        for variant in variants(source):
            objects.append("_".join(source.relative_to(csrc).parts) + variant.replace("=", "_") + ".o")
            lines += [f"build {objects[-1]}: compile {source}", f"  extra = {extra} {variant}".rstrip()]
    return "\n".join([*lines, f"build {output}: link {' '.join(objects)}", ""])


def build(
    output: Path, work_directory: Path, verbose: bool = False, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Compiles the library to `output`; objects stay in `work_directory`, so that the next build is incremental.
    progress: called with the files compiled so far and their number."""
    nvcc = find_nvcc()
    if not nvcc:
        raise BuildError(
            "nvcc was not found. Install the CUDA toolkit (12.8 or newer) and put nvcc on PATH, or set CUDA_HOME."
        )
    try:
        import ninja
        import pybind11  # noqa: F401
    except ImportError as error:
        raise BuildError(f"the build needs {error.name}: pip install ninja pybind11") from None
    work_directory.mkdir(parents=True, exist_ok=True)
    temporary = work_directory / "_cuda.so"
    (work_directory / "build.ninja").write_text(ninja_file(temporary, nvcc))
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-j", str(job_count()), "-C", str(work_directory)]
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            said.append(line)
            if verbose:
                print(line, end="", flush=True)
            step = re.match(r"\[(\d+)/(\d+)\]", line)
            if step and progress:
                progress(int(step.group(1)), int(step.group(2)))
    if process.returncode:
        raise BuildError(f"compiling failed:\n{''.join(said)[-4000:]}")
    # Copied beside its goal and renamed: whoever loads the library sees the old one or the new one, never half of one.
    staged = output.with_name(f"{output.name}.{os.getpid()}")
    shutil.copy2(temporary, staged)
    os.replace(staged, output)
    return output


def cache_root() -> Path:
    base = os.environ.get("GPTKERNELS_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gptkernels"
    )
    return Path(base)


def check_private(directory: Path) -> None:
    """Refuses a folder from which another user could make this one run their code."""
    status = directory.lstat()
    if directory.is_symlink() or status.st_uid != os.getuid():
        raise BuildError(f"{directory} is a link or belongs to another user; remove it or set GPTKERNELS_CACHE")
    if status.st_mode & 0o022:
        raise BuildError(f"{directory} is writable by others (chmod 700 it, or set GPTKERNELS_CACHE)")


def cached_libraries() -> list[Path]:
    """Libraries that `gptkernels build` made from these very sources for this Python, newest first."""
    folder = cache_root() / "libraries"
    if not folder.is_dir():
        return []
    check_private(cache_root())
    check_private(folder)
    pattern = f"{source_hash()}-{sys.implementation.cache_tag}-*/_cuda.so"
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        check_private(path.parent)
    return found


@contextmanager
def locked(path: Path, timeout_s: float = LOCK_TIMEOUT_S):
    """Holds an exclusive lock on `path`; another process's build is waited for, but not for ever."""
    import fcntl

    with open(path, "w") as file:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"another build has held {path} for {timeout_s:.0f} s") from None
                time.sleep(0.1)
        yield


def build_into_cache(
    verbose: bool = False,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Builds the library for this user, keyed by source, Python, toolkit and archs; returns its path."""
    nvcc = find_nvcc()
    toolkit = f"cuda{toolkit_version(nvcc)}-{'-'.join(archs())}" if nvcc else "none"
    root = cache_root()
    for folder in (root, root / "libraries", root / "objects"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BuildError(f"{folder} cannot be made ({error.strerror}); GPTKERNELS_CACHE names another") from None
        check_private(folder)
    with locked(root / "lock", lock_timeout_s):
        target = root / "libraries" / f"{source_hash()}-{sys.implementation.cache_tag}-{toolkit}"
        objects = root / "objects" / f"{sys.implementation.cache_tag}-{toolkit}"
        target.mkdir(mode=0o700, exist_ok=True)
        check_private(target)
        return build(target / "_cuda.so", objects, verbose, progress)
