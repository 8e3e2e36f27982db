"""Tokens per second of a whole model, and where its time and memory go: `gptkernels profile`."""
