"""The Pareto curve of a search: which results nothing beats in error, size and latency at once, and a page of it."""
