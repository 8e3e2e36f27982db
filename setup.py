"""Builds `gptkernels`: pure Python, plus the CUDA library where nvcc is found. Needs neither torch nor a GPU.

Without nvcc, or when compiling fails, the package still installs (its Triton and PyTorch backends need no compiler);
`gptkernels info` then tells why the library is absent and `gptkernels build` builds it later.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_cuda_build():
    """gptkernels/cuda_build.py by its path: importing the package would import torch, which a build does not have."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "gptkernels" / "cuda_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_build = load_cuda_build()


class BuildCudaLibrary(build_ext):
    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            cuda_build.build(output, work_directory=Path(self.build_temp).resolve() / "cuda")
        except cuda_build.BuildError as error:
            self.warn(f"installing without the CUDA library: {error}")


packages = find_packages(include=["gptkernels", "gptkernels.*"])
csrc_folders = sorted({path.parent for path in (ROOT / "csrc").rglob("*") if path.is_file()})
csrc_packages = ["gptkernels." + ".".join(folder.relative_to(ROOT).parts) for folder in csrc_folders]

setup(
    # csrc travels inside the package, so that `gptkernels build` works from an installed wheel.
    packages=[*packages, *csrc_packages],
    package_dir={"gptkernels": "gptkernels", "gptkernels.csrc": "csrc"},
    package_data={
        "gptkernels": ["py.typed", "tuning/shipped/*.json", "launch/*.json", "plan/*.json"],
        **{name: ["*.cu", "*.cuh", "*.h", "*.cpp"] for name in csrc_packages},
    },
    # optional: setuptools must not insist on a file that a machine without a working compiler did not produce.
    ext_modules=[Extension("gptkernels._cuda", [], optional=True)] if cuda_build.find_nvcc() else [],
    cmdclass={"build_ext": BuildCudaLibrary},
)
