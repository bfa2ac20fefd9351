"""Inference engines as what computes the hidden states of a base: vLLM and TensorRT-LLM."""
