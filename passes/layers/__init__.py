"""Linear layers, affine maps, weight formats and quantization errors."""
