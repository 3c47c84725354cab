"""Look at it, and take it away: README.md."""
