"""What the package does, on data that anybody can get; each module is run as `python -m samples.<name>`."""
