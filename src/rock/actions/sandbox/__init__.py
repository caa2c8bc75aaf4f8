"""The messages of sandboxes, under ROCK's paths."""
