"""channelfold: compress ONNX models by working on their channels, build TensorRT engines, prove the result."""

__version__ = "0.8.0"
