"""The one forward-and-every-gradient check. It lives in the package, because `gptkernels check` makes it too."""

from gptkernels.parity import ParityError, assert_parity, check, guarded_allocations

__all__ = ["ParityError", "assert_parity", "check", "guarded_allocations"]
