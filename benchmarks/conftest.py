"""Options and machine facts of the pytest-benchmark suites."""

import torch

from gptkernels.bench import suites, telemetry


def pytest_addoption(parser):
    parser.addoption("--suite", default="quick", choices=suites.SUITES)


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["device"] = telemetry.device_facts(device)
    machine_info["versions"] = telemetry.versions()
    machine_info["telemetry"] = telemetry.Nvml(device).read()
