from .op import AddRMSNormFunction, RMSNormFunction, add_rms_norm, rms_norm

__all__ = ["AddRMSNormFunction", "RMSNormFunction", "add_rms_norm", "rms_norm"]
