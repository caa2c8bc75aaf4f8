"""Wire protocols of other systems, over the public service interface."""
