"""Configuration: what a user asks for, and how a base model is described. Imports no torch."""

from mcore_spec.config.algorithms import ALGORITHMS, ExportFormat, RegisteredAlgorithm
from mcore_spec.config.base import BaseArchitecture, BaseIdentity, DtypeName, Family, RopeConfig
from mcore_spec.config.drafts import (
    EAGLE1_DEFAULT_CFG,
    EAGLE3_DEFAULT_CFG,
    EAGLE_MTP_DEFAULT_CFG,
    DraftInit,
    EagleAlgorithm,
    EagleArchitectureConfig,
    EagleConfig,
    MedusaConfig,
    check_supported,
    eagle_preset,
)
from mcore_spec.config.strict import StrictConfig, describe_problem, describe_validation_error, suggest
from mcore_spec.config.training import DataConfig, TrainingConfig

__all__ = [
    "ALGORITHMS",
    "EAGLE1_DEFAULT_CFG",
    "EAGLE3_DEFAULT_CFG",
    "EAGLE_MTP_DEFAULT_CFG",
    "BaseArchitecture",
    "BaseIdentity",
    "DataConfig",
    "DraftInit",
    "DtypeName",
    "EagleAlgorithm",
    "EagleArchitectureConfig",
    "EagleConfig",
    "ExportFormat",
    "Family",
    "MedusaConfig",
    "RegisteredAlgorithm",
    "RopeConfig",
    "StrictConfig",
    "TrainingConfig",
    "check_supported",
    "describe_problem",
    "describe_validation_error",
    "eagle_preset",
    "suggest",
]
