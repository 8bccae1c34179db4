"""Export of trained networks as ONNX files: ``export.export``, ``onnx_file.OnnxFile``."""
