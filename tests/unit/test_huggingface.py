"""A draft on a transformers model: convert, forward, generate, files, errors. One process, tiny models."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
)

import mcore_spec
from mcore_spec import CheckpointError, ConfigError, UnsupportedError
from mcore_spec.bases.transformers import TransformersBase
from mcore_spec.conversion import Mode, conversion_of
from mcore_spec.hosting.key import CONFIG_KEY
from mcore_spec.weights.safetensors_io import WeightDirectory
from tests.tiny import VOCAB_SIZE, draft_to_target, write_hf_model

EAGLE3: Mode = [("eagle", {"eagle_architecture_config": {"num_hidden_layers": 1}})]
MODES: dict[str, Mode] = {
    "eagle3": EAGLE3,
    "eagle1": mcore_spec.EAGLE1_DEFAULT_CFG,
    "eagle-mtp": mcore_spec.EAGLE_MTP_DEFAULT_CFG,
    "medusa": "medusa",
}
IGNORED = -100


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("base") / "llama", "llama", tied=False, dtype=torch.float32)


@pytest.fixture
def model(base_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base_dir)


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def drafted(model: PreTrainedModel, mode: Mode = EAGLE3, **options: Any) -> Any:
    """Converted, the draft's weights off their defaults."""
    converted = mcore_spec.convert(model, mode, **options)
    generator = torch.Generator().manual_seed(5)
    draft: Any = TransformersBase(model).draft()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return converted


def draft_state(model: Any) -> dict[str, Tensor]:
    draft: Any = TransformersBase(model).draft()
    return draft.state_dict()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


# --- convert -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODES)
def test_convert_is_in_place_and_leaves_the_base(model: Any, name: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    converted = mcore_spec.convert(model, MODES[name])
    assert converted is model
    child = model.medusa_heads if name == "medusa" else model.eagle_module
    assert any(parameter.requires_grad for parameter in child.parameters())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert not any(parameter.requires_grad for parameter in model.lm_head.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert model.config.model_type == "llama" and type(model).__name__ == "LlamaForCausalLM"


def test_converting_twice_is_refused(model: Any) -> None:
    mcore_spec.convert(model, EAGLE3)
    with pytest.raises(ConfigError, match="has a draft already"):
        mcore_spec.convert(model, "medusa")


def test_a_configuration_of_the_other_algorithm_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="medusa_num_heads: unknown field"):
        mcore_spec.convert(model, [("eagle", {"medusa_num_heads": 2})])
    assert conversion_of(model) is None


def test_models_without_the_structure_are_refused(model: Any) -> None:
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel.*not supported"):
        mcore_spec.convert(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)), "medusa")
    seq2seq = AutoModelForSeq2SeqLM.from_config(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedError, match="T5ForConditionalGeneration.*not supported"):
        mcore_spec.convert(seq2seq, "medusa")
    with pytest.raises(UnsupportedError, match="got Linear"):
        mcore_spec.convert(torch.nn.Linear(2, 2), "medusa")
    del model.model.norm
    with pytest.raises(UnsupportedError, match="0 norms behind the layers of its LlamaModel"):
        mcore_spec.convert(model, "medusa")


# --- forward -------------------------------------------------------------------------------------


def test_forward_with_labels(model: Any) -> None:
    drafted(model).train()
    ids = tokens()
    output = model(input_ids=ids, labels=ids)
    assert output.loss.requires_grad and output.loss.ndim == 0
    assert output.accuracy.shape == (3,) and 1 <= float(output.acceptance_length) <= 4
    assert output.lm_loss.ndim == 0 and not output.lm_loss.requires_grad and output.logits is None
    loss, accuracy, _, _ = model(input_ids=ids, labels=ids, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(accuracy, output.accuracy)


def test_evaluation_also_gives_what_the_base_says(model: Any, base_dir: Path) -> None:
    drafted(model).eval()
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    # transformers lets padding predict it.
    unpredicted = labels.clone()
    unpredicted[0, 3] = IGNORED
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, labels=labels)
        plain = AutoModelForCausalLM.from_pretrained(base_dir)(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), labels=unpredicted
        )
    assert torch.allclose(output.lm_loss, plain.loss, atol=1e-5)
    assert torch.allclose(output.logits[mask == 1], plain.logits[mask == 1], atol=1e-4)
    assert not output.logits[mask == 0].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["eagle3", "eagle3, reduced vocabulary", "medusa"])
def test_the_bases_loss_is_transformers(model: Any, base_dir: Path, name: str, training: bool) -> None:
    """On answers behind prompts, padded on either side; no row of the draft counts in the last one."""
    ids, mask = tokens(rows=4), torch.ones(4, 12, dtype=torch.int64)
    mask[1, :3] = mask[2, 9:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, :5] = labels[1, :6] = labels[2, 3:6] = labels[3, :11] = IGNORED
    labels[2, 0] = IGNORED
    d2t = draft_to_target() if "reduced" in name else None
    drafted(model, MODES[name.split(",")[0]], d2t=d2t).train(training)
    with torch.set_grad_enabled(training):
        output = model(input_ids=ids, attention_mask=mask, labels=labels)
        plain = AutoModelForCausalLM.from_pretrained(base_dir)(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), labels=labels
        )
    assert torch.allclose(output.lm_loss, plain.loss.detach(), rtol=1e-6)
    assert (output.logits is None) == training


def test_one_token_has_one_weight(model: Any) -> None:
    """Micro-batches of other sizes, padded or not, add up to the gradient of the whole."""
    drafted(model).train()
    ids = tokens(rows=3)
    labels = ids.clone()
    labels[0, :8], labels[1, :2], labels[2, 3:6] = IGNORED, IGNORED, IGNORED
    count = 17
    model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(count)).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.eagle_module.named_parameters()}
    model.zero_grad()
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[:, 12:] = 0
    padded = torch.nn.functional.pad(ids[1:], (0, 3))
    padded_labels = torch.nn.functional.pad(labels[1:], (0, 3), value=IGNORED)
    parts = [
        {"input_ids": ids[:1], "labels": labels[:1]},
        {"input_ids": padded, "labels": padded_labels, "attention_mask": mask},
    ]
    for part in parts:
        model(**part, num_items_in_batch=torch.tensor(count)).loss.backward()
    for name, parameter in model.eagle_module.named_parameters():
        assert torch.allclose(parameter.grad, whole[name], atol=1e-5 * float(whole[name].abs().max())), name


def test_a_batch_without_a_counted_row_adds_nothing(model: Any) -> None:
    drafted(model).train()
    ids = tokens()
    output = model(input_ids=ids, labels=torch.full_like(ids, IGNORED))
    output.loss.backward()
    assert float(output.loss.detach()) == float(output.lm_loss) == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.eagle_module.parameters())


def test_only_aux_layers_are_kept(model: Any) -> None:
    """While the base runs, outputs of other layers are gone as soon as the next layer has read them."""
    drafted(model, [("eagle", {"eagle_architecture_config": {"eagle_aux_hidden_state_layer_ids": [1]}})]).train()
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[list[int]] = []

    def note(_layer: object, _inputs: object, output: Tensor) -> None:
        assert not output.requires_grad
        alive.append([number for number, earlier in enumerate(outputs) if earlier() is not None])
        outputs.append(weakref.ref(output))

    for layer in model.model.layers:
        layer.register_forward_hook(note)
    ids = tokens()
    assert model(input_ids=ids, labels=ids).loss.requires_grad
    # The layer before is still the argument of the one that ends.
    assert alive == [[], [0], [1], [1, 2], [1, 3], [1, 4]]
    assert all(len(layer._forward_hooks) == 1 for layer in model.model.layers)


def test_gradient_checkpointing_changes_no_gradient(model: Any) -> None:
    drafted(model).train()
    ids = tokens()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.eagle_module.named_parameters()})
    assert same(*gradients)


def test_autocast_is_the_bases(model: Any) -> None:
    drafted(model).train()
    ids = tokens()
    plain = model(input_ids=ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.dtype is torch.float32
    assert 0 < abs(float((loss - plain).detach())) < 0.1 * float(plain.detach())


def test_a_device_map(model: Any, base_dir: Path) -> None:
    """accelerate's hooks around every module stay as they are."""
    layers = {f"model.layers.{index}": "cpu" for index in range(6)}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **layers}
    # transformers leaves the hooks out where every module is in one place.
    plain_model = AutoModelForCausalLM.from_pretrained(base_dir)
    mapped: Any = dispatch_model(plain_model, places, main_device="cpu", force_hooks=True)
    assert mapped.hf_device_map == places
    ids = tokens()
    outputs = [drafted(each).train()(input_ids=ids, labels=ids) for each in (model, mapped)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    plain, found = (each.eval().generate(ids, max_new_tokens=3, do_sample=False) for each in (model, mapped))
    assert torch.equal(plain, found)


def offloaded(base_dir: Path, folder: Path) -> Any:
    """The last half of the layers, which a draft may start from, and the embedding are on disk."""
    layers = {f"model.layers.{index}": "cpu" if index < 3 else "disk" for index in range(6)}
    places = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **layers}
    return AutoModelForCausalLM.from_pretrained(base_dir, device_map=places, offload_folder=str(folder))


def test_a_base_that_is_offloaded_in_part(model: Any, base_dir: Path, tmp_path: Path) -> None:
    apart = offloaded(base_dir, tmp_path / "offload")
    assert apart.model.layers[5].mlp.up_proj.weight.device.type == "meta"
    ids = tokens()
    outputs = []
    for each in (model, apart):
        mcore_spec.convert(each, EAGLE3)
        each.train()
        outputs.append(each(input_ids=ids, labels=ids).loss)
        outputs[-1].backward()
    assert same(draft_state(model), draft_state(apart))
    assert torch.equal(*outputs) and torch.equal(model.eagle_module.fc.weight.grad, apart.eagle_module.fc.weight.grad)
    with pytest.raises(ConfigError, match="is offloaded in part"):
        mcore_spec.export_speculative_decoding(apart, export_dir=tmp_path / "export")
    assert not (tmp_path / "export").exists()
    apart.save_pretrained(tmp_path / "whole")
    mcore_spec.enable_huggingface_checkpointing()
    assert same(draft_state(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), draft_state(model))


def test_a_vocabulary_that_changes_later_is_refused(model: Any) -> None:
    drafted(model).train()
    model.resize_token_embeddings(VOCAB_SIZE + 8)
    ids = tokens()
    with pytest.raises(ConfigError, match="resize_token_embeddings.* comes before convert"):
        model(input_ids=ids, labels=ids)


def test_what_a_flattening_collator_adds_changes_nothing(model: Any) -> None:
    drafted(model).train()
    documents = [{"input_ids": row, "labels": row} for row in (tokens(1, 9)[0].tolist(), tokens(1, 5)[0].tolist())]
    losses = []
    for with_bounds in (False, True):
        batch = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=with_bounds)(documents)
        losses.append(model(**batch).loss)
    assert {"cu_seq_lens_q", "position_ids"} <= batch.keys() and torch.equal(*losses)
    del batch["position_ids"]
    with pytest.raises(ConfigError, match="cu_seq_lens_q.* given beside labels"):
        model(**batch)


@pytest.mark.parametrize("training", [False, True])
def test_generate_is_unchanged(model: Any, base_dir: Path, training: bool) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base_dir)
    drafted(model).train(training)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = tokens()
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_copy_is_a_model_of_its_own(model: Any) -> None:
    drafted(model).train()
    other = copy.deepcopy(model)
    ids = tokens()
    with torch.no_grad():
        other.eagle_module.norm.weight.zero_()
    ours, theirs = (each(input_ids=ids, labels=ids).loss.detach() for each in (model, other))
    assert float(ours) != float(theirs)


# --- batches that are not understood -----------------------------------------------------------------


def bad_batches() -> dict[str, tuple[dict[str, Any], str]]:
    ids = tokens()
    padded = ids.clone()
    padded[0, 9:] = 0
    unlabelled = padded.masked_fill(padded == 0, IGNORED)
    holes = torch.ones_like(ids)
    holes[1, 4] = 0
    jumping = torch.arange(12).repeat(2, 1)
    jumping[0, 5:] += 1
    return {
        "no labels": ({"input_ids": ids}, "labels are missing in a training step"),
        "right padding without a mask": (
            {"input_ids": padded, "labels": unlabelled},
            r"input_ids\[0\] ends in 3 times pad_token_id = 0.*attention_mask",
        ),
        "right padding with labels": ({"input_ids": padded, "labels": padded}, r"input_ids\[0\] ends in 3 times pad_"),
        "a token that is not there": (
            {"input_ids": ids.clone().fill_(VOCAB_SIZE), "labels": ids.clone().fill_(VOCAB_SIZE)},
            rf"input_ids\[0, 0\] = {VOCAB_SIZE}, and the model's vocabulary has {VOCAB_SIZE} tokens",
        ),
        "labels that are shifted": ({"input_ids": ids, "labels": ids.roll(-1, 1)}, r"labels\[0, 0\].*not shifted"),
        "labels in padding": (
            {"input_ids": padded, "labels": padded, "attention_mask": (padded != 0).long()},
            r"labels\[0, 9\] is set where attention_mask is 0",
        ),
        "a mask with holes": (
            {"input_ids": ids, "labels": ids.masked_fill(holes == 0, IGNORED), "attention_mask": holes},
            r"attention_mask\[1, 4\] = 0 between tokens",
        ),
        "a mask that numbers documents": (
            {"input_ids": ids, "labels": ids, "attention_mask": 1 + (torch.arange(12) >= 7).long().repeat(2, 1)},
            r"attention_mask\[0, 7\] = 2; give 1 for a token and 0 for padding",
        ),
        "more tokens than positions": (
            {"input_ids": ids.repeat(1, 6), "labels": ids.repeat(1, 6)},
            r"input_ids\[0\] has 72 tokens in a document, and the model has 64 positions",
        ),
        "a mask of four dimensions": (
            {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(2, 1, 12, 12)},
            r"attention_mask has shape \[2, 1, 12, 12\]",
        ),
        "positions that jump": (
            {"input_ids": ids, "labels": ids, "position_ids": jumping},
            r"position_ids\[0, 5\] = 6 behind 4",
        ),
        "padding alone": (
            {"input_ids": ids, "labels": torch.full_like(ids, IGNORED), "attention_mask": torch.zeros_like(ids)},
            "padding alone",
        ),
        "embeddings": ({"inputs_embeds": torch.zeros(2, 12, 16), "labels": ids}, "inputs_embeds given beside labels"),
        "hidden states": (
            {"input_ids": ids, "labels": ids, "output_hidden_states": True},
            "output_hidden_states given beside labels",
        ),
    }


@pytest.mark.parametrize("name", list(bad_batches()))
def test_bad_batches(model: Any, name: str) -> None:
    model.config.pad_token_id = 0
    batch, message = bad_batches()[name]
    drafted(model).train()
    with pytest.raises(ConfigError, match=message):
        model(**batch)


@pytest.mark.parametrize("are_labels", [True, False])
def test_end_tokens_are_padding_where_the_model_names_no_other(model: Any, are_labels: bool) -> None:
    """Repeated at the end; inside, and once at the end, they are the row's own."""
    model.config.pad_token_id, model.config.eos_token_id = None, [2, 1]
    drafted(model).train()
    ids = tokens()
    ids[0, 3:5] = ids[0, 11] = ids[1, 10] = 2
    ids[1, 11] = 1
    assert float(model(input_ids=ids, labels=ids).loss.detach()) > 0
    ids[1, 9:] = 2
    labels = ids.clone()
    if not are_labels:
        labels[1, 9:] = IGNORED
    with pytest.raises(ConfigError, match=r"input_ids\[1\] ends in 3 times eos_token_id = 2.*attention_mask"):
        model(input_ids=ids, labels=labels)


def test_a_last_token_that_is_learned_may_be_the_padding_token(model: Any) -> None:
    """Vocabularies are there whose token 0 is a word, and configurations that name it for padding."""
    model.config.pad_token_id = 0
    drafted(model).train()
    ids = tokens()
    ids[:, -1] = 0
    assert float(model(input_ids=ids, labels=ids).loss.detach()) > 0


def test_a_single_end_token_is_no_padding(model: Any) -> None:
    model.config.pad_token_id = model.config.eos_token_id = 2
    drafted(model).train()
    ids = tokens()
    ids[:, -1] = 2
    labels = ids.clone()
    labels[:, -1] = IGNORED
    assert float(model(input_ids=ids, labels=labels).loss.detach()) > 0


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODES)
def test_from_pretrained_restores_the_draft(model: Any, name: str, tmp_path: Path) -> None:
    drafted(model, MODES[name]).eval()
    model.save_pretrained(tmp_path / "out")
    mcore_spec.enable_huggingface_checkpointing()
    mcore_spec.enable_huggingface_checkpointing()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model) and not loaded.training
    assert same(loaded.state_dict(), model.state_dict())
    ids = tokens()
    with torch.no_grad():
        expected, found = (each(input_ids=ids, labels=ids) for each in (model, loaded))
    assert torch.equal(found.loss, expected.loss)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (tmp_path / "out" / "config.json").read_text()
    )


def test_what_save_pretrained_writes_is_ordinary(model: Any, tmp_path: Path, base_dir: Path) -> None:
    """Base tensors as they were, the draft's beside them; anybody's loader finds the base."""
    drafted(model).save_pretrained(tmp_path / "out")
    stored, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base_dir / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in before.items())
    assert {name for name in stored if name not in before} == {f"eagle_module.{name}" for name in draft_state(model)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[CONFIG_KEY]["algorithm"] == "eagle" and config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(plain.state_dict(), before)
    mcore_spec.enable_huggingface_checkpointing()
    assert conversion_of(AutoModel.from_pretrained(tmp_path / "out")) is None
    assert conversion_of(AutoModelForCausalLM.from_pretrained(base_dir)) is None


def test_a_draft_vocabulary_survives(model: Any, tmp_path: Path) -> None:
    drafted(model, d2t=draft_to_target()).save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    mcore_spec.enable_huggingface_checkpointing()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(loaded.eagle_module.d2t, draft_to_target())
    assert loaded.eagle_module.fc.weight.dtype is torch.bfloat16


def test_files_of_a_variant_are_refused(model: Any, tmp_path: Path) -> None:
    drafted(model).save_pretrained(tmp_path / "out", variant="half")
    mcore_spec.enable_huggingface_checkpointing()
    with pytest.raises(ConfigError, match="variant = 'half' of .*without one"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", variant="half")


def test_a_directory_that_lost_its_draft_is_refused(model: Any, tmp_path: Path, base_dir: Path) -> None:
    drafted(model).save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes((base_dir / "model.safetensors").read_bytes())
    mcore_spec.enable_huggingface_checkpointing()
    with pytest.raises(CheckpointError, match="missing .*fc.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", MODES)
def test_save_and_restore(model: Any, name: str, tmp_path: Path, base_dir: Path) -> None:
    drafted(model, MODES[name])
    mcore_spec.save(model, tmp_path / "draft")
    mcore_spec.save(model, tmp_path / "draft")
    fresh = AutoModelForCausalLM.from_pretrained(base_dir)
    mcore_spec.restore(fresh, tmp_path / "draft")
    assert same(draft_state(fresh), draft_state(model))
    assert sum(file.stat().st_size for file in (tmp_path / "draft").iterdir()) < 200_000
    with pytest.raises(ConfigError, match="has a draft already"):
        mcore_spec.restore(fresh, tmp_path / "draft")


def test_restore_takes_every_form(model: Any, tmp_path: Path, base_dir: Path) -> None:
    """What save_pretrained and an export wrote too."""
    drafted(model, d2t=draft_to_target()).save_pretrained(tmp_path / "both")
    mcore_spec.export_speculative_decoding(model, export_dir=tmp_path / "export")
    mcore_spec.export_speculative_decoding(model, export_dir=tmp_path / "speculators", export_format="speculators")
    for form in ("both", "export", "speculators"):
        fresh = AutoModelForCausalLM.from_pretrained(base_dir)
        mcore_spec.restore(fresh, tmp_path / form)
        assert same(draft_state(fresh), draft_state(model)), form


def test_restore_onto_another_base_is_refused(model: Any, tmp_path: Path) -> None:
    mcore_spec.save(drafted(model), tmp_path / "draft")
    other = write_hf_model(tmp_path / "qwen2", "qwen2", tied=False, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="hidden_size = 16.*this base has 32"):
        mcore_spec.restore(AutoModelForCausalLM.from_pretrained(other), tmp_path / "draft")
    with pytest.raises(CheckpointError, match="no directory"):
        mcore_spec.restore(model, tmp_path / "nowhere")


@pytest.mark.parametrize("form", ["saved", "exported", "beside its base"])
def test_restore_onto_a_base_of_equal_sizes_is_asked_for(model: Any, form: str, tmp_path: Path, base_dir: Path) -> None:
    """Another family, or other weights; in another dtype they cannot be told apart."""
    drafted(model)
    if form == "saved":
        mcore_spec.save(model, tmp_path / "draft")
    elif form == "exported":
        mcore_spec.export_speculative_decoding(model, export_dir=tmp_path / "draft")
    else:
        model.save_pretrained(tmp_path / "draft")
    family = write_hf_model(tmp_path / "qwen3", "qwen3", tied=False, dtype=torch.float32)
    tuned = AutoModelForCausalLM.from_pretrained(base_dir)
    with torch.no_grad():
        tuned.model.layers[3].mlp.up_proj.weight[0] += 1
    others = [
        (AutoModelForCausalLM.from_pretrained(family), "a base with family = llama .*, this one has qwen3"),
        (tuned, "a base with other weights"),
    ]
    for other, message in others:
        with pytest.raises(CheckpointError, match=f"{message}.*or allow_other_base = True"):
            mcore_spec.restore(other, tmp_path / "draft")
        assert conversion_of(other) is None
        mcore_spec.restore(other, tmp_path / "draft", allow_other_base=True)
        assert same(draft_state(other), draft_state(model))
    half = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
    mcore_spec.restore(half, tmp_path / "draft")
    assert half.eagle_module.fc.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("with_head", [False, True])
def test_a_tied_head_may_be_among_the_files(with_head: bool, tmp_path: Path) -> None:
    """Some hubs' files have it, transformers' do not."""
    base = write_hf_model(tmp_path / "base", "llama", tied=True, dtype=torch.float32)
    model = drafted(AutoModelForCausalLM.from_pretrained(base))
    mcore_spec.save(model, tmp_path / "draft")
    if with_head:
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        file = tmp_path / "draft" / "mcore_spec_export.json"
        record = json.loads(file.read_text())
        record["identity"]["fingerprint"] = WeightDirectory(base).fingerprint()
        file.write_text(json.dumps(record))
    fresh = AutoModelForCausalLM.from_pretrained(base)
    mcore_spec.restore(fresh, tmp_path / "draft")
    assert same(draft_state(fresh), draft_state(model))


def test_the_export_says_what_it_was_made_for(model: Any, tmp_path: Path, base_dir: Path) -> None:
    mcore_spec.export_speculative_decoding(drafted(model), export_dir=tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert {"fc.weight", "midlayer.hidden_norm.weight"} <= WeightDirectory(tmp_path / "export").tensors.keys()
    record = json.loads((tmp_path / "export" / "mcore_spec_export.json").read_text())
    assert record["identity"]["source"] == str(base_dir)
    assert record["identity"]["fingerprint"] == WeightDirectory(base_dir).fingerprint()
    assert CONFIG_KEY not in record["identity"]["hf_config"]
    with pytest.raises(ConfigError, match="exists; choose another directory"):
        mcore_spec.export_speculative_decoding(model, export_dir=tmp_path / "export")


def test_a_model_without_a_draft_has_nothing_to_save(model: Any, tmp_path: Path) -> None:
    for write in (
        lambda: mcore_spec.save(model, tmp_path / "draft"),
        lambda: mcore_spec.export_speculative_decoding(model, export_dir=tmp_path / "draft"),
    ):
        with pytest.raises(ConfigError, match="has no draft; attach one first"):
            write()
    assert not (tmp_path / "draft").exists()
