"""Sizes, work and layouts of plans, against published numbers, the modules themselves and the benchmark's count."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_spec.algorithms.eagle import build_member
from mcore_spec.cli.main import run_command
from mcore_spec.config import EagleAlgorithm, EagleConfig, eagle_preset
from mcore_spec.config.base import HF_FAMILIES
from mcore_spec.drafts.resolve import resolve_eagle
from mcore_spec.errors import ConfigError, UnsupportedError
from mcore_spec.losses import blocks
from mcore_spec.parallel.tensor_parallel import Placement
from mcore_spec.planning import activations
from mcore_spec.planning.activations import TrainingSetup, base_forward, loss_blocks
from mcore_spec.planning.hardware import GPUS, usable_bytes
from mcore_spec.planning.layout import PlannedLayout
from mcore_spec.planning.memory import rank_memory
from mcore_spec.planning.search import find_layout, judge, last_stage_layers, possible_layouts
from mcore_spec.planning.shapes import known_shape, known_shapes, read_shape
from mcore_spec.planning.weights import base_parameters, draft_tensors, stage_weights
from mcore_spec.planning.work import count_work, estimate_speed
from mcore_spec.weights.hf_config import describe_hf
from tools.benchmark.cases import BaseSizes, Case
from tools.benchmark.harness import count_work as count_benchmark_work

CONFIGS = Path(__file__).parents[1] / "hf_configs"
# Of the published weights.
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_248_023_552,
    "phi-3-mini": 3_821_079_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}


def setup_of(name: str, *, draft: dict[str, Any] | None = None, **changes: Any) -> TrainingSetup:
    shape = known_shape(name)
    config = resolve_eagle(EagleConfig.parse(draft or {}), shape.architecture)
    return TrainingSetup(**{"shape": shape, "draft": config, "layout": PlannedLayout(), "seq_length": 4096, **changes})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_weights(name: str) -> None:
    assert base_parameters(known_shape(name)) == PARAMETERS[name]


@pytest.mark.parametrize("directory", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_a_configuration_is_read_as_the_import_reads_it(directory: Path) -> None:
    read = read_shape(directory).architecture
    described = describe_hf(json.loads((directory / "config.json").read_text()), where="here")
    assert read.model_dump(exclude={"rope"}) == described.model_dump(exclude={"rope"})
    assert read_shape(directory / "config.json").architecture == read
    assert known_shape(directory.name).architecture == read


def test_every_family_that_can_be_imported_can_be_planned() -> None:
    planned = {known_shape(name).architecture.family for name in known_shapes()}
    assert planned == {*HF_FAMILIES.values(), "megatron"}


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-70b", "qwen3-235b-a22b"])
@pytest.mark.parametrize("layout", [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_the_stages_hold_the_base_once(name: str, layout: tuple[int, int]) -> None:
    shape, (tensor, pipeline) = known_shape(name), layout
    planned = PlannedLayout(tensor=tensor, pipeline=pipeline)
    ranks = [stage_weights(shape, planned, stage=stage) for stage in range(pipeline)]
    base = shape.architecture
    # On every rank of a stage: norms and routers. A tied head stands on the first stage and on the last.
    routers = 0 if shape.experts is None else base.hidden_size * shape.experts.num
    norms = base.num_layers * (2 * base.hidden_size + (2 * base.head_dim if base.qk_norm else 0) + routers)
    again = (tensor - 1) * (norms + base.hidden_size)
    vocabulary = base.vocab_size * base.hidden_size
    again += vocabulary if base.tie_word_embeddings and pipeline > 1 else 0
    assert tensor * sum(rank.base for rank in ranks) == base_parameters(shape) + again
    copied = vocabulary if pipeline > 1 and not base.tie_word_embeddings else 0
    assert tensor * sum(rank.embedding_copy for rank in ranks) == copied


def test_block_sizes_are_those_of_the_loss() -> None:
    assert activations.HOST_MAX_LOGITS == blocks.HOST_MAX_LOGITS
    assert activations.DEVICE_MAX_LOGITS == blocks.DEVICE_MAX_LOGITS


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen2.5-7b", "qwen3-8b"])
@pytest.mark.parametrize("member", ["eagle1", "eagle3", "eagle-mtp"])
def test_the_tensors_of_a_draft_are_those_of_its_module(member: EagleAlgorithm, name: str) -> None:
    flags = eagle_preset(member)["config"]["eagle_architecture_config"]
    architecture = {**flags, "num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}
    setup = setup_of(name, draft={"eagle_architecture_config": architecture})
    place = Placement(device=torch.device("meta"))
    module = build_member(setup.draft, setup.shape.architecture, place=place)
    planned = draft_tensors(setup.sizes, setup.architecture, tensor=1)
    assert sorted(planned) == sorted(parameter.numel() for parameter in module.parameters())


def test_a_recurrent_draft_joins_at_every_step() -> None:
    def draft_work(member: EagleAlgorithm, steps: int) -> float:
        config = {**eagle_preset(member)["config"], "eagle_ttt_steps": steps}
        return count_work(setup_of("llama-3.2-1b", draft=config, seq_length=1000)).draft

    base = known_shape("llama-3.2-1b").architecture
    hidden, kv = base.hidden_size, base.num_key_value_heads * base.head_dim
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * base.intermediate_size
    for member in ("eagle1", "eagle-mtp"):
        # Forward and the gradients of input and weight, 2 operations each.
        assert draft_work(member, 3) == 3 * 1000 * 6 * (layer + 2 * hidden * hidden)


@pytest.mark.parametrize("name", ["t1024-k3", "t512-k7", "t1024-k3-v8192"])
def test_work_is_what_the_benchmark_counts(name: str) -> None:
    case, shape = Case.parse(name), known_shape("llama-3.2-1b")
    base = shape.architecture
    sizes = BaseSizes(
        num_layers=base.num_layers,
        hidden_size=base.hidden_size,
        intermediate_size=base.intermediate_size,
        num_heads=base.num_attention_heads,
        num_kv_heads=base.num_key_value_heads,
        head_dim=base.head_dim,
        vocab_size=base.vocab_size,
        config={},
    )
    draft: dict[str, Any] = {"eagle_ttt_steps": case.num_steps}
    if case.draft_vocab_size is not None:
        draft["eagle_architecture_config"] = {"draft_vocab_size": case.draft_vocab_size}
    counted = count_work(setup_of("llama-3.2-1b", draft=draft, seq_length=case.num_tokens))
    expected = count_benchmark_work(sizes, case)
    assert counted.base == expected.base
    assert counted.draft == expected.draft
    assert counted.teacher_head == expected.teacher_head
    assert counted.student_head == expected.student_head
    assert counted.attention_base + counted.attention_draft == expected.attention


def test_the_busiest_stage_sets_the_pace() -> None:
    layout = PlannedLayout(pipeline=4)
    even = setup_of("llama-3.2-1b", layout=layout)
    uneven = replace(even, layout=replace(layout, last_stage_layers=1))
    speeds = [estimate_speed(setup, num_micro_batches=100, flops_per_second=1e12) for setup in (even, uneven)]
    assert [speed.busiest_stage for speed in speeds] == [3, 3]
    # Fewer layers beside the draft: faster.
    assert speeds[1].tokens_per_second > speeds[0].tokens_per_second
    one = estimate_speed(replace(even, layout=PlannedLayout()), num_micro_batches=100, flops_per_second=1e12)
    assert one.tokens_per_second == pytest.approx(4096 * 1e12 / count_work(replace(even, layout=PlannedLayout())).total)
    assert speeds[0].tokens_per_second < 4 * one.tokens_per_second


def test_what_a_rank_holds_shrinks_with_the_ranks_that_share_it() -> None:
    whole = setup_of("llama-3.1-8b", draft={"eagle_architecture_config": {"draft_vocab_size": 32000}})

    def memory(**layout: Any) -> Any:
        return rank_memory(replace(whole, layout=PlannedLayout(**layout)), stage=0)

    one, data = memory(), memory(data=8)
    assert data.fixed["Adam's moments"] * 8 == one.fixed["Adam's moments"]
    assert data.fixed["gradient buffers"] == one.fixed["gradient buffers"]
    tensor, sequence = memory(tensor=2), memory(tensor=2, sequence_parallel=True)
    assert sum(sequence.phases["backward"].values()) < sum(tensor.phases["backward"].values())
    assert tensor.peak_bytes < one.peak_bytes
    recomputed = rank_memory(replace(whole, recompute=True), stage=0)
    assert recomputed.phases["loss"]["draft's saved activations"] < one.phases["loss"]["draft's saved activations"] / 3


def test_logits_are_held_in_blocks_whatever_the_length() -> None:
    short, long = (loss_blocks(setup_of("llama-3.1-8b", seq_length=length)) for length in (8192, 65536))
    assert long <= 1.05 * short
    # And the base's pass grows with the rows alone.
    small, large = (
        sum(base_forward(setup_of("llama-3.1-8b", seq_length=length), stage=0).values()) for length in (4096, 8192)
    )
    assert large == 2 * small


@pytest.mark.parametrize(
    ("name", "gpu", "num_gpus"),
    [("llama-3.1-8b", "h100", 1), ("llama-3.1-70b", "h100", None), ("llama-3.1-405b", "h200", None)],
)
def test_the_smallest_layout_fits_and_no_smaller_one_does(name: str, gpu: str, num_gpus: int | None) -> None:
    setup, usable = setup_of(name), usable_bytes(GPUS[gpu])
    search = find_layout(setup, usable_bytes=usable, gpus_per_node=8)
    assert search.found is not None
    layout = search.found.setup.layout
    assert search.found.worst.peak_bytes <= usable
    assert num_gpus is None or layout.num_gpus == num_gpus
    for candidate in possible_layouts(setup, gpus_per_node=8):
        if candidate.num_gpus < layout.num_gpus:
            assert judge(replace(setup, layout=candidate)).worst.peak_bytes > usable
    assert all(each.setup.layout.num_gpus < layout.num_gpus for each in search.rejected)
    # By weights alone there is no smaller one either.
    assert layout.num_gpus >= 2 * PARAMETERS[name] / usable


def test_a_rest_of_the_layers_leaves_the_last_stage_fewer() -> None:
    assert last_stage_layers(80, 4) is None
    assert last_stage_layers(126, 8) == 14
    assert PlannedLayout(pipeline=8, last_stage_layers=14).layers_of_stages(126) == [16] * 7 + [14]


def test_other_drafts_and_models_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="parallel_draft_step = 2: parallel heads are not planned"):
        assert setup_of("llama-3.2-1b", draft={"eagle_architecture_config": {"parallel_draft_step": 2}}).sizes
    with pytest.raises(UnsupportedError, match="eagle_freeze_base_model = false: .* not planned"):
        assert setup_of("llama-3.2-1b", draft={"eagle_freeze_base_model": False}).sizes
    with pytest.raises(ConfigError, match="tensor_model_parallel_size = 3"):
        assert setup_of("llama-3.2-1b", layout=PlannedLayout(tensor=3)).sizes


# --- the command ----------------------------------------------------------------------------------


def plan(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = run_command("plan", [str(word) for word in words])
    return code, *capsys.readouterr()


def test_the_command_answers_at_once_and_without_torch() -> None:
    program = (
        "import sys; from mcore_spec.cli.main import main; "
        "code = main(['plan', '--model-shape', 'llama-3.1-405b', '--find-layout']); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "smallest that fits: TP 8" in done.stdout
    assert "does not fit: TP 1 x PP 1 x CP 1 x DP 1 = 1 GPU: " in done.stdout
    # Alone on a core it takes 0.4 s.
    assert time.perf_counter() - start < 5


def test_the_command_says_what_a_rank_needs(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ("--tensor-model-parallel-size", 8, "--sequence-parallel", "--pipeline-model-parallel-size", 4)
    words = ("--pretrained-model-path", CONFIGS / "llama-3.1-70b", *layout, "--context-parallel-size", 2)
    code, out, err = plan(capsys, *words, "--num-gpus", 128, "--global-batch-size", 32, "--draft-vocab-size", 32000)
    assert (code, err) == (0, "")
    assert "TP 8 (sequence parallel) x PP 4 x CP 2 x DP 2 = 128 GPUs; stages of 20, 20, 20, 20 layers" in out
    for part in ("base weights", "embedding copy", "gradient buffers", "Adam's moments", "logit blocks", "backward"):
        assert part in out
    assert "estimate, not a measurement" in out and "fits" in out


def test_a_base_with_experts_is_planned_and_said_to_be_the_users_own(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--model-shape", "qwen3-235b-a22b", "--find-layout", "--gpu", "h200")
    assert code == 0
    assert "128 experts a layer, 8 for each token" in out and "cannot be imported yet" in out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("--pretrained-model-path or --model-shape", "neither is given")),
        (("--model-shape", "llama-3.1-8b", "--pretrained-model-path", "x"), ("both are given",)),
        (("--model-shape", "llama-3.1-8"), ("--model-shape", "did you mean llama-3.1-8b?")),
        (("--pretrained-model-path", "nowhere"), ("pretrained_model_path = nowhere", "no such config.json")),
        (("--model-shape", "llama-3.1-8b", "--gpu", "h10"), ("--gpu", "did you mean h100?")),
        (("--model-shape", "llama-3.1-8b", "--tensor-model-parallel-size", 3), ("num_attention_heads = 32",)),
        (("--model-shape", "llama-3.1-8b", "--pipeline-model-parallel-size", 5), ("32 decoder layers",)),
        (("--model-shape", "llama-3.1-8b", "--num-gpus", 3, "--context-parallel-size", 2), ("--num-gpus 3",)),
        (("--model-shape", "llama-3.1-8b", "--global-batch-size", 3, "--num-gpus", 2), ("--global-batch-size 3",)),
        (("--model-shape", "phi-3-mini", "--seq-length", 8192), ("--seq-length 8192", "4096 positions")),
        (("--model-shape", "llama-3.1-8b", "--draft-vocab-size", 200000), ("draft_vocab_size = 200000",)),
        (("--model-shape", "llama-3.1-8b", "--find-layout", "--num-gpus", 8), ("--num-gpus", "--find-layout")),
        (("--model-shape", "llama-3.1-8b", "--gpus-per-node", 4), ("--gpus-per-node", "--find-layout")),
    ],
)
def test_bad_input_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    code, out, err = plan(capsys, *words)
    assert code == 2
    assert err.count("\n") == 1 and all(part in err for part in parts), err
    assert "GiB" not in out


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ('{"architectures": ["GPT2LMHeadModel"]}', "'GPT2LMHeadModel' is not planned"),
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}', "must be a whole number above 0"),
    ],
)
def test_a_configuration_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, part: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    code, _, err = plan(capsys, "--pretrained-model-path", tmp_path)
    assert code == 2 and part in err and str(tmp_path) in err
