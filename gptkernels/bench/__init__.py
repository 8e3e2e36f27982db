"""Benchmarks that prove a result right before they time it: `gptkernels bench` and `gptkernels compare`."""
