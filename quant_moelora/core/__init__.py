"""Types and Protocols that every part of the library speaks: torch and the standard library only."""
