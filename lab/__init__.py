"""Is it good, is it new: README.md."""
