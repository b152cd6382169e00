"""HSCR and its kin: preference alignment that makes medical vision-language models look at the image."""

__version__ = "0.1.0"
