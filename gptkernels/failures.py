"""Errors as a user of the command line meets them."""


class UsageError(ValueError):
    """Options that make no sense, alone or together; the message names the flag. The command line exits with 2."""


class UnsupportedError(RuntimeError):
    """No backend, or not the one that was named, can run this call."""


def one_line(error: Exception) -> str | None:
    """What a user is told; None for an error that is a fault of ours, and deserves its traceback."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, (ValueError, OSError, UnsupportedError)):
        return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
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
