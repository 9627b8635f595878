"""The error report layer by layer: how far every layer of a quantized model is from the float model, and why."""
