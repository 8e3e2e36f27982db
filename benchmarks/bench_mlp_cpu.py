"""gk.mlp and gk.linear_cross_entropy on the CPU against what people would write, in time and in peak memory.

    python benchmarks/bench_mlp_cpu.py [--json FILE]

Forward and backward, float32, one thread; each case in a process of its own, so that peak memory is its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import gptkernels as gk

REPEATS = 5
CASES = {
    "mlp, 1024 x 768": {"plain": "plain_mlp", "gptkernels": "our_mlp", "gptkernels, save=input": "our_mlp_input"},
    "loss, 1024 x 768 x 50257": {"plain": "plain_loss", "gptkernels": "our_loss"},
}


def mlp_inputs():
    x, fc, proj = torch.randn(1024, 768), torch.randn(3072, 768) / 28, torch.randn(768, 3072) / 55
    return [t.requires_grad_() for t in (x, fc, torch.zeros(3072), proj, torch.zeros(768))]


def plain_mlp(x, fc_weight, fc_bias, proj_weight, proj_bias):
    return F.linear(F.gelu(F.linear(x, fc_weight, fc_bias), approximate="tanh"), proj_weight, proj_bias).sum()


def our_mlp(*inputs):
    return gk.mlp(*inputs).sum()


def our_mlp_input(*inputs):
    return gk.mlp(*inputs, save="input").sum()


def loss_inputs():
    return [torch.randn(1024, 768, requires_grad=True), (torch.randn(50257, 768) / 28).requires_grad_()]


def targets():
    return torch.arange(1024) * 49


def plain_loss(x, weight):
    return F.cross_entropy(x @ weight.T, targets())


def our_loss(x, weight):
    return gk.linear_cross_entropy(x, weight, targets())


def measure(name: str) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = mlp_inputs() if "mlp" in name else loss_inputs()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        globals()[name](*inputs).backward()
        seconds.append(time.perf_counter() - started)
        for tensor in inputs:
            tensor.grad = None
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the samples there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    found = {}
    for case, variants in CASES.items():
        for label, function in variants.items():
            run = subprocess.run([sys.executable, __file__, "--one", function], stdout=subprocess.PIPE, check=True)
            found[f"{case}: {label}"] = result = json.loads(run.stdout)
            print(
                f"{case:26} {label:24} {statistics.median(result['seconds']):7.3f} s {result['peak_mib']:7.0f} MiB",
                flush=True,
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
