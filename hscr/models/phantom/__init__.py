"""The embedded default model: synthetic phantoms, their language, and a tiny LLaVA trained on them."""
