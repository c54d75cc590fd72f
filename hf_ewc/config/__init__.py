"""Settings as dataclasses, and the checks of their values."""

from hf_ewc.config.ewc_config import EWCConfig

__all__ = ["EWCConfig"]
