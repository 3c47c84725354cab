"""Look at it, and take it away: README.md."""
import common                     # first of all: it makes Ctrl-C one line, also while torch loads
