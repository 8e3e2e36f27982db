from .op import RopeFunction, rope

__all__ = ["RopeFunction", "rope"]
