"""The tables of a recipe, each a strict pydantic model."""
