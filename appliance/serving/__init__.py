"""The corridor: a request becomes engine work (chat templates, routing, generation, loaded models)."""
