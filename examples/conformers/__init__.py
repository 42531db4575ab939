"""Conformer ensembles of real molecules against measured pIC50 values."""
