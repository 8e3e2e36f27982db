"""The file of what was measured on a device: private to the user, written whole or not at all, and of use only to the
same GPU, driver, torch, Triton and kernels."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import cuda_build
from ..failures import UsageError
from ..files import write_text
from .classes import CallClass

VERSION = 1
LOCK_TIMEOUT_S = 3600.0
SHIPPED = Path(__file__).parent / "shipped"


def facts(device: torch.device) -> dict:
    """What the measurements depend on, and are of no use without"""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where = {"device": properties.name, "units": properties.multi_processor_count, "driver": driver()}
    else:
        where = {"device": processor(), "units": os.cpu_count() or 1, "driver": None}
    versions = {"torch": torch.__version__, "triton": triton_version()}
    return where | versions | {"sources": sources()}


def driver() -> str:
    """Of the kernel's module, which can be read without asking the driver itself, or else the CUDA that it is for"""
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[1] if found else f"CUDA {torch.version.cuda}"


def triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else "cpu"


def sources() -> str:
    """Of the kernels and launchers: what is changed is measured again"""
    digest = hashlib.sha256(cuda_build.source_hash().encode())
    for path in sorted((Path(__file__).parents[1] / "ops").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def folder() -> Path:
    return cuda_build.cache_root() / "tuning"


def path_of(found: dict) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")[:40]
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    return folder() / f"{name}-{key}.json"


def checksum(document: dict) -> str:
    rest = {name: value for name, value in document.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(found: dict, entries: dict[CallClass, dict]) -> dict:
    rows = [{"op": c.op, "kind": list(c.kind), "sizes": c.sizes, **entry} for c, entry in entries.items()]
    document = {"version": VERSION, "facts": found, "classes": rows}
    return document | {"checksum": checksum(document)}


def opened(text: str) -> dict:
    """ValueError where it is not a file of ours, whole and of this version"""
    document = json.loads(text)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ValueError(f"not a tuning file of version {VERSION}")
    if document.get("checksum") != checksum(document):
        raise ValueError("its checksum is another")
    return document


def entries_of(document: dict) -> dict[CallClass, dict]:
    found = {}
    for row in document["classes"]:
        entry = {name: value for name, value in row.items() if name not in ("op", "kind", "sizes")}
        found[CallClass(row["op"], tuple(row["kind"]), row["sizes"])] = entry
    return found


def load(device: torch.device) -> dict[CallClass, dict]:
    """Nothing where nothing was measured. A file that cannot be read is set aside, and said to be."""
    if not folder().is_dir():
        return {}
    path = path_of(facts(device))
    try:
        cuda_build.check_private(cuda_build.cache_root())
        cuda_build.check_private(folder())
        return entries_of(opened(path.read_text()))
    except FileNotFoundError:
        return {}
    except cuda_build.BuildError as error:
        warnings.warn(f"gptkernels: what was tuned is not used: {error}", stacklevel=2)
    except (OSError, ValueError, KeyError, TypeError) as error:
        aside = path.with_suffix(".unreadable")
        warnings.warn(f"gptkernels: {path} is not used, and becomes {aside.name}: {error}", stacklevel=2)
        with suppress(OSError):  # of a file system that is read only
            os.replace(path, aside)
    return {}


def shipped(device: torch.device) -> dict[CallClass, dict]:
    """What was measured on a GPU of this name by those who made the package, with `gptkernels tune --export`"""
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_properties(device).name
    for path in sorted(SHIPPED.glob("*.json")):
        document = opened(path.read_text())
        if document["facts"]["device"] == name:
            return {found: entry | {"shipped": True} for found, entry in entries_of(document).items()}
    return {}


@contextmanager
def writing(device: torch.device, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator["Writer"]:
    """Holds the lock of what is known of this device"""
    for directory in (cuda_build.cache_root(), folder()):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        cuda_build.check_private(directory)
    found = facts(device)
    path = path_of(found)
    try:
        with cuda_build.locked(path.with_suffix(".lock"), timeout_s):
            yield Writer(path, found, load(device))
    except cuda_build.BuildError as error:
        raise UsageError(str(error).replace("another build", "another gptkernels tune")) from None


class Writer:
    def __init__(self, path: Path, found: dict, entries: dict[CallClass, dict]):
        self.path, self.facts, self.entries = path, found, entries

    def keep(self, of: CallClass, entry: dict) -> None:
        self.entries[of] = entry
        write_text(self.path, json.dumps(sealed(self.facts, self.entries), indent=1))

    def reset(self) -> None:
        self.entries.clear()
        self.path.unlink(missing_ok=True)
