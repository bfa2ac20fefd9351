"""Where a transformers configuration, and so its config.json, says how a draft was attached. Imports nothing."""

from __future__ import annotations

CONFIG_KEY = "mcore_spec"
FORMAT_VERSION = 1
