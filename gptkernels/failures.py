"""Errors as a user of the command line meets them."""

import os


class UsageError(ValueError):
    """Options that make no sense, alone or together; the message names the flag. The command line exits with 2."""


class UnsupportedError(RuntimeError):
    """No backend, or not the one that was named, can run this call."""


class LostRankError(RuntimeError):
    """Another process of the run has ended, or does not answer."""


# What gloo says, as a RuntimeError like any other; NCCL's errors have types of their own.
LOST_BY_GLOO = ("connection closed by peer", "connection reset", "timed out", "broken pipe", "connection refused")


def is_lost_rank(error: BaseException) -> bool:
    if isinstance(error, LostRankError) or any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "gloo" in text and any(words in text for words in LOST_BY_GLOO)


def lost_rank(error: BaseException) -> LostRankError:
    """error: of which is_lost_rank is true -> what a user is told"""
    if isinstance(error, LostRankError):
        return error
    said = str(error).strip().splitlines()
    me = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    return LostRankError(
        f"{me}another process of this run has ended or does not answer ({said[0] if said else 'no more is known'})"
    )


def one_line(error: Exception) -> str | None:
    """What a user is told; None for an error that is a fault of ours, and deserves its traceback."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, (ValueError, OSError, UnsupportedError)):
        return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if is_lost_rank(error):
        return str(lost_rank(error))
    if is_out_of_memory(error):
        return f"out of memory: {str(error).strip().splitlines()[0]}" if str(error).strip() else "out of memory"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has an error of its own for a GPU's memory, and a RuntimeError for the host's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "allocate memory" in str(error))
    )
