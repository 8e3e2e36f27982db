"""What software does besides the model's products: bytes that go through memory, counted kernel by kernel, and bytes
that it communicates. Ours, and those of published runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    # Per layer: 16-bit tensors of the model's width, and of the MLP's, that are read or written outside of products and
    # of attention; forward, backward.
    width_passes: tuple[float, float]
    hidden_passes: tuple[float, float]
    logit_bytes: float  # read or written per logit
    gather_bytes: int  # per parameter that data parallelism gathers
    reduce_bytes: int  # per gradient that it sums
    tensor_bytes: int = 2  # per element that tensor parallelism moves
    # Attention that writes its scores, all of their square, and the bytes per score, forward and backward.
    score_bytes: tuple[float, float] | None = None
    attention_share: float | None = None  # of the peak, where it is known; fitted for the others


# Norms of ours read x and the residual and write both. Epilogues write the pre-activation, and read it in backward.
OURS = Stack((8, 10), (1, 2), logit_bytes=8, gather_bytes=2, reduce_bytes=4)

PUBLISHED = {
    # Fused bias-GELU, bias-dropout-addition and LayerNorm; scores: written by a product, softmax over the triangle,
    # dropout, read by a product. float32 logits and their softmax. 16-bit gradients.
    "megatron-2021": Stack((11, 21), (2, 3), 30, gather_bytes=2, reduce_bytes=2, score_bytes=(12, 17)),
    # Residual addition and norm in one, GELU in the product's epilogue, the loss in place; cuDNN's attention, whose
    # forward is published at 288 of 989 TFLOP/s for 1,024 tokens and heads of 64 (flash-attention's flash3_fp16_fwd).
    "llm.c": Stack((8, 15), (1, 4), 8, gather_bytes=2, reduce_bytes=2, attention_share=288 / 989),
    # PyTorch's ops one by one, flash-attention and its in-place loss. FSDP's reduce type follows its parameters', which
    # are in 16 bits both by Composer's DEFAULT and by its PURE.
    "llm-foundry": Stack((10, 27), (2, 4), 8, gather_bytes=2, reduce_bytes=2),
}
