"""Teacher signals on disk: captured once, reused by every student. Format: `store`."""
