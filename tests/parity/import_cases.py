"""What the ranks of the pool run to import and export a base, and the memory that it takes."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_spec.bases import packed_attention
from mcore_spec.bases.features import Features
from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import BaseGPTModel, build_gpt_model
from mcore_spec.checkpoint.record import CheckpointRecord
from mcore_spec.config import BaseArchitecture, BaseIdentity
from mcore_spec.errors import McoreSpecError
from mcore_spec.export.base import export_base_and_draft
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.weights import hf_export
from mcore_spec.weights.hf_config import describe_hf, read_hf_config
from mcore_spec.weights.hf_import import import_hf
from mcore_spec.weights.safetensors_io import WeightDirectory


class Differences(NamedTuple):
    """Largest absolute difference from transformers, of the logits and of each layer's output."""

    logits: float
    hidden_states: list[float]


def describe(directory: Path) -> BaseArchitecture:
    """The description of a Hugging Face directory."""
    return describe_hf(read_hf_config(directory), where=str(directory / "config.json"))


def load(directory: Path, layout: Layout, *, cast_to: str | None = None) -> BaseGPTModel:
    """This rank's part of the base in `directory`."""
    architecture = describe(directory)
    if cast_to is not None:
        architecture = architecture.model_copy(update={"dtype": cast_to})
    model = build_gpt_model(architecture, layout)
    with WeightDirectory(directory) as weights:
        import_hf(model, weights, cast=cast_to is not None)
    MegatronBase(model).freeze()
    return model


# --- parity -------------------------------------------------------------------------------------------


def compare_with_transformers(
    layout: Layout, directories: dict[str, Path], runs: dict[str, list[Any]], window_block: int | None = None
) -> dict[str, list[Differences]] | None:
    """Import each directory and repeat its runs.

    Args:
        layout: of the base.
        directories: case -> where its model is saved.
        runs: case -> (token ids, logits, hidden states) of transformers, several times.
        window_block: query rows that windowed attention takes at once; ``None``: its own choice.

    Returns:
        Case -> one entry a run; ``None`` on ranks without the head.
    """
    block = packed_attention.WINDOW_BLOCK if window_block is None else window_block
    differences = {}
    with parallel_runtime(layout), mock.patch.object(packed_attention, "WINDOW_BLOCK", block):
        for case, directory in directories.items():
            base = MegatronBase(load(directory, layout))
            differences[case] = [_differences(base, *run) for run in runs[case]]
        return differences if base.is_last_stage else None


def _differences(
    base: MegatronBase, token_ids: Tensor, logits: Tensor, hidden_states: Sequence[Tensor]
) -> Differences | None:
    features = base.features(token_ids, aux_layer_ids=range(len(hidden_states) - 1))
    if features is None:
        return None
    ours = _outputs(base, features)
    assert len(ours) == len(hidden_states)
    hidden = [_largest(own, theirs) for own, theirs in zip(ours, hidden_states, strict=True)]
    return Differences(_largest(_logits(base, features), logits), hidden)


def _outputs(base: MegatronBase, features: Features) -> list[Tensor]:
    """Whole outputs of every layer, [b, s, h]; the last one after the final norm."""
    assert features.aux is not None
    layers = [*features.aux.split(base.architecture.hidden_size, dim=-1), features.last]
    if base.tp.sequence_parallel:
        layers = [torch.cat(_gathered(base, layer), dim=0) for layer in layers]
    return [layer.transpose(0, 1) for layer in layers]


def _logits(base: MegatronBase, features: Features) -> Tensor:
    """Whole logits [b, s, v]: the ranks' columns side by side, the padding dropped."""
    whole = torch.cat(_gathered(base, base.logits(features.last)), dim=-1)
    assert whole.shape[-1] == base.tp.padded(base.architecture.vocab_size)
    return whole[..., : base.architecture.vocab_size].transpose(0, 1)


def _gathered(base: MegatronBase, part: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(base.tp.size)]
    dist.all_gather(parts, part.contiguous(), group=base.tp.group)
    return parts


def _largest(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (ours.shape, theirs.shape, ours.dtype)
    return float((ours - theirs).abs().max())


def compare_logits(layout: Layout, directory: Path, token_ids: Tensor, logits: Tensor) -> float:
    """Import real weights as float32; largest difference of the logits (one pipeline stage)."""
    with parallel_runtime(layout):
        base = MegatronBase(load(directory, layout, cast_to="float32"))
        features = base.features(token_ids)
        assert features is not None
        return _largest(_logits(base, features), logits)


# --- and back -----------------------------------------------------------------------------------------


def export_bases(
    layout: Layout,
    directories: dict[str, Path],
    output: Path,
    max_file_bytes: int | None = None,
    as_megatron: bool = False,
) -> dict[str, BaseArchitecture]:
    """Import each directory and export it again, to `output`/case.

    Args:
        layout: of the base.
        directories: case -> Hugging Face directory; its tokenizer's files stand below ``tokenizer``.
        output: where to write.
        max_file_bytes: size at which a new file begins.
        as_megatron: forget the family and config.json, as if the base came from Megatron-LM.

    Returns:
        Case -> what was exported.
    """
    exported = {}
    size = hf_export.MAX_FILE_BYTES if max_file_bytes is None else max_file_bytes
    with parallel_runtime(layout), mock.patch.object(hf_export, "MAX_FILE_BYTES", size):
        for case, directory in directories.items():
            model = load(directory, layout)
            raw = read_hf_config(directory)
            if as_megatron:
                model.architecture = model.architecture.model_copy(update={"family": "megatron"})
                raw = {}
            identity = BaseIdentity(source=str(directory), fingerprint="", hf_config=raw)
            record = CheckpointRecord(base=model.architecture, identity=identity, conversion=None, packages={})
            export_base_and_draft(model, record, output / case, tokenizer_path=directory / "tokenizer")
            exported[case] = model.architecture
    return exported


# --- what is read -------------------------------------------------------------------------------------


class CountingDirectory(WeightDirectory):
    """Counts how often each tensor is asked for, and how many bytes of it."""

    def __init__(self, directory: Path) -> None:
        self.num_bytes: Counter[str] = Counter()
        self.num_reads: Counter[str] = Counter()
        super().__init__(directory)

    def read(self, name: str, **part: Any) -> Tensor:
        tensor = super().read(name, **part)
        self.num_bytes[name] += tensor.numel() * tensor.element_size()
        self.num_reads[name] += 1
        return tensor


def count_reads(layout: Layout, directories: dict[str, Path]) -> dict[str, tuple[Counter[str], Counter[str]]]:
    """Case -> bytes and number of reads by tensor, on this rank."""
    counts = {}
    with parallel_runtime(layout):
        for case, directory in directories.items():
            model = build_gpt_model(describe(directory), layout)
            with CountingDirectory(directory) as weights:
                import_hf(model, weights)
            counts[case] = (weights.num_bytes, weights.num_reads)
    return counts


def anonymous_bytes() -> int:
    """Memory of this process that is its own: not the pages of mapped files, which the kernel can drop."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


@contextmanager
def sampled_peak(interval_s: float = 0.001) -> Iterator[list[int]]:
    """The largest `anonymous_bytes` that a thread saw during the block, as the one entry of the list."""
    peak, done = [anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(interval_s):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], anonymous_bytes())


def import_memory(directory: Path) -> tuple[int, int]:
    """Bytes of the model, and how much this process grew at most while it built and filled it."""
    with parallel_runtime(Layout()):
        before = anonymous_bytes()
        with sampled_peak() as peak:
            model = load(directory, Layout())
        return sum(p.numel() * p.element_size() for p in model.parameters()), peak[0] - before


# --- refusals -----------------------------------------------------------------------------------------


def refusal(directory: Path, cast_to: str | None = None) -> tuple[str, str] | None:
    """Class and message of the error that importing `directory` raises; ``None`` if it does not."""
    with parallel_runtime(Layout()):
        try:
            load(directory, Layout(), cast_to=cast_to)
        except McoreSpecError as error:
            return type(error).__name__, str(error)
    return None


if __name__ == "__main__":
    # In a process of its own: what another test allocated and gave back would hide growth.
    torch.set_num_threads(1)
    print(*import_memory(Path(sys.argv[1])))
