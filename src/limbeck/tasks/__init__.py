"""Tasks: how to read a kind of data, feed it to a model, and score the answers."""
