"""What computes the hidden states of a base from its Hugging Face directory: vLLM, TensorRT-LLM, transformers."""
