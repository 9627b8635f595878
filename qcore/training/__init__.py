"""Everything that needs torch: ONNX graphs run and trained in it, and their weights written back."""
