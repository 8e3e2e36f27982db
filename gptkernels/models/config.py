"""What a model is made of, and the models that were published."""

from dataclasses import dataclass, replace

from ..ops.mlp.reference import ACTIVATIONS

PATTERNS = ("dense", "banded")
GPT3_WINDOW = 256


@dataclass(frozen=True)
class GPTConfig:
    """One field per choice. Defaults are GPT-2's."""

    vocabulary: int = 50257
    context: int = 1024  # the longest sequence: so many positions are learned, where these are not rotary
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int | None = None  # of keys and values, each for heads / kv_heads query heads; as many by default
    mlp_width: int | None = None  # 4 * width by default
    norm: str = "pre"  # "pre", with a norm after the last layer, "rms", which is "pre" with RMSNorm, or "post"
    rotary: float | None = None  # the base of rotary positions, such as 10000.0; by default positions are learned
    qk_norm: bool = False  # RMSNorms of each head's queries and keys, in the pass that rotates them
    pattern: tuple[str, ...] = ("dense",)  # of attention, repeated over the layers: "dense" or "banded"
    window: int | None = None  # keys that a query of a banded layer sees, itself included
    attention_scale: float | None = None  # 1 / sqrt(head size) by default
    activation: str = "gelu_tanh"
    gated: bool = False  # the MLP is down(activation(gate(x)) * up(x))
    bias: bool = True
    qkv_bias: bool = True
    tied: bool = True  # the head's weight is the token embedding
    dropout: float = 0.0  # of embeddings and of what each attention and MLP adds
    attention_dropout: float = 0.0
    share_layers: bool = False  # one layer's weights, used `layers` times
    embedding_rank: int | None = None  # embeddings of this width, projected to `width`, as in ALBERT
    token_types: int = 0  # learned segment embeddings
    objective: str = "next_token"  # or "masked": bidirectional, with masked tokens and sentence order to predict
    eps: float = 1e-5
    init_std: float = 0.02
    position_std: float = 0.02
    scale_residual_init: bool = True  # by 1 / sqrt(2 * layers), what feeds the residual stream
    save: str = "preact"  # what the MLP keeps for backward: "all", "preact" or "input"
    backend: str = "auto"

    def __post_init__(self):
        for name in ("vocabulary", "context", "layers", "width", "heads"):
            check_positive(name, getattr(self, name))
        for name in ("kv_heads", "mlp_width", "window", "embedding_rank"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check_choice("norm", self.norm, ("pre", "rms", "post"))
        check_choice("objective", self.objective, ("next_token", "masked"))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("save", self.save, ("all", "preact", "input"))
        object.__setattr__(self, "pattern", tuple(self.pattern))  # it comes back from JSON as a list
        if not self.pattern:
            raise ValueError("pattern must name at least one kind of attention")
        for kind in self.pattern:
            check_choice("pattern", kind, PATTERNS)
        if "banded" in self.pattern and self.window is None:
            raise ValueError("window must be given where the pattern has banded layers")
        if self.width % self.heads or not 16 <= self.width // self.heads <= 256:
            raise ValueError(
                f"heads must divide the width of {self.width} into head sizes of 16 ... 256, not {self.heads}"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads must divide the {self.heads} heads, not {self.kv_heads}")
        if self.qk_norm and self.rotary is None:
            raise ValueError("qk_norm needs rotary positions: rotary must be their base, not None")
        if self.rotary is not None:
            check_rotary(self.rotary, self.head_size)
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return (self.kv_heads or self.heads) * self.head_size

    @property
    def hidden(self) -> int:
        return self.mlp_width or 4 * self.width

    @property
    def causal(self) -> bool:
        return self.objective == "next_token"

    def layer_window(self, layer: int) -> int | None:
        """The window of layer number `layer`, None where it is dense."""
        return self.window if self.pattern[layer % len(self.pattern)] == "banded" else None

    @staticmethod
    def preset(name: str, **changes) -> "GPTConfig":
        """A published model; `changes` are fields to set differently."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
        return replace(PRESETS[name], **changes)


def check_positive(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, not {value!r}")


def check_rotary(base, head_size: int) -> None:
    if isinstance(base, bool) or not isinstance(base, (int, float)) or not 1 < base < float("inf"):
        raise ValueError(f"rotary must be None or a finite base above 1, not {base!r}")
    if head_size % 2:
        raise ValueError(f"rotary needs an even head size (width / heads), not {head_size}")


def check_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def gpt2(layers: int, width: int, heads: int) -> GPTConfig:
    # GPT-2's code draws positions with half the deviation of tokens.
    return GPTConfig(layers=layers, width=width, heads=heads, dropout=0.1, attention_dropout=0.1, position_std=0.01)


def gpt3(layers: int, width: int, heads: int) -> GPTConfig:
    """Table 2.1 of the GPT-3 paper. Its layers alternate "dense and locally banded sparse" attention; the paper
    publishes no width of the band, so `window` is an option, and 256 (GPT-Neo's choice) only a default."""
    return GPTConfig(
        context=2048, layers=layers, width=width, heads=heads, pattern=("dense", "banded"), window=GPT3_WINDOW
    )


def albert(layers: int, width: int, heads: int) -> GPTConfig:
    """The second release, which trains without dropout."""
    return GPTConfig(
        vocabulary=30000,
        context=512,
        layers=layers,
        width=width,
        heads=heads,
        norm="post",
        share_layers=True,
        embedding_rank=128,
        token_types=2,
        objective="masked",
        eps=1e-12,
        scale_residual_init=False,
    )


def llama(layers: int, width: int, heads: int, kv_heads: int, mlp_width: int) -> GPTConfig:
    """Llama 2's kind, of which TinyLlama is a small one; drawn as transformers draws it."""
    return GPTConfig(
        vocabulary=32000,
        context=2048,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=mlp_width,
        norm="rms",
        rotary=10000.0,
        activation="silu",
        gated=True,
        bias=False,
        tied=False,
        scale_residual_init=False,
    )


PRESETS = {
    "gpt1": GPTConfig(
        vocabulary=40478,
        context=512,
        norm="post",
        dropout=0.1,
        attention_dropout=0.1,
        scale_residual_init=False,
    ),
    "gpt2": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1024, 16),
    "gpt2-large": gpt2(36, 1280, 20),
    "gpt2-xl": gpt2(48, 1600, 25),
    "gpt3-125m": gpt3(12, 768, 12),
    "gpt3-350m": gpt3(24, 1024, 16),
    "gpt3-760m": gpt3(24, 1536, 16),
    # The table says 24 heads of 128 for a width of 2048; 16 heads are what fits.
    "gpt3-1.3b": gpt3(24, 2048, 16),
    "gpt3-2.7b": gpt3(32, 2560, 32),
    "gpt3-6.7b": gpt3(32, 4096, 32),
    # The table says a width of 5140, which 40 heads of 128 do not have; 5120 is what they have.
    "gpt3-13b": gpt3(40, 5120, 40),
    "gpt3-175b": gpt3(96, 12288, 96),
    "albert-base": albert(12, 768, 12),
    "albert-large": albert(24, 1024, 16),
    "albert-xlarge": albert(24, 2048, 16),
    "albert-xxlarge": albert(12, 4096, 64),
    "tinyllama-1.1b": llama(22, 2048, 32, kv_heads=4, mlp_width=5632),
}
