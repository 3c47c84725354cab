"""Is it good, is it new: README.md."""
import common                     # first of all: it makes Ctrl-C one line, also while torch loads
