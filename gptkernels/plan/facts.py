"""Facts about GPUs and the nodes they come in, and the constants that were fitted to published runs: all data."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..hardware import DATA_SHEETS

FOLDER = Path(__file__).resolve().parent


@lru_cache
def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class GPU:
    """In bytes, FLOPs and seconds. nvlink, network: in one direction, of each GPU."""

    name: str
    family: str  # whose fitted constants it takes
    device: str  # part of what its driver calls it
    data_sheet: str  # its name in hardware.DATA_SHEETS
    memory: float
    hbm: float
    nvlink: float
    network: float
    per_node: int

    @property
    def peak(self) -> float:
        """Dense bfloat16"""
        return DATA_SHEETS[self.data_sheet] * 1e12


GPUS = {
    name: GPU(
        name,
        facts["family"],
        facts["device"],
        facts["data_sheet"],
        facts["memory_gb"] * 1e9,
        facts["hbm_gbps"] * 1e9,
        facts["nvlink_gbps"] * 1e9,
        facts["network_gbps"] * 1e9,
        facts["per_node"],
    )
    for name, facts in read("facts.json")["gpus"].items()
}
