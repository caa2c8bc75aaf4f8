"""The messages of GEM environments, under ROCK's paths."""
