"""LightningModules, one file a paper."""
