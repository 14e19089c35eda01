"""Foundations that every room uses: errors, paths, atomic file writes, the cache, ranks."""
