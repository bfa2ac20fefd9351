"""Distributed checkpoints in Megatron-LM's layout, with the conversion recorded beside the weights."""
