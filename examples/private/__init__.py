"""Private training on handwritten digits, beside Opacus."""
