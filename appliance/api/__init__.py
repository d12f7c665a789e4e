"""The HTTP door: one table of routes drives the server and the OpenAPI document."""
