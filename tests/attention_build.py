"""Builds variants of the CUDA attention kernels, with edits made to their sources, for bfloat16 and the simulator."""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pybind11

from gptkernels import cuda_build, cuda_library

ENTRY_POINTS = """
#include "attention/attention_bwd_passes.cuh"
#include "attention/attention_fwd_kernel.cuh"

cudaError_t attention_fwd(const AttentionFwdParams& params, cudaStream_t stream) {
    return params.shape.head_dim <= 64    ? attention_fwd_launch<__nv_bfloat16, 64>(params, stream)
           : params.shape.head_dim <= 128 ? attention_fwd_launch<__nv_bfloat16, 128>(params, stream)
                                          : attention_fwd_launch<__nv_bfloat16, 256>(params, stream);
}
cudaError_t attention_bwd(const AttentionBwdParams& params, cudaStream_t stream) {
    return params.shape.head_dim <= 64    ? attention_bwd_launch<__nv_bfloat16, 64>(params, stream)
           : params.shape.head_dim <= 128 ? attention_bwd_launch<__nv_bfloat16, 128>(params, stream)
                                          : attention_bwd_launch<__nv_bfloat16, 256>(params, stream);
}
int64_t attention_bwd_workspace_bytes(const AttentionShape& shape) {
    AttentionBwdWorkspace unused;
    return shape.head_dim <= 64    ? attention_bwd_workspace<64>(shape, nullptr, &unused)
           : shape.head_dim <= 128 ? attention_bwd_workspace<128>(shape, nullptr, &unused)
                                   : attention_bwd_workspace<256>(shape, nullptr, &unused);
}
"""


def attention_bindings(text: str) -> str:
    """bindings.cpp without the other ops, whose objects are not linked."""
    other_function = re.compile(r"[\w:]+ (?!attention_)\w+_binding\(")
    text = "\n\n".join(part for part in text.split("\n\n") if not other_function.match(part))
    other_line = re.compile(r'\s*(m\.def\("(?!attention_|error_string)|#include "(?!attention/|common/))')
    return "\n".join(line for line in text.splitlines() if not other_line.match(line)) + "\n"


class Builder:
    def __init__(self, folder: Path):
        self.folder, self.nvcc = folder, cuda_build.find_nvcc()
        shutil.copytree(cuda_build.source_directory(), folder / "csrc", dirs_exist_ok=True)
        self.host = folder / "bindings.cpp"
        self.host.write_text(attention_bindings((folder / "csrc" / "bindings.cpp").read_text()))
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        defines = ["-DGPTKERNELS_SOURCE_HASH=edited", "-DGPTKERNELS_ARCHS=90a"]
        for source in (self.host, folder / "csrc" / "build_info.cpp"):
            self.compile(folder / "csrc", source, *includes, *defines)

    def compile(self, csrc: Path, source: Path, *flags: str) -> None:
        command = [self.nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "shared"]
        command += [f"-I{csrc}", *flags, "-c", str(source), "-o", str(self.folder / f"{source.name}.o")]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)

    def build(self, name: str, edits: dict[str, str]) -> Path:
        """edits: texts of files of csrc/attention that replace the real ones. -> the library"""
        csrc = self.folder / "edited"
        shutil.copytree(cuda_build.source_directory(), csrc, dirs_exist_ok=True)
        for file, text in edits.items():
            (csrc / "attention" / file).write_text(text)
        source = self.folder / f"{name}.cu"
        source.write_text(ENTRY_POINTS)
        self.compile(csrc, source, "-gencode", "arch=compute_90a,code=compute_90a")
        library = self.folder / f"{name}.so"
        objects = [str(self.folder / f"{file}.o") for file in ("bindings.cpp", "build_info.cpp", source.name)]
        subprocess.run([self.nvcc, "-shared", "-cudart", "shared", *objects, "-o", str(library)], check=True)
        return library


@contextmanager
def using(library: Path):
    """Launches go to this library; to be entered before the simulator."""
    import ptxemu.cuda

    ptxemu.cuda.load_runtime()  # before the library's own runtime can be
    spec = importlib.util.spec_from_file_location("_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with mock.patch.object(cuda_library, "_find", return_value=module):
        yield
