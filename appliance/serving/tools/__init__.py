"""Tool calls: how a model is told of tools, held to their schemas while it calls them, and read.

- `dialects`   how families of models write calls, and which a template means (pure)
- `schemas`    a tool's JSON Schema as a grammar wants it (pure)
- `grammar`    what an answer with tools must look like (pure)
- `reader`     text becomes text and calls, as it comes (pure)
- `messages`   tools, earlier calls and results as a template reads them (pure)
- `offer`      all of it for one request
- `generation` an engine's answer with its calls apart
"""
