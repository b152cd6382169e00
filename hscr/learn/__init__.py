"""Training a LoRA adapter from preference records (arXiv 2506.00805, §3.3)."""
