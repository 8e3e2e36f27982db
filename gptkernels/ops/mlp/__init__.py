from .op import MlpFunction, mlp

__all__ = ["MlpFunction", "mlp"]
