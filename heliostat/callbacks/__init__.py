"""Callbacks that work in a plain Trainer with anyone's LightningModule."""
