"""Hugging Face models: config, tokenizer, weights, and which of them move."""
