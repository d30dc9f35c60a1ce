"""Mathematics only: one value per position, in nats. `objective` does the bookkeeping."""
