"""The models to repair that the demo and the samples train: data, backdoor, vision transformer, export."""
