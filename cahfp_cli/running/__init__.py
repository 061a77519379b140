"""Running networks: in torch and in ONNX Runtime, for logits, for measures of quality, and against the clock."""
