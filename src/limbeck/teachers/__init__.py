"""Teachers: a live model, a store of what one said. Training does not know which it has."""
