"""`gptkernels plan`: how to split a training run over GPUs, and what that needs, takes and costs.

facts -> split, memory, traffic -> step -> search -> report; published.py holds the model against runs that others
published.
"""
