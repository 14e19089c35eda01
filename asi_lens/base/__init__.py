"""What every room stands on: errors, paths, whole files, the cache, ranks."""
