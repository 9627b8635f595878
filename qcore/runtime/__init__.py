"""The only importers of onnxruntime: predictions, activations, latency, and the device's self-test."""
