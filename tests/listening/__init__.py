"""Jacobians that are heard in somebody else's backward."""
