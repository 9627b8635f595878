"""ONNX graphs in memory (onnx-ir): read, write, walk, and rewrite with reasons. No numerics decisions, no runtime."""
