"""Where the bytes of a model file come from. Each source fills a partial file; none decides whether it is right."""
