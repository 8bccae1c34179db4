"""Trained networks as ONNX files.

- `export`: `export`, `check_parity`: write files and compare them with PyTorch.
- `onnx_file`: `OnnxFile`, `graph_of`: the graph from 8-bit images on.
"""
