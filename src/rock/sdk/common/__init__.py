"""ROCK's path of what is shared."""
