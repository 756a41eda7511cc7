"""Tests of the sources of objects."""
