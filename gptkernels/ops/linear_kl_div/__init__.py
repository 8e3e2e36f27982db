from .op import linear_kl_div

__all__ = ["linear_kl_div"]
