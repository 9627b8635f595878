"""Packages, evidence and the signed repository: what leaves the pipeline."""
