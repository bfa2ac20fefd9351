"""The errors that the package raises for its user.

Every message says what is wrong, where (the field and its value, or the file), and the remedy. The
entry points turn each of them into one line on stderr and exit code 2; anything else that escapes is
a fault of ours and keeps its traceback.
"""


class McoreSpecError(Exception):
    """Base of every error that is meant for the user of the package."""


class ConfigError(McoreSpecError):
    """A value that the user gave is wrong: a field, a flag, a file that a field names."""


class CheckpointError(McoreSpecError):
    """Weights on disk are missing, damaged, or not the ones that were asked for."""


class TrainingError(McoreSpecError):
    """A run that cannot go on: its numbers are no numbers any more."""


class EndpointError(McoreSpecError):
    """A server that is not there, or that refuses what it is asked."""


class EvaluationError(McoreSpecError):
    """A draft that changed what its base says: a fault of the decoding, of the layers or of the weights."""


class UnsupportedError(McoreSpecError):
    """A combination that is valid in itself but that this package cannot represent exactly."""
