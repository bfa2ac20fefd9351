"""Configuration: what a user asks for, and how a base model is described. Imports no torch."""

from mcore_spec.config.base import BaseArchitecture, BaseIdentity, DtypeName, Family, RopeConfig
from mcore_spec.config.drafts import (
    EAGLE1_DEFAULT_CFG,
    EAGLE3_DEFAULT_CFG,
    EAGLE_MTP_DEFAULT_CFG,
    EagleAlgorithm,
    EagleArchitectureConfig,
    EagleConfig,
    MedusaConfig,
    check_supported,
    eagle_preset,
)
from mcore_spec.config.strict import StrictConfig, describe_validation_error

__all__ = [
    "EAGLE1_DEFAULT_CFG",
    "EAGLE3_DEFAULT_CFG",
    "EAGLE_MTP_DEFAULT_CFG",
    "BaseArchitecture",
    "BaseIdentity",
    "DtypeName",
    "EagleAlgorithm",
    "EagleArchitectureConfig",
    "EagleConfig",
    "Family",
    "MedusaConfig",
    "RopeConfig",
    "StrictConfig",
    "check_supported",
    "describe_validation_error",
    "eagle_preset",
]
