"""LightningDataModules for local files, Hugging Face data sets and embedded real data."""
