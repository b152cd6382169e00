"""From LLaVA's own checkpoint layout to the Hugging Face hub's: `convert.convert`."""
