"""HSCR preference generation: what the model would say if it looked less (arXiv 2506.00805, §3)."""
