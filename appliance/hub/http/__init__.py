"""The operators' HTTP door of the hub: one table of routes drives the server and the OpenAPI document."""
