"""Placeholder until the public API is assembled."""
