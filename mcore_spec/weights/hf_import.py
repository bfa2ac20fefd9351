"""Filling a `GPTModel` from Hugging Face files: each rank reads only the slices that it keeps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from mcore_spec.bases.megatron_build import DTYPES, BaseGPTModel
from mcore_spec.config import BaseArchitecture
from mcore_spec.errors import CheckpointError, ConfigError
from mcore_spec.parallel.tensor_parallel import TensorParallel
from mcore_spec.weights.families import STORED_LAYERS, TRANSFORMER_ENGINE_NAMES, Row, base_rows, stored_shapes
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
    check_tensors(source, base, cast=cast)
    filled = set()
    with torch.no_grad():
        for row, name, parameter in local_rows(model, base):
            part = row.cut.read(source, row.stored, base, tp)
            assert part.shape == parameter.shape, f"{name}: {tuple(part.shape)} for {tuple(parameter.shape)}"
            parameter.copy_(part)
            filled.add(name)
    missing = {name for name, _ in model.named_parameters()} - filled
    assert not missing, f"no row of the table fills {sorted(missing)}"


def check_tensors(source: WeightDirectory, base: BaseArchitecture, *, cast: bool = False) -> None:
    """Compare the files' names, shapes and dtypes with the table's; reads headers only.

    A rank that reads its slice of too large a tensor would not notice the rest, and one that refused alone would
    leave the others waiting.

    Raises:
        CheckpointError: lists what is missing, what is left over, and what has another shape.
        ConfigError: another dtype, without `cast`.
    """
    expected = {
        name: shape for row in base_rows(base) for name, shape in zip(row.stored, stored_shapes(row, base), strict=True)
    }
    stored = {name for name in source.tensors if _COMPUTED not in name}
    if not base.has_layers:
        stored = {name for name in stored if not name.startswith(STORED_LAYERS)}
    if base.tie_word_embeddings and "lm_head.weight" in stored:
        _check_tied(source)
        stored.remove("lm_head.weight")
    missing, unknown = sorted(expected.keys() - stored), sorted(stored - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{source.directory} does not fit its config.json ({base.family}, {base.num_layers} layers): "
            f"missing {_some(missing)}; not known {_some(unknown)}"
        )
    shapes = {name: source.tensors[name].shape for name in expected}
    wrong = [f"{name} {shapes[name]}, not {shape}" for name, shape in expected.items() if shapes[name] != shape]
    if wrong:
        raise CheckpointError(
            f"{source.directory}: config.json and weights do not belong together, by their shapes: {_some(wrong)}"
        )
    dtype = DTYPES[base.dtype]
    other = [name for name in expected if source.tensors[name].dtype != dtype]
    if other and not cast:
        raise ConfigError(
            f"{source.directory}: {other[0]} is stored as {source.tensors[other[0]].dtype}, config.json says {dtype}; "
            "correct config.json, or choose params_dtype to convert"
        )


def _check_tied(source: WeightDirectory) -> None:
    """A head that is stored although it is tied must be the embedding."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    shapes = {source.tensors[name].shape for name in names if name in source.tensors}
    num_rows = source.tensors[names[0]].shape[0]
    for start in range(0, num_rows, _COMPARED_ROWS):
        stop = min(start + _COMPARED_ROWS, num_rows)
        if len(shapes) > 1 or not torch.equal(*(source.read(name, start=start, stop=stop) for name in names)):
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
    first = layers[0].layer_number - 1 if base.has_layers else 0
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
