"""Other methods on the same photos and latents, one file each: README.md."""
import common                     # first of all: it makes Ctrl-C one line, also while torch loads
