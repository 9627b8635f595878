"""One file per compression method: its options and one function from model to `Rewrite`."""
