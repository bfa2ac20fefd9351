"""``save_pretrained`` and ``from_pretrained`` of models with drafts, and of quantised ones.

``save_pretrained`` needs nothing: draft and scales are children of the model, and the configuration says how they came
there. ``from_pretrained`` builds the model that the configuration names, which has neither; once
`enable_huggingface_checkpointing` was called, it then attaches the recorded draft, quantises by the recorded recipe,
and reads both from the same files. No code is taken from the directory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from mcore_spec.config import ALGORITHMS
from mcore_spec.config.quantization import QuantizationRecord
from mcore_spec.conversion import conversion_of, find_algorithm
from mcore_spec.errors import CheckpointError, ConfigError
from mcore_spec.export.modules import conversion_in, quantization_in
from mcore_spec.export.reader import attach_exported
from mcore_spec.hosting.key import QUANTIZATION_KEY
from mcore_spec.quantization.installed import CHILD, install, quantization_of
from mcore_spec.weights.hf_config import locate
from mcore_spec.weights.safetensors_io import WeightDirectory

# Options of from_pretrained that say which files are meant.
_REVISION, _SUBFOLDER, _VARIANT = "revision", "subfolder", "variant"
# Where a class of transformers lists tensors that it does not report.
_IGNORED = "_keys_to_ignore_on_load_unexpected"


def enable_huggingface_checkpointing() -> None:
    """Let ``from_pretrained`` restore drafts, of every class of transformers, until the process ends.

    It may be called again. A directory without a draft is read as before.
    """
    current: Any = PreTrainedModel.__dict__["from_pretrained"]
    if isinstance(current, _RestoringDrafts):
        return
    PreTrainedModel.from_pretrained = _RestoringDrafts(current)  # type: ignore[method-assign, assignment]


def load_model(directory: Path | str, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A causal language model, with its draft where it was saved with one.

    Args:
        directory: Hugging Face's files.
        dtype: of the weights; "auto": as stored.

    Raises:
        CheckpointError: files that transformers cannot load, or a draft that is not as recorded.
    """
    enable_huggingface_checkpointing()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{directory}: transformers cannot load it ({reason}); give a model that is whole"
        ) from error
    return model


class _RestoringDrafts:
    """``PreTrainedModel.from_pretrained``, and after it the draft."""

    def __init__(self, original: Any) -> None:
        """Take the place of the class method `original`."""
        self.original = original

    def __get__(self, _instance: object, owner: type[PreTrainedModel]) -> Any:
        """Bound to the class that is loaded."""
        load = self.original.__get__(None, owner)

        @functools.wraps(load)
        def from_pretrained(name: Any, *args: Any, **options: Any) -> Any:
            with _ignoring_drafts(owner):
                loaded = load(name, *args, **options)
            model = loaded[0] if options.get("output_loading_info") else loaded
            quantization = _take_quantization(model, name)
            _restore_draft(model, name, options)
            if quantization is not None:
                _restore_quantization(model, quantization, name, options)
            return loaded

        return from_pretrained


@contextmanager
def _ignoring_drafts(owner: type[PreTrainedModel]) -> Iterator[None]:
    """A draft's tensors, and scales, are none that transformers would report as unexpected."""
    own = {name: value for name, value in vars(owner).items() if name == _IGNORED}
    children = [*(find_algorithm(name).child_name for name in ALGORITHMS), CHILD]
    patterns = [rf"^{name}\." for name in children]
    owner._keys_to_ignore_on_load_unexpected = [*(owner._keys_to_ignore_on_load_unexpected or []), *patterns]
    try:
        yield
    finally:
        delattr(owner, _IGNORED)
        for name, value in own.items():
            setattr(owner, name, value)


def _restore_draft(model: PreTrainedModel, name: Any, options: dict[str, Any]) -> None:
    """Attach and fill the draft that the model's configuration records, if it does.

    Raises:
        CheckpointError: its tensors are not in the files, or not as the record says.
    """
    is_drafted = conversion_in(vars(model.config), where=str(name)) is not None
    # A model without a head (AutoModel) is a part of one that carries the draft.
    if is_drafted and conversion_of(model) is None and model.get_output_embeddings() is not None:
        attach_exported(model, _directory(name, options))


def _take_quantization(model: PreTrainedModel, name: Any) -> QuantizationRecord | None:
    """What the configuration records, out of it until it is true: the draft is attached before.

    ``None``: nothing, or it is done already, or the model has no head, and is a part of one that is quantised.

    Raises:
        CheckpointError: a record of another version.
        ConfigError: a damaged one.
    """
    if quantization_of(model) is not None or model.get_output_embeddings() is None:
        return None
    record = quantization_in(vars(model.config), where=str(name))
    vars(model.config).pop(QUANTIZATION_KEY, None)
    return record


def _restore_quantization(
    model: PreTrainedModel, record: QuantizationRecord, name: Any, options: dict[str, Any]
) -> None:
    """Quantise by a record of the model's configuration, with the scales in the files.

    Raises:
        CheckpointError: scales that are not in the files.
    """
    quantization = install(model, record)
    with WeightDirectory(_directory(name, options), below=f"{CHILD}.") as files:
        wanted = quantization.state_dict()
        if files.tensors.keys() != wanted.keys():
            odd = sorted(files.tensors.keys() ^ wanted.keys())
            raise CheckpointError(
                f"{name}: scales of its recipe {quantization.record.recipe.name} are missing or too many, such as "
                f"{odd[0]}; save the model again"
            )
        quantization.load_state_dict({scale: files.read(scale) for scale in wanted})


def _directory(name: Any, options: dict[str, Any]) -> Path:
    """Where the files are."""
    if options.get(_VARIANT) is not None:
        raise ConfigError(
            f"variant = {options[_VARIANT]!r} of {name}: drafts and scales are read from files without a variant; save "
            "it without one"
        )
    if not Path(name).is_dir() and options.get(_REVISION) not in (None, "main"):
        raise ConfigError(
            f"revision = {options[_REVISION]!r} of {name}: drafts are read from the main revision of a hub repository; "
            "download that revision, and give its directory"
        )
    return locate(str(name)) / options.get(_SUBFOLDER, "")
