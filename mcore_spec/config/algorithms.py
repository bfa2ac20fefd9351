"""The algorithms by name. Imports no torch: the command line lists them in ``--help``."""

from __future__ import annotations

from typing import Literal, NamedTuple

# Forms of an exported draft; each algorithm knows some of them.
ExportFormat = Literal["hf", "speculators", "mimo", "tensorrt-llm", "fasterdecoding"]


class RegisteredAlgorithm(NamedTuple):
    """One line of the registry.

    Attributes:
        target: ``"module:name"`` of its `mcore_spec.conversion.Algorithm`, imported when it is first asked for.
        flags: fields of ``mcore-spec convert`` that it reads besides --algorithm-config; with an algorithm that
            does not read them they are errors.
    """

    target: str
    flags: tuple[str, ...] = ()


ALGORITHMS: dict[str, RegisteredAlgorithm] = {
    "eagle": RegisteredAlgorithm(
        "mcore_spec.algorithms.eagle:EAGLE",
        ("export_eagle_algorithm", "eagle_config", "draft_vocab_cache", "draft_init", "seed"),
    ),
    # Its heads start as the base's head: nothing is drawn, so that a seed would have no effect.
    "medusa": RegisteredAlgorithm(
        "mcore_spec.algorithms.medusa:MEDUSA", ("export_num_medusa_heads", "export_num_medusa_layers")
    ),
}
