"""A worker of `gptkernels tune` in which some block sizes of eager's attention go wrong, each in a way of its own."""

import os
import sys
import time

from gptkernels.ops.attention import eager
from gptkernels.tuning import choices, worker

real = eager.block_fwd


def faulty(*arguments):
    rows = (choices._trial or {}).get("eager_rows")
    if rows == 64:
        out, lse = real(*arguments)
        return out * 1.1, lse
    if rows == 128:
        os.abort()
    if rows == 512:
        time.sleep(1000)
    return real(*arguments)


eager.block_fwd = faulty
sys.exit(worker.main())
