"""Quotas: how much each caller may ask for, decided in one step on Redis or on SQLite."""
