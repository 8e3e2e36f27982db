"""Builds variants of the CUDA kernels of one op, with edits made to their sources, for bfloat16 and the simulator."""

import re
import shutil
import subprocess
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pybind11

from gptkernels import cuda_build, cuda_library, remembered

BY_SIZE = """
template <int HeadDim> using Size = std::integral_constant<int, HeadDim>;

template <class Work>
static auto with_size(int head_dim, Work work) {
    if (head_dim <= 64) return work(Size<64>());
    if (head_dim <= 128) return work(Size<128>());
    return work(Size<256>());
}
"""
ATTENTION_FWD = """
void attention_fwd(const AttentionFwdParams& p, cudaStream_t stream) {
    BEFORE_EACH_LAUNCH
    with_size(p.shape.head_dim, [&](auto size) { attention_fwd_launch<__nv_bfloat16, size.value, kBent>(p, stream); });
}
"""
ATTENTION_BWD = """
void attention_bwd(const AttentionBwdParams& p, cudaStream_t stream) {
    BEFORE_EACH_LAUNCH
    with_size(p.shape.head_dim, [&](auto size) { attention_bwd_launch<__nv_bfloat16, size.value, kBent>(p, stream); });
}
int64_t attention_bwd_workspace_bytes(const AttentionShape& shape, int sm_count) {
    AttentionBwdParams params = {};
    params.shape = shape;
    params.sm_count = sm_count;
    AttentionBwdArguments unused;
    return with_size(shape.head_dim, [&](auto size) { return attention_bwd_plan<size.value>(params, &unused); });
}
"""


def attention(bent: bool) -> dict[str, str]:
    """bent: the kernels with a softcap and ALiBi, or those without"""
    flag = f"constexpr bool kBent = {str(bent).lower()};\n"
    parts = {"fwd": ("attention_fwd_kernel", ATTENTION_FWD), "bwd": ("attention_bwd_passes", ATTENTION_BWD)}
    return {part: f'#include "attention/{file}.cuh"\n{flag}{BY_SIZE}{text}' for part, (file, text) in parts.items()}


# The op's functions, for bfloat16 alone, in parts that are compiled apart: "bwd" needs no file named _fwd_.
ENTRY_POINTS = {
    "attention": attention(bent=False),
    "attention_bent": attention(bent=True),
    "mlp": {
        "fwd_bwd": """
#include "mlp/mlp_kernel.cuh"
using T = __nv_bfloat16;
void mlp_fwd(const MlpFwdParams& p, cudaStream_t stream) {
    BEFORE_EACH_LAUNCH
    if (p.activation == Activation::kNone) return mlp_fwd_launch<T, Activation::kNone>(p, stream);
    mlp_fwd_launch<T, Activation::kGeluTanh>(p, stream);
}
void mlp_bwd(const MlpBwdParams& p, cudaStream_t stream) {
    BEFORE_EACH_LAUNCH
    mlp_bwd_launch<T, Activation::kGeluTanh>(p, stream);
}
"""
    },
    # gpt-oss's, which does all that the others do
    "gated_mlp": {
        "fwd_bwd": """
#include "mlp/mlp_kernel.cuh"
using T = __nv_bfloat16;
void mlp_fwd(const MlpFwdParams& p, cudaStream_t stream) {
    BEFORE_EACH_LAUNCH
    mlp_fwd_launch<T, Activation::kNone>(p, stream);
}
void gated_mlp_fwd(const GatedMlpFwdParams& p, cudaStream_t stream) {
    BEFORE_EACH_LAUNCH
    gated_mlp_fwd_launch<T, Activation::kGptOss>(p, stream);
}
void gated_mlp_bwd(const GatedMlpBwdParams& p, cudaStream_t stream) {
    BEFORE_EACH_LAUNCH
    gated_mlp_bwd_launch<T, Activation::kGptOss>(p, stream);
}
"""
    },
}
FOLDERS = ("attention", "cross_entropy", "layer_norm", "mlp")


def source(op: str, file: str) -> str:
    return (cuda_build.source_directory() / op / file).read_text()


def folder_of(op: str) -> str:
    return {"gated_mlp": "mlp", "attention_bent": "attention"}.get(op, op)


def placeholders(op: str) -> str:
    """Functions of the other ops, which the bindings name too."""
    text, own = "#include <cstdlib>\n", "".join(ENTRY_POINTS[op].values())
    for folder in FOLDERS:
        text += f'#include "{folder}/{folder}.h"\n'
        for declared, name in re.findall(r"^(\w+ (\w+)\([^;]*\));", source(folder, f"{folder}.h"), re.M):
            if f" {name}(const " not in own:
                text += f"{declared} {{ std::abort(); }}\n"
    return text


class Builder:
    """before_each_launch: a statement of the host; flags: of every file with kernels"""

    def __init__(self, folder: Path, op: str, before_each_launch: str = "", flags: tuple[str, ...] = ()):
        self.folder, self.op, self.nvcc = folder, op, cuda_build.find_nvcc()
        self.flags = (*flags, f"-DBEFORE_EACH_LAUNCH={before_each_launch}")
        self.compiled: dict[tuple, str] = {}
        csrc = cuda_build.source_directory()
        shutil.copytree(csrc, folder / "csrc", dirs_exist_ok=True)
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        defines = ["-DGPTKERNELS_SOURCE_HASH=edited", "-DGPTKERNELS_ARCHS=90a"]
        rest = folder / "rest.cpp"
        rest.write_text(placeholders(op))
        self.objects = [
            self.compile(source, *includes, *defines)
            for source in (csrc / "bindings.cpp", csrc / "build_info.cpp", rest)
        ]

    def compile(self, source: Path, *flags: str) -> str:
        output = str(self.folder / f"{source.name}.o")
        command = [self.nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "shared"]
        command += [f"-I{self.folder / 'csrc'}", *flags, "-c", str(source), "-o", output]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)
        return output

    def build(self, name: str, edits: dict[str, str]) -> Path:
        """edits: texts of files of the op that replace the real ones. -> the library"""
        originals = cuda_build.source_directory() / folder_of(self.op)
        for original in originals.glob("*.cuh"):
            (self.folder / "csrc" / folder_of(self.op) / original.name).write_text(
                edits.get(original.name, original.read_text())
            )
        kernels = [self.part(part, name, edits) for part in ENTRY_POINTS[self.op]]
        library = self.folder / f"{name}.so"
        subprocess.run(
            [self.nvcc, "-shared", "-cudart", "shared", *self.objects, *kernels, "-o", str(library)], check=True
        )
        return library

    def part(self, part: str, name: str, edits: dict[str, str]) -> str:
        """The object of one part, compiled anew where edits touch what it is made of."""
        others = [f"_{other}_" for other in ENTRY_POINTS[self.op] if other != part]
        touching = {f: text for f, text in edits.items() if not any(other in f for other in others)}
        key = (part, *sorted(touching.items()))
        if key not in self.compiled:
            source = self.folder / f"{name}_{part}.cu"
            source.write_text(ENTRY_POINTS[self.op][part])
            self.compiled[key] = self.compile(source, *self.flags, "-gencode", "arch=compute_90a,code=compute_90a")
        return self.compiled[key]


@contextmanager
def using(library: Path):
    """Launches go to this library; to be entered before the simulator."""
    import ptxemu.cuda

    ptxemu.cuda.load_runtime()  # before the library's own runtime can be
    with mock.patch.object(cuda_library, "_find", return_value=cuda_library.load_file(library)):
        remembered.forget()  # launches are of the library that they were made for
        yield
    remembered.forget()
