"""Filling a `GPTModel` from Hugging Face files: each rank reads only the slices that it keeps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from mcore_spec.bases.megatron_build import BaseGPTModel
from mcore_spec.config import BaseArchitecture
from mcore_spec.errors import CheckpointError, ConfigError
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.weights.families import TRANSFORMER_ENGINE_NAMES, Row, base_rows
from mcore_spec.weights.safetensors_io import WeightDirectory

# Buffers that old files carry and that are computed, not read.
_COMPUTED = "rotary_emb.inv_freq"
_COMPARED_ROWS = 4096


def import_hf(model: BaseGPTModel, source: WeightDirectory, *, cast: bool = False) -> None:
    """Fill this rank's weights.

    Args:
        model: built from the same configuration.
        source: the files.
        cast: allow a stored dtype that differs from the model's.

    Raises:
        CheckpointError: tensors missing, left over or of another shape.
        ConfigError: another dtype, without `cast`.
    """
    base = model.architecture
    tp = TensorParallel(group=model.pg_collection.tp)
    check_names(source, base)
    filled = set()
    with torch.no_grad():
        for row, name, parameter in local_rows(model, base):
            part = row.cut.read(source, row.stored, base, tp)
            if part.shape != parameter.shape:
                raise CheckpointError(
                    f"{source.directory}: {row.stored} give this rank {tuple(part.shape)}, the configuration "
                    f"asks for {tuple(parameter.shape)}; config.json and weights do not belong together"
                )
            if part.dtype != parameter.dtype and not cast:
                raise ConfigError(
                    f"{source.directory}: {row.stored[0]} is stored as {part.dtype}, config.json says "
                    f"{parameter.dtype}; correct config.json, or choose params_dtype to convert"
                )
            parameter.copy_(part)
            filled.add(name)
    missing = {name for name, _ in model.named_parameters()} - filled
    assert not missing, f"no row of the table fills {sorted(missing)}"


def check_names(source: WeightDirectory, base: BaseArchitecture) -> None:
    """Compare the files' names with the table's.

    Raises:
        CheckpointError: lists what is missing and what is left over.
    """
    expected = {name for row in base_rows(base) for name in row.stored}
    stored = {name for name in source.tensors if _COMPUTED not in name}
    if base.tie_word_embeddings and "lm_head.weight" in stored:
        _check_tied(source)
        stored.remove("lm_head.weight")
    missing, unknown = sorted(expected - stored), sorted(stored - expected)
    if missing or unknown:
        raise CheckpointError(
            f"{source.directory} does not fit its config.json ({base.family}, {base.num_layers} layers): "
            f"missing {_some(missing)}; not known {_some(unknown)}"
        )


def _check_tied(source: WeightDirectory) -> None:
    """A head that is stored although it is tied must be the embedding."""
    num_rows = source.tensors["lm_head.weight"].shape[0]
    for start in range(0, num_rows, _COMPARED_ROWS):
        blocks = [
            source.read(name, start=start, stop=min(start + _COMPARED_ROWS, num_rows))
            for name in ("lm_head.weight", "model.embed_tokens.weight")
        ]
        if not torch.equal(*blocks):
            raise CheckpointError(
                f"{source.directory}: tie_word_embeddings is true but lm_head.weight is not the embedding; "
                "set it to false in config.json"
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:6]) or "nothing"
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def local_rows(model: GPTModel, base: BaseArchitecture) -> Iterator[tuple[Row, str, Tensor]]:
    """Rows of the table whose tensor this rank's stage holds, with its local name and parameter.

    A tied head on a last stage of its own is the embedding's row once more.
    """
    parameters = dict(model.named_parameters())
    layers = model.decoder.layers
    first = layers[0].layer_number - 1
    for row in base_rows(base):
        name = _local_name(row.megatron, first, len(layers), parameters)
        if name is not None:
            yield row, name, parameters[name]
        is_embedding = row.megatron == "embedding.word_embeddings.weight"
        if is_embedding and base.tie_word_embeddings and not model.pre_process and model.post_process:
            yield row, "output_layer.weight", parameters["output_layer.weight"]


def _local_name(name: str, first_layer: int, num_layers: int, parameters: dict[str, nn.Parameter]) -> str | None:
    prefix = "decoder.layers."
    if name.startswith(prefix):
        layer, rest = name.removeprefix(prefix).split(".", 1)
        local = int(layer) - first_layer
        if not 0 <= local < num_layers:
            return None
        name = f"{prefix}{local}.{rest}"
        if name not in parameters:
            name = f"{prefix}{local}.{TRANSFORMER_ENGINE_NAMES.get(rest, rest)}"
    return name if name in parameters else None
