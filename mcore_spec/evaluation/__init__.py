"""Speculative decoding with key/value caches, and how well it went."""
