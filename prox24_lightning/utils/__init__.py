"""Helpers that every room uses: files, checksums, processes, tables, copies of modules."""
