"""Files of `torch.save`, read without running what stands in them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch


class UnreadableFile(ValueError):
    """A file that is no torch file, is cut off, or holds other objects than tensors and plain values."""


def read_torch_file(path: Path, *, mmap: bool = False) -> object:
    """What a file holds, on the host.

    Args:
        path: the file.
        mmap: map tensors instead of reading them; what is not looked at is not read.

    Raises:
        UnreadableFile: with the reason in a few words.
        FileNotFoundError: there is none.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise UnreadableFile(reason) from error
