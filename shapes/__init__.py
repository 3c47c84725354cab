"""What stands in for ShapeNet, and what reads it: README.md."""
