"""What joins kvtier to other projects. Each module imports its project; importing this package imports none."""
