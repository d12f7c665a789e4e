"""The ground floor: the types, errors, settings and clock that every room may use."""
