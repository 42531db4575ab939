"""Every way to a gradient under every mode a model may run in: one table, tested and printed."""
