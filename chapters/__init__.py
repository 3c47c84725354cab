"""Other methods on the same photos and latents, one file each: README.md."""
