"""The registry: which models exist, where their files come from, and what is on this box.

manifest, catalog       what can be had: `models/*.toml` and the site's own folder
sources/                how a file is had: https with resume, a local file, a wheel from the package index
gguf_values, gguf_header, ggml_types   whether a model file is sound, before native code sees it
blobs                   content-addressed files, partial downloads
versions                the registered models and who holds them
transfer, install, verify   the journeys through all of the above: one file in, pull and import, check again
"""
