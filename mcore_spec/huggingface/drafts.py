"""`mcore_spec.save`, `restore` and `export_speculative_decoding`: a draft by itself, from and to a model of either
library.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.checkpoint import store
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.checkpoint.store import Checkpoint
from mcore_spec.config.quantization import QuantFormat
from mcore_spec.conversion import as_base, conversion_of
from mcore_spec.errors import CheckpointError, ConfigError, UnsupportedError
from mcore_spec.export.draft import PlannedDraft, export_draft, write_planned
from mcore_spec.export.modules import plan_modules
from mcore_spec.export.plan import ExportFormat
from mcore_spec.export.reader import Exported, attach_read, read_exported
from mcore_spec.huggingface.record import describe_drafted, fingerprints, trains_base, write_bare_base


def save(
    model: nn.Module, directory: Path | str, *, record: CheckpointRecord | None = None, overwrite: bool = True
) -> None:
    """Write the draft of `model` and how it was attached; the base is not written. All ranks take part.

    Args:
        model: with a draft; a transformers model, or this rank's part of a `GPTModel`.
        directory: where to write; what `save` or an export wrote there before is replaced once all is written.
        record: of a `GPTModel` (`make_record`).
        overwrite: whether it may be.

    Raises:
        ConfigError: no draft, a sharded model, or a directory that is in the way.
        UnsupportedError: a quantised model.
    """
    described = describe_drafted(model, record)
    draft = as_base(model).draft()
    if described.quantization is not None:
        raise UnsupportedError(
            f"the model is quantised ({described.quantization.recipe.name}), which this form does not say; save a "
            "checkpoint (save_checkpoint), or export it for engines (export_speculative_decoding)"
        )
    planned = None if draft is None else PlannedDraft(plan_modules(draft, described))
    write_planned(model, described, planned, directory, overwrite=overwrite)


def restore(model: nn.Module, source: Checkpoint | Path | str, *, allow_other_base: bool = False) -> None:
    """Attach a draft to its bare base as it was attached before, and load it; in place. All ranks take part.

    Args:
        model: the base; a transformers model, or this rank's part of a `GPTModel`.
        source: a directory that `save`, an export or ``save_pretrained`` wrote, from either library; for a `GPTModel`
            also a `Checkpoint`, with which base and draft are loaded.
        allow_other_base: take a base of equal sizes that is of another family or has other weights, such as a
            fine-tuned one. Weights are compared on a transformers model of the dtype that the draft was made on;
            otherwise they cannot be told apart.

    Raises:
        CheckpointError: no draft there, one of another base, or of a quantised model, or damaged files.
        ConfigError: the model has a draft already, or is quantised.
    """
    base = as_base(model)
    if not isinstance(source, Checkpoint):
        if not Path(source).is_dir():
            raise CheckpointError(f"{source} is no directory; give one that mcore_spec.save or an export wrote")
        exported = read_exported(Path(source), base.architecture)
        quantization = exported.record.quantization
        if exported.below and quantization is not None:
            raise CheckpointError(
                f"{source} holds a quantised model ({quantization.recipe.name}), whose draft has scales; load it "
                "whole: from_pretrained behind mcore_spec.enable_huggingface_checkpointing()"
            )
        if not allow_other_base:
            _check_same_base(base, exported)
        attach_read(model, exported)
        return
    if not isinstance(base, MegatronBase):
        raise ConfigError(
            f"a {type(model).__name__} takes no Megatron-core checkpoint ({source.path}); give the directory that "
            "mcore_spec.save or export wrote of it"
        )
    if allow_other_base:
        raise ConfigError(
            f"allow_other_base = True with a checkpoint ({source.path}), which holds its base; leave it out"
        )
    store.restore(base.model, source)


def _check_same_base(base: MegatronBase | TransformersBase, exported: Exported) -> None:
    """Refuse a base of another family or with other weights, as far as that can be told.

    Raises:
        CheckpointError: it is another one.
    """
    record, actual = exported.record, base.architecture
    identity = record.identity
    what = None
    # A model of Megatron-core's that somebody else built does not say its family.
    if actual.family != record.base.family and "megatron" not in (actual.family, record.base.family):
        what = f"family = {record.base.family} ({identity.source}), this one has {actual.family}"
    elif isinstance(base, TransformersBase) and identity.fingerprint:
        # The files may have another dtype than the model that the draft was made on, and this model a third.
        stored = identity.hf_config.get("dtype") or identity.hf_config.get("torch_dtype")
        found = fingerprints(base) if {stored, record.base.dtype} == {actual.dtype} else []
        if found and identity.fingerprint not in found:
            what = f"other weights ({identity.source})"
    if what is not None:
        raise CheckpointError(
            f"draft = {exported.directory} was made for a base with {what}; give the base that the draft belongs to, "
            "or allow_other_base = True for one that is close to it, such as a fine-tuned one"
        )


def export_speculative_decoding(
    model: nn.Module,
    *,
    export_dir: Path | str,
    record: CheckpointRecord | None = None,
    export_format: ExportFormat = "hf",
    overwrite: bool = False,
    quant_format: QuantFormat | None = None,
) -> None:
    """Write the draft of `model` as a directory for inference engines; all ranks take part.

    The base of a transformers model that is trained with its draft is written too, into ``base/`` below, without a
    tokenizer; that of a `GPTModel` ``mcore-spec export`` writes.

    Args:
        model: with a draft; a transformers model, or this rank's part of a `GPTModel`.
        export_dir: where to write.
        record: of a `GPTModel` (`make_record`).
        export_format: engines' Hugging Face form, or `speculators`'.
        overwrite: replace an earlier export.
        quant_format: whose form the scales of a quantised draft have; ``None``: ModelOpt's.

    Raises:
        ConfigError: no draft, a sharded model, or a directory that is in the way.
        UnsupportedError: a draft that would not serve.
    """
    described, base, conversion = describe_drafted(model, record), as_base(model), conversion_of(model)
    write_base = None
    if not isinstance(base, MegatronBase) and conversion is not None and trains_base(conversion):
        write_base = partial(write_bare_base, base)
    export_draft(
        model,
        described,
        export_dir,
        export_format=export_format,
        overwrite=overwrite,
        quant_format=quant_format,
        write_base=write_base,
    )
