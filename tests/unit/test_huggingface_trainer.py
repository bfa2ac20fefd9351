"""transformers' own Trainer around a model with a draft: gradient accumulation, resume, what it divides by."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import mcore_spec
from mcore_spec import ConfigError, UnsupportedError
from mcore_spec.conversion import Mode
from mcore_spec.data.document import Document
from mcore_spec.hosting.context import context_group
from mcore_spec.huggingface.data import ConversationDataset, DraftCollator
from mcore_spec.huggingface.trainer import DraftTrainer
from tests.tiny import VOCAB_SIZE, write_hf_model

CONFIG: dict[str, Any] = {"eagle_architecture_config": {"num_hidden_layers": 1}}
NUM_DOCUMENTS = 16


class Documents:
    """Random ones, of several lengths."""

    def __init__(self) -> None:
        generator = np.random.RandomState(0)
        sizes = generator.randint(6, 18, size=NUM_DOCUMENTS)
        self.lengths = sizes.astype(np.int64)
        self.documents = [
            Document(generator.randint(3, VOCAB_SIZE, size=size), generator.rand(size) < 0.8) for size in sizes
        ]

    def document(self, index: int) -> Document:
        return self.documents[index]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base") / "llama", "llama", tied=False, dtype=torch.float64)


def train(
    base_dir: Path,
    output: Path,
    *,
    kind: type[Trainer] = Trainer,
    resume: str | None = None,
    mixing: bool = False,
    mode: Mode | None = None,
    fit: int = 0,
    collator: Any = None,
    **options: Any,
) -> Trainer:
    config = {**CONFIG, "eagle_mix_hidden_states": mixing}
    model = mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), mode or [("eagle", config)])
    arguments = TrainingArguments(
        output_dir=str(output),
        **{
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 3,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            **options,
        },
    )
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=ConversationDataset(Documents()),
        data_collator=collator or DraftCollator(),
    )
    if fit:
        assert isinstance(trainer, DraftTrainer)
        state = torch.get_rng_state()
        trainer.fit_start(fit)
        assert torch.equal(torch.get_rng_state(), state)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    model: Any = trainer.model
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_resume_is_bitwise(base_dir: Path, tmp_path: Path) -> None:
    """With mixed states, whose rows are drawn: the generator's state is resumed too."""
    mcore_spec.enable_huggingface_checkpointing()
    whole = train(base_dir, tmp_path / "whole", mixing=True)
    expected = weights(whole)
    resumed = train(base_dir, tmp_path / "resumed", mixing=True, resume=str(tmp_path / "whole" / "checkpoint-3"))
    found = weights(resumed)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    halfway = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-3").state_dict()
    assert any(not torch.equal(halfway[name], expected[name]) for name in expected)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    whole.save_model(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert [name for name, value in expected.items() if not torch.equal(loaded[name], value)] == []


class _Seen:
    """A collator that keeps what it was given."""

    def __init__(self) -> None:
        self.collate, self.batches = DraftCollator(), list[list[Document]]()

    def __call__(self, documents: list[Document]) -> dict[str, Tensor]:
        self.batches.append(documents)
        return self.collate(documents)


def test_a_start_is_made_from_the_runs_first_batches(base_dir: Path, tmp_path: Path) -> None:
    """And changes nothing else: the run then sees the same batches in the same order."""
    seen, steps = _Seen(), 2
    # A rate of zero keeps the start.
    options: dict[str, Any] = {"kind": DraftTrainer, "mixing": True, "learning_rate": 0.0, "max_steps": 3}
    fitted = train(base_dir, tmp_path / "fitted", fit=steps, collator=seen, **options)
    # Two micro-batches a step, and one that the loader reads ahead.
    learned, trained = seen.batches[: 2 * steps], seen.batches[2 * steps + 1 :]
    tokens = [[document.token_ids.tolist() for document in batch] for batch in seen.batches]
    assert tokens[: 2 * steps] == tokens[2 * steps + 1 : 4 * steps + 1] and len(trained) >= 6
    model = mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), [("eagle", CONFIG)])
    start = mcore_spec.fit_start(model, [DraftCollator()(batch) for batch in learned], seed=42)
    assert start is not None
    rows = [mask[1:-1] & mask[2:] for batch in learned for _, mask in batch]
    assert start.num_rows == sum(int(row.sum()) for row in rows)
    expected, found = model.state_dict(), weights(fitted)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    plain = _Seen()
    train(base_dir, tmp_path / "plain", collator=plain, **options)
    assert tokens[2 * steps + 1 :] == [[document.token_ids.tolist() for document in batch] for batch in plain.batches]


def test_behind_a_start_each_matrix_has_a_rate_of_its_own(base_dir: Path, tmp_path: Path) -> None:
    """Also in a run that is resumed, bit for bit, where no start is made."""
    mcore_spec.enable_huggingface_checkpointing()
    whole = train(base_dir, tmp_path / "whole", kind=DraftTrainer, fit=2)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = train(base_dir, tmp_path / "resumed", kind=DraftTrainer, resume=checkpoint)
    expected, found = weights(whole), weights(resumed)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    saved = torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.pt")["param_groups"]
    model: Any = whole.model
    start = mcore_spec.fit_start(
        mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), [("eagle", CONFIG)]),
        [DraftCollator()(Documents().documents)],
    )
    assert start is not None
    draft, state = model.eagle_module, torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.pt")["state"]
    vectors, *own = saved
    assert vectors["initial_lr"] == 1e-2
    matrices = {name: parameter for name, parameter in draft.named_parameters() if parameter.dim() > 1}
    made = vars(model.config)["mcore_spec"]["rates"]
    assert matrices.keys() == made.keys() == start.rates.keys() and len(own) == len(matrices)
    for group, (name, matrix) in zip(own, matrices.items(), strict=True):
        (member,) = group["params"]
        assert state[member]["exp_avg"].shape == matrix.shape
        assert group["initial_lr"] == pytest.approx(1e-2 * made[name], rel=1e-12), name
        # The solution is of the run's first batches, half of the documents; what the MLP adds follows from how many.
        if name != "layers.0.mlp.down_proj.weight":
            assert made[name] == pytest.approx(start.rates[name], rel=0.3), name
    assert len({group["initial_lr"] for group in own}) > 2


def test_starts_that_are_refused(base_dir: Path, tmp_path: Path) -> None:
    def drafted(mode: Any = (("eagle", CONFIG),)) -> Any:
        return mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), list(mode))

    batch = DraftCollator()(Documents().documents[:2])
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(ConfigError, match="has no draft"):
        mcore_spec.fit_start(AutoModelForCausalLM.from_pretrained(base_dir), [batch])
    with pytest.raises(UnsupportedError, match="fit_start = 1: this draft has no such start"):
        mcore_spec.fit_start(drafted([("medusa", {})]), [batch], num_batches=1)
    assert mcore_spec.fit_start(drafted([("medusa", {})]), [batch]) is None
    assert mcore_spec.fit_start(drafted(), [batch], num_batches=0) is None
    with pytest.raises(ConfigError, match="fit_start = -1: give a number of batches"):
        mcore_spec.fit_start(drafted(), [batch], num_batches=-1)
    with pytest.raises(ConfigError, match="there are no batches"):
        mcore_spec.fit_start(drafted(), [])
    with pytest.raises(ConfigError, match="no row of the first batches counts"):
        mcore_spec.fit_start(drafted(), [nothing])
    with pytest.raises(ConfigError, match="quantise then"):
        mcore_spec.fit_start(mcore_spec.quantize(drafted(), "int8_per_channel"), [batch])
    trained = train(base_dir, tmp_path / "out", kind=DraftTrainer, max_steps=1)
    assert isinstance(trained, DraftTrainer)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trained, "optimizer", None)
        patched.setattr(trained, "is_fsdp_enabled", True)
        assert trained.fit_start() is None
        with pytest.raises(UnsupportedError, match="fit_start = 2 with FSDP"):
            trained.fit_start(2)
    with pytest.raises(ConfigError, match="call it before train"):
        trained.fit_start()


def test_micro_batches_do_not_change_a_step(base_dir: Path, tmp_path: Path) -> None:
    """The loss is divided by the rows of all micro-batches: however they are cut, the weights come out alike."""
    found = []
    for batch, steps in ((4, 1), (1, 4)):
        trainer = train(
            base_dir,
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
        )
        found.append((weights(trainer), trainer.state.log_history[0]["loss"]))
    (one, loss), (four, other) = found
    assert abs(loss - other) < 1e-6
    moved = 0.0
    for name, value in AutoModelForCausalLM.from_pretrained(base_dir).state_dict().items():
        assert torch.equal(one[name], value) and torch.equal(four[name], value)
    for name in (name for name in one if name.startswith("eagle_module.")):
        assert torch.allclose(one[name], four[name], rtol=0, atol=1e-10), name
        moved = max(moved, float((one[name] - one[name].mean()).abs().max()))
    assert moved > 0.01


def test_the_collator_marks_the_rows_that_count() -> None:
    """Trainer then divides by them, where it would count every label but a row's first."""
    documents = Documents().documents[:4]
    batch = DraftCollator()(documents)
    rows = sum(int((mask[1:-1] & mask[2:]).sum()) for _, mask in documents)
    assert int(batch["shift_labels"].ne(-100).sum()) == rows
    assert int(batch["labels"][:, 1:].ne(-100).sum()) == sum(int(mask[1:].sum()) for _, mask in documents) > rows
    assert DraftCollator(multiple=8)(documents)["input_ids"].shape[1] % 8 == 0


def test_figures_are_logged(base_dir: Path, tmp_path: Path) -> None:
    seen = _Seen()
    trainer = train(base_dir, tmp_path / "out", kind=DraftTrainer, max_steps=2, collator=seen)
    entry = trainer.state.log_history[0]
    assert {"loss", "accuracy_0", "accuracy_1", "accuracy_2", "acceptance_length"} <= entry.keys()
    base: Any = AutoModelForCausalLM.from_pretrained(base_dir)
    own = []
    for batch in map(DraftCollator(), seen.batches[:2]):
        # The draft's rows are fewer than the base's.
        del batch["shift_labels"]
        own.append(float(base(**batch).loss.detach()))
    assert entry["lm_loss"] == pytest.approx(sum(own) / 2, rel=1e-5)


def test_evaluation_leaves_the_draft_alone(base_dir: Path, tmp_path: Path) -> None:
    trainer = train(base_dir, tmp_path / "out", kind=DraftTrainer, max_steps=1)
    before = weights(trainer)
    trainer.eval_dataset = ConversationDataset(Documents(), indices=[3, 1])
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_loss"] < 100
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_the_context_parallel_group_is_accelerates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the mesh that its ParallelismConfig makes; without one there is none, and none is made by asking."""
    group, state = object(), {}
    monkeypatch.setattr(AcceleratorState, "_shared_state", state)
    assert context_group() is None and not state
    mesh = SimpleNamespace(get_group=lambda: group)
    config = SimpleNamespace(cp_enabled=True)
    state.update(parallelism_config=config, device_mesh={"cp": mesh}, _cpu=True)
    assert context_group() is group
    config.cp_enabled = False
    assert context_group() is None


def test_trainer_without_labels_is_told(base_dir: Path, tmp_path: Path) -> None:
    model = mcore_spec.convert(AutoModelForCausalLM.from_pretrained(base_dir), [("eagle", CONFIG)])
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    data: Any = [{"input_ids": torch.arange(3, 9)}] * 4
    with pytest.raises(ConfigError, match="labels are missing"):
        Trainer(model=model, args=arguments, train_dataset=data).train()
