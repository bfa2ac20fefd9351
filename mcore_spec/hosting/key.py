"""Where a transformers configuration, and so its config.json, says what was done to the model. Imports nothing."""

from __future__ import annotations

# How a draft was attached.
CONFIG_KEY = "mcore_spec"
# In it: factors of the learning rate by matrix behind a start from data, which a run that goes on needs.
RATES = "rates"
# In it: fingerprint of what the draft learns from, so that a run does not go on with something else.
DATA = "data"
# By which recipe base and draft were quantised; the scales are among the weights.
QUANTIZATION_KEY = "mcore_spec_quantization"
FORMAT_VERSION = 1
