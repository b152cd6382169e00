"""Preference records as other programs read them, and back."""
