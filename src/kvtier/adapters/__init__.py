"""What joins kvtier to other projects. Each module imports its project; this package imports none."""
