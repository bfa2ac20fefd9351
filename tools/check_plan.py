"""Compare what `mcore-spec plan` reckons with what an allocator saw: a few steps of training on the host.

    python -m tools.check_plan [CASE ...]        # all cases: about 3 minutes on one core

Each case runs in processes of its own. Weights, gradients and optimizer are counted from the tensors themselves; the
phases of a step from every allocation and release that torch's profiler records. Prints a table a case; exit code 1
where the peak, or what stays, is off by more than `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mcore_spec.bases.megatron import MegatronBase
from mcore_spec.bases.megatron_build import build_gpt_model
from mcore_spec.config import (
    BaseArchitecture,
    EagleAlgorithm,
    EagleConfig,
    RopeConfig,
    TrainingConfig,
    eagle_preset,
)
from mcore_spec.conversion import convert
from mcore_spec.data.batch import Batch, make_batch
from mcore_spec.data.document import Document
from mcore_spec.drafts.resolve import resolve_eagle
from mcore_spec.objectives import stepwise as objective_module
from mcore_spec.parallel.layout import Layout, parallel_runtime
from mcore_spec.planning.activations import TrainingSetup
from mcore_spec.planning.layout import PlannedLayout
from mcore_spec.planning.memory import OPTIMIZER_STEP, RankMemory, rank_memory
from mcore_spec.planning.shapes import ModelShape
from mcore_spec.training.optimizer import DraftOptimizer
from mcore_spec.training.step import DraftStep

TOLERANCE = 0.10
MIB = 2**20
PREFIX = "phase: "
MEMORY_EVENT = "[memory]"
MASK_GAP = 50  # every so many tokens one is not learnt, so that the rows of a block have gaps


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting of a run.

    Attributes:
        steps: TTT steps.
        vocabulary: entries of the draft vocabulary; ``None``: the base's.
        recompute: the draft's activations twice.
        bf16: with float32 main weights.
        tensor: ranks that share each layer.
        sequence_parallel: between the parallel regions too.
        context: ranks that share the rows.
        pipeline: stages.
        documents: that the tokens are cut into.
        layers: of the draft.
        tokens: of a micro-batch.
        member: of the EAGLE family.
    """

    steps: int = 3
    vocabulary: int | None = None
    recompute: bool = False
    bf16: bool = False
    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    pipeline: int = 1
    documents: int = 1
    layers: int = 1
    tokens: int = 2048
    member: EagleAlgorithm = "eagle3"

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.tensor * self.context * self.pipeline


CASES = {
    "k1": Case(steps=1),
    "k3": Case(),
    "k7": Case(steps=7),
    "k3-recompute": Case(recompute=True),
    "k7-recompute": Case(steps=7, recompute=True),
    "k3-v8192": Case(vocabulary=8192),
    "k3-bf16": Case(bf16=True),
    "k7-bf16-v8192": Case(steps=7, bf16=True, vocabulary=8192),
    "k3-bf16-recompute": Case(bf16=True, recompute=True),
    "k3-packed": Case(documents=4),
    "k3-layers2": Case(layers=2),
    "k3-few-tokens": Case(tokens=256, vocabulary=8192),
    "k3-tp2": Case(tensor=2),
    "k3-tp2-sp-v8192": Case(tensor=2, sequence_parallel=True, vocabulary=8192),
    "k3-cp2": Case(context=2, documents=2),
    "k3-pp2": Case(pipeline=2),
    "eagle1": Case(member="eagle1"),
    "eagle1-k1-tp2": Case(member="eagle1", steps=1, tensor=2),
    "eagle1-layers2-recompute": Case(member="eagle1", layers=2, recompute=True),
    "mtp": Case(member="eagle-mtp"),
    "mtp-bf16": Case(member="eagle-mtp", bf16=True),
    "mtp-tp2-sp": Case(member="eagle-mtp", tensor=2, sequence_parallel=True),
    # What the tests run.
    "ci": Case(tokens=1024, vocabulary=8192),
    "ci-mtp": Case(tokens=512, member="eagle-mtp"),
}
# A base whose weights are small beside its activations.
BASE = BaseArchitecture(
    family="llama",
    num_layers=6,
    hidden_size=512,
    intermediate_size=1408,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=32000,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope=RopeConfig(theta=10000.0),
)


# --- the plan -------------------------------------------------------------------------------------


def setup_of(case: Case) -> TrainingSetup:
    """The case as a plan takes it, on the host."""
    base = BASE.model_copy(update={"dtype": "bfloat16" if case.bf16 else "float32"})
    return TrainingSetup(
        shape=ModelShape("check", base),
        draft=resolve_eagle(draft_config(case), base),
        layout=PlannedLayout(
            tensor=case.tensor,
            pipeline=case.pipeline,
            context=case.context,
            sequence_parallel=case.sequence_parallel,
        ),
        seq_length=case.tokens,
        packed=case.documents > 1,
        bf16=case.bf16,
        use_distributed_optimizer=False,
        recompute=case.recompute,
        on_cuda=False,
    )


def draft_config(case: Case) -> EagleConfig:
    """The draft of a case."""
    flags = eagle_preset(case.member)["config"]["eagle_architecture_config"]
    architecture: dict[str, Any] = {**flags, "num_hidden_layers": case.layers}
    if case.vocabulary is not None:
        architecture["draft_vocab_size"] = case.vocabulary
    return EagleConfig.parse({"eagle_ttt_steps": case.steps, "eagle_architecture_config": architecture})


# --- the measurement, in a process of its own for each rank -----------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """Bytes of this rank: ``{"stage", "fixed": {part: bytes}, "phases": {phase: bytes}}``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layout = Layout(
        tensor=case.tensor, pipeline=case.pipeline, context=case.context, sequence_parallel=case.sequence_parallel
    )
    with parallel_runtime(layout):
        setup = setup_of(case)
        model = build_gpt_model(setup.shape.architecture, layout)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        d2t = None if case.vocabulary is None else torch.arange(case.vocabulary) * 2
        convert(model, [("eagle", draft_config(case))], d2t=d2t)
        step = DraftStep(model, recompute=case.recompute)
        config = TrainingConfig(
            data_path=("none",), train_iters=10, bf16=case.bf16, use_distributed_optimizer=False, clip_grad=0.5
        )
        optimizer = DraftOptimizer(model, config, num_iterations=10)
        batch = make_rows(case, step)
        train_step(step, optimizer, batch)  # makes Adam's moments
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, marked_phases():
            train_step(step, optimizer, batch)
        base = MegatronBase(model)
        return {
            "stage": base.stage,
            "fixed": count_fixed(base, step, optimizer),
            "phases": phase_peaks(profiler.profiler.kineto_results.events()),
        }


def make_rows(case: Case, step: DraftStep) -> Batch:
    """Random tokens."""
    length = case.tokens // case.documents
    mask = np.arange(length) % MASK_GAP != 0
    rng = np.random.default_rng(0)
    documents = [Document(rng.integers(0, BASE.vocab_size, length), mask) for _ in range(case.documents)]
    return make_batch(
        documents,
        num_steps=case.steps,
        document_multiple=step.document_multiple,
        row_multiple=step.row_multiple,
        num_samples=1,
    )


def train_step(step: DraftStep, optimizer: DraftOptimizer, batch: Batch) -> None:
    """What `Trainer.train_step` does with one micro-batch."""
    optimizer.zero_grad()
    output = step(batch)
    num_rows = 1
    if output is not None:
        num_rows = int(output.rows_by_step[0])
        loss = output.loss
        del output
        with record_function(f"{PREFIX}backward"):
            loss.backward()
    with record_function(f"{PREFIX}{OPTIMIZER_STEP}"):
        optimizer.reduce_gradients(num_rows=num_rows)
        optimizer.step()


@contextmanager
def marked_phases() -> Iterator[None]:
    """Name the base's forward pass and the loss in the profile."""
    features, loss = MegatronBase.features, objective_module.distillation_loss

    def marked_features(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"{PREFIX}base forward"):
            return features(*args, **kwargs)

    def marked_loss(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"{PREFIX}loss"):
            return loss(*args, **kwargs)

    with (
        mock.patch.object(MegatronBase, "features", marked_features),
        mock.patch.object(objective_module, "distillation_loss", marked_loss),
    ):
        yield


def phase_peaks(events: Sequence[Any]) -> dict[str, int]:
    """Most bytes held in each phase, of what was allocated since the profile began."""
    phases = {
        event.name().removeprefix(PREFIX): (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.name().startswith(PREFIX)
    }
    peaks, held = dict.fromkeys(phases, 0), 0
    for event in sorted((each for each in events if each.name() == MEMORY_EVENT), key=lambda each: each.start_ns()):
        held += event.nbytes()
        for name, (start, stop) in phases.items():
            if start <= event.start_ns() <= stop:
                peaks[name] = max(peaks[name], held)
    return peaks


def count_fixed(base: MegatronBase, step: DraftStep, optimizer: DraftOptimizer) -> dict[str, int]:
    """What stays, from the tensors themselves."""
    draft = base.draft()
    of_draft = set() if draft is None else {id(parameter) for parameter in draft.parameters()}
    copy = {id(p) for name, p in base.model.named_parameters() if name.startswith("draft_embedding.")}
    parameters = list(base.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    buffers = [] if draft is None else list(draft.buffers())
    inner = optimizer._only.optimizer
    moments = [] if inner is None else [value for state in inner.state.values() for value in state.values()]
    fixed = {
        "base weights": sum(_bytes(p) for p in parameters if id(p) not in of_draft | copy),
        "embedding copy": sum(_bytes(p) for p in parameters if id(p) in copy),
        "draft weights": sum(_bytes(p) for p in parameters if id(p) in of_draft),
        "gradient buffers": sum(buffer.grad_data.nbytes for buffer in optimizer.ddp.buffers),
        "main weights": sum(_bytes(main) for own, main in optimizer._parameters() if main is not own),
        "Adam's moments": sum(_bytes(value) for value in moments if value.ndim > 0),
        "draft vocabulary": sum(_bytes(buffer) for buffer in buffers if not buffer.is_floating_point()),
    }
    if step.objective is not None:
        assert isinstance(step.objective, objective_module.StepwiseObjective)
        vocabulary = step.objective.vocabulary
        kept = (vocabulary.draft_to_target, vocabulary.target_to_draft, vocabulary.teacher_rows)
        fixed["draft vocabulary"] += sum(_bytes(tensor) for tensor in kept if tensor is not None)
    assert len(trained) == 0 or fixed["gradient buffers"] > 0
    return {name: size for name, size in fixed.items() if size}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- the comparison -------------------------------------------------------------------------------


def run_case(name: str) -> list[dict[str, Any]]:
    """Measurements of every rank."""
    case = CASES[name]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(case.world_size):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if case.world_size > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(case.world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        command = [sys.executable, "-m", "tools.check_plan", "--measure", name]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        )
    found = []
    for process in processes:
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"case {name}: a rank ended with code {process.returncode}; see above")
        found.append(json.loads(output.splitlines()[-1]))
    return found


def compare(planned: RankMemory, measured: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Planned and measured bytes: parts that stay, phases, and the peak of all."""
    fixed, phases = measured["fixed"], measured["phases"]
    rows = {part: (planned.fixed.get(part, 0), fixed.get(part, 0)) for part in dict.fromkeys([*planned.fixed, *fixed])}
    # An earlier stage has no draft: its optimizer step does nothing.
    rows |= {phase: (sum(parts.values()), phases[phase]) for phase, parts in planned.phases.items()}
    peak = sum(fixed.values()) + max(phases.values())
    return rows | {"always": (planned.fixed_bytes, sum(fixed.values())), "peak": (planned.peak_bytes, peak)}


def show(name: str, stage: int, rows: dict[str, tuple[int, int]], *, verbose: RankMemory | None = None) -> list[str]:
    """Print a table; returns what is off by too much."""
    print(f"\n{name}, stage {stage}: {asdict(CASES[name])}")
    print(f"  {'MiB':<22}{'planned':>10}{'measured':>10}{'off by':>8}")
    for part, (planned, measured) in rows.items():
        print(f"  {part:<22}{planned / MIB:>10.2f}{measured / MIB:>10.2f}{planned / max(measured, 1) - 1:>8.1%}")
    if verbose is not None:
        for phase, parts in verbose.phases.items():
            print(f"    {phase}: " + ", ".join(f"{part} {size / MIB:.2f}" for part, size in parts.items()))
    return [
        f"{name}, stage {stage}: {part} is planned {planned / MIB:.1f} MiB and measured {measured / MIB:.1f}"
        for part, (planned, measured) in rows.items()
        if part in ("always", "peak") and abs(planned / measured - 1) > TOLERANCE
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare planned and measured memory of training steps.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--parts", action="store_true", help="show what the phases are planned of")
    parser.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(CASES[options.measure])))
        return 0
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]}; choose of {', '.join(CASES)}")
    faults = []
    for name in options.cases or CASES:
        shown = set()
        for measured in run_case(name):
            stage = measured["stage"]
            if stage in shown:
                continue
            shown.add(stage)
            planned = rank_memory(setup_of(CASES[name]), stage=stage)
            faults += show(name, stage, compare(planned, measured), verbose=planned if options.parts else None)
    print()
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    print(f"{len(faults)} of the peaks off by more than {TOLERANCE:.0%}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
