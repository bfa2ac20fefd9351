"""Hidden states of the base on disk: what a draft learns from where the base does not run beside it."""

from mcore_spec.data.hidden_states.description import StoreDescription
from mcore_spec.data.hidden_states.states import DocumentStates
from mcore_spec.data.hidden_states.store import StatesStore
from mcore_spec.data.hidden_states.writer import StatesWriter

__all__ = ["DocumentStates", "StatesStore", "StatesWriter", "StoreDescription"]
