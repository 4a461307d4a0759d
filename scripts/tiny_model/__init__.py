"""The parts of ``scripts/train_tiny_model.py``: corpus, network, checkpoint files, measurement."""
