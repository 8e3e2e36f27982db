from .op import LayerNormFunction, add_layer_norm, layer_norm

__all__ = ["LayerNormFunction", "add_layer_norm", "layer_norm"]
