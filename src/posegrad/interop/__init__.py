"""Other libraries, as they are: imported by nobody inside."""
