"""Compress ONNX models, prove the result, ship exactly those bytes.

Nothing is imported here: a device imports `qcore.device` without numpy or onnx.
"""

__version__ = "0.1.0"
