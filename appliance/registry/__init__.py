"""The registry: which models exist, where their files come from, and what is on this box.

manifest, catalog       what can be had: `models/*.toml` and the site's own folder
roles, naming           what the files of a model are for and where they lie, and what models are called
sources/                how a file is had: https with resume, a local file, a wheel from the package index
gguf_values, gguf_header, ggml_types   whether a model file is sound, before native code sees it
onnx_wire, onnx_header, onnx_operators, onnx_tensors   the same of an ONNX file
onnx_folder, onnx_purpose   which files of a folder make up an ONNX model, and what it is for
blobs                   content-addressed files, partial downloads
versions                the registered models and who holds them
layout                  the files of a model side by side in a folder, as engines look for them
transfer, install, install_onnx, verify   the journeys through all of the above: files in, pull, import, check again
"""
