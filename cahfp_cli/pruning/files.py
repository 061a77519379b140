"""Names of the files in a submodel folder."""

TENSORS = "submodel.safetensors"
INDEX_MAP = "index_map.safetensors"
ONNX = "model.onnx"
REPORT = "report.json"
FILES = (TENSORS, INDEX_MAP, ONNX, REPORT)
