from .op import AddLayerNormFunction, LayerNormFunction, add_layer_norm, layer_norm

__all__ = ["AddLayerNormFunction", "LayerNormFunction", "add_layer_norm", "layer_norm"]
