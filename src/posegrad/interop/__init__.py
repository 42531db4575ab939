"""Other libraries, as they are: imported by nobody inside, each needs its own package."""
