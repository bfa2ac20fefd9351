"""A Hugging Face directory as a base, before any of its weights is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mcore_spec.bases.transformers_config import describe_hf
from mcore_spec.config import BaseArchitecture, BaseIdentity
from mcore_spec.weights.hf_config import check_not_quantized, locate, mtp_names, read_hf_config, without_mtp
from mcore_spec.weights.safetensors_io import WeightDirectory


class BaseDirectory(NamedTuple):
    """Where a base lies and what it is.

    Attributes:
        directory: on this machine.
        architecture: by its configuration.
        identity: with an empty fingerprint where there are no weights.
        mtp: beginnings of the names of tensors that are not the base's, but of its layers for multi-token prediction.
    """

    directory: Path
    architecture: BaseArchitecture
    identity: BaseIdentity
    mtp: tuple[str, ...] = ()


def find_base(path_or_hub_id: str, *, field: str = "pretrained_model_path", with_weights: bool = True) -> BaseDirectory:
    """Find and describe a base.

    Args:
        path_or_hub_id: a directory, or a repository of the hub, which is downloaded.
        field: what the user calls it.
        with_weights: they must be there; otherwise they may be missing.

    Raises:
        ConfigError: neither a directory nor a repository, or a configuration that cannot be read.
        CheckpointError: weights that are missing or damaged.
        UnsupportedError: a family or a feature that is not represented, or a quantised model.
    """
    directory = locate(path_or_hub_id, with_weights=with_weights, field=field)
    given = read_hf_config(directory)
    check_not_quantized(given, what=f"{field} = {path_or_hub_id}")
    raw, mtp = without_mtp(given), mtp_names(given)
    architecture = describe_hf(raw, where=str(directory / "config.json"))
    fingerprint = ""
    if with_weights or any(directory.glob("*.safetensors")):
        with WeightDirectory(directory, without=mtp) as weights:
            fingerprint = weights.fingerprint()
    source = str(directory.resolve()) if Path(path_or_hub_id).is_dir() else path_or_hub_id
    identity = BaseIdentity(source=source, fingerprint=fingerprint, hf_config=raw)
    return BaseDirectory(directory, architecture, identity, mtp)
