"""Tests of the cellar: the database with its one writer, and the migrations."""
