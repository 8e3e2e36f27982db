"""attn_implementation="gptkernels" for transformers: gptkernels.hf.register()."""


def register(fallback: str | None = None) -> None:
    """Makes attn_implementation="gptkernels" known to transformers: the attention, and the masks it takes.

    fallback: what to do with a call that the kernels cannot run exactly, such as one with a 4-D mask of your own. None
        raises NotImplementedError with the reason; "sdpa" runs PyTorch's attention and warns, once for each reason.
    """
    from .swap import attention_interface

    attention_interface.register(fallback)
