"""A production server for Google's Gemma chat models on vLLM."""

__version__ = "0.1.0"
