"""What a person brings: an image, a question about it and the answer known to be right, as files."""
