"""What the ranks do for `test_huggingface_layouts.py`: one step of a drafted transformers model in some layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from mcore_spec import ConfigError, UnsupportedError, convert, fit_start
from mcore_spec.config import eagle_preset
from mcore_spec.conversion import Mode
from mcore_spec.data.document import Document
from mcore_spec.hosting import forward
from mcore_spec.huggingface.data import DraftCollator
from tests.tiny import VOCAB_SIZE, draft_to_target, drawn

LENGTHS = (19, 8, 13, 16)
STEPS = 2
LEARNING_RATE = 0.5


def documents() -> list[Document]:
    generator = np.random.RandomState(1)
    return [Document(generator.randint(3, VOCAB_SIZE, size=size), generator.rand(size) < 0.8) for size in LENGTHS]


def train(*, directory: Path, mode: Mode, layout: str, has_d2t: bool = False) -> dict[str, Any]:
    """Two plain steps on the same documents; losses as a Trainer would report them, the base's own on this rank's
    documents, and the draft afterwards."""
    size, rank = dist.get_world_size(), dist.get_rank()
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    convert(model, mode, d2t=draft_to_target() if has_d2t else None)
    child = model.medusa_heads if mode == "medusa" else model.eagle_module
    with torch.no_grad():
        for name, parameter in child.named_parameters():
            parameter.add_(0.5 * drawn(name, tuple(parameter.shape)))
    model.train()
    all_documents = documents()
    # With context parallelism every rank takes part in every document.
    own = all_documents if layout == "cp" else all_documents[rank::size]
    batch = DraftCollator(multiple=2 * size if layout == "cp" else 1)(own)
    count = DraftCollator()(all_documents)["shift_labels"].ne(-100).sum()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    group = mesh["cp"].get_group() if layout == "cp" else None
    wrapped = _wrap(model, layout)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses, lm_losses = [], []
    with mock.patch.object(forward, "context_group", return_value=group):
        for _ in range(STEPS):
            optimizer.zero_grad()
            # Gradients are means over ranks; Trainer scales the loss for that.
            output = _forward(wrapped, batch, count, mesh if layout == "cp" else None)
            lm_losses.append(float(output.lm_loss))
            loss = output.loss * size
            loss.backward()
            optimizer.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(float(total) / size)
    state = {name: _whole(value) for name, value in model.state_dict().items()}
    # Of frozen layers a copy would be compared with itself.
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: value for name, value in state.items() if not (name in frozen and "model.layers" in name)}
    return {"losses": losses, "lm_losses": lm_losses, "state": state}


def joint_refused(*, directory: Path, mode: Mode, layout: str) -> str:
    """What one forward of a layout says that cuts a base which is trained too."""
    try:
        train(directory=directory, mode=mode, layout=layout)
    except UnsupportedError as error:
        return str(error)
    return ""


def start(*, directory: Path) -> dict[str, Any]:
    """A start from data, each rank with its share of the documents: what it was made from, and the weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    convert(model, eagle_preset("eagle3"))
    own = documents()[dist.get_rank() :: dist.get_world_size()]
    made = fit_start(model, [DraftCollator()([document]) for document in own], seed=3)
    return {"made": made, "state": model.eagle_module.state_dict()}


def start_refused(*, directory: Path) -> list[str]:
    """One rank has a batch that is not understood; FSDP."""
    found = []
    for sharded in (False, True):
        model: Any = AutoModelForCausalLM.from_pretrained(directory)
        convert(model, eagle_preset("eagle3"))
        batch = DraftCollator()(documents())
        if sharded:
            model = _wrap(model, "fsdp2")
        elif dist.get_rank() == 1:
            batch["labels"] = batch["labels"] + 1
        try:
            fit_start(model, [batch])
        except (ConfigError, UnsupportedError) as error:
            found.append(str(error))
    return found


def _wrap(model: Any, layout: str) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if layout in ("fsdp2", "cp"):
        # As accelerate shards it; its Accelerator takes FSDP on GPUs only.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=False, device="cpu"
        )
        # The mesh of all processes, of the model's device.
        accelerator.torch_device_mesh = None
        wrapped: nn.Module = fsdp2_prepare_model(accelerator, model)
        assert all(isinstance(parameter, DTensor) for parameter in wrapped.parameters())
        return wrapped
    return model


def _forward(model: nn.Module, batch: dict[str, Tensor], count: Tensor, mesh: Any) -> Any:
    if mesh is None:
        return model(**batch, num_items_in_batch=count)
    inputs = {name: value.clone() for name, value in batch.items()}
    shape = inputs["input_ids"].shape
    inputs["position_ids"] = torch.arange(shape[1]).repeat(shape[0], 1)
    buffers = list(inputs.values())
    # As Trainer and accelerate do it: every tensor is cut in place, and attention of transformers is replaced.
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)):
        assert inputs["input_ids"].shape[1] * mesh.size() == shape[1]
        return model(**inputs, num_items_in_batch=count)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor().detach().clone() if isinstance(value, DTensor) else value.detach().clone()
