"""Conversations to batches: sources, chat template and loss mask, the token store, packing, shifts."""
