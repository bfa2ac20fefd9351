"""A plan in lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mcore_spec.planning.activations import TrainingSetup
from mcore_spec.planning.hardware import GIB, RESERVED_GIB, RESERVED_SHARE, Gpu, usable_bytes
from mcore_spec.planning.layout import PlannedLayout
from mcore_spec.planning.memory import RankMemory, stage_memories
from mcore_spec.planning.search import Candidate, Search
from mcore_spec.planning.states import STORAGE_DTYPES, StatesSize
from mcore_spec.planning.weights import base_parameters, draft_sizes, draft_tensors, given
from mcore_spec.planning.work import count_work, estimate_speed

_LABELS = {"eagle1": "EAGLE-1", "eagle3": "EAGLE-3", "eagle-mtp": "EAGLE-MTP"}


class Machine(NamedTuple):
    """What the run is planned for.

    Attributes:
        name: of the GPU.
        gpu: what it holds and does.
        utilization: share of its arithmetic that is assumed.
    """

    name: str
    gpu: Gpu
    utilization: float


def describe_model(setup: TrainingSetup) -> list[str]:
    """Base and draft, whole."""
    shape, draft = setup.shape, setup.architecture
    base = shape.architecture
    lines = [
        f"base: {shape.name}, {base.num_layers} layers, hidden {base.hidden_size:,}, vocabulary {base.vocab_size:,}; "
        f"{base_parameters(shape):,} parameters, frozen"
    ]
    if shape.experts is not None:
        lines.append(
            f"  {shape.experts.num} experts a layer, {shape.experts.active} for each token, cut over tensor-parallel "
            "ranks. Weights of bases with experts cannot be imported yet: this plan is for a GPTModel of your own."
        )
    sizes = draft_sizes(setup.draft, shape, PlannedLayout())
    trained = sum(draft_tensors(sizes, draft, tensor=1))
    layers = ", ".join(map(str, draft.eagle_aux_hidden_state_layer_ids))
    reads = f"aux layers {layers}" if layers else "reads the last hidden state"
    lines.append(
        f"draft: {_LABELS[sizes.member]}, {draft.num_hidden_layers} layer(s), {trained:,} parameters, trained over "
        f"{setup.num_steps} steps; {reads}; draft vocabulary {given(draft.draft_vocab_size):,}"
    )
    return lines


def describe_states(setup: TrainingSetup, *, num_tokens: int | None) -> list[str]:
    """What a store of the base's hidden states takes on disk, in each of its dtypes."""
    num_aux = len(setup.architecture.eagle_aux_hidden_state_layer_ids)
    parts = []
    for name, dtype in STORAGE_DTYPES.items():
        num_bytes = StatesSize(setup.shape.architecture.hidden_size, num_aux, dtype).bytes_per_token
        total = "" if num_tokens is None else f" ({num_bytes * num_tokens / GIB:,.1f} GiB)"
        parts.append(f"{name} {num_bytes:,}{total}")
    tokens = "" if num_tokens is None else f", and for {num_tokens:,} tokens"
    return ["", f"stored hidden states (extract), bytes a token{tokens}: {', '.join(parts)}"]


def describe_layout(layout: PlannedLayout, *, num_layers: int) -> str:
    """``TP 8 (sequence parallel) x PP 4 x CP 2 x DP 1 = 64 GPUs; 20, 20, 20, 20 layers``."""
    parallel = " (sequence parallel)" if layout.sequence_parallel else ""
    gpus = "GPU" if layout.num_gpus == 1 else "GPUs"
    text = (
        f"TP {layout.tensor}{parallel} x PP {layout.pipeline} x CP {layout.context} x DP {layout.data} = "
        f"{layout.num_gpus} {gpus}"
    )
    if layout.pipeline == 1:
        return text
    stages = layout.layers_of_stages(num_layers)
    if len(set(stages[:-1])) == 1 and len(stages) > 4:
        return f"{text}; {stages[0]} layers a stage, {stages[-1]} on the last"
    return f"{text}; stages of {', '.join(map(str, stages))} layers"


def describe_memory(setup: TrainingSetup, machine: Machine | None) -> list[str]:
    """A table: parts of a rank by stage, then the phases of a step, of which the largest counts."""
    memories = stage_memories(setup)
    names = {stage: _stage_name(stage, setup.layout.pipeline) for stage in memories}
    lines = ["", _row("GiB on each rank of", [names[stage] for stage in memories])]
    parts = dict.fromkeys(part for memory in memories.values() for part in memory.fixed)
    lines += [_row(f"  {part}", [_gib(memory.fixed.get(part)) for memory in memories.values()]) for part in parts]
    lines.append(_row("always", [_gib(memory.fixed_bytes) for memory in memories.values()]))
    for phase in dict.fromkeys(phase for memory in memories.values() for phase in memory.phases):
        lines += _phase(phase, list(memories.values()))
    lines.append(_row("peak: always + the largest of these", [_gib(memory.peak_bytes) for memory in memories.values()]))
    if machine is not None:
        lines.append(_verdict(max(memory.peak_bytes for memory in memories.values()), machine))
    return lines


def _stage_name(stage: int, num_stages: int) -> str:
    if num_stages == 1:
        return "the model"
    return "the last stage" if stage == num_stages - 1 else f"stage {stage + 1}"


def _phase(phase: str, memories: Sequence[RankMemory]) -> list[str]:
    found = [memory.phases.get(phase) for memory in memories]
    totals = [None if parts is None else sum(parts.values()) for parts in found]
    lines = [_row(phase, [_gib(total) for total in totals])]
    for part in dict.fromkeys(part for parts in found if parts for part in parts):
        lines.append(_row(f"  {part}", [_gib((parts or {}).get(part)) for parts in found]))
    return lines


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:<38}" + "".join(f"{cell:>16}" for cell in cells)


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIB:.2f}"


def _verdict(peak: int, machine: Machine) -> str:
    usable = usable_bytes(machine.gpu)
    state = (
        f"fits, {1 - peak / usable:.0%} to spare"
        if peak <= usable
        else f"does NOT fit: {_gib(peak - usable)} GiB too much"
    )
    return (
        f"{machine.name}: {_gib(usable)} of {machine.gpu.memory_gib} GiB can be used ({RESERVED_GIB:g} GiB and "
        f"{RESERVED_SHARE:.0%} are left to CUDA, NCCL and gaps): {state}"
    )


def describe_work(setup: TrainingSetup, machine: Machine | None, *, global_batch_size: int) -> list[str]:
    """Operations of a token and a step, and the speed that follows from the assumed utilization."""
    work, layout = count_work(setup), setup.layout
    num_micro_batches = global_batch_size // (setup.micro_batch_size * layout.data)
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value / work.total:.0%}" for name, value in work._asdict().items() if value
    )
    tokens = global_batch_size * setup.seq_length
    lines = [
        "",
        f"work: {work.total / setup.all_rows / 1e9:,.1f} GFLOP a token ({parts}); "
        f"{work.total / setup.all_rows * tokens / 1e12:,.0f} TFLOP a step of {tokens:,} tokens",
    ]
    if machine is not None:
        rate = machine.gpu.dense_tflops * 1e12 * machine.utilization
        speed = estimate_speed(setup, num_micro_batches=num_micro_batches, flops_per_second=rate)
        wait = "" if layout.pipeline == 1 else f"; stage {speed.busiest_stage + 1} sets the pace"
        lines.append(
            f"estimate, not a measurement: about {speed.tokens_per_second:,.0f} tokens/s, {speed.step_seconds:.2f} s a "
            f"step, if each GPU reached {machine.utilization:.0%} of {machine.gpu.dense_tflops:,.0f} TFLOP/s{wait}"
        )
    return lines


def describe_search(search: Search) -> list[str]:
    """Why smaller layouts do not fit, and which one does."""
    lines = [""]
    for candidate in search.rejected:
        lines.append(f"does not fit: {_describe_candidate(candidate)}")
    if search.found is None:
        lines.append(
            "nothing that was tried fits; shorten --seq-length, lower --micro-batch-size, or give "
            "--recompute-granularity draft"
        )
    else:
        lines.append(f"smallest that fits: {_describe_candidate(search.found)}")
    return lines


def _describe_candidate(candidate: Candidate) -> str:
    setup, worst = candidate.setup, candidate.worst
    layout = describe_layout(setup.layout, num_layers=setup.shape.architecture.num_layers)
    part = worst.largest_part
    size = {**worst.fixed, **worst.phases[worst.peak_phase]}[part]
    return (
        f"{layout}: {_gib(worst.peak_bytes)} GiB on {_stage_name(candidate.stage, setup.layout.pipeline)}, most of it "
        f"{part} ({_gib(size)})"
    )
