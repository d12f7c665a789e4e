"""What the HTTP doors of the box and of the hub have in common: connections, limits, errors, keys, tables of routes."""
