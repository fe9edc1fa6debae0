"""Objectives over whole responses: preferences, rankings, and the report on a trained scorer.

Importing this package loads no torch."""
