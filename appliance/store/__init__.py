"""The cellar: SQLite databases, their migrations, locks on files, and nothing that knows what is kept in them."""
