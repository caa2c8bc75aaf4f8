"""Wire protocols of other sandbox services, over the public service interface: docs/adding-a-dialect.md."""
