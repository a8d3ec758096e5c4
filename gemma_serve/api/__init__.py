"""Routes and wire schemas."""
