from .op import MlpFunction, accumulate_gradient, mlp

__all__ = ["MlpFunction", "accumulate_gradient", "mlp"]
