"""Training on docked poses of three protein targets against measured binding free energies."""
