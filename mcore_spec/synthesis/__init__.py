"""Answers of a base model to prompts: what its draft learns from."""
