"""The cellar: SQLite databases, their migrations, and nothing that knows what is kept in them."""
