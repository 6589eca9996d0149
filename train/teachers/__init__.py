"""Frozen teachers: where their networks come from, their features, and the targets made of these (docs/teacher.md)."""
