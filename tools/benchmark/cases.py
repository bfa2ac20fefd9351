"""What is measured: cases, and the inputs that every contender shares.

Imported in three environments: torch and safetensors only, nothing of the package and of no peer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

INPUTS_FILE = "inputs.safetensors"
DRAFT_FILE = "draft.safetensors"
# Default of ModelOpt; speculators takes any.
LOSS_DECAY = 0.9
# Tokens of one exchange: a question, which is not learnt, then an answer, which is.
TURN_TOKENS = 160

_NAME = re.compile(r"t(?P<tokens>\d+)-k(?P<steps>\d+)(-v(?P<vocabulary>\d+))?(-m(?P<share>\d+))?")


class CaseError(ValueError):
    """A case or its inputs cannot be used; the message says which and the remedy."""


class BaseSizes(NamedTuple):
    """The base's `config.json`, as far as work and layer ids are counted from it."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    config: dict[str, Any]

    @classmethod
    def read(cls, base: Path) -> BaseSizes:
        """Sizes of the model in the HF directory `base`, a dense decoder of Llama's kind."""
        config = json.loads((base / "config.json").read_text())
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            vocab_size=config["vocab_size"],
            config=config,
        )

    @property
    def aux_layer_ids(self) -> tuple[int, ...]:
        """Layers whose output the draft reads, 0-based: EAGLE-3's default in this package and in ModelOpt."""
        return tuple(sorted({1, max(0, self.num_layers // 2 - 1), max(0, self.num_layers - 4)}))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of tokens, and how it is trained on.

    Attributes:
        num_tokens: of the one document in the batch.
        num_steps: TTT steps.
        draft_vocab_size: entries of the draft's own head; ``None``: the base's head, frozen.
        mask_percent: share of the tokens that the base should produce.
    """

    num_tokens: int
    num_steps: int
    draft_vocab_size: int | None = None
    mask_percent: int = 100

    @classmethod
    def parse(cls, name: str) -> Case:
        """``t1024-k3``: tokens and steps; ``-v8192``: a draft vocabulary; ``-m60``: percent of tokens in the mask.

        Raises:
            CaseError: another name, or sizes without sense.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise CaseError(f"case {name!r} is not of the form t1024-k3[-v8192][-m60]; write it so")
        case = cls(
            num_tokens=int(match["tokens"]),
            num_steps=int(match["steps"]),
            draft_vocab_size=None if match["vocabulary"] is None else int(match["vocabulary"]),
            mask_percent=100 if match["share"] is None else int(match["share"]),
        )
        if case.num_steps < 1 or case.num_tokens < case.num_steps + 2 or not 1 <= case.mask_percent <= 100:
            raise CaseError(f"case {name!r} has no row to learn from; take more tokens, a step, and 1 to 100 percent")
        return case

    @property
    def name(self) -> str:
        """What `parse` reads."""
        vocabulary = "" if self.draft_vocab_size is None else f"-v{self.draft_vocab_size}"
        share = "" if self.mask_percent == 100 else f"-m{self.mask_percent}"
        return f"t{self.num_tokens}-k{self.num_steps}{vocabulary}{share}"

    def loss_mask(self) -> Tensor:
        """bool [n]: the tokens of the answers; each turn ends with its answer."""
        question = TURN_TOKENS * (100 - self.mask_percent) // 100
        return torch.arange(self.num_tokens) % TURN_TOKENS >= question

    def counted_rows(self) -> list[Tensor]:
        """bool [n] a step: rows in the loss (algorithms: m[t+1] and m[t+2+k], t+2+k inside the document)."""
        mask, rows = self.loss_mask(), []
        for step in range(self.num_steps):
            counted = torch.zeros(self.num_tokens, dtype=torch.bool)
            num_rows = self.num_tokens - 2 - step
            counted[:num_rows] = mask[1 : 1 + num_rows] & mask[2 + step :]
            rows.append(counted)
        return rows


class Inputs(NamedTuple):
    """What a contender is given.

    Attributes:
        token_ids: int64 [n].
        loss_mask: bool [n], true where the base should produce the token.
        target_ids: int64 [v] ascending, base ids of the draft vocabulary; ``None``: it is the base's.
        draft: the draft's weights under engines' names (`layers.0.` for the one layer), without a head.
    """

    token_ids: Tensor
    loss_mask: Tensor
    target_ids: Tensor | None
    draft: dict[str, Tensor]

    @classmethod
    def read(cls, work_dir: Path, case: Case) -> Inputs:
        """The inputs of `case` from what `prepare` wrote.

        Raises:
            CaseError: `prepare` has not run for this case.
        """
        tensors = load_file(work_dir / INPUTS_FILE)
        size = case.draft_vocab_size
        key = target_ids_key(size)
        if tensors["token_ids"].shape[0] < case.num_tokens or (size is not None and key not in tensors):
            raise CaseError(f"{work_dir / INPUTS_FILE} does not cover case {case.name}; run prepare with it")
        return cls(
            token_ids=tensors["token_ids"][: case.num_tokens],
            loss_mask=case.loss_mask(),
            target_ids=None if size is None else tensors[key],
            draft=load_file(work_dir / DRAFT_FILE),
        )

    @property
    def draft_to_target(self) -> Tensor | None:
        """int64 [v]: base id minus draft id."""
        return None if self.target_ids is None else self.target_ids - torch.arange(self.target_ids.shape[0])


def target_ids_key(draft_vocab_size: int | None) -> str:
    """Name of a draft vocabulary in the inputs file."""
    return f"target_ids_{draft_vocab_size}"
